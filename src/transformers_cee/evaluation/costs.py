# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What one inference costs that stops at each exit: counted in layers or FLOPs, or measured.

FLOPs are those of matrix products, two per multiplication and addition; embeddings, norms, biases, activations,
softmax and sums are left out. With `d` hidden units, `f` of the feed-forward part, `T` tokens, `C` labels, policies of
`w` inputs and `h` hidden units, and LoRA merged:

- BERT, one row, per layer: `8·T·d² + 4·T²·d + 4·T·d·f`; per exit that is asked: pooler `2·d²` (CLS pooling only),
  head `2·d·C`, policy `2·w·h + 2·h`.
- LLaMA, one new token with `T` keys, itself included, `q` and `k` units of all query and all key-value heads, and a
  vocabulary of `V`: per layer `4·d·q + 4·d·k + 4·T·q + 6·d·f`; per skipped layer, if its keys and values are copied,
  `4·d·k`; LM head `2·d·V`, an adapter of rank `r` before it `4·d·r`.

A policy is asked at every internal exit up to the one taken, a head there too where the criterion looks at it,
otherwise at the exit taken only.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from transformers_cee.evaluation.timing import synchronize
from transformers_cee.exits.cache_name import CACHE_NAME
from transformers_cee.exits.criteria import CRITERIA
from transformers_cee.exits.evaluating import evaluating
from transformers_cee.exits.lm_heads import LM_EXIT_HEADS
from transformers_cee.exits.policy import NUM_CONFIDENCE_FEATURES


__all__ = ["exit_costs", "measured_exit_costs"]

UNITS = ("layers", "flops")
# Closed to everybody, but asked: exits whose threshold is 1 may be passed without a look.
_CLOSED = math.nextafter(1.0, 0.0)


def exit_costs(
    config: Any, sequence_length: int, unit: Literal["layers", "flops"] = "flops", criterion: str | None = None
) -> list[float]:
    """Cost of one inference that stops at each exit, in order of the exits; the module's docstring has the formulas.

    Args:
        config: of an early-exit BERT (cost of one row) or LLaMA (cost of one generated token).
        sequence_length: tokens of the row, or keys that the token attends to, itself included.
        unit: `"layers"` or `"flops"`.
        criterion: exit criterion; `config.exit_criterion` by default. Fitted estimators are not counted.

    Raises:
        ValueError: an unknown architecture, unit or criterion, or a length below 1.
    """
    if config.model_type not in _ARCHITECTURES:
        known = ", ".join(map(repr, _ARCHITECTURES))
        raise ValueError(f"`config` of the model type {config.model_type!r} is unknown; accepted are {known}.")
    if sequence_length < 1:
        raise ValueError(f"`sequence_length`={sequence_length} must be at least 1.")
    if unit not in UNITS:
        raise ValueError(f"`unit`={unit!r} is unknown; accepted are {', '.join(map(repr, UNITS))}.")
    criterion = config.exit_criterion if criterion is None else criterion
    CRITERIA.find(criterion, "criterion")
    layers = config.exit_layer_numbers
    if unit == "layers":
        return [float(layer) for layer in layers]
    layer_cost, skipped_cost, state_cost, head_costs = _ARCHITECTURES[config.model_type](config, sequence_length)
    looks_at = CRITERIA[criterion].looks_at
    policy_cost = _policy_cost(config) if "policy" in looks_at else 0
    asks_policy_heads = "policy" in looks_at and config.policy_inputs != "state"
    asks_heads = asks_policy_heads or bool(looks_at & {"logits", "confidence", "predictions"})
    costs = []
    # A decoder passes exits before the first one that is open; only what has a memory looks at them.
    first_layer = getattr(config, "min_exit_layer", None) or 1
    has_memory = asks_policy_heads or CRITERIA[criterion].has_memory is True
    for index, layer in enumerate(layers):
        asked = [other for other in range(index + 1) if has_memory or layers[other] >= first_layer or other == index]
        internal = [other for other in asked if other < len(layers) - 1]
        heads = [other for other in asked if other in internal or other == index] if asks_heads else [index]
        costs.append(
            layer * layer_cost
            + (layers[-1] - layer) * skipped_cost
            + len(asked) * state_cost
            + len(internal) * policy_cost
            + sum(head_costs[other] for other in heads)
        )
    return [float(cost) for cost in costs]


def _policy_cost(config: Any) -> int:
    """FLOPs of one policy network for one row."""
    width = {"state": config.hidden_size, "confidence": NUM_CONFIDENCE_FEATURES}.get(
        config.policy_inputs, config.hidden_size + NUM_CONFIDENCE_FEATURES
    )
    width += config.policy_condition == "input"
    hidden = config.policy_hidden_size
    film = 4 * hidden if config.policy_condition == "film" else 0
    return 2 * width * hidden + film + 2 * hidden


def _bert_costs(config: Any, length: int) -> tuple[int, int, int, list[int]]:
    """FLOPs of a layer, of a skipped layer, of an exit state and of each exit's head, for one row."""
    hidden, wide = config.hidden_size, config.intermediate_size
    layer = 8 * length * hidden**2 + 4 * length**2 * hidden + 4 * length * hidden * wide
    pooler = 2 * hidden**2 if config.exit_pooling == "cls" else 0
    return layer, 0, pooler, [2 * hidden * config.num_labels] * len(config.exit_layer_numbers)


def _llama_costs(config: Any, length: int) -> tuple[int, int, int, list[int]]:
    """FLOPs as in `_bert_costs`, for one token."""
    hidden, wide, size = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
    layer = 4 * hidden * queries + 4 * hidden * keys + 4 * length * queries + 6 * hidden * wide
    head = 2 * hidden * config.vocab_size
    heads = [_exit_head_cost(config, head)] * (len(config.exit_layer_numbers) - 1)
    return layer, 4 * hidden * keys if config.skipped_kv == "copy" else 0, 0, [*heads, head]


def _exit_head_cost(config: Any, lm_head: int) -> int:
    """FLOPs of an internal exit's head for one token: two for each weight of its matrices, and `lm_head`, those of the
    model's own head, where it ends in that."""
    kind = LM_EXIT_HEADS.find(config.exit_head)
    with torch.device("meta"):
        own = kind.head(config)
    weights = [] if own is None else [weight.numel() for weight in own.parameters() if weight.dim() == 2]
    return 2 * sum(weights) + (lm_head if kind.shares_lm_head else 0)


_ARCHITECTURES: dict[str, Callable[[Any, int], tuple[int, int, int, list[int]]]] = {
    "bert_cee": _bert_costs,
    "llama_cee": _llama_costs,
}


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

    def __init__(self, model: nn.Module, batch: dict[str, Tensor]) -> None:
        self.model, self.inputs = model, dict(batch)
        self.cache = None
        self.first_layer = getattr(model.config, "min_exit_layer", None)
        if model.exits_per_token:
            from transformers_cee.generation.cache import EarlyExitCache

            output = model(**batch, use_cache=True)
            self.cache = EarlyExitCache.from_cache(output[CACHE_NAME], model.config.num_hidden_layers)
            self.inputs = {"input_ids": output.logits[:, -1:].argmax(-1)}
            if "attention_mask" in batch:
                self.inputs["attention_mask"] = nn.functional.pad(batch["attention_mask"], (0, 1), value=1)

    def milliseconds(self, index: int) -> float:
        """Time per row until all of them have left at exit `index` (0-based)."""
        numbers, device = self.model.layer_numbers, self.model.device
        thresholds = [_CLOSED] * index + [0.0] * (len(numbers) - index)
        # A step writes into the cache.
        more = {} if self.cache is None else {CACHE_NAME: copy.deepcopy(self.cache)}
        if self.first_layer is not None:
            more["min_exit_layer"] = min(self.first_layer, numbers[index])
        synchronize(device)
        start = time.perf_counter()
        output = self.model(**self.inputs, **more, exit_criterion="policy", exit_threshold=thresholds)
        synchronize(device)
        seconds = time.perf_counter() - start
        if not bool((output.exit_layers == numbers[index]).all()):
            raise RuntimeError(f"Rows sent to layer {numbers[index]} left at layers {output.exit_layers.tolist()}.")
        return 1000 * seconds / len(output.exit_layers)
