# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Synthetic scores whose exits rank rows more or less alike."""

from __future__ import annotations

import torch
from torch import Tensor

from transformers_cee.calibration.scores import ExitScores


def population(
    rows: int, exits: int = 8, correlation: float = 0.5, seed: int = 0, criterion: str = "max_probability"
) -> ExitScores:
    """Scores in (0, 1), surer and more often right at deeper exits; `correlation` 1 ranks rows alike at all exits."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(rows, 1, generator=generator)
    single = torch.randn(rows, exits, generator=generator)
    latent = correlation**0.5 * shared + (1 - correlation) ** 0.5 * single
    sure = (1.5 * latent + torch.linspace(-0.3, 1.5, exits)).sigmoid()
    correct = torch.rand(rows, exits, generator=generator) < 0.4 + 0.6 * sure
    # What is wrong is mostly wrong in the same way, so that exits also agree on wrong answers.
    wrong = torch.where(torch.rand(rows, exits, generator=generator) < 0.7, 1, 2)
    predictions = torch.where(correct, 0, wrong)
    scores = sure if criterion != "entropy" else 1 - sure
    return ExitScores(
        criterion,
        scores[:, :-1].contiguous(),
        torch.arange(1, exits + 1),
        predictions != predictions[:, -1:],
        (~correct).float(),
        last_scores=scores[:, -1].contiguous(),
    )


def halves(rows: int, split: int) -> tuple[Tensor, Tensor]:
    """Two random halves of rows."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(split))
    return order[: rows // 2], order[rows // 2 :]


def slow_exit(scores: list[float], thresholds: list[float]) -> int:
    """Exit (0-based) of one row with oriented scores."""
    for index, score in enumerate(scores):
        if score > thresholds[index]:
            return index
    return len(scores)
