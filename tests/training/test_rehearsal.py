# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Rows of each data set are looked at as phases will, before any of them has begun."""

from __future__ import annotations

import pytest
from datasets import Dataset
from tiny import accuracy, collate, instructions, task, tiny_llama, tiny_model, tiny_text_trainer, tiny_trainer


EVALUATES = {"eval_strategy": "epoch"}


def film(**fields):
    return tiny_model(num_hidden_layers=4, policy_condition="film", **fields)


def collate_any(rows):
    """`collate`, of rows that may come without labels."""
    batch = collate([{"labels": 0, **row} for row in rows])
    return batch if "labels" in rows[0] else {name: value for name, value in batch.items() if name != "labels"}


def unlabelled(rows: int = 24):
    return task(rows, seed=2).remove_columns("labels")


def answers(rows: int, counted: int) -> Dataset:
    """Text with a number of tokens that count, at its end."""
    ids = [5, 6, 7, 8]
    labels = [-100] * (len(ids) - counted) + ids[len(ids) - counted :]
    columns = {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
    return Dataset.from_dict({name: [value] * rows for name, value in columns.items()})


def refused(trainer, folder, message: str, error: type[Exception] = ValueError):
    with pytest.raises(error, match=message):
        trainer.train()
    assert not list(folder.iterdir()) and trainer.state.global_step == 0


class TestEvaluationRows:
    def test_without_labels(self, tmp_path):
        """They would stop the first evaluation, after an epoch."""
        data = {"eval_dataset": unlabelled(), "data_collator": collate_any, "compute_metrics": None}
        refused(tiny_trainer(tmp_path, trainer=data, **EVALUATES), tmp_path, "no `labels`")

    @pytest.mark.parametrize("phases", [["heads"], ["policy"]])
    def test_that_cannot_be_stored(self, tmp_path, phases):
        """Budgets come at the end of a run, whatever its phases."""
        for rows, message in (
            (task(24, seed=2).to_iterable_dataset(), "`eval_dataset` of type IterableDataset must have a length"),
            (task(1, seed=2).select([]), "`eval_dataset` is empty"),
        ):
            for options in ({}, EVALUATES):
                data = {"eval_dataset": rows}
                trainer = tiny_trainer(tmp_path, film(), phases=phases, trainer=data, **options)
                refused(trainer, tmp_path, message)

    def test_heads_alone_store_nothing(self, tmp_path):
        trainer = tiny_trainer(tmp_path, film(), trainer={"eval_dataset": task(8, seed=2).to_iterable_dataset()})
        trainer.check_phases(["heads"])
        with pytest.raises(ValueError, match="must have a length"):
            trainer.check_phases()

    def test_that_the_model_does_not_take(self, tmp_path):
        rows = unlabelled(8).map(lambda row: {"input_ids": [10_000] * len(row["input_ids"])})
        trainer = tiny_trainer(tmp_path, film(), trainer={"eval_dataset": rows, "data_collator": collate_any})
        refused(trainer, tmp_path, ".", Exception)


class TestBudgets:
    """Labels are not looked at where nothing is judged."""

    def test_without_labels(self, tmp_path):
        budgets = []
        for rows in (task(24, seed=2), unlabelled(), task(24, seed=2).map(lambda _: {"labels": -1})):
            trainer = tiny_trainer(
                tmp_path, film(), rows=16, trainer={"eval_dataset": rows, "data_collator": collate_any}
            )
            trainer.train()
            budgets.append(trainer.model.config.exit_budgets)
        assert budgets[0] and budgets[0] == budgets[1] == budgets[2]

    def test_of_confidence_in_several_labels(self, tmp_path):
        """What the logits mean is told by the training rows."""

        def many(data):
            labels = [[float(label), 1.0] for label in data["labels"]]
            return data.remove_columns("labels").add_column("labels", labels)

        budgets = []
        for rows in (many(task(24, seed=2)), unlabelled()):
            model = film(num_labels=2, policy_inputs="both")
            data = {"train_dataset": many(task(16, seed=1)), "eval_dataset": rows, "data_collator": collate_any}
            trainer = tiny_trainer(tmp_path, model, trainer={**data, "compute_metrics": None})
            trainer.train()
            budgets.append(trainer.model.config.exit_budgets)
        assert budgets[0] and budgets[0] == budgets[1]

    def test_stored_rows_are_not_taken_for_labelled_ones(self, tmp_path):
        trainer = tiny_trainer(tmp_path, film())
        trainer.fit_exit_budgets()
        store = trainer.collect_exits(trainer.eval_dataset)
        assert store.labels.tolist() == trainer.eval_dataset["labels"]

    def test_stored_rows_of_the_policies_are_taken(self, tmp_path):
        trainer = tiny_trainer(tmp_path, film(), rows=16, phases=["policy"], **EVALUATES)
        trainer.train()
        assert trainer._stores["eval"][1].labels.tolist() == trainer.eval_dataset["labels"]


class TestTokens:
    def test_none_may_leave(self, tmp_path):
        for rows in (answers(6, 1), {"one": instructions(6, seed=2), "two": answers(6, 1)}):
            name = r"`eval_dataset\['two'\]`" if isinstance(rows, dict) else "`eval_dataset`"
            trainer = tiny_text_trainer(tmp_path, trainer={"eval_dataset": rows}, **EVALUATES)
            refused(trainer, tmp_path, f"{name} has no token that may leave early")

    def test_none_is_counted(self, tmp_path):
        model = tiny_llama(policy_condition="film")
        trainer = tiny_text_trainer(tmp_path, model, trainer={"eval_dataset": answers(6, 0)})
        refused(trainer, tmp_path, "`eval_dataset` has no token to predict")

    def test_where_none_has_to_leave(self, tmp_path):
        """The heads are judged by any token, and budgets are left empty."""
        data = {"eval_dataset": answers(6, 1)}
        tiny_text_trainer(tmp_path / "a", trainer=data, phases=["heads"], **EVALUATES).train()
        trainer = tiny_text_trainer(tmp_path / "b", tiny_llama(policy_condition="film"), trainer=data)
        trainer.train()
        assert not trainer.model.config.exit_budgets


class TestPlace:
    """Trainer leaves some models where they are until its own loop begins."""

    @pytest.mark.parametrize("method", ["train", "train_policy", "check_phases", "fit_exit_budgets"])
    def test_half_precision_in_evaluation(self, tmp_path, monkeypatch, method):
        trainer, seen = tiny_trainer(tmp_path, film(), rows=16, bf16_full_eval=True), []
        assert not trainer.place_model_on_device
        move = trainer._move_model_to_device
        monkeypatch.setattr(
            trainer, "_move_model_to_device", lambda *args: (seen.append(("moved", args[1])), move(*args))
        )
        trainer.model.register_forward_pre_hook(lambda *_: seen.append("run"))
        getattr(trainer, method)()
        assert seen[0] == ("moved", trainer.args.device) and "run" in seen

    def test_split_models_are_not_run(self, tmp_path, monkeypatch):
        """Their batches are made and looked at all the same."""
        seen = []
        for rows in (task(8, seed=2), task(8, seed=2).to_iterable_dataset(), unlabelled(8)):
            data = {"eval_dataset": rows, "data_collator": collate_any}
            trainer = tiny_trainer(tmp_path, phases=["heads"], trainer=data, **EVALUATES)
            trainer.is_fsdp_enabled, trainer.place_model_on_device = True, False
            monkeypatch.setattr(trainer, "_move_model_to_device", lambda *_: seen.append("moved"))
            trainer.model.register_forward_pre_hook(lambda *_: seen.append("run"))
            if "labels" in next(iter(rows)):
                trainer.check_phases()
            else:
                with pytest.raises(ValueError, match="no `labels`"):
                    trainer.check_phases()
        assert not seen


class TestRows:
    """How many rows are run, and which."""

    def test_a_batch_of_a_process(self, tmp_path, monkeypatch):
        """Every process runs the first training rows, and its part of those of evaluation."""
        trainer, sizes = tiny_trainer(tmp_path, phases=["heads"]), []
        monkeypatch.setattr(type(trainer.args), "world_size", property(lambda _: 3))
        trainer.model.register_forward_pre_hook(
            lambda _, args, inputs: sizes.append(len(inputs["input_ids"])), with_kwargs=True
        )
        trainer.check_phases()
        assert sizes == [8]

    def test_metrics_of_rows_that_are_sorted(self, tmp_path):
        """Some rows are enough where they are of several classes."""
        sizes = []

        def metrics(prediction):
            sizes.append(len(prediction.label_ids))
            if len({*prediction.label_ids.tolist()}) < 2:
                raise ValueError("Only one class present")
            return accuracy(prediction)

        data = {"eval_dataset": task(200, seed=2).sort("labels"), "compute_metrics": metrics}
        options = {"phases": ["heads", "policy", "consistent"], "heads_objective": "two_stage", **EVALUATES}
        tiny_trainer(tmp_path, trainer=data, metric_for_best_model="accuracy", **options).check_phases()
        assert sizes == [8, 8, 8]

    @pytest.mark.parametrize("fails", [True, False])
    def test_all_rows_are_run_once(self, tmp_path, fails):
        sizes = []

        def metrics(prediction):
            sizes.append(len(prediction.label_ids))
            if len(prediction.label_ids) == 24:
                return accuracy(prediction)
            if fails:
                raise ValueError("Too few rows")
            return {}

        options = {"phases": ["heads", "policy", "consistent"], "heads_objective": "two_stage", **EVALUATES}
        trainer = tiny_trainer(
            tmp_path, trainer={"compute_metrics": metrics}, metric_for_best_model="accuracy", **options
        )
        trainer.check_phases()
        assert sizes.count(24) == 1 and len(sizes) > 3
