# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What the trainer of a run and those of its phases share, and what a phase leaves to the run."""

from __future__ import annotations

import gc
import os
import random
import weakref

import numpy as np
import pytest
import torch
from tiny import collate, task, tiny_model, tiny_trainer, training_arguments
from transformers import Trainer, TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from transformers_cee import ConsistentEETrainer
from transformers_cee.training.model_phase import ModelPhaseTrainer


class Holds(TrainerCallback):
    """A callback that holds the trainer it was given to, as people write them."""

    def __init__(self) -> None:
        self.trainer: ConsistentEETrainer | None = None
        self.steps: list[tuple[int, int]] = []
        self.optimizers: list[bool] = []
        self.metrics: dict[str, dict] = {}

    def on_step_end(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        self.steps.append((self.trainer.state.global_step, state.global_step))
        self.optimizers.append(self.trainer.optimizer is optimizer and self.trainer.lr_scheduler is lr_scheduler)

    def on_epoch_end(self, args, state, control, **kwargs):
        phase = os.path.basename(args.output_dir)
        if not phase.endswith("policy"):
            self.metrics[phase] = self.trainer.evaluate(metric_key_prefix="seen")


class TestRunAndPhase:
    def make(self, folder, **fields):
        holds = Holds()
        holds.trainer = tiny_trainer(
            folder, rows=16, eval_exit_thresholds=[0.3], trainer={"callbacks": [holds]}, **fields
        )
        return holds.trainer, holds

    def test_state_is_that_of_the_phase(self, tmp_path):
        trainer, holds = self.make(tmp_path, phases=["heads"], num_train_epochs=2)
        before = trainer.state
        trainer.train()
        assert holds.steps == [(number, number) for number in range(1, 5)] and holds.optimizers == [True] * 4
        assert trainer.state is not before and trainer.state.global_step == 4

    def test_state_after_a_stop(self, tmp_path):
        trainer, holds = self.make(tmp_path, phases=["heads"])

        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                raise KeyboardInterrupt

        trainer.add_callback(Stop())
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert trainer.state.global_step == 1
        trainer.remove_callback(Stop)
        holds.steps.clear()
        trainer.train_heads()
        assert trainer.state.global_step == 2 and holds.steps == [(1, 1), (2, 2)]

    def test_callbacks_evaluate_as_the_phase_does(self, tmp_path):
        """At full depth in `heads`, where the policies leave in `consistent`; without operating points."""
        trainer, holds = self.make(tmp_path)
        trainer.train()
        assert holds.metrics["heads"]["seen_depth"] == 4.0 > holds.metrics["consistent-1-model"]["seen_depth"]
        assert all("seen_exit_loss" in metrics for metrics in holds.metrics.values())
        assert trainer.operating_points == {}
        assert "seen_exit_loss" not in trainer.evaluate(metric_key_prefix="seen"), "the phases are over"
        assert [point.to_dict()["exit_threshold"] for point in trainer.operating_points["seen"]] == [0.5, 0.3]

    def test_callbacks_predict_as_the_phase_does(self, tmp_path):
        """In the precision that the model learns in, whatever later evaluations are made in."""

        class Predicts(TrainerCallback):
            def on_epoch_end(self, args, state, control, **kwargs):
                if not args.output_dir.endswith("policy"):
                    found.append(trainer.predict(task(4, seed=3)))
                    precisions.append(next(trainer.model.parameters()).dtype)

        found, precisions = [], []
        trainer, holds = self.make(tmp_path, bf16_full_eval=True)
        trainer.add_callback(Predicts())
        holds.trainer = None
        trainer.remove_callback(holds)
        trainer.train()
        assert precisions == [torch.float32] * 2
        assert found[0].metrics["test_depth"] == 4.0 > found[1].metrics["test_depth"]
        trainer.predict(task(4, seed=3))
        assert next(trainer.model.parameters()).dtype == torch.bfloat16, "the phases are over"

    def test_one_optimizer_at_a_time(self, tmp_path):
        """What an optimizer remembers is larger than the model: that of an earlier phase is gone."""

        class Counts(TrainerCallback):
            def on_step_end(self, args, state, control, optimizer=None, **kwargs):
                gc.collect()
                phase = os.path.basename(args.output_dir)
                made.setdefault(phase, weakref.ref(optimizer.optimizer))
                alive[phase] = sorted(name for name, one in made.items() if one() is not None)

        made, alive = {}, {}
        trainer = tiny_trainer(tmp_path, rows=8, trainer={"callbacks": [Counts()]}, consistent_num_rounds=2)
        trainer.train()
        for phase in ("heads", "consistent-1-model", "consistent-2-model"):
            assert alive[phase] == [phase]
        assert trainer.optimizer.optimizer is made["consistent-2-model"]()

    def test_random_numbers_go_on(self, tmp_path):
        """Making the trainer of a phase draws none, and seeds none."""
        trainer, _ = self.make(tmp_path)
        phase = trainer._heads_phase("heads")
        for seed in (3, 4):
            torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
            expected = (float(torch.rand(1)), random.random(), float(np.random.rand()))
            torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
            trainer.make_phase_trainer(phase, training_arguments(tmp_path))
            assert (float(torch.rand(1)), random.random(), float(np.random.rand())) == expected

    def test_checkpoints_on_demand_are_those_of_the_phase(self, tmp_path, monkeypatch):
        monkeypatch.setattr("signal.signal", lambda *_: None)
        trainer = tiny_trainer(tmp_path, rows=16, phases=["heads"], enable_jit_checkpoint=True)
        (jit,) = [one for one in trainer.callback_handler.callbacks if isinstance(one, JITCheckpointCallback)]
        jit.jit_manager.is_checkpoint_requested = True
        trainer.train()
        (found,) = (tmp_path / "phases" / "heads").glob("checkpoint-*")
        assert (found / "trainer_state.json").is_file()
        assert sum(isinstance(one, JITCheckpointCallback) for one in trainer.callback_handler.callbacks) == 1

    def test_a_backend_may_wrap_the_model(self, tmp_path):
        """Some leave a model with any arguments around it for the next phase; columns and labels are as before."""

        class Wrapped(torch.nn.Module):
            def __init__(self, module):
                super().__init__()
                self.module = module

            def __getattr__(self, name):
                return super().__getattr__(name) if name in ("module",) else getattr(self.module, name)

            def forward(self, *args, **kwargs):
                return self.module(*args, **kwargs)

        trainer = tiny_trainer(tmp_path, rows=8)
        phase = trainer._heads_phase("heads")
        first = trainer.make_phase_trainer(phase, training_arguments(tmp_path), trainer.train_dataset)
        trainer.model = Wrapped(trainer.model)
        second = trainer.make_phase_trainer(phase, training_arguments(tmp_path), trainer.train_dataset)
        assert second.label_names == first.label_names == ["labels"]
        for one in (first, second):
            assert set(next(iter(one.get_train_dataloader()))) == {"input_ids", "attention_mask", "labels"}


class TestHooks:
    """What people override in a subclass of Trainer."""

    def test_of_the_run_alone(self, tmp_path):
        class Own(ConsistentEETrainer):
            def create_optimizer(self, *args, **kwargs):
                return super().create_optimizer(*args, **kwargs)

        with pytest.raises(ValueError, match=r"`Own.create_optimizer` would not be asked .* `phase_trainer` of `Own`"):
            Own(tiny_model(), training_arguments(tmp_path))

    @pytest.mark.parametrize("name", ["_get_train_sampler", "get_eval_dataloader", "_prepare_inputs", "log", "_save"])
    def test_of_the_run_by_a_mixin(self, tmp_path, name):
        mixin = type("Mixin", (), {name: lambda self, *args, **kwargs: None})
        own = type("Own", (mixin, ConsistentEETrainer), {})
        with pytest.raises(ValueError, match=rf"`Own.{name}` would not be asked"):
            own(tiny_model(), training_arguments(tmp_path))

    @pytest.mark.parametrize("wrong", [Trainer, object, "ModelPhaseTrainer", None])
    def test_trainers_of_phases_are_of_one_kind(self, tmp_path, wrong):
        own = type("Own", (ConsistentEETrainer,), {"phase_trainer": wrong})
        with pytest.raises(TypeError, match=r"`phase_trainer`=.* must be a class derived from ModelPhaseTrainer"):
            own(tiny_model(), training_arguments(tmp_path))

    def test_what_only_the_run_is_asked_for(self, tmp_path):
        """Nothing in the way of what phases never do, nor of methods that Trainer has not."""
        asked = []

        class Own(ConsistentEETrainer):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)

            def evaluate(self, *args, **kwargs):
                asked.append("evaluate")
                return super().evaluate(*args, **kwargs)

            def predict(self, *args, **kwargs):
                asked.append("predict")
                return super().predict(*args, **kwargs)

            def create_model_card(self, *args, **kwargs):
                asked.append("card")

            def my_own(self):
                asked.append("own")

        data = {"train_dataset": task(8, seed=1), "eval_dataset": task(4, seed=2), "data_collator": collate}
        trainer = Own(tiny_model(num_hidden_layers=4), training_arguments(tmp_path, phases=["heads"]), **data)
        trainer.train()
        trainer.evaluate(), trainer.predict(data["eval_dataset"]), trainer.create_model_card(), trainer.my_own()
        assert asked == ["evaluate", "predict", "card", "own"]

    def test_of_the_phases(self, tmp_path):
        asked = []

        class Phase(ModelPhaseTrainer):
            def compute_loss(self, *args, **kwargs):
                asked.append(os.path.basename(self.args.output_dir))
                return super().compute_loss(*args, **kwargs)

        class Own(ConsistentEETrainer):
            phase_trainer = Phase

        data = {"train_dataset": task(8, seed=1), "data_collator": collate}
        Own(tiny_model(num_hidden_layers=4), training_arguments(tmp_path), **data).train()
        assert asked == ["heads", "consistent-1-model"]
