# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Passes over texts that grow at different speeds. A token's keys and values stand in that column of the cache which
is its own place in its row, but for other choices of a token, which stand behind all until one is moved there. To take
tokens back is to remember a smaller length: the masks hide what stands behind it until it is written over."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from transformers_cee.exits.cache_name import CACHE_NAME
from transformers_cee.exits.row_batch import SLIDING
from transformers_cee.generation.cache import EarlyExitCache
from transformers_cee.generation.decoding import Decoder


class SlotPass:
    """Tokens of one pass, in the columns `first`, `first` + 1, … of each row.

    Args:
        decoder (`Decoder`): the decoder.
        cache (`EarlyExitCache`): its layers get the columns that they lack.
        first (`LongTensor` of shape `(rows,)`): column of each row's first token.
        columns (`int`): tokens of each row.
        padding (`Tensor` of shape `(rows, prompt)`, *optional*): 1 at tokens, 0 at padding, of the first columns.
        shifts (`LongTensor` of shape `(rows,)`): by how much a token's column exceeds its position.
        like (`Tensor`): of the type and on the device of hidden states.
        others (`int`, *optional*, defaults to 0):
            So many of the tokens, the last ones, are other choices of each row's second one, which no token sees.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: EarlyExitCache,
        first: Tensor,
        columns: int,
        padding: Tensor | None,
        shifts: Tensor,
        like: Tensor,
        others: int = 0,
    ) -> None:
        low, high = int(first.min()), int(first.max())
        # The column where all rows begin, if it is one for all.
        self.aligned = low if low == high else None
        self.decoder, self.cache, self.total = decoder, cache, high + columns
        self.columns = first.unsqueeze(1) + torch.arange(columns, device=first.device)
        self.rows = torch.arange(len(first), device=first.device).unsqueeze(1)
        # The column that each token has once it stands.
        self.places = self.columns
        if others:
            seconds = self.columns[:, 1:2].expand(-1, others)
            self.places = torch.cat((self.columns[:, :-others], seconds), 1)
        self.positions = self.places - shifts.unsqueeze(1)
        shape = like.new_empty(len(first), columns, decoder.config.hidden_size)
        self.rotary = decoder.rotary(shape, self.positions)
        self.masks = {kind: self._mask(kind, padding, shape) for kind in dict.fromkeys(decoder.layer_types)}
        for layer in cache.layers:
            if layer.length < self.total:
                layer.reserve(self.total - layer.length)

    def run(self, states: Tensor, start: int, stop: int) -> Tensor:
        """The layers `start..stop−1` (0-based) on input states (rows, columns, hidden)."""
        for index in range(start, stop):
            states = self.run_layer(self.decoder.layers[index], index, states)
        return states

    def run_layer(self, layer: nn.Module, index: int, states: Tensor) -> Tensor:
        """A layer that stands at `index` (0-based) on input states (rows, columns, hidden)."""
        found: Tensor = layer(
            states,
            attention_mask=self.masks[self.decoder.layer_types[index]],
            position_embeddings=self.rotary,
            position_ids=self.positions,
            use_cache=True,
            **{CACHE_NAME: self},
        )
        return found

    def move(self, rows: Tensor, source: Tensor) -> None:
        """Puts other choices in the place of the second token.

        Args:
            rows (`LongTensor` of shape `(rows to change,)`): rows.
            source (`LongTensor` of shape `(rows to change,)`): which token of the pass (0-based) comes there.
        """
        from_columns, to_columns = self.columns[rows, source], self.columns[rows, 1]
        for layer in self.cache.layers:
            for held in (layer.keys, layer.values):
                assert held is not None
                held[rows, :, to_columns] = held[rows, :, from_columns]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """What a layer takes for its cache: writes the pass's columns, gives all up to the last."""
        layer = self.cache.layers[layer_idx]
        found = []
        for held, new in ((layer.keys, key_states), (layer.values, value_states)):
            assert held is not None
            if self.aligned is None:
                held[self.rows, :, self.columns] = new.transpose(1, 2).to(held.dtype)
            else:
                held.narrow(2, self.aligned, new.shape[2]).copy_(new)
            found.append(held.narrow(2, 0, self.total))
        return found[0], found[1]

    def _mask(self, kind: str, padding: Tensor | None, like: Tensor) -> Tensor | None:
        """What is added to attention scores (rows, 1, columns, all columns); None where all is seen."""
        window = self.decoder.config.sliding_window if kind == SLIDING else None
        single = self.aligned is not None and self.columns.shape[1] == 1
        if single and padding is None and (window is None or self.total <= window):
            return None
        columns = torch.arange(self.total, device=self.columns.device)
        ahead, own = self.places.unsqueeze(-1) - columns, self.columns.unsqueeze(-1) == columns
        seen = (ahead > 0) | own
        if window is not None:
            seen &= ahead < window
        if padding is not None:
            known = torch.ones(len(padding), self.total, dtype=torch.bool, device=seen.device)
            known[:, : padding.shape[1]] = padding[:, : self.total] != 0
            # A row of padding alone would have nothing to look at.
            seen = seen & known.unsqueeze(1) | own
        # Of numbers: what is true or false would be turned into them by every layer anew.
        hidden = ~seen.unsqueeze(1)
        return torch.zeros_like(hidden, dtype=like.dtype).masked_fill(hidden, torch.finfo(like.dtype).min)


__all__ = ["SlotPass"]
