# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""One step of plain SGD of a decoder, by the trainer and by hand: it shows the gradient."""

from __future__ import annotations

import copy

import torch
from text_reference import text_tokens
from tiny import instructions, tiny_text_trainer


SGD = {
    "optim": "sgd",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "weight_decay": 0.0,
    "train_sampling_strategy": "sequential",
}
ROWS = 8


def is_policy(name: str) -> bool:
    return name.startswith("exit_policies.")


def one_step(folder, model, **fields):
    """A trainer whose model phases take one step of plain SGD on 8 rows, which shows the gradient."""
    return tiny_text_trainer(folder, model, rows=ROWS, max_steps=1, **{**SGD, **fields})


def manual(model, loss_of) -> dict:
    """Weights after one step by a loss of the model and its counted tokens."""
    model = copy.deepcopy(model)
    loss_of(model, text_tokens(model, instructions(ROWS, seed=1))).backward()
    return {
        name: parameter.detach() - (0.0 if parameter.grad is None else 0.1 * parameter.grad)
        for name, parameter in model.named_parameters()
    }


def compare(model, expected, before, atol=3e-6):
    moved = 0.0
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=0, atol=atol, msg=name)
        moved = max(moved, float((expected[name] - before[name]).abs().max()))
    assert moved > 1e-3, "otherwise the comparison says nothing"


def layer_weighted(model, tokens):
    """Mean over tokens of Σ i·CE_i / Σ i."""
    total = 0.0
    for token in tokens:
        weights = range(1, len(token.losses) + 1)
        total = total + sum(weight * loss for weight, loss in zip(weights, token.losses, strict=True)) / sum(weights)
    return total / len(tokens)


def certain(model):
    """The model with policies that give 0 or 1."""
    with torch.no_grad():
        for network in model.exit_policies.networks:
            network[-1].weight.mul_(1e5)
    return model
