# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What the exits of one call of `generate` cost and save. Both are counted, never measured: no text depends on how
fast a machine was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from transformers_cee.exits.criteria import ExitCriterion


# Share of all steps' cost that asking in vain may take, beside the first two steps.
_ALLOWANCE = 0.01
# What the keys and values of a skipped layer cost, in layers: at most so much of a layer's weights project them.
_PROJECTION = 0.15
# What an exit costs beside an LM head, in layers, by type of device: its norm and score, and that the host waits;
# meanwhile a GPU gets no work.
_ASKING = {"cpu": 0.2}
_ASKING_ELSEWHERE = 1.0


@dataclass
class ExitAccount:
    """Tells before each step whether its exits are asked: while they have cost no more than they saved.

    One step is asked in vain before anything is known, a second one is paid by that step's credit, and then one as
    often as a hundredth of what ran pays for it. Costs are those of weights that are read, which single tokens wait
    for, so that rows which left early save nothing while others of their batch go on.

    Args:
        open_layers (sequence of `int`): layers (1-based) of the internal exits at which tokens may leave.
        num_layers (`int`): layers of the model.
        head (`float`): weights of the LM head over those of a layer.
        asking (`float`): what an exit costs beside any LM head, in layers.
        reads_heads (`bool`): does each exit that is asked need an LM head?
        shares_head (`bool`): do tokens that leave at different exits need one LM head in all?
    """

    open_layers: Sequence[int]
    num_layers: int
    head: float
    asking: float
    reads_heads: bool
    shares_head: bool
    steps: int = 0
    balance: float = 0.0
    is_asked: bool = False

    @property
    def full(self) -> float:
        """Cost of a step without exits, in layers."""
        return self.num_layers + self.head

    @property
    def in_vain(self) -> float:
        """Cost of asking all exits of a step, in layers, if some token goes to the end."""
        heads = self.reads_heads or not self.shares_head
        return len(self.open_layers) * (self.asking + (self.head if heads else 0.0))

    def ask(self) -> bool:
        """Are the exits of the next step asked?"""
        # Sums of many numbers may miss equality by a little.
        self.is_asked = self.balance + self.in_vain + _ALLOWANCE * self.full * self.steps > -1e-6
        return self.is_asked

    def note(self, exit_layers: Tensor) -> None:
        """Counts a step that has run; exit layers (rows,) are 1-based."""
        self.steps += 1
        if not self.is_asked:
            return
        left = set(exit_layers.tolist())
        deepest = max(left)
        asked = sum(layer <= deepest for layer in self.open_layers)
        if self.reads_heads:
            heads = asked + (deepest == self.num_layers)
        else:
            heads = 1 if self.shares_head else len(left)
        skipped = self.num_layers - deepest
        cost = deepest + _PROJECTION * skipped + self.asking * asked + self.head * heads
        self.balance += self.full - cost


def open_account(model: Any, criterion: ExitCriterion, first_exit: int) -> ExitAccount:
    """The account of a call.

    Args:
        model (`EarlyExitCausalLM`): whose layers and LM head are weighed.
        criterion (`ExitCriterion`): with the thresholds of the call.
        first_exit (`int`): exit (0-based) before which no token leaves.
    """
    layers = model.layers
    numbers = model.layer_numbers[:-1]
    open_layers = [layer for index, layer in enumerate(numbers) if index >= first_exit and criterion.can_exit(index)]
    head, layer = _bytes(model.lm_head), sum(map(_bytes, layers)) / len(layers)
    return ExitAccount(
        open_layers,
        len(layers),
        head / max(layer, 1),
        _ASKING.get(model.device.type, _ASKING_ELSEWHERE),
        criterion.needs_logits,
        model.exit_heads.share_head,
    )


def _bytes(module: nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in module.parameters())


__all__ = ["ExitAccount", "open_account"]
