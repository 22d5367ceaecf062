# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A phase alone, run by its own method, goes on from its newest checkpoint."""

from __future__ import annotations

import shutil

import pytest
import torch
from tiny import tiny_model, tiny_trainer, weights


SAVES = {"save_strategy": "steps", "save_steps": 2}


def run(folder, seed: int = 0, **fields):
    return tiny_trainer(folder, tiny_model(seed, num_hidden_layers=4), rows=32, **SAVES, **fields)


def same(trainer, expected) -> bool:
    found = weights(trainer.model)
    return all(torch.equal(value, found[name]) for name, value in expected.items())


@pytest.mark.parametrize("objective", ["layer_weighted", "two_stage"])
def test_heads(tmp_path, objective):
    whole = run(tmp_path, heads_objective=objective)
    whole.train_heads()
    expected = weights(whole.model)
    shutil.rmtree(tmp_path / "phases" / "heads" / "checkpoint-4")
    resumed = run(tmp_path, seed=7, heads_objective=objective)
    resumed.train_heads(resume_from_checkpoint=True)
    assert same(resumed, expected), "of the newest checkpoint, not of the model that was given"


def test_last_stage_has_no_checkpoint(tmp_path):
    whole = run(tmp_path, heads_objective="two_stage")
    whole.train_heads()
    expected = weights(whole.model)
    shutil.rmtree(tmp_path / "phases" / "heads")
    resumed = run(tmp_path, seed=7, heads_objective="two_stage")
    resumed.train_heads(resume_from_checkpoint=True)
    assert same(resumed, expected)


@pytest.mark.parametrize("asked", [True, False, None])
def test_nothing_to_resume(tmp_path, asked):
    """Trained from its start, as by Trainer."""
    first, second = run(tmp_path / "first"), run(tmp_path / "second")
    first.train_heads()
    second.train_heads(resume_from_checkpoint=asked)
    assert same(second, weights(first.model))


def test_policy(tmp_path):
    trainer = run(tmp_path)
    trainer.train_policy()
    assert trainer.train_policy(resume_from_checkpoint=True).global_step == 4
