# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What cannot go through is refused before the first phase has begun."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import (
    accuracy,
    collate,
    collate_text,
    instructions,
    task,
    tiny_llama,
    tiny_model,
    tiny_text_trainer,
    tiny_trainer,
    weights,
    with_adapters,
)
from transformers import EarlyStoppingCallback, TrainerCallback

from transformers_cee import ConsistentEETrainer
from transformers_cee.training.model_phase import ModelPhaseTrainer
from transformers_cee.training.rewards import REWARDS


EVALUATES = {"eval_strategy": "epoch"}
OWN_REWARDS = {
    "two_exits": lambda step: -step.losses[:, :2],
    "squared_price": lambda step: -step.losses - step.alpha**2 * step.layers,
    "no_number": lambda step: step.losses * float("nan"),
}


@pytest.fixture(autouse=True)
def own_rewards(monkeypatch):
    for name, reward in OWN_REWARDS.items():
        monkeypatch.setitem(REWARDS, name, reward)


def adapted(model, task_type, **fields):
    """The model in PEFT's own adapter, with nothing about exits in its config."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        target = ["query", "value"] if task_type == "SEQ_CLS" else ["q_proj", "v_proj"]
        return get_peft_model(model, LoraConfig(task_type=task_type, r=2, target_modules=target, **fields))


def numbers(rows: int, seed: int, wrong: float | None = None):
    data = task(rows, seed=seed)
    labels = [float(label) for label in data["labels"]]
    if wrong is not None:
        labels[2] = wrong
    return data.remove_columns("labels").add_column("labels", labels)


def regression(**fields):
    return tiny_model(num_hidden_layers=4, num_labels=1, **fields)


def text(folder, **options):
    return tiny_text_trainer(folder, options.pop("model", None), **options)


def encoder(folder, **options):
    return tiny_trainer(folder, options.pop("model", None), **{"rows": 16, **options})


# Name, what makes the trainer, and what the message says.
REFUSED = {
    "one exit": (
        lambda folder: encoder(folder, model=tiny_model(num_hidden_layers=4, exit_layers=[4])),
        r"`exit_layers`=\[4\] and `min_exit_layer`=None leave the last layer as the only exit",
    ),
    "one exit of a decoder": (
        lambda folder: text(folder, model=tiny_llama(exit_layers=[4])),
        r"`exit_layers`=\[4\] and `min_exit_layer`=None leave the last layer as the only exit",
    ),
    "one exit to leave at": (
        lambda folder: encoder(folder, model=tiny_model(num_hidden_layers=4, min_exit_layer=4)),
        r"`exit_layers`=None and `min_exit_layer`=4 leave the last layer as the only exit",
    ),
    "confidence in regression": (
        lambda folder: encoder(
            folder,
            model=regression(policy_inputs="confidence"),
            trainer={
                "train_dataset": numbers(16, 1),
                "eval_dataset": numbers(8, 2),
                "compute_metrics": None,
            },
        ),
        r"`policy_inputs`='confidence'.*'regression' has no class probabilities; accepted are 'state'",
    ),
    "a plain adapter": (
        lambda folder: encoder(folder, model=adapted(tiny_model(num_hidden_layers=4), "SEQ_CLS")),
        r"policies are frozen.*`modules_to_save`.*`exit_lora_config`",
    ),
    "a plain adapter of a decoder": (
        lambda folder: text(folder, model=adapted(tiny_llama(), "CAUSAL_LM")),
        r"policies are frozen.*`modules_to_save`.*`exit_lora_config`",
    ),
    "an adapter without policies": (
        lambda folder: text(folder, model=with_adapters(tiny_llama(), modules_to_save=["exit_norms"])),
        r"policies are frozen.*`modules_to_save`",
    ),
    "metrics in a list": (
        lambda folder: encoder(folder, trainer={"compute_metrics": lambda _: [0.5]}, **EVALUATES),
        r"`compute_metrics` gave list \[0.5\]; accepted is a dictionary of numbers",
    ),
    "metrics that are no numbers": (
        lambda folder: encoder(folder, trainer={"compute_metrics": lambda _: {"by_class": [0.5, 0.1]}}, **EVALUATES),
        r"`compute_metrics` gave list \[0.5, 0.1\] for 'by_class'; accepted are numbers",
    ),
    "metrics that fail": (
        lambda folder: encoder(folder, trainer={"compute_metrics": lambda p: {"x": p.nothing}}, **EVALUATES),
        r"has no attribute 'nothing'",
    ),
    "an evaluation set without numbers": (
        lambda folder: encoder(folder, trainer={"eval_dataset": task(8, seed=2).to_iterable_dataset()}, **EVALUATES),
        r"`eval_dataset` of type IterableDataset must have a length and rows by number",
    ),
    "one of several sets without numbers": (
        lambda folder: encoder(
            folder,
            trainer={"eval_dataset": {"one": task(8, seed=2), "two": task(8, seed=2).to_iterable_dataset()}},
            **EVALUATES,
        ),
        r"`eval_dataset\['two'\]` of type IterableDataset must have",
    ),
    "budgets of a set without numbers": (
        lambda folder: encoder(
            folder,
            model=tiny_model(num_hidden_layers=4, policy_condition="film"),
            trainer={"eval_dataset": task(8, seed=2).to_iterable_dataset()},
        ),
        r"`eval_dataset` of type IterableDataset must have",
    ),
    "an empty evaluation set": (
        lambda folder: encoder(folder, trainer={"eval_dataset": task(1, seed=2).select([])}, **EVALUATES),
        r"`eval_dataset` is empty",
    ),
    "an empty training set": (
        lambda folder: encoder(folder, trainer={"train_dataset": task(1, seed=2).select([])}),
        r"`train_dataset` is empty",
    ),
    "dropped training rows": (
        lambda folder: encoder(folder, rows=7, dataloader_drop_last=True),
        r"`dataloader_drop_last`=True leaves no batch: 7 rows do not fill one of 8",
    ),
    "dropped evaluation rows": (
        lambda folder: encoder(
            folder, trainer={"eval_dataset": task(7, seed=2)}, dataloader_drop_last=True, **EVALUATES
        ),
        r"`dataloader_drop_last`=True leaves no batch of `eval_dataset`: 7 rows do not fill one of 8",
    ),
    "nothing but held out rows": (
        lambda folder: encoder(folder, rows=3, policy_holdout=0.9),
        r"`policy_holdout`=0.9 leaves no row of 3 for the heads",
    ),
    "an unknown best metric": (
        lambda folder: encoder(folder, metric_for_best_model="acuracy", **EVALUATES),
        r"`metric_for_best_model`='acuracy' is none of the metrics: accepted are .*accuracy, .*depth",
    ),
    "the best metric of several sets": (
        lambda folder: encoder(
            folder,
            metric_for_best_model="accuracy",
            trainer={"eval_dataset": {"one": task(8, seed=2)}},
            **EVALUATES,
        ),
        r"`metric_for_best_model`='accuracy' is none of the metrics: accepted are .*one_accuracy",
    ),
    "stopping without evaluation": (
        lambda folder: encoder(folder, trainer={"callbacks": [EarlyStoppingCallback()]}),
        r"`EarlyStoppingCallback` needs evaluations: `eval_strategy`='no'",
    ),
    "stopping without a metric": (
        lambda folder: encoder(folder, trainer={"callbacks": [EarlyStoppingCallback()]}, **EVALUATES),
        r"`EarlyStoppingCallback` needs `metric_for_best_model`",
    ),
    "a reward of another shape": (
        lambda folder: encoder(folder, reward="two_exits"),
        r"`reward`='two_exits' gave shape \(3, 2\), needed a tensor of \(3, 4\)",
    ),
    "a reward that conditioned policies cannot have": (
        lambda folder: encoder(
            folder,
            model=tiny_model(num_hidden_layers=4, policy_condition="film"),
            reward="squared_price",
        ),
        r"`reward`='squared_price' is not linear in `alpha`.*`policy_condition`='none'",
    ),
    "no token that may leave": (
        lambda folder: text(
            folder,
            trainer={"train_dataset": [{"input_ids": [5, 6], "attention_mask": [1, 1], "labels": [-100, 6]}] * 8},
        ),
        r"`train_dataset` has no token that may leave early",
    ),
    "rows without labels": (
        lambda folder: encoder(
            folder, trainer={"data_collator": lambda rows: {"input_ids": collate(rows)["input_ids"]}}
        ),
        r"no `labels`; got \['input_ids'\]",
    ),
    "evaluation rows of another kind": (
        lambda folder: encoder(
            folder, trainer={"eval_dataset": task(8, seed=2).map(lambda _: {"labels": 9})}, **EVALUATES
        ),
        r"`labels` must lie in 0..2",
    ),
    "evaluation at a criterion that is not fitted": (
        lambda folder: encoder(
            folder,
            model=tiny_model(num_hidden_layers=4, exit_criterion="consistency"),
            phases=["heads", "hardness", "policy", "consistent"],
            **EVALUATES,
        ),
        r"consistency",
    ),
    "an infinite target": (
        lambda folder: encoder(
            folder,
            model=regression(),
            trainer={"train_dataset": numbers(16, 1, float("inf")), "compute_metrics": None},
        ),
        r"`train_dataset` row 2, column 'labels': the label inf is not a finite number",
    ),
    "a target above float32": (
        lambda folder: encoder(
            folder, model=regression(), trainer={"train_dataset": numbers(16, 1, 1e39), "compute_metrics": None}
        ),
        r"row 2, column 'labels': the label 1e\+39 is not a finite number in float32",
    ),
    "a target of evaluation that is no number": (
        lambda folder: encoder(
            folder,
            model=regression(),
            trainer={
                "train_dataset": numbers(16, 1),
                "eval_dataset": numbers(8, 2, float("nan")),
                "compute_metrics": None,
            },
        ),
        r"`eval_dataset` row 2, column 'labels': the label nan",
    ),
    "arguments changed to what is not accepted": (
        lambda folder: changed_arguments(encoder(folder)),
        r"`reward_loss`='unheard' is unknown",
    ),
    "nothing to train": (
        lambda folder: text(folder, model=tiny_llama(exit_head="shared"), trainable="exits"),
        r"`trainable`='exits' leaves nothing to train",
    ),
}


def changed_arguments(trainer):
    trainer.args.reward_loss = "unheard"
    return trainer


class Begun(Exception):
    pass


class TestBeforeTheFirstPhase:
    @pytest.mark.parametrize("name", REFUSED)
    def test_refused(self, tmp_path, monkeypatch, name):
        make, message = REFUSED[name]
        trainer = make(tmp_path)
        before, told = weights(trainer.model), []

        def begin(*args, **kwargs):
            raise Begun

        class Listener(TrainerCallback):
            def __getattribute__(self, event):
                return (
                    (lambda *args, **kwargs: told.append(event))
                    if event.startswith("on_")
                    else super().__getattribute__(event)
                )

        trainer.add_callback(Listener())
        for phase in ("_heads", "_consistent_model"):
            monkeypatch.setattr(ConsistentEETrainer, phase, begin)
        for step in ("hardness_step", "policy_step"):
            monkeypatch.setattr(f"transformers_cee.training.trainer.{step}", begin)
        with pytest.raises((ValueError, TypeError, AttributeError), match=message):
            trainer.train()
        assert not list(tmp_path.iterdir()) and not told
        assert all(torch.equal(value, trainer.model.state_dict()[key]) for key, value in before.items())

    @pytest.mark.parametrize(
        "name,method",
        [
            ("one exit", "train_policy"),
            ("one exit", "train_consistent"),
            ("a plain adapter", "train_policy"),
            ("confidence in regression", "compute_hardness"),
            ("metrics in a list", "train_heads"),
            ("dropped training rows", "train_heads"),
            ("dropped training rows", "train_consistent"),
            ("an infinite target", "train_heads"),
            ("an infinite target", "compute_hardness"),
            ("no token that may leave", "train_policy"),
        ],
    )
    def test_phases_alone(self, tmp_path, name, method):
        make, message = REFUSED[name]
        with pytest.raises((ValueError, TypeError), match=message):
            getattr(make(tmp_path), method)()
        assert not list(tmp_path.iterdir())

    def test_policies_by_alpha(self, tmp_path):
        make, message = REFUSED["one exit"]
        with pytest.raises(ValueError, match=message):
            make(tmp_path).train_policies_at([0.1])

    def test_scripts_can_ask(self, tmp_path):
        make, message = REFUSED["one exit"]
        trainer = make(tmp_path)
        with pytest.raises(ValueError, match=message):
            trainer.check_phases()
        trainer.check_phases(["heads"])


class TestWhatGoesThrough:
    """What the checks must not refuse, and what they leave as it was."""

    def test_phases_that_need_less(self, tmp_path):
        """The same faults are none where nothing stumbles over them."""
        options = {"phases": ["heads"]}
        encoder(tmp_path / "a", model=tiny_model(num_hidden_layers=4, exit_layers=[4]), **options).train()
        rows = {"eval_dataset": task(8, seed=2).to_iterable_dataset()}
        encoder(tmp_path / "b", trainer=rows, **options, **EVALUATES).train()
        text(tmp_path / "c", model=with_adapters(tiny_llama(), modules_to_save=["exit_norms"]), **options).train()
        short = {"policy_batch_size": 64, "dataloader_drop_last": True}
        assert encoder(tmp_path / "d", phases=["policy"], **short).train().global_step == 2, "no entry is dropped"

    def test_metrics_that_need_all_rows(self, tmp_path):
        def metrics(prediction):
            if len(prediction.label_ids) < 24:
                raise ValueError("Only one class present")
            return accuracy(prediction)

        trainer = encoder(
            tmp_path, trainer={"compute_metrics": metrics}, metric_for_best_model="accuracy", **EVALUATES
        )
        trainer.check_phases()

    def test_metrics_that_only_all_rows_have(self, tmp_path):
        def metrics(prediction):
            return accuracy(prediction) if len(prediction.label_ids) == 24 else {}

        best = {"metric_for_best_model": "accuracy"}
        encoder(tmp_path, trainer={"compute_metrics": metrics}, **best, **EVALUATES).check_phases()

    def test_metrics_of_subclasses_and_callbacks(self, tmp_path):
        class Own(ConsistentEETrainer):
            def evaluate(self, *args, **kwargs):
                return {**super().evaluate(*args, **kwargs), "eval_own": 1.0}

        class Phase(ModelPhaseTrainer):
            def evaluate(self, *args, **kwargs):
                return {**super().evaluate(*args, **kwargs), "eval_own": 1.0}

        class OfPhases(ConsistentEETrainer):
            phase_trainer = Phase

        class Adds(TrainerCallback):
            def on_evaluate(self, args, state, control, metrics, **kwargs):
                metrics["eval_own"] = 1.0

        for kind, callbacks in ((Own, []), (OfPhases, []), (ConsistentEETrainer, [Adds()])):
            given = encoder(tmp_path, metric_for_best_model="own", phases=["heads"], **EVALUATES)
            data = {"train_dataset": given.train_dataset, "eval_dataset": given.eval_dataset, "data_collator": collate}
            kind(given.model, given.args, callbacks=callbacks, **data).train()

    def test_adapters_without_exits_are_said(self, tmp_path, caplog):
        """They may be left alone on purpose."""
        logger = logging.getLogger("transformers_cee")
        logger.addHandler(caplog.handler)
        try:
            for own, said in ((["exit_policies"], True), (["exit_policies", "exit_norms"], False)):
                caplog.clear()
                model = with_adapters(tiny_llama(), modules_to_save=own)
                text(tmp_path, model=model, phases=["heads"]).check_phases()
                messages = [record.getMessage() for record in caplog.records]
                assert any("`exit_lora_config`" in message for message in messages) == said
        finally:
            logger.removeHandler(caplog.handler)

    def test_numbers_of_any_library(self, tmp_path):
        import numpy as np

        trainer = encoder(
            tmp_path,
            trainer={"compute_metrics": lambda _: {"a": np.float32(1), "b": torch.tensor(2.0), "c": 3, "d": True}},
            **EVALUATES,
        )
        trainer.train()

    @pytest.mark.parametrize("kind", [encoder, text])
    def test_nothing_is_left_behind(self, tmp_path, kind):
        """Random numbers, modes, problem type and figures are as they were."""
        trainer = kind(tmp_path, **EVALUATES)
        told = list(trainer.callback_handler.callbacks)
        trainer.model.train()
        torch.manual_seed(3)
        expected, before = torch.rand(3), weights(trainer.model)
        torch.manual_seed(3)
        trainer.check_phases()
        assert torch.equal(torch.rand(3), expected)
        assert trainer.model.training and trainer.callback_handler.callbacks == told
        assert trainer.model.config.to_dict().get("problem_type") is None and trainer.is_in_train is False
        assert trainer.state.log_history == [] and not list(tmp_path.iterdir())
        assert not trainer.accelerator._models and "_is_accelerate_prepared" not in vars(trainer.model)
        assert all(torch.equal(value, trainer.model.state_dict()[key]) for key, value in before.items())

    def test_later_evaluations_take_all_rows(self, tmp_path):
        """Workers that are kept go through the whole set."""
        workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "per_device_eval_batch_size": 4}
        trainer = encoder(tmp_path, eval_exit_thresholds=[], **workers, **EVALUATES)
        trainer.check_phases()
        trainer.evaluate()
        assert sum(trainer.operating_points["eval"][0].exit_histogram.values()) == 24


class TestArguments:
    def test_other_labels(self, tmp_path):
        for names in (["label"], ["labels", "weights"], []):
            with pytest.raises(ValueError, match=r"`label_names`=.* must be \['labels'\] or None"):
                encoder(tmp_path, label_names=names)
        encoder(tmp_path, label_names=["labels"], phases=["heads"]).train()

    def test_text_that_has_no_labels(self, tmp_path):
        """Plain text of a decoder is its own label."""
        rows = {"train_dataset": instructions(8, seed=1, plain=True), "data_collator": collate_text}
        text(tmp_path, trainer=rows).check_phases()


class TestNumbers:
    """Labels of data sets that are made when they are asked for, and losses."""

    @pytest.mark.parametrize("wrong", [float("inf"), float("nan"), 1e39])
    def test_rows_of_a_list(self, tmp_path, wrong):
        rows = [{**row, "labels": float(row["labels"])} for row in task(16, seed=1)]
        rows[13]["labels"] = wrong
        data = {"train_dataset": rows, "eval_dataset": numbers(8, 2), "compute_metrics": None}
        trainer = encoder(tmp_path, model=regression(), trainer=data, train_sampling_strategy="sequential")
        before = weights(trainer.model)
        with pytest.raises(
            ValueError, match=r"`labels` of row 5 of a batch of 8: the label .* is not a finite number"
        ):
            trainer.train()
        assert all(value.isfinite().all() for value in trainer.model.state_dict().values())
        assert trainer.state.global_step <= 1 and before

    def test_many_labels(self, tmp_path):
        data = task(16, seed=1)
        labels = [[0.0, 1.0] for _ in range(16)]
        labels[4][1] = float("nan")
        data = data.remove_columns("labels").add_column("labels", labels)
        model = tiny_model(num_hidden_layers=4, num_labels=2, problem_type="multi_label_classification")
        with pytest.raises(ValueError, match=r"`train_dataset` row 4, column 'labels': the label nan"):
            encoder(tmp_path, model=model, trainer={"train_dataset": data, "compute_metrics": None}).train()

    def test_a_loss_that_is_no_number(self, tmp_path):
        """Targets that are finite, and whose squares are not: the weights stay as they were."""
        data = {
            "train_dataset": numbers(16, 1).map(lambda _: {"labels": 1e30}),
            "eval_dataset": numbers(8, 2),
            "compute_metrics": None,
        }
        trainer = encoder(tmp_path, model=regression(), trainer=data)
        before = weights(trainer.model)
        with pytest.raises(ValueError, match=r"The loss of step 1 in .*heads is inf"):
            trainer.train()
        assert all(torch.equal(value, trainer.model.state_dict()[key]) for key, value in before.items())

    def test_policies(self, tmp_path):
        trainer = encoder(tmp_path, reward="no_number")
        with pytest.raises(ValueError, match=r"The loss of step 1 in .*policy is nan"):
            trainer.train_policy()
