# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Slow and independent: a decoder's exits on known text, one unpadded row and one token at a time.

Of the package nothing is called; of the model only weights and, for hidden states, transformers' own LLaMA stack.
"""

from __future__ import annotations

from dataclasses import dataclass

import reference
import torch
from torch import Tensor


@dataclass
class Token:
    """A counted token: the position before it, which predicts it, at every exit. Tensors keep their gradient."""

    row: int
    label: int
    may_exit: bool
    states: list[Tensor]
    logits: list[Tensor]

    @property
    def losses(self) -> list[Tensor]:
        """Cross-entropy at every exit."""
        return [torch.logsumexp(logits, 0) - logits[self.label] for logits in self.logits]

    @property
    def predictions(self) -> list[int]:
        return [int(logits.argmax()) for logits in self.logits]

    def memorized_layer(self, layers: list[int]) -> int:
        """The smallest exit layer from which on every exit predicts the token; the last layer if there is none."""
        right = [prediction == self.label for prediction in self.predictions]
        return next((layer for index, layer in enumerate(layers) if all(right[index:])), layers[-1])

    def exit_probabilities(self, model, first_layer: int = 1) -> list[float]:
        """Exit distribution by the policies, one product at a time."""
        layers = reference.exit_layers(model.config)
        reached, shares = 1.0, []
        for index, layer in enumerate(layers[:-1]):
            p = 0.0
            if self.may_exit and layer >= first_layer:
                history = self.logits[: index + 1]
                p = reference.policy_score(model, self.states[index], history, "single_label_classification", index)
            shares.append(reached * p)
            reached *= 1 - p
        return [*shares, reached]


def text_tokens(model, rows) -> list[Token]:
    """All counted tokens of rows with `input_ids` and, unless they are plain text, `labels`."""
    return [token for number, row in enumerate(rows) for token in row_tokens(model, row, number)]


def row_tokens(model, row: dict, number: int = 0) -> list[Token]:
    """The counted tokens of one row, left to right."""
    ids = list(row["input_ids"])
    labels = list(row.get("labels", ids))
    hidden = model.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
    layers = reference.exit_layers(model.config)
    tokens = []
    for position in range(len(ids) - 1):
        if labels[position + 1] == -100:
            continue
        states, logits = [], []
        for index, layer in enumerate(layers):
            # The stack hands its last hidden state out normed.
            state = hidden[layer][0, position]
            states.append(state if index == len(layers) - 1 else normed(model, state, index))
            logits.append(head(model, states[-1], index))
        may_exit = position > 0 and labels[position] != -100
        tokens.append(Token(number, labels[position + 1], may_exit, states, logits))
    return tokens


def normed(model, state: Tensor, index: int) -> Tensor:
    """Normed state (hidden,) of internal exit `index`."""
    kind, eps = model.config.exit_head, model.config.rms_norm_eps
    if kind == "layernorm_linear":
        norm = model.exit_norms.norms[index]
        centred = state - state.mean()
        return centred / (centred.square().mean() + eps).sqrt() * norm.weight + norm.bias
    weight = model.model.norm.weight if kind == "shared" else model.exit_norms.norms[index].weight
    return state / (state.square().mean() + eps).sqrt() * weight


def head(model, state: Tensor, index: int) -> Tensor:
    """Logits (vocabulary,) of exit `index`."""
    kind = model.config.exit_head
    if index < len(reference.exit_layers(model.config)) - 1:
        if kind in ("untied", "layernorm_linear"):
            own = model.exit_heads.heads[index]
            logits = own.weight @ state
            return logits if own.bias is None else logits + own.bias
        if kind == "low_rank":
            adapter = model.exit_heads.heads[index]
            state = state + adapter.up.weight @ (adapter.down.weight @ state)
    return model.lm_head.weight @ state
