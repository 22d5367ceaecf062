# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Overthinking: rows that had the right answer before they left, and rows that lose it on the way."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


__all__ = ["Overthinking", "overthinking"]


@dataclass
class Overthinking:
    """Shares of rows (Kaya et al. 2019, *Shallow-Deep Networks*, ICML), exits in order.

    Args:
        wasteful (`float`): rows that an earlier exit than the one taken gets right.
        wasteful_by_exit (`list[float]`): the same rows by the exit taken, as shares of all rows.
        destructive (`float`): rows that some internal exit gets right and the last exit wrong.
        destructive_by_exit (`list[float]`):
            Rows that this exit gets right and the last exit wrong. A row may count at several exits.
        oracle_depth (`float`):
            Mean layer of each row's first correct exit; rows that no exit gets right leave at the first.
        oracle_accuracy (`float`): rows that some exit gets right.
    """

    wasteful: float
    wasteful_by_exit: list[float]
    destructive: float
    destructive_by_exit: list[float]
    oracle_depth: float
    oracle_accuracy: float


def overthinking(correct: Tensor, layers: Tensor, exits: Tensor | None = None) -> Overthinking:
    """Wasteful and destructive overthinking, and the depth of the oracle.

    Args:
        correct (`BoolTensor` of shape `(rows, exits)`): is each exit right? `ExitStore.correct`.
        layers (`LongTensor` of shape `(exits,)`): 1-based layer of each exit.
        exits (`LongTensor` of shape `(rows,)`, *optional*):
            Exit (0-based) taken by each row, see `exits_taken`; by default the last, as the model without exits.

    Raises:
        ValueError: no rows, or shapes or exits that do not fit.
    """
    if correct.dim() != 2 or 0 in correct.shape:
        raise ValueError(f"`correct` of shape {tuple(correct.shape)} must be (rows, exits), at least one of each.")
    rows, num_exits = correct.shape
    if tuple(layers.shape) != (num_exits,):
        raise ValueError(f"`layers` of shape {tuple(layers.shape)} must be (exits,) = ({num_exits},).")
    exits = torch.full((rows,), num_exits - 1) if exits is None else exits
    if tuple(exits.shape) != (rows,) or not bool(((exits >= 0) & (exits < num_exits)).all()):
        raise ValueError(f"`exits` must be (rows,) = ({rows},) numbers in 0..{num_exits - 1}; got {exits}.")
    correct, ever = correct.bool(), correct.bool().any(1)
    first = correct.int().argmax(1)
    wasted = ever & (first < exits)
    destroyed = correct & ~correct[:, -1:]
    return Overthinking(
        wasteful=float(wasted.double().mean()),
        wasteful_by_exit=(torch.bincount(exits[wasted], minlength=num_exits).double() / rows).tolist(),
        destructive=float(destroyed.any(1).double().mean()),
        destructive_by_exit=destroyed.double().mean(0).tolist(),
        oracle_depth=float(layers[first].double().mean()),
        oracle_accuracy=float(ever.double().mean()),
    )
