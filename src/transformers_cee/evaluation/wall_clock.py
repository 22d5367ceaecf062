# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Time that exits of encoders and image models save: rows really leave, in turn with full depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from transformers_cee.evaluation.operating_points import FULL_DEPTH
from transformers_cee.evaluation.timing import Figure, Timer
from transformers_cee.exits.evaluating import evaluating


BASELINE = "full depth"


@dataclass
class Executed:
    """What came of a setting that was executed and timed.

    Args:
        exit_layers (`LongTensor` of shape `(rows,)`): where the rows of all batches left (1-based), on the CPU.
        speedup (`Figure`): time of all batches at full depth over their time with exits.
    """

    exit_layers: Tensor
    speedup: Figure


@torch.no_grad()
def measure_wall_clock(
    model: Any,
    batches: Sequence[dict[str, Tensor]],
    settings: Sequence[Mapping[str, Any]],
    timer: Timer | None = None,
) -> list[Executed]:
    """Wall-clock speed-up of each setting over full depth, all of them in turn on the same batches.

    A figure that exceeds `allowed_speedup` is noise, as is one whose rounds lie too far apart, see `Figure`.

    Args:
        model: an early-exit model; its device is synchronised around every forward pass.
        batches: tokenised inputs, or images, without labels, on the model's device.
        settings: exit arguments of `forward`, see `OperatingPoint.exit_arguments`.
        timer (*optional*): how often; five rounds and three attempts by default.

    Returns:
        `list[Executed]`: one per setting, in their order.

    Raises:
        ValueError: no batches.
    """
    if not len(batches):
        raise ValueError(f"`batches` ({len(batches)}) must be at least 1.")
    names = [str(number) for number in range(len(settings))]
    with evaluating(model):
        model(**batches[0], **FULL_DEPTH)  # warm-up; the others have theirs where their exits are noted
        exits = [[_exit_layers(model, batch, one) for batch in batches] for one in settings]
        allowed = {name: allowed_speedup(model, batches, found) for name, found in zip(names, exits, strict=True)}
        variants = {
            name: [partial(model, **batch, **one) for batch in batches]
            for name, one in zip((BASELINE, *names), (FULL_DEPTH, *settings), strict=True)
        }
        device = next(model.parameters()).device
        found = (timer or Timer()).time(variants, BASELINE, allowed={BASELINE: allowed}, device=device, warm_up=False)
    return [
        Executed(torch.cat(layers), found.speedups[BASELINE][name]) for name, layers in zip(names, exits, strict=True)
    ]


def _exit_layers(model: Any, batch: Mapping[str, Tensor], setting: Mapping[str, Any]) -> Tensor:
    """On the CPU."""
    return model(**batch, **setting, return_dict=True).exit_layers.cpu()


def allowed_speedup(model: Any, batches: Sequence[Mapping[str, Tensor]], exits: Sequence[Tensor]) -> float:
    """The largest wall-clock speed-up over full depth that batches can have whose rows left as they did.

    The time of a batch is a sum of kinds of work, each at a price of the machine's own: layers that are called, and
    rows, tokens and pairs of tokens that run through them, all layers alike or by their FLOPs; and of embeddings,
    heads and policies, which exits do not save. So times cannot differ by more than the kind of work that was saved
    most. Of single rows of one length that is the layer speed-up. A batch may be faster: its padding is trimmed where
    the rows that leave are the long ones.

    Args:
        model: an early-exit model.
        batches: inputs, padded or not.
        exits (sequence of `LongTensor` of shape `(rows,)`): exit layers (1-based) of the rows of each batch.
    """
    first = batches[0]
    size = first["pixel_values"].shape[-1] if "pixel_values" in first else int(_lengths(first).max())
    weights = torch.tensor(model.item_flops(size).layers, dtype=torch.float64)
    full, early = torch.zeros(2, 7, dtype=torch.float64)
    for batch, layers in zip(batches, exits, strict=True):
        lengths = _lengths(batch)
        full += executed_work(torch.full_like(layers, len(weights)), torch.full_like(lengths, _width(batch)), weights)
        early += executed_work(layers, lengths, weights)
    return float((full / early).max())


def executed_work(exit_layers: Tensor, lengths: Tensor, weights: Tensor) -> Tensor:
    """Work of one batch by kind, (7,): calls of layers; rows, tokens and pairs of tokens that run through layers; and
    the last three weighted by layer.

    Args:
        exit_layers, lengths (`LongTensor` of shape `(rows,)`): exit layer (1-based) and tokens of each row; rows that
            are still there are as long as the longest of them.
        weights (`Tensor` of shape `(layers,)`): of each layer.
    """
    runs = exit_layers.unsqueeze(1) > torch.arange(len(weights))
    rows = runs.sum(0).double()
    longest = (runs * lengths.unsqueeze(1)).amax(0).double()
    kinds = torch.stack([rows, rows * longest, rows * longest.square()])
    return torch.cat([(rows > 0).sum().double().unsqueeze(0), kinds.sum(1), kinds @ weights])


def _lengths(batch: Mapping[str, Tensor]) -> Tensor:
    """Tokens of each row, on the CPU."""
    if batch.get("attention_mask") is not None:
        return batch["attention_mask"].sum(1).cpu()
    rows = next(value for value in batch.values() if isinstance(value, Tensor)).shape[0]
    return torch.full((rows,), _width(batch))


def _width(batch: Mapping[str, Tensor]) -> int:
    """Columns of a batch of texts; 1 of images, whose rows are all as large."""
    found = [batch[name].shape[1] for name in ("input_ids", "inputs_embeds") if batch.get(name) is not None]
    return found[0] if found else 1


__all__ = ["Executed", "allowed_speedup", "executed_work", "measure_wall_clock"]
