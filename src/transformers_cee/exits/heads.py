# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Pooling of hidden states into exit states, and the exit heads."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from transformers_cee.exits.by_layer import LayerModules, each_size


def first_token(hidden_states: Tensor, padding_mask: Tensor | None) -> Tensor:
    """State (rows, hidden) of each row's first unmasked token; column 0 without a mask."""
    if padding_mask is None:
        return hidden_states[:, 0]
    first = (padding_mask != 0).to(torch.int8).argmax(1)
    return hidden_states[torch.arange(first.shape[0], device=first.device), first]


def mean_token(hidden_states: Tensor, padding_mask: Tensor | None) -> Tensor:
    """Mean (rows, hidden) over each row's unmasked tokens, in float32 inside."""
    if padding_mask is None:
        return hidden_states.mean(1)
    weights = (padding_mask != 0).to(torch.float32).unsqueeze(-1)
    total = (hidden_states.float() * weights).sum(1)
    return (total / weights.sum(1).clamp_min(1.0)).to(hidden_states.dtype)


class ExitNorms(nn.Module):
    """One LayerNorm per exit, or nothing.

    Args:
        kind (`str`): `exit_norm` of the config.
        layers (sequence of `int`): layers (1-based) of all exits, the last one included.
        hidden_size (`int` or sequence of `int`): size of an exit state, or of each exit's.
        eps (`float`): of the norms.
    """

    def __init__(self, kind: str, layers: Sequence[int], hidden_size: int | Sequence[int], eps: float) -> None:
        super().__init__()
        own = layers if kind == "layer_norm" else ()
        self.norms = LayerModules(own, lambda size: nn.LayerNorm(size, eps=eps), each_size(hidden_size, layers))

    def forward(self, state: Tensor, index: int) -> Tensor:
        if not len(self.norms):
            return state
        return self.norms[index](state)


class ExitHeads(nn.Module):
    """Untied linear heads of the internal exits. The last exit keeps the architecture's own classifier.

    Args:
        layers (sequence of `int`): layers (1-based) of the internal exits.
        hidden_size (`int` or sequence of `int`): size of a state, or of each exit's.
        num_labels (`int`): size of logits.
        dropout (`float`): share of a state that is dropped in training.
    """

    def __init__(
        self, layers: Sequence[int], hidden_size: int | Sequence[int], num_labels: int, dropout: float
    ) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.heads = LayerModules(layers, lambda size: nn.Linear(size, num_labels), each_size(hidden_size, layers))

    def forward(self, state: Tensor, index: int) -> Tensor:
        """Logits (rows, labels) of internal exit `index` (0-based) from its state (rows, hidden)."""
        return self.heads[index](self.dropout(state) if self.training else state)
