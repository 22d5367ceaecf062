# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Roll-outs of a model's drafter over a known text: what it learns from.

From every token on it drafts a few tokens, each from the states of its own draft before it, as it does in use, and its
distribution is to be the model's (KL; training-time test of EAGLE-3, Li et al. 2025).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache

from transformers_cee.exits.cache_name import CACHE_NAME
from transformers_cee.exits.jump_drafter import JumpDrafter
from transformers_cee.exits.row_batch import SLIDING


# Weight of the squared error of predicted states, over their mean square.
_STATES = 0.1


@dataclass
class TextRead:
    """What the model made of a text: all but `keys` and `values` of shape (rows, time, …)."""

    input_ids: Tensor
    counts: Tensor
    embedded: Tensor
    before: Tensor
    behind: Tensor
    last: Tensor
    keys: Tensor
    values: Tensor


@torch.no_grad()
def read_text(model: Any, input_ids: Tensor, attention_mask: Tensor | None) -> TextRead:
    """One pass of the model over texts (rows, time), padded on either side."""
    layer, ids = model.config.drafter_layer, input_ids
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    cache = DynamicCache()
    output = model.get_decoder()(
        input_ids=ids, attention_mask=mask, use_cache=True, output_hidden_states=True, **{CACHE_NAME: cache}
    )
    hidden, held = output.hidden_states, cache.layers[layer - 1]
    behind = hidden[layer]
    return TextRead(
        ids,
        mask != 0,
        model.get_input_embeddings()(ids),
        hidden[layer - 1],
        behind,
        hidden[-1],
        held.keys,
        held.values,
    )


@dataclass
class RollOut:
    """What drafting so far ahead came to, as means over tokens.

    Args:
        loss (`Tensor`): KL and the weighted error of predicted states.
        kl (`Tensor`): KL of the drafter's distribution from the model's, over the drafter's vocabulary.
        accepted (`Tensor`): share of drafts that are the model's own choice.
    """

    loss: Tensor
    kl: Tensor
    accepted: Tensor


class _RollOutCache:
    """What the drafter's layer sees as its cache: the model's keys and values, then those of the roll-outs so far."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = [keys], [values]

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys.append(keys)
        self.values.append(values)
        return torch.cat(self.keys, 2), torch.cat(self.values, 2)


def roll_outs(model: Any, read: TextRead, ahead: int) -> Iterator[RollOut]:
    """Drafts from every token on, all in parallel: the k-th token of each roll-out sees what the model has of the
    tokens before it began, and what the roll-out has of its own."""
    drafter: JumpDrafter = model.exit_drafter
    config, layer = model.config, model.config.drafter_layer
    window = config.sliding_window if model.layer_types[layer - 1] == SLIDING else None
    time = read.input_ids.shape[1]
    # Short texts end sooner; of one token there is nothing to draft.
    ahead = min(ahead, time - 1)
    starts = time - ahead
    cache = _RollOutCache(read.keys, read.values)
    places = torch.arange(starts, device=read.input_ids.device) + 1
    columns = torch.arange(time, device=places.device)
    own = torch.eye(starts, dtype=torch.bool, device=places.device)
    head = model.lm_head.weight[drafter.token_ids]
    state = read.behind[:, :starts]
    for step in range(ahead):
        here = places + step
        embedded, counted = read.embedded[:, here], read.counts[:, here] & read.counts[:, places - 1]
        jumped = drafter.jump(state, embedded)
        seen = columns < places.unsqueeze(1)
        if window is not None:
            seen &= here.unsqueeze(1) - columns < window
        seen_by_row = seen & read.counts.unsqueeze(1)
        owns = own.expand(len(seen_by_row), -1, -1)
        # A row of padding alone sees itself.
        mask = torch.cat((seen_by_row, *[owns] * (step + 1)), 2).unsqueeze(1)
        if config._attn_implementation == "eager":
            mask = torch.zeros_like(mask, dtype=jumped.dtype).masked_fill(~mask, torch.finfo(jumped.dtype).min)
        positions = here.unsqueeze(0)
        state = drafter.layer(
            jumped,
            attention_mask=mask,
            position_embeddings=model.model.rotary_emb(jumped, positions),
            position_ids=positions,
            use_cache=True,
            **{CACHE_NAME: cache},
        )
        logits = F.linear(model.model.norm(drafter.read(state[counted])), head)
        with torch.no_grad():
            teacher = model.lm_head(read.last[:, here][counted]).float()
            chosen = teacher.argmax(-1)
            wanted = teacher.log_softmax(-1)[:, drafter.token_ids]
        said = logits.float().log_softmax(-1)
        kl = (wanted.exp() * (wanted - said)).sum(-1).mean()
        true = read.before[:, here][counted]
        error = (jumped[counted] - true).pow(2).mean() / true.pow(2).mean()
        accepted = (drafter.token_ids[said.argmax(-1)] == chosen).float().mean()
        yield RollOut(kl + _STATES * error, kl.detach(), accepted)


__all__ = ["RollOut", "TextRead", "read_text", "roll_outs"]
