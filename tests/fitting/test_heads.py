# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Heads that learn the last exit's answers: they are at the minimum, and what they say of a row has not seen it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from transformers_cee.fitting.heads import draw_folds, fit_head, put_head


def data(rows: int = 160, labels: int = 3, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(rows, 8, generator=generator) * torch.logspace(-1, 1, 8) + 3
    targets = states @ torch.randn(8, labels, generator=generator) / 3
    return states, targets + torch.randn(rows, labels, generator=generator)


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification"])
def test_head_is_at_the_minimum(problem_type):
    states, targets = data()
    fitted = fit_head(states, targets, draw_folds(len(states), 0), problem_type)
    aims = targets.double()
    if problem_type.startswith("single"):
        aims = aims - aims.mean(-1, keepdim=True)
    scale = states.double().std(0, correction=0)
    weight = (fitted.weight.double() * scale).requires_grad_()
    bias = fitted.bias.double().requires_grad_()
    errors = (states.double() / scale) @ weight.T + bias - aims
    (errors.square().sum(-1).mean() / 2 + fitted.penalty / 2 * weight.square().sum()).backward()
    assert float(weight.grad.abs().max()) < 1e-4 and float(bias.grad.abs().max()) < 1e-4
    torch.testing.assert_close(fitted(states), states @ fitted.weight.T + fitted.bias)


def test_penalty_is_that_of_the_smallest_loss_of_rows_that_were_held_out():
    states, targets = data(80)
    folds, tried = draw_folds(80, 0), (0.01, 0.3, 3.0)
    wanted = targets.softmax(-1)
    losses = {}
    for penalty in tried:
        logits = fit_head(states, targets, folds, penalties=[penalty]).held_out
        losses[penalty] = float(nn.functional.cross_entropy(logits, wanted))
    fitted = fit_head(states, targets, folds, penalties=tried)
    assert fitted.penalty == min(losses, key=losses.__getitem__)


def test_held_out_logits_have_not_seen_their_row():
    states, targets = data(60)
    folds = draw_folds(60, 0)
    fitted = fit_head(states, targets, folds, penalties=[0.01])
    for fold in folds.unique().tolist():
        changed = targets.clone()
        changed[folds == fold] = changed[folds == fold].flip(-1) * 5
        again = fit_head(states, changed, folds, penalties=[0.01])
        torch.testing.assert_close(again.held_out[folds == fold], fitted.held_out[folds == fold])
        assert not torch.allclose(again.held_out[folds != fold], fitted.held_out[folds != fold], atol=1e-2)


def test_noise_wants_a_strong_penalty():
    generator = torch.Generator().manual_seed(0)
    states, targets = torch.randn(60, 30, generator=generator), torch.randn(60, 3, generator=generator) * 4
    assert fit_head(states, targets, draw_folds(60, 0)).penalty > fit_head(*data(600), draw_folds(600, 0)).penalty


def test_states_that_do_not_vary():
    states, targets = data(40)
    states[:, 2] = 1.5
    fitted = fit_head(states, targets, draw_folds(40, 0))
    assert bool(fitted.weight.isfinite().all()) and bool(fitted.held_out.isfinite().all())


def test_folds():
    folds = draw_folds(43, seed=1)
    counts = folds.bincount()
    assert len(counts) == 4 and int(counts.max() - counts.min()) <= 1
    torch.testing.assert_close(folds, draw_folds(43, seed=1))
    assert not torch.equal(folds, draw_folds(43, seed=2))


def test_put_head():
    states, targets = data(40)
    fitted, head = fit_head(states, targets, draw_folds(40, 0)), nn.Linear(8, 3)
    put_head(head, fitted)
    torch.testing.assert_close(head(states), fitted(states))
