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
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from transformers_cee.evaluation.timing import Figure, Prepared, Timer
from transformers_cee.exits.criteria import CRITERIA
from transformers_cee.exits.evaluating import evaluating
from transformers_cee.modeling.flops import ItemFlops


__all__ = ["exit_cost_figures", "exit_costs", "measured_exit_costs"]

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


def measured_exit_costs(
    model: nn.Module, batches: Sequence[dict[str, Tensor]], timer: Timer | None = None, disable_tqdm: bool = False
) -> list[float]:
    """Milliseconds per row of stopping at each exit, in order of the exits: really executed, every row of a batch
    sent to the same exit by thresholds of the policy criterion, policies asked on the way.

    Of an encoder a forward pass is timed; of a decoder one step that adds one token to each of the batch's rows, which
    have been run at full depth before; an exit that `min_exit_layer` closes is timed as the first one to leave at.

    Args:
        model: an early-exit model; its device is synchronised around everything that is timed.
        batches: tokenised inputs without labels, on the model's device.
        timer (*optional*): how often; five rounds and three attempts by default.
        disable_tqdm: no progress bar.

    Returns:
        `list[float]`: per exit, the median over rounds of all batches.

    Raises:
        ValueError: no batches.
        RuntimeError: a row did not leave at the exit that it was sent to, or a cost stayed noise in all attempts.
    """
    costs = exit_cost_figures(model, batches, timer, disable_tqdm)
    noisy = [layer for layer, figure in costs.items() if figure.is_noise]
    if noisy:
        raise RuntimeError(
            f"Costs of exits at layers {noisy} are noise: rounds lie too far apart. Measure again while the machine "
            "does nothing else, or with more batches."
        )
    return [figure.median for figure in costs.values()]


@torch.no_grad()
def exit_cost_figures(
    model: Any, batches: Sequence[dict[str, Tensor]], timer: Timer | None = None, disable_tqdm: bool = False
) -> dict[int, Figure]:
    """The same with the spread of each cost, by exit layer (1-based); what is noise says so itself, see `Figure`."""
    if not batches:
        raise ValueError(f"`batches` ({len(batches)}) must be at least 1.")
    with evaluating(model):
        runs = [_Run(model, batch) for batch in batches]
        variants = {
            str(layer): [Prepared(run.inputs, partial(run.stop_at, index)) for run in runs]
            for index, layer in enumerate(model.layer_numbers)
        }
        bar = partial(tqdm, desc="Exit costs", disable=disable_tqdm)
        found = (timer or Timer()).time(variants, device=model.device, progress=bar)
    # Rows as what left: known once a run has run.
    scale = 1000 / sum(run.rows for run in runs)
    return {layer: found.seconds[str(layer)].times(scale) for layer in model.layer_numbers}


class _Run:
    """One batch, ready to be sent to any exit."""

    def __init__(self, model: Any, batch: dict[str, Tensor]) -> None:
        self.model, self.inputs = model, model.step_inputs(batch)
        self.rows = 0

    def stop_at(self, index: int, inputs: dict[str, Any]) -> None:
        """Runs until all rows have left at exit `index` (0-based)."""
        numbers = self.model.layer_numbers
        thresholds = [_CLOSED] * index + [0.0] * (len(numbers) - index)
        first_layer = self.model.config.min_exit_layer
        if first_layer is not None:
            inputs = {**inputs, "min_exit_layer": min(first_layer, numbers[index])}
        output = self.model(**inputs, exit_criterion="policy", exit_threshold=thresholds)
        self.rows = len(output.exit_layers)
        if not bool((output.exit_layers == numbers[index]).all()):
            raise RuntimeError(f"Rows sent to layer {numbers[index]} left at layers {output.exit_layers.tolist()}.")
