# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Exit heads that learn the last exit's answers from stored states, without labels, in closed form.

A head is linear in its state: ridge regression on the last exit's logits less their mean over classes, which no
answer depends on. States that a head has learned from look surer than others. What it says of them in earnest comes
from heads that have not seen them (cross-fitting), and the penalty of its weights is chosen by that, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


# Weights of the squared norm that are tried, per row, of states with a variance of 1.
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
FOLDS = 4


@dataclass
class FittedHead:
    """A linear head, fitted.

    Args:
        weight (`Tensor` of shape `(labels, hidden)`), bias (`Tensor` of shape `(labels,)`): of the head.
        held_out (`Tensor` of shape `(rows, labels)`):
            Logits of the rows that it was fitted on, each from a head that has not seen the row, but for the scale of
            states, which is that of all rows.
        penalty (`float`): chosen weight of the squared norm.
    """

    weight: Tensor
    bias: Tensor
    held_out: Tensor
    penalty: float

    def __call__(self, states: Tensor) -> Tensor:
        """Logits (rows, labels) of states (rows, hidden)."""
        return F.linear(states, self.weight, self.bias)


@torch.no_grad()
def fit_head(
    states: Tensor,
    targets: Tensor,
    folds: Tensor,
    problem_type: str = "single_label_classification",
    penalties: Sequence[float] = PENALTIES,
) -> FittedHead:
    """Fits a linear head on what the last exit says.

    Args:
        states (`Tensor` of shape `(rows, hidden)`): of one exit.
        targets (`Tensor` of shape `(rows, labels)`): logits of the last exit.
        folds (`LongTensor` of shape `(rows,)`): fold of each row, from 0; see `draw_folds`.
        problem_type (`str`): what the logits mean: one class, or a decision for each label.
        penalties (sequence of `float`): those to choose from, by the cross-entropy of rows that were held out with
            the last exit's probabilities.
    """
    states, targets = states.double(), targets.double()
    is_one_class = problem_type == "single_label_classification"
    aims = targets - targets.mean(-1, keepdim=True) if is_one_class else targets
    scale = states.std(0, correction=0)
    # What does not vary tells nothing.
    scale = torch.where(scale > 0, scale, 1.0)
    seen = states / scale
    held_out = torch.zeros(len(penalties), *targets.shape, dtype=torch.double)
    for fold in folds.unique().tolist():
        out = folds == fold
        for at, (weight, bias) in enumerate(_ridge(seen[~out], aims[~out], penalties)):
            held_out[at, out] = F.linear(seen[out], weight, bias)
    loss = _of_one_class if is_one_class else _of_many_labels
    best = min(range(len(penalties)), key=lambda at: loss(held_out[at], targets))
    ((weight, bias),) = _ridge(seen, aims, penalties[best : best + 1])
    return FittedHead((weight / scale).float(), bias.float(), held_out[best].float(), float(penalties[best]))


def draw_folds(rows: int, seed: int, folds: int = FOLDS) -> Tensor:
    """Folds (rows,) of equal size but for one row, drawn at random."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    return order.argsort() % min(folds, rows)


def _ridge(states: Tensor, aims: Tensor, penalties: Sequence[float]) -> list[tuple[Tensor, Tensor]]:
    """Weight (labels, hidden) and bias (labels,) at each penalty: `(XᵀX/n + λI)⁻¹ XᵀY/n` of centred X and Y."""
    mean, middle = states.mean(0), aims.mean(0)
    centred = states - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(states))
    turned = vectors.T @ (centred.T @ (aims - middle) / len(states))
    found = []
    for penalty in penalties:
        weight = (vectors @ (turned / (values.clamp_min(0) + penalty).unsqueeze(1))).T
        found.append((weight, middle - weight @ mean))
    return found


def _of_one_class(logits: Tensor, targets: Tensor) -> float:
    return float(F.cross_entropy(logits, targets.softmax(-1)))


def _of_many_labels(logits: Tensor, targets: Tensor) -> float:
    return float(F.binary_cross_entropy_with_logits(logits, targets.sigmoid()))


def put_head(head: nn.Linear, fitted: FittedHead) -> None:
    """Gives a model's head the weights that were fitted."""
    with torch.no_grad():
        head.weight.copy_(fitted.weight)
        head.bias.copy_(fitted.bias)


__all__ = ["FittedHead", "draw_folds", "fit_head", "put_head"]
