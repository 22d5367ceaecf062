# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Time that exits save, measured: rows really leave, in turn with full depth."""

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from transformers_cee.evaluation.operating_points import FULL_DEPTH
from transformers_cee.exits.evaluating import evaluating


def synchronize(device: torch.device) -> None:
    """Waits until a device has done what it was asked for; a CPU has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@torch.no_grad()
def _seconds(model: nn.Module, batch: dict[str, Tensor], exit_arguments: Mapping[str, Any]) -> float:
    synchronize(model.device)
    start = time.perf_counter()
    model(**batch, **exit_arguments)
    synchronize(model.device)
    return time.perf_counter() - start


def measure_wall_clock(
    model: nn.Module,
    batches: Sequence[dict[str, Tensor]],
    settings: Sequence[Mapping[str, Any]],
    repeats: int = 3,
) -> list[float]:
    """Wall-clock speed-up of each setting over full depth: really executed, exits against no exits, in turn on the
    same batches; the median of `repeats` ratios of total times.

    Args:
        model (`nn.Module`): an early-exit model; its device is synchronised around every forward pass.
        batches (sequence of `dict`): tokenised inputs without labels, on the model's device.
        settings (sequence of mappings): exit arguments of `forward`, see `OperatingPoint.exit_arguments`.
        repeats (`int`): passes over all batches.

    Returns:
        `list[float]`: one ratio per setting; above 1 is faster than full depth.

    Raises:
        ValueError: no batches or no repeats.
    """
    if not len(batches) or repeats < 1:
        raise ValueError(f"`batches` ({len(batches)}) and `repeats` ({repeats}) must both be at least 1.")
    ratios: list[list[float]] = [[] for _ in settings]
    with evaluating(model):
        _seconds(model, batches[0], FULL_DEPTH)  # warm-up
        for _ in range(repeats):
            full, early = [0.0] * len(settings), [0.0] * len(settings)
            for batch in batches:
                for index, exit_arguments in enumerate(settings):
                    full[index] += _seconds(model, batch, FULL_DEPTH)
                    early[index] += _seconds(model, batch, exit_arguments)
            for index in range(len(settings)):
                ratios[index].append(full[index] / early[index])
    return [statistics.median(values) for values in ratios]
