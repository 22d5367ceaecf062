# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Exits and layers of a toy architecture, for tests of the walks alone."""

from __future__ import annotations

import torch
from torch import Tensor

from transformers_cee.exits.row_batch import RowBatch


HIDDEN, LAYERS = 3, 5


class ToyExits:
    """Exits read the mean of unmasked tokens; a test says what a layer does, and notes its calls.

    Args:
        layer_numbers: layers (1-based) of the exits.
    """

    def __init__(self, layer_numbers: list[int]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.layer_numbers = layer_numbers
        self.weights = torch.randn(LAYERS, HIDDEN, HIDDEN, generator=generator)
        self.heads = torch.randn(LAYERS, HIDDEN, 2, generator=generator)
        self.calls: list[tuple] = []

    def state(self, hidden: Tensor, padding_mask: Tensor | None, index: int) -> Tensor:
        if padding_mask is None:
            return hidden.mean(1)
        share = padding_mask.float().unsqueeze(-1)
        return (hidden * share).sum(1) / share.sum(1)

    def logits(self, state: Tensor, index: int) -> Tensor:
        return state @ self.heads[index]

    def layers(self):
        return [lambda batch, number=number: self.layer(batch, number) for number in range(LAYERS)]

    def layer(self, batch: RowBatch, number: int) -> Tensor:
        """Hidden states behind a layer (0-based)."""
        raise NotImplementedError
