# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What drafting and verifying cost on the machine at hand, measured once per model, rows of a batch and process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any
from weakref import WeakKeyDictionary

import torch

from transformers_cee.generation.cache import EarlyExitCache
from transformers_cee.generation.slots import SlotPass


# Columns that stand in the cache while it is measured, and tokens of a pass that verifies.
_CONTEXT, _TOKENS, _ROUNDS = 32, 4, 5
# Batches take longer, and their times differ less.
_FEWER_ROUNDS, _MOST_ROWS = 3, 16


@dataclass(frozen=True)
class DraftCosts:
    """Shares of one decode step of a batch at full depth.

    Args:
        verify (`float`): one more token of each row.
        layer (`float`): a layer on one token of each row.
        head (`float`): the LM head on one token of each row.
        start (`float`): a pass over several tokens of a row, beyond what each costs: single tokens may have kernels
            of their own.
    """

    verify: float
    layer: float
    head: float
    start: float = 0.0


_MEASURED: WeakKeyDictionary[Any, dict[Any, DraftCosts]] = WeakKeyDictionary()


def draft_costs(model: Any, rows: int = 1) -> DraftCosts:
    """Costs of a model where it runs now, medians of some rounds.

    Args:
        rows (`int`): of the batch. They are measured of the next power of two, and of 16 where there are more.
    """
    rows = min(_MOST_ROWS, 1 << (rows - 1).bit_length())
    key = (rows, str(model.device), model.dtype, torch.get_num_threads())
    known = _MEASURED.setdefault(model, {})
    if key not in known:
        known[key] = _measure(model, rows)
    return known[key]


def forget_costs(model: Any) -> None:
    """Measures a model's costs anew when they are next asked for: it computes in another way now."""
    _MEASURED.pop(model, None)


@torch.no_grad()
def _measure(model: Any, rows: int) -> DraftCosts:
    decoder, layers = model.as_decoder, model.config.num_hidden_layers
    embed = model.get_input_embeddings()
    tokens = torch.zeros(rows, _CONTEXT, dtype=torch.long, device=embed.weight.device)
    cache, none = EarlyExitCache(layers), torch.zeros(rows, dtype=torch.long, device=tokens.device)
    states = embed(tokens)
    rotary = decoder.rotary(states, torch.arange(_CONTEXT, device=tokens.device).unsqueeze(0))
    keys, values = decoder.project(0, layers, states, rotary)
    for layer, key, value in zip(cache.layers, keys, values, strict=True):
        layer.update(key, value)

    def run(columns: int) -> float:
        first = none + _CONTEXT
        walk = SlotPass(decoder, cache, first, columns, None, none, states[0, :0])
        return _seconds(lambda: walk.run(states[:, :columns], 0, layers), model)

    def head(columns: int) -> float:
        return _seconds(lambda: model.exit_logits(states[:, :columns], model.last_exit), model)

    ways: list[Callable[[], float]] = [
        lambda: run(1), lambda: run(2), lambda: run(_TOKENS), lambda: head(1), lambda: head(2), lambda: head(_TOKENS)
    ]  # fmt: skip
    for way in ways:
        way()
    rounds = [[way() for way in ways] for _ in range(_ROUNDS if rows == 1 else _FEWER_ROUNDS)]
    one, two, many, head_one, head_two, head_many = (median(times) for times in zip(*rounds, strict=True))
    step = one + head_one
    more = max(0.0, (many + head_many - two - head_two) / (_TOKENS - 2))
    start = max(0.0, two + head_two - step - more)
    return DraftCosts(more / step, one / layers / step, head_one / step, start / step)


def _seconds(run: Callable[[], Any], model: Any) -> float:
    start = perf_counter()
    run()
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)
    return perf_counter() - start


__all__ = ["DraftCosts", "draft_costs", "forget_costs"]
