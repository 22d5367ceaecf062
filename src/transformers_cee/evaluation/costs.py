# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What one inference costs that stops at each exit: counted in layers or FLOPs, or measured.

FLOPs are those of matrix products, two per multiplication and addition, of one row of an encoder or of one new token
of a decoder: of the layers up to the exit, of the keys and values that skipped layers are given, and of the states,
policies and heads that are asked on the way. The model says what each of them takes, see `modeling.flops`. A policy is
asked at every internal exit up to the one taken, a head there too where the criterion looks at it, otherwise at the
exit taken only.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from transformers_cee.evaluation.timing import synchronize
from transformers_cee.exits.criteria import CRITERIA
from transformers_cee.exits.evaluating import evaluating
from transformers_cee.modeling.flops import ItemFlops


__all__ = ["exit_costs", "measured_exit_costs"]

UNITS = ("layers", "flops")
# Closed to everybody, but asked: exits whose threshold is 1 may be passed without a look.
_CLOSED = math.nextafter(1.0, 0.0)


def exit_costs(
    model: Any, sequence_length: int, unit: Literal["layers", "flops"] = "flops", criterion: str | None = None
) -> list[float]:
    """Cost of one inference that stops at each exit, in order of the exits.

    Args:
        model: an early-exit model; of an encoder it is the cost of one row, of a decoder that of one new token.
        sequence_length: tokens of the row, or keys that the token attends to, itself included; of a model of images,
            pixels a side.
        unit: `"layers"` or `"flops"`.
        criterion: exit criterion; that of the config by default. Fitted estimators are not counted.

    Raises:
        ValueError: an unknown unit or criterion, or a length below 1.
    """
    if sequence_length < 1:
        raise ValueError(f"`sequence_length`={sequence_length} must be at least 1.")
    if unit not in UNITS:
        raise ValueError(f"`unit`={unit!r} is unknown; accepted are {', '.join(map(repr, UNITS))}.")
    config, layers = model.config, model.layer_numbers
    criterion = config.exit_criterion if criterion is None else criterion
    if criterion not in CRITERIA:
        raise ValueError(f"`criterion`={criterion!r} is unknown; accepted are {', '.join(sorted(CRITERIA))}.")
    if unit == "layers":
        return [float(layer) for layer in layers]
    flops: ItemFlops = model.item_flops(sequence_length)
    looks_at = CRITERIA[criterion].looks_at
    asks_policies = "policy" in looks_at
    asks_policy_heads = asks_policies and config.policy_inputs != "state"
    asks_heads = asks_policy_heads or bool(looks_at & {"logits", "confidence", "predictions"})
    # Exits before the first one that is open are passed; only what has a memory looks at them.
    has_memory = asks_policy_heads or CRITERIA[criterion].has_memory is True
    first_exit, last_exit = 0 if has_memory else model.first_exit(), len(layers) - 1
    costs = []
    for index, layer in enumerate(layers):
        asked = [*range(first_exit, index), index]
        costs.append(
            sum(flops.layers[:layer])
            + sum(flops.skipped[layer:])
            + sum(flops.states[other] for other in asked)
            + flops.policy * sum(other < last_exit for other in asked if asks_policies)
            + sum(flops.heads[other] for other in (asked if asks_heads else [index]))
        )
    return [float(cost) for cost in costs]


@torch.no_grad()
def measured_exit_costs(
    model: nn.Module, batches: Sequence[dict[str, Tensor]], repeats: int = 3, disable_tqdm: bool = False
) -> list[float]:
    """Milliseconds per row of stopping at each exit, in order of the exits: really executed, every row of a batch
    sent to the same exit by thresholds of the policy criterion, policies asked on the way.

    Of an encoder a forward pass is timed; of a decoder one step that adds one token to each of the batch's rows, which
    have been run at full depth before; an exit that `min_exit_layer` closes is timed as the first one to leave at.
    Exits take turns on the same batch, upwards and downwards, so that a machine that slows down slows all of them.

    Args:
        model: an early-exit model; its device is synchronised around everything that is timed.
        batches: tokenised inputs without labels, on the model's device.
        repeats: passes over all batches.
        disable_tqdm: no progress bar.

    Returns:
        `list[float]`: per exit, the median over batches and passes.

    Raises:
        ValueError: no batches, or fewer than one pass.
        RuntimeError: a row did not leave at the exit that it was sent to.
    """
    if not batches or repeats < 1:
        raise ValueError(f"`batches` ({len(batches)}) and `repeats` ({repeats}) must both be at least 1.")
    exits = list(range(len(model.layer_numbers)))
    times: list[list[float]] = [[] for _ in exits]
    with evaluating(model):
        runs = [_Run(model, batch) for batch in batches]
        for index in exits:
            runs[0].milliseconds(index)  # warm-up
        for number in tqdm(range(repeats * len(runs)), desc="Exit costs", disable=disable_tqdm):
            run = runs[number % len(runs)]
            for index in exits if number % 2 == 0 else reversed(exits):
                times[index].append(run.milliseconds(index))
    return [statistics.median(values) for values in times]


class _Run:
    """One batch, ready to be sent to any exit."""

    def __init__(self, model: Any, batch: dict[str, Tensor]) -> None:
        self.model, self.inputs = model, model.step_inputs(batch)

    def milliseconds(self, index: int) -> float:
        """Time per row until all of them have left at exit `index` (0-based)."""
        numbers, device = self.model.layer_numbers, self.model.device
        thresholds = [_CLOSED] * index + [0.0] * (len(numbers) - index)
        inputs, first_layer = self.inputs(), self.model.config.min_exit_layer
        if first_layer is not None:
            inputs = {**inputs, "min_exit_layer": min(first_layer, numbers[index])}
        synchronize(device)
        start = time.perf_counter()
        output = self.model(**inputs, exit_criterion="policy", exit_threshold=thresholds)
        synchronize(device)
        seconds = time.perf_counter() - start
        if not bool((output.exit_layers == numbers[index]).all()):
            raise RuntimeError(f"Rows sent to layer {numbers[index]} left at layers {output.exit_layers.tolist()}.")
        return 1000 * seconds / len(output.exit_layers)
