# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A decoder's run, bare or with adapters, that is killed in any phase and resumed ends with the same weights."""

from __future__ import annotations

import os

import pytest
from tiny import changed, tiny_llama, tiny_text_trainer, weights, with_adapters
from transformers import TrainerCallback


STEPS = ("heads", "policy", "consistent-1-model", "consistent-1-policy")
TOLERANCE = 1e-6


class Kill(Exception):
    """Stands for a process that is stopped."""


class Watch(TrainerCallback):
    """Counts steps by phase, and stops the process at one of them."""

    def __init__(self, phase: str | None = None, step: int = 0) -> None:
        self.phase, self.step = phase, step
        self.steps: dict[str, int] = {}

    def on_step_end(self, args, state, control, **kwargs):
        name = os.path.basename(args.output_dir)
        self.steps[name] = self.steps.get(name, 0) + 1
        if name == self.phase and state.global_step == self.step:
            raise Kill


def bare(seed: int):
    # One tensor under two names: it is saved once.
    return tiny_llama(seed, policy_inputs="both", exit_head="low_rank", tie_word_embeddings=True)


def adapted(seed: int):
    """The base model comes from elsewhere in any case; what is trained starts anew."""
    model = with_adapters(tiny_llama(0, policy_inputs="both", exit_head="low_rank"))
    other = with_adapters(tiny_llama(seed, policy_inputs="both", exit_head="low_rank"))
    own = {name: p for name, p in other.state_dict().items() if "lora_" in name or "modules_to_save" in name}
    model.load_state_dict(own, strict=False)
    return model


def run(folder, make, watch=None, seed=0, **fields):
    """A trainer in which everything that can draw random numbers does."""
    options = {
        "save_strategy": "steps",
        "save_steps": 3,
        "num_train_epochs": 1.5,
        "consistent_num_train_epochs": 1.5,
        "policy_num_train_epochs": 1,
        "policy_gradient": "reinforce",
        "consistent_objective": "sampled",
        "consistent_samples": 2,
        "policy_holdout": 0.25,
        "policy_max_tokens": 20,
        "policy_batch_size": 4,
        "exit_learning_rate": 2e-3,
        "weight_decay": 0.01,
        "warmup_steps": 2,
        **fields,
    }
    callbacks = [] if watch is None else [watch]
    return tiny_text_trainer(folder, make(seed), rows=40, trainer={"callbacks": callbacks}, **options)


@pytest.fixture(scope="module", params=[bare, pytest.param(adapted, marks=pytest.mark.slow)])
def whole(request, tmp_path_factory):
    trainer = run(tmp_path_factory.mktemp("whole"), request.param)
    start = weights(trainer.model)
    trainer.train()
    end = weights(trainer.model)
    assert len(changed(start, end)) > 20
    return request.param, end


def check_equal(model, expected):
    for name, value in weights(model).items():
        assert float((value - expected[name]).abs().max()) <= TOLERANCE, name


@pytest.mark.parametrize("phase,step", [("heads", 4), *((phase, step) for phase in STEPS[1:] for step in (2, 4))])
def test_killed(tmp_path, whole, phase, step):
    """Before the first checkpoint of the phase, and one step behind it."""
    make, expected = whole
    with pytest.raises(Kill):
        run(tmp_path, make, Watch(phase, step)).train()
    count = Watch()
    # Another initial model: whatever is not restored would show.
    resumed = run(tmp_path, make, count, seed=7)
    flags = {name: p.requires_grad for name, p in resumed.model.named_parameters()}
    resumed.train(resume_from_checkpoint=True)
    check_equal(resumed.model, expected)
    assert set(count.steps) == set(STEPS[STEPS.index(phase) :]), "finished phases are not repeated"
    assert {name: p.requires_grad for name, p in resumed.model.named_parameters()} == flags


def test_best_model_and_accumulation(tmp_path, whole):
    make, _ = whole
    options = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "load_best_model_at_end": True,
        "num_train_epochs": 3,
        "consistent_num_train_epochs": 3,
        "metric_for_best_model": "loss",
        "gradient_accumulation_steps": 2,
        "trainable": "exits",
    }
    first = run(tmp_path / "first", make, **options)
    first.train()
    for phase in ("heads", "consistent-1-model"):
        with pytest.raises(Kill):
            run(tmp_path / phase, make, Watch(phase, 3), **options).train()
        resumed = run(tmp_path / phase, make, **options)
        resumed.train(resume_from_checkpoint=True)
        check_equal(resumed.model, weights(first.model))
