# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tiny models with all estimators, and what their rows meet on the way down."""

from __future__ import annotations

import criteria_reference as slow
import reference
import torch
from tiny import tiny_model

from transformers_cee.exits.estimators import ESTIMATORS


SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"


def fitted_model(problem_type: str = SINGLE, **fields):
    """A tiny model with all estimators, drawn at random and opinionated."""
    labels = 1 if problem_type == REGRESSION else 3
    model = tiny_model(problem_type=problem_type, num_labels=labels, exit_estimators=sorted(ESTIMATORS), **fields)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.exit_estimators.parameters():
            parameter.normal_(0.0, 0.5)
        exits = model.exit_estimators["token_hash"].exits
        exits.copy_(torch.randint(0, len(model.layer_numbers), exits.shape))
    return model


def labels_of(rows: int, problem_type: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    if problem_type == SINGLE:
        return torch.randint(0, 3, (rows,), generator=generator)
    if problem_type == MULTI:
        return torch.randint(0, 2, (rows, 3), generator=generator).float()
    return torch.randn(rows, generator=generator)


def journeys(model, rows: list[dict], labels: torch.Tensor, problem_type: str) -> list[slow.Journey]:
    layers, made = reference.exit_layers(model.config), []
    for row, label in zip(rows, labels, strict=True):
        hidden = reference.layer_states(model, row["input_ids"], row["token_type_ids"])
        states = [reference.exit_state(model, hidden[layer - 1], index) for index, layer in enumerate(layers[:-1])]
        logits = [reference.head_logits(model, state, index) for index, state in enumerate(states)]
        policy = [
            reference.policy_score(model, state, logits[: index + 1], problem_type, index)
            for index, state in enumerate(states)
        ]
        made.append(
            slow.Journey(
                states, logits, problem_type, policy, dict(model.exit_estimators.items()), layers,
                row["input_ids"].tolist(), label,
                patience=model.config.exit_patience, tolerance=model.config.exit_tolerance,
            )
        )  # fmt: skip
    return made
