# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What a user may run instead of exits on an engine: stock models, and early exits as they are often published."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from transformers_cee.exits.outputs import ExitClassifierOutput


STOCK = "stock torch float32"
# Does a row leave? From the predictions and confidences (1 − entropy / log K) of the exits asked so far.
Leaves = Callable[[list[int], list[float]], bool]


def stock_of(model: Any, layers: int | None = None) -> nn.Module:
    """A stock model of the same size, as far as its time goes: heads have no part in it.

    Args:
        layers (`int`, *optional*): its depth; by default that of the model.
    """
    config = copy.deepcopy(model.config)
    if layers is not None:
        config.num_hidden_layers, config.exit_layers = layers, None
    made: nn.Module = model.stock_class(config)
    return made.eval()


def dynamic_int8(model: nn.Module) -> nn.Module:
    """A copy in torch's dynamic int8, whose scales are those of a whole batch: rows change each other's results."""
    made: nn.Module = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    return made


def by_entropy(threshold: float) -> Leaves:
    """As DeeBERT (Xin et al. 2020): at the first exit whose entropy over log K is below a threshold."""
    return lambda predictions, sure: 1 - sure[-1] < threshold


def by_patience(patience: float) -> Leaves:
    """As PABEE (Zhou et al. 2020): once so many exits in a row have repeated the one before."""

    def leaves(predictions: list[int], sure: list[float]) -> bool:
        streak = 0
        while streak + 1 < len(predictions) and predictions[-streak - 1] == predictions[-streak - 2]:
            streak += 1
        return streak >= patience

    return leaves


class SingleRows:
    """Early exits as a loop over single rows and layers that looks at each exit on the host, as they are often
    published.

    Args:
        model: a classifier with exits, in torch.
        leaves: says where a row leaves.
        first (`int`): layer (1-based) of the first exit at which it may.
    """

    def __init__(self, model: Any, leaves: Leaves, first: int = 1) -> None:
        self.model, self.leaves, self.first = model, leaves, first

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor, **more: Tensor) -> ExitClassifierOutput:
        found = [
            self._row(input_ids[row : row + 1], attention_mask[row : row + 1] != 0) for row in range(len(input_ids))
        ]
        layers = torch.tensor([layer for _, layer in found])
        return ExitClassifierOutput(logits=torch.cat([logits for logits, _ in found]), exit_layers=layers)

    def _row(self, input_ids: Tensor, mask: Tensor) -> tuple[Tensor, int]:
        model = self.model
        others = dict.fromkeys(("token_type_ids", "position_ids", "inputs_embeds"))
        batch = model.embed(mask, input_ids=input_ids, **others)
        run: tuple[Tensor, int] = model.walked(partial(self._walk, batch), model.stack(batch, {}).layers, {})["run"]
        return run

    def _walk(self, batch: Any, layers: Sequence[Callable[[Any], Tensor]]) -> tuple[Tensor, int]:
        model = self.model
        predictions: list[int] = []
        sure: list[float] = []
        logits = torch.empty(0)
        for number, layer in enumerate(layers, start=1):
            batch.hidden_states = layer(batch)
            if number not in model.layer_numbers:
                continue
            place = model.layer_numbers.index(number)
            logits = model.logits(model.state(batch.hidden_states, batch.padding_mask, place), place)
            probabilities = logits.softmax(-1)
            entropy = -(probabilities * probabilities.log()).sum().item()
            sure.append(1 - entropy / math.log(logits.shape[-1]))
            predictions.append(int(logits.argmax(-1).item()))
            if number >= self.first and self.leaves(predictions, sure):
                return logits, number
        return logits, len(layers)
