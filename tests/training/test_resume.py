# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A run that is killed in any phase and resumed ends with the weights of a run that was not."""

from __future__ import annotations

import os

import pytest
import torch
from tiny import changed, tiny_model, tiny_trainer, weights
from transformers import TrainerCallback


STEPS = ("heads", "policy", "consistent-1-model", "consistent-1-policy")
# Weights after a resumed run on CPU; expected to be equal, and at most this far apart.
TOLERANCE = 1e-6


class Kill(Exception):
    """Stands for a process that is stopped."""


class KillAt(TrainerCallback):
    def __init__(self, phase: str, step: int) -> None:
        self.phase, self.step = phase, step

    def on_step_end(self, args, state, control, **kwargs):
        if os.path.basename(args.output_dir) == self.phase and state.global_step == self.step:
            raise Kill


class Count(TrainerCallback):
    """Steps that were really taken, by phase."""

    def __init__(self) -> None:
        self.steps: dict[str, int] = {}

    def on_step_end(self, args, state, control, **kwargs):
        name = os.path.basename(args.output_dir)
        self.steps[name] = self.steps.get(name, 0) + 1


def run(folder, *callbacks, seed=0, **fields):
    """A trainer in which everything that can draw random numbers does: dropout, sampled exits, reinforce."""
    model = tiny_model(
        seed, num_hidden_layers=4, policy_inputs="both", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1
    )
    options = {
        "save_strategy": "steps",
        "save_steps": 3,
        "num_train_epochs": 1.5,
        "consistent_num_train_epochs": 1.5,
        "policy_num_train_epochs": 3,
        "policy_gradient": "reinforce",
        "consistent_objective": "sampled",
        "policy_holdout": 0.25,
        "policy_batch_size": 4,
        "exit_learning_rate": 2e-3,
        "weight_decay": 0.01,
        "warmup_steps": 2,
        "gradient_accumulation_steps": 1,
        **fields,
    }
    return tiny_trainer(folder, model, rows=40, trainer={"callbacks": list(callbacks)}, **options)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    trainer = run(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return weights(trainer.model)


def check_equal(model, expected):
    for name, value in weights(model).items():
        assert float((value - expected[name]).abs().max()) <= TOLERANCE, name


def test_twice_the_same(tmp_path, uninterrupted):
    """Otherwise the tests below would say nothing, and neither would they if nothing were learned."""
    trainer = run(tmp_path)
    start = weights(trainer.model)
    trainer.train()
    check_equal(trainer.model, uninterrupted)
    assert len(changed(start, uninterrupted)) > 60


@pytest.mark.parametrize(
    "phase,step", [(phase, step) for phase in STEPS for step in (2, 4) if (phase, step) != ("heads", 2)]
)
def test_killed(tmp_path, uninterrupted, phase, step):
    """Before the first checkpoint of the phase, and one step behind it."""
    with pytest.raises(Kill):
        run(tmp_path, KillAt(phase, step)).train()
    count = Count()
    # Another initial model: whatever is not restored would show.
    resumed = run(tmp_path, count, seed=7)
    results = resumed.train(resume_from_checkpoint=True)
    check_equal(resumed.model, uninterrupted)
    done = STEPS.index(phase)
    assert set(count.steps) == set(STEPS[done:]), "finished phases are not repeated"
    total = results.phases[phase].global_step
    assert count.steps[phase] == (total - 3 if step > 3 else total), "an interrupted one goes on from its checkpoint"


def test_killed_twice(tmp_path, uninterrupted):
    with pytest.raises(Kill):
        run(tmp_path, KillAt("heads", 4)).train()
    with pytest.raises(Kill):
        run(tmp_path, KillAt("consistent-1-model", 4), seed=7).train(resume_from_checkpoint=True)
    resumed = run(tmp_path, seed=8)
    resumed.train(resume_from_checkpoint=True)
    check_equal(resumed.model, uninterrupted)


@pytest.mark.parametrize("what", ["output_dir", "output_dir/", "checkpoint"])
def test_from_a_path(tmp_path, uninterrupted, what):
    """Another run's folder, or a checkpoint inside it, from a trainer that writes there, too."""
    first = tmp_path / "first"
    with pytest.raises(Kill):
        run(first, KillAt("policy", 4)).train()
    path = {
        "output_dir": str(first),
        "output_dir/": f"{first}/",
        "checkpoint": str(first / "phases" / "policy" / "checkpoint-3"),
    }[what]
    resumed = run(tmp_path / "second", seed=7)
    resumed.train(resume_from_checkpoint=path)
    check_equal(resumed.model, uninterrupted)


def test_with_accumulation_and_validation(tmp_path):
    """Evaluation, best model and accumulation inside the phases."""
    options = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "load_best_model_at_end": True,
        "num_train_epochs": 2,
        "consistent_num_train_epochs": 2,
        "metric_for_best_model": "loss",
        "gradient_accumulation_steps": 2,
    }
    whole = run(tmp_path / "whole", **options)
    whole.train()
    for phase in ("heads", "consistent-1-model"):
        folder = tmp_path / phase
        with pytest.raises(Kill):
            run(folder, KillAt(phase, 3), **options).train()
        resumed = run(folder, **options)
        resumed.train(resume_from_checkpoint=True)
        check_equal(resumed.model, weights(whole.model))


def test_a_finished_run(tmp_path, uninterrupted):
    run(tmp_path, phases=["heads"]).train()
    again = run(tmp_path, seed=7, phases=["heads"])
    assert list(again.train(resume_from_checkpoint=True).phases) == ["heads"]
    assert not torch.equal(again.model.classifier.weight, tiny_model(7, num_hidden_layers=4).classifier.weight)
    longer = run(tmp_path, seed=7)
    assert next(iter(longer.train(resume_from_checkpoint=True).phases)) == "heads"
    check_equal(longer.model, uninterrupted)
