# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What people who know 🤗 Trainer do with one, done with ours."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest
import torch
from tiny import (
    changed,
    collate,
    instructions,
    task,
    tiny_llama,
    tiny_model,
    tiny_text_trainer,
    tiny_trainer,
    training_arguments,
    weights,
)
from torch.nn import functional as F
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback
from transformers.trainer_utils import HPSearchBackend, TrainOutput

from transformers_cee import ConsistentEETrainer
from transformers_cee.evaluation.exit_budget import fit_exit_budgets


STEPS = ["heads", "hardness", "policy", "consistent-1-model", "consistent-1-policy"]
MAKERS = {"encoder": tiny_trainer, "decoder": tiny_text_trainer}


class Watch(TrainerCallback):
    """Keeps the folders of the phases that it saw begin, and the metrics of evaluations."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.metrics: list[tuple[str, dict]] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.phases.append(os.path.basename(args.output_dir))

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.metrics.append((os.path.basename(args.output_dir), metrics))


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@pytest.mark.parametrize("kind", MAKERS)
class TestFigures:
    def test_evaluation(self, tmp_path, kind, capsys):
        trainer = MAKERS[kind](tmp_path, eval_timing_rows=8)
        metrics = trainer.evaluate()
        assert all(map(is_number, metrics.values())), "as log_metrics, trackers and searches take them"
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
        assert "eval_depth" in capsys.readouterr().out
        assert json.loads((tmp_path / "eval_results.json").read_text()) == metrics
        own = trainer.operating_points["eval"][0]
        assert own.depth == metrics["eval_depth"] and own.to_dict()["exit_histogram"]

    def test_training(self, tmp_path, kind):
        trainer = MAKERS[kind](tmp_path, rows=16, logging_strategy="epoch")
        output = trainer.train()
        assert isinstance(output, TrainOutput) and list(output.phases) == STEPS
        trained = [output.phases[step] for step in STEPS if step != "hardness"]
        assert output.global_step == sum(one.global_step for one in trained)
        assert output.training_loss == output.phases["consistent-1-model"].training_loss
        assert output.metrics["train_loss"] == output.training_loss
        assert output.metrics["policy_train_loss"] == output.phases["policy"].training_loss
        assert output.metrics["train_runtime"] >= sum(one.metrics["train_runtime"] for one in trained) - 0.01
        assert all(map(is_number, output.metrics.values()))
        trainer.log_metrics("train", output.metrics)
        trainer.save_metrics("train", output.metrics)
        trainer.save_state()
        history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
        assert list(dict.fromkeys(entry["phase"] for entry in history)) == STEPS
        assert {entry["phase"] for entry in history if "loss" in entry} == set(STEPS) - {"hardness"}

    def test_only_policies(self, tmp_path, kind):
        output = MAKERS[kind](tmp_path, rows=16, phases=["hardness", "policy"]).train()
        assert output.training_loss == output.phases["policy"].training_loss
        alone = MAKERS[kind](tmp_path / "alone", rows=16, phases=["hardness"]).train()
        assert alone.global_step == 0 and "train_loss" not in alone.metrics

    def test_batches_that_are_not_joined(self, tmp_path, kind):
        seen = []

        def metrics(prediction):
            seen.append((prediction.predictions, prediction.label_ids))
            return {}

        joined, apart = (
            MAKERS[kind](
                tmp_path,
                per_device_eval_batch_size=5,
                eval_do_concat_batches=whole,
                eval_exit_thresholds=[0.5],
                eval_strategy="epoch",
                rows=8,
                trainer={"compute_metrics": metrics},
            )
            for whole in (True, False)
        )
        figures = [
            {name: value for name, value in one.evaluate().items() if "second" not in name and "time" not in name}
            for one in (joined, apart)
        ]
        assert figures[0] == pytest.approx(figures[1])
        assert [one.depth for one in joined.operating_points["eval"]] == [
            one.depth for one in apart.operating_points["eval"]
        ]
        whole, parts = joined.predict(joined.eval_dataset), apart.predict(apart.eval_dataset)
        assert [len(one) for one in parts.predictions] == [5] * (len(apart.eval_dataset) // 5) + [
            len(apart.eval_dataset) % 5
        ]
        if kind == "encoder":
            torch.testing.assert_close(
                torch.cat(list(map(torch.as_tensor, parts.predictions))), torch.as_tensor(whole.predictions)
            )
        assert isinstance(seen[-1][0], list) and len(seen[-1][0]) == len(seen[-1][1])
        apart.train_heads()

    def test_an_evaluation_set_without_rows(self, tmp_path, kind):
        trainer = MAKERS[kind](tmp_path)
        metrics = trainer.evaluate(trainer.eval_dataset.select([]))
        assert "eval_depth" not in metrics and trainer.operating_points == {}
        trainer.log_metrics("eval", metrics)

    def test_an_evaluation_set_without_numbers(self, tmp_path, kind):
        """Rows that can only be gone through."""
        trainer = MAKERS[kind](tmp_path, rows=8, eval_strategy="epoch", phases=["heads"])
        expected = trainer.evaluate()
        trainer.eval_dataset = trainer.eval_dataset.to_iterable_dataset()
        found = trainer.evaluate()
        for name in ("eval_loss", "eval_depth"):
            assert found[name] == pytest.approx(expected[name], rel=1e-5)
        assert trainer.train().phases["heads"].global_step > 0


class TestSeveralSets:
    def sets(self, kind: str = "encoder") -> dict:
        make = task if kind == "encoder" else instructions
        return {"one": make(6, seed=3), "two": make(9, seed=4)}

    @pytest.mark.parametrize("kind", MAKERS)
    def test_points_and_card_of_each(self, tmp_path, kind):
        trainer = MAKERS[kind](tmp_path, eval_exit_thresholds=[0.5], trainer={"eval_dataset": self.sets(kind)})
        metrics = trainer.evaluate()
        assert list(trainer.operating_points) == ["eval_one", "eval_two"]
        for name, rows in self.sets(kind).items():
            alone = MAKERS[kind](tmp_path, eval_exit_thresholds=[0.5])
            assert alone.evaluate(rows)["eval_depth"] == metrics[f"eval_{name}_depth"]
            points = zip(trainer.operating_points[f"eval_{name}"], alone.operating_points["eval"], strict=True)
            assert all(mine.exit_histogram == other.exit_histogram for mine, other in points)
        trainer.create_model_card(model_name="tiny")
        card = (tmp_path / "README.md").read_text()
        assert "the one rows" in card and "On the two rows" in card
        assert f"{metrics['eval_two_depth']:.2f}" in card

    def test_budgets_are_those_of_all_rows(self, tmp_path):
        fields = {"policy_condition": "film", "policy_alphas": [0.01, 1.0], "num_hidden_layers": 4}
        model = tiny_model(**fields)
        trainer = tiny_trainer(tmp_path, model, phases=["policy"], trainer={"eval_dataset": self.sets()})
        trainer.train()
        together = [row for rows in self.sets().values() for row in rows]
        store = tiny_trainer(tmp_path / "together", model).collect_exits(together)
        expected = fit_exit_budgets(model.exit_policies, store)
        assert model.config.exit_budgets and len(expected) == len(model.config.exit_budgets)
        for mine, theirs in zip(model.config.exit_budgets, expected, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-4)

    def test_policies_are_judged_on_each(self, tmp_path):
        watch = Watch()
        trainer = tiny_trainer(
            tmp_path,
            rows=16,
            eval_strategy="epoch",
            phases=["policy"],
            trainer={"eval_dataset": self.sets(), "callbacks": [watch]},
        )
        trainer.train()
        metrics = dict(watch.metrics)["policy"]
        assert {"eval_one_accuracy", "eval_two_accuracy", "eval_one_depth", "eval_two_reward"} <= metrics.keys()
        mean = (6 * metrics["eval_one_loss"] + 9 * metrics["eval_two_loss"]) / 15
        assert metrics["eval_loss"] == pytest.approx(mean) and metrics["eval_reward"] == pytest.approx(-mean)

    def test_early_stopping(self, tmp_path):
        """Nothing improves without learning: two evaluations, then stop."""
        trainer = tiny_trainer(
            tmp_path,
            rows=16,
            learning_rate=0.0,
            policy_learning_rate=0.0,
            num_train_epochs=9,
            policy_num_train_epochs=9,
            policy_batch_size=8,
            heads_objective="two_stage",
            phases=["heads", "policy"],
            eval_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model="one_accuracy",
            trainer={"eval_dataset": self.sets(), "callbacks": [EarlyStoppingCallback(1)]},
        )
        phases = trainer.train().phases
        assert {step: result.global_step for step, result in phases.items()} == {
            "heads-backbone": 4,
            "heads": 4,
            "policy": 4,
        }


class TestCallbacks:
    def test_added_later(self, tmp_path):
        trainer = tiny_trainer(tmp_path, rows=8)
        watch = Watch()
        trainer.add_callback(watch)
        trainer.train()
        assert watch.phases == [step for step in STEPS if step != "hardness"]

    def test_removed(self, tmp_path, capsys):
        watch, other = Watch(), Watch()
        trainer = tiny_trainer(tmp_path, rows=8, trainer={"callbacks": [watch, other]})
        trainer.remove_callback(watch)
        trainer.remove_callback(PrinterCallback)
        assert trainer.pop_callback(other) is other
        trainer.train()
        assert watch.phases == other.phases == [] and "train_loss" not in capsys.readouterr().out

    def test_a_class_is_one_object(self, tmp_path):
        trainer = tiny_trainer(tmp_path, rows=8, trainer={"callbacks": [Watch]})
        trainer.train()
        (watch,) = [one for one in trainer.callback_handler.callbacks if isinstance(one, Watch)]
        assert watch.phases == [step for step in STEPS if step != "hardness"]


class TestModelInit:
    def make(self, folder, made, **fields):
        def fresh(trial=None):
            made.append(trial)
            return tiny_model(num_hidden_layers=4)

        return ConsistentEETrainer(
            model_init=fresh,
            args=training_arguments(folder, **fields),
            train_dataset=task(16, seed=1),
            eval_dataset=task(8, seed=2),
            data_collator=collate,
        )

    def test_a_fresh_model_for_every_run(self, tmp_path):
        made = []
        trainer = self.make(tmp_path, made)
        runs = []
        for _ in range(2):
            trainer.train()
            runs.append(weights(trainer.model))
        assert not changed(*runs) and len(made) == 3
        given = tiny_trainer(tmp_path / "given", tiny_model(num_hidden_layers=4), rows=16)
        given.train()
        assert not changed(runs[0], weights(given.model)), "phases go on with the model of the run"

    def test_phases_alone_go_on(self, tmp_path):
        made = []
        trainer = self.make(tmp_path, made)
        before = weights(trainer.model)
        trainer.train_heads()
        after = weights(trainer.model)
        trainer.train_policy()
        now = weights(trainer.model)
        assert len(made) == 1 and changed(before, after)
        assert all("exit_policies" in name for name in changed(after, now))

    def test_a_trial(self, tmp_path):
        """What a backend of `hyperparameter_search` does, step by step."""
        made = []
        trainer = self.make(tmp_path, made, phases=["heads", "policy"])
        trainer.hp_search_backend = HPSearchBackend.OPTUNA
        trainer.hp_space = lambda trial: {"policy_num_train_epochs": 3, "heads_objective": "uniform"}
        output = trainer.train(trial=SimpleNamespace(number=7, params={}))
        assert made[-1].number == 7
        assert output.phases["policy"].global_step == 3 and trainer.args.heads_objective == "uniform"
        assert (tmp_path / "run-7" / "phases").is_dir() and trainer.args.output_dir == str(tmp_path)
        trainer.hp_space = lambda trial: {"heads_objective": "unheard"}
        with pytest.raises(ValueError, match=r"`heads_objective`='unheard' is unknown"):
            trainer.train(trial=SimpleNamespace(number=8, params={}))
        assert not (tmp_path / "run-8").exists() and trainer.args.output_dir == str(tmp_path)

    def test_search(self, tmp_path):
        pytest.importorskip("optuna")
        trainer = self.make(tmp_path, [], phases=["heads"])
        best = trainer.hyperparameter_search(
            lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", [1e-3, 5e-3])}, n_trials=2
        )
        assert best.hyperparameters["learning_rate"] in (1e-3, 5e-3)
        assert 0.0 < best.objective < 10.0, "a loss"
        assert {"run-0", "run-1"} <= set(os.listdir(tmp_path))

    @pytest.mark.parametrize("computes", [True, False])
    def test_default_objective(self, tmp_path, computes):
        """Depth and speed-up are no quality: the task's own metrics are, or else the loss."""
        from transformers_cee.training.early_exit_trainer import _objective

        trainer = tiny_trainer(tmp_path, trainer={} if computes else {"compute_metrics": None}, eval_timing_rows=8)
        metrics = trainer.evaluate()
        assert _objective(metrics) == metrics["eval_accuracy" if computes else "eval_loss"]
        metrics = tiny_text_trainer(tmp_path).evaluate()
        assert _objective(metrics) == metrics["eval_loss"]

    def test_no_model(self, tmp_path):
        with pytest.raises((ValueError, RuntimeError), match="model_init"):
            ConsistentEETrainer(args=training_arguments(tmp_path))
        with pytest.raises(ValueError, match=r"`model` of type Linear has no exits"):
            ConsistentEETrainer(model_init=lambda: torch.nn.Linear(1, 1), args=training_arguments(tmp_path))


CLASS_WEIGHTS = torch.tensor([1.0, 4.0, 0.25])


def weighted(outputs, labels, num_items_in_batch=None):
    """Class weights, as people give them to Trainer."""
    return F.cross_entropy(outputs.logits, labels, weight=CLASS_WEIGHTS)


def weighted_rows(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs.logits, labels, weight=CLASS_WEIGHTS, reduction="none")


SGD = {
    "optim": "sgd",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "weight_decay": 0.0,
    "max_steps": 1,
    "train_sampling_strategy": "sequential",
}


class TestOwnLoss:
    @pytest.mark.parametrize("accumulation", [1, 2])
    @pytest.mark.parametrize("loss", [weighted, weighted_rows])
    def test_one_step_of_heads(self, tmp_path, loss, accumulation):
        """One step of plain SGD shows the gradient of the user's loss at every exit, in layer weights."""
        trainer = tiny_trainer(
            tmp_path,
            rows=8,
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
            trainer={"compute_loss_func": loss},
            **SGD,
        )
        trainer.train_heads()
        model = tiny_model(num_hidden_layers=4).train()
        rows = list(task(8, seed=1))
        size = 8 // accumulation
        for part in range(accumulation):
            batch = collate(rows[part * size : (part + 1) * size])
            labels = batch.pop("labels")
            logits = model(**batch, output_all_exits=True).all_exit_logits
            reduction = "mean" if loss is weighted else "none"
            for index in range(4):
                value = F.cross_entropy(logits[:, index], labels, weight=CLASS_WEIGHTS, reduction=reduction).mean()
                (value * (index + 1) / 10 / accumulation).backward(retain_graph=True)
        plain = weights(tiny_model(num_hidden_layers=4))
        moved = 0.0
        for name, parameter in model.named_parameters():
            wanted = parameter.detach() - (0.0 if parameter.grad is None else 0.1 * parameter.grad)
            moved = max(moved, float((wanted - plain[name]).abs().max()))
            mine = dict(trainer.model.named_parameters())[name].detach()
            torch.testing.assert_close(mine, wanted, rtol=0, atol=2e-6, msg=name)
        assert moved > 1e-3

    def test_it_is_what_evaluation_reports(self, tmp_path):
        trainer = tiny_trainer(tmp_path, trainer={"compute_loss_func": weighted_rows})
        loss = trainer.evaluate()["eval_loss"]
        batch = collate(list(trainer.eval_dataset))
        labels = batch.pop("labels")
        with torch.no_grad():
            logits = trainer.model.eval()(**batch).logits
        assert loss == pytest.approx(float(weighted_rows(SimpleNamespace(logits=logits), labels).mean()), rel=1e-4)

    def test_all_phases(self, tmp_path):
        watch = Watch()
        trainer = tiny_trainer(
            tmp_path,
            rows=16,
            eval_strategy="epoch",
            trainer={"compute_loss_func": weighted_rows, "callbacks": [watch]},
        )
        assert list(trainer.train().phases) == STEPS
        assert dict(watch.metrics)["heads"]["eval_exit_loss"] > 0

    def test_means_where_rows_are_weighed(self, tmp_path):
        trainer = tiny_trainer(tmp_path, rows=8, trainer={"compute_loss_func": weighted})
        with pytest.raises(ValueError, match=r"`compute_loss_func` gave one number.*reduction='none'"):
            trainer.train()
        assert not (tmp_path / "phases").exists()
        trainer.args.phases = ["heads", "policy"]
        trainer.train()

    def test_other_shapes(self, tmp_path):
        trainer = tiny_trainer(
            tmp_path, rows=8, trainer={"compute_loss_func": lambda outputs, *_, **__: outputs.logits}
        )
        with pytest.raises(ValueError, match=r"`compute_loss_func` gave .* accepted are one number"):
            trainer.train()

    def test_decoders_have_token_losses(self, tmp_path):
        with pytest.raises(ValueError, match=r"`compute_loss_func` is not supported.*`token_loss`"):
            tiny_text_trainer(tmp_path, trainer={"compute_loss_func": weighted})


class TestOptimizer:
    def test_a_class_is_that_of_every_phase(self, tmp_path):
        seen = {}

        class Look(TrainerCallback):
            def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
                group = optimizer.param_groups[0]
                kind = getattr(optimizer, "optimizer", optimizer)
                seen[os.path.basename(args.output_dir)] = (type(kind), group["momentum"], group["initial_lr"])

        options = {"lr_scheduler_type": "constant", "learning_rate": 0.02, "policy_learning_rate": 0.03}
        pair = (torch.optim.SGD, {"momentum": 0.5})
        trainer = tiny_trainer(
            tmp_path, rows=8, trainer={"callbacks": [Look()], "optimizer_cls_and_kwargs": pair}, **options
        )
        trainer.train()
        assert seen == {
            "heads": (torch.optim.SGD, 0.5, 0.02),
            "policy": (torch.optim.SGD, 0.5, 0.03),
            "consistent-1-model": (torch.optim.SGD, 0.5, 0.02),
            "consistent-1-policy": (torch.optim.SGD, 0.5, 0.03),
        }

    def test_a_rate_belongs_to_a_phase(self, tmp_path):
        pair = (torch.optim.SGD, {"lr": 0.1})
        with pytest.raises(ValueError, match=r"`optimizer_cls_and_kwargs` sets \['lr'\].*`policy_learning_rate`"):
            tiny_trainer(tmp_path, trainer={"optimizer_cls_and_kwargs": pair})


def test_decoders_run_without_a_trainer_of_their_own(tmp_path):
    """`model_init` of another kind of model in the middle of a search is refused."""
    models = iter([tiny_model(num_hidden_layers=4), tiny_llama()])
    trainer = ConsistentEETrainer(
        model_init=lambda: next(models), args=training_arguments(tmp_path), train_dataset=task(8, seed=1)
    )
    with pytest.raises(ValueError, match=r"`model_init` made a LlamaForConsistentEECausalLM"):
        trainer.train()
