# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A cache into which single rows can write, and which keeps the states of tokens that deeper layers have not seen."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from transformers_cee.exits.cache_name import CACHE_NAME
from transformers_cee.exits.row_batch import SLIDING


# Columns by which the buffers grow at least.
_GROWTH = 64
_CROPS_TO_LENGTH = "max_length" in inspect.signature(DynamicLayer.crop).parameters


class ExitCacheLayer(CacheLayerMixin):
    """Keys and values (batch, heads, time, head size) of one layer, in buffers with room for more columns.

    Where `DynamicLayer` copies everything for every new token, a new token's keys and values are written in place, for
    all rows or for some. Layers that look at a window of tokens keep all columns, too: their masks hide the rest.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self) -> None:
        super().__init__()
        self.length = 0
        # So many columns stay: some of them were taken over without what their window held before them.
        self.least = 0

    # `keys` and `values` are what other code reads and sets; the buffers behind them are longer.

    @property
    def keys(self) -> Tensor | None:
        return None if self._keys is None else self._keys[:, :, : self.length]

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._keys = value
        self.length = 0 if value is None else value.shape[-2]

    @property
    def values(self) -> Tensor | None:
        return None if self._values is None else self._values[:, :, : self.length]

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._values = value

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends columns for all rows; returns all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.reserve(key_states.shape[-2])
        return self.write(key_states, value_states)

    def take(self, layer: DynamicLayer) -> None:
        """Takes over the content of another layer; where it holds a window alone, zeros stand before that."""
        keys, values = layer.keys, layer.values
        forgotten = layer.get_seq_length() - keys.shape[-2]
        if forgotten:
            keys, values = (torch.cat((_room(one, forgotten), one), dim=-2) for one in (keys, values))
        self.update(keys, values)
        self.least = self.length if forgotten else 0

    def write(
        self, key_states: Tensor, value_states: Tensor, rows: Tensor | None = None, only: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`put`, then all keys and values of these rows."""
        self.put(key_states, value_states, rows, only)
        assert self._keys is not None and self._values is not None
        # Called for every layer of every step: single tokens feel each view that is made.
        keys, values = self._keys.narrow(2, 0, self.length), self._values.narrow(2, 0, self.length)
        if rows is None:
            return keys, values
        return keys.index_select(0, rows), values.index_select(0, rows)

    def reserve(self, columns: int) -> None:
        """Adds columns, which hold nothing meaningful until they are written."""
        assert self._keys is not None and self._values is not None
        self.length += columns
        capacity = self._keys.shape[-2]
        if self.length > capacity:
            room = max(_GROWTH, self.length // 2) + self.length - capacity
            self._keys = torch.cat((self._keys, _room(self._keys, room)), dim=-2)
            self._values = torch.cat((self._values, _room(self._values, room)), dim=-2)

    def put(
        self, key_states: Tensor, value_states: Tensor, rows: Tensor | None = None, only: Tensor | None = None
    ) -> None:
        """Writes the last columns, for all rows or some.

        Args:
            key_states, value_states (`Tensor` of shape `(rows, heads, columns, head size)`): what to write.
            rows (`LongTensor` of shape `(rows,)`, *optional*): rows of the cache; None stands for all in order.
            only (`BoolTensor` of shape `(rows, columns)`, *optional*): what is False keeps its old content.
        """
        columns = key_states.shape[-2]
        start = self.length - columns
        for buffer, new in ((self._keys, key_states), (self._values, value_states)):
            assert buffer is not None
            place, new = buffer.narrow(2, start, columns), new.to(buffer.dtype)
            if only is not None:
                old = place if rows is None else place.index_select(0, rows)
                new = torch.where(only[:, None, :, None], new, old)
            if rows is None:
                place.copy_(new)
            else:
                place.index_copy_(0, rows, new)

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """What `get_max_length` was called before transformers 5.16."""
        return -1

    def reset(self) -> None:
        self.keys = self.values = None
        self.least = 0
        self.is_initialized = False

    def crop(self, amount: int) -> None:
        """Removes so many of the last columns, given as a negative number; before transformers 5.16, whose own caches
        do that too, a number from 0 on says how many columns stay."""
        self.length = self.cropped(amount)

    def cropped(self, amount: int) -> int:
        """Columns that `crop` would leave.

        Raises:
            ValueError: a number that `crop` does not take, or windows would reach what another cache had forgotten.
        """
        length = self.length
        if amount < 0:
            length = max(0, self.length + amount)
        elif _CROPS_TO_LENGTH:
            length = min(self.length, amount)
        elif amount > 0:
            raise ValueError(f"`tokens_to_remove`={amount} must be negative: so many columns are removed.")
        if length < self.least:
            raise ValueError(
                f"The cache cannot be cropped to {length} tokens: layers that look at a window were taken over from a "
                f"cache of {self.least} tokens, which had forgotten what stood before its last window. Run the prompt "
                "with an `EarlyExitCache` instead."
            )
        return length

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._select(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self._select(lambda tensor: tensor[indices.to(tensor.device)])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def _select(self, take: Any) -> None:
        """Applies `take` to the content; the buffers keep room for the next column."""
        assert self._keys is not None and self._values is not None
        self._keys = torch.cat((take(self.keys), _room(take(self._keys[:, :, :0]), _GROWTH)), dim=-2)
        self._values = torch.cat((take(self.values), _room(take(self._values[:, :, :0]), _GROWTH)), dim=-2)


def _room(like: Tensor, columns: int) -> Tensor:
    # Zeros, since attention multiplies what it masks by 0.
    return like.new_zeros(*like.shape[:2], columns, like.shape[-1])


class WaitingTokens:
    """The last tokens of each row whose deeper keys and values are missing, and their states where they wait.

    In each row a later token never waits deeper than an earlier one: a token can pass a layer only together with all
    that wait there. So what waits at a layer is a run of columns that ends with the row.

    Args:
        states (`Tensor` of shape `(batch, columns, hidden)`): input of the layer at which each token waits.
        positions (`LongTensor` of shape `(batch, columns)`): position ids.
        layers_done (`LongTensor` of shape `(batch, columns)`, on the host): layers that each token has passed.
    """

    def __init__(self, states: Tensor, positions: Tensor, layers_done: Tensor) -> None:
        self.states, self.positions, self.layers_done = states, positions, layers_done

    def __len__(self) -> int:
        return self.states.shape[1]

    def append(self, other: "WaitingTokens") -> "WaitingTokens":
        """The columns of both, `other` at the end."""
        return WaitingTokens(
            torch.cat((self.states, other.states), dim=1),
            torch.cat((self.positions, other.positions), dim=1),
            torch.cat((self.layers_done, other.layers_done), dim=1),
        )

    def last(self, columns: int) -> "WaitingTokens":
        start = max(0, len(self) - columns)
        return WaitingTokens(self.states[:, start:], self.positions[:, start:], self.layers_done[:, start:])

    def first(self, columns: int) -> "WaitingTokens":
        return WaitingTokens(self.states[:, :columns], self.positions[:, :columns], self.layers_done[:, :columns])

    def without_done(self, num_layers: int) -> "WaitingTokens":
        """Drops leading columns in which every row's token has passed all layers."""
        unfinished = (self.layers_done < num_layers).any(0)
        return self.last(len(self) - int(unfinished.int().argmax()) if bool(unfinished.any()) else 0)

    def select(self, rows: Tensor) -> "WaitingTokens":
        device = self.states.device
        return WaitingTokens(
            self.states[rows.to(device)], self.positions[rows.to(device)], self.layers_done[rows.cpu()]
        )


class EarlyExitCache(DynamicCache):
    """Cache of a model whose tokens leave early: a [`~transformers.DynamicCache`] to whoever looks at it.

    Tokens that wait for their deeper keys and values (`skipped_kv="deferred"`) are kept here with the mask that they
    were run with, so that reordering beams, cropping and selecting rows carry them along. `generate` completes them
    before it returns the cache. The layers behind which its tokens left are `exit_layers`.

    Args:
        num_layers (`int`): layers of the model.
    """

    def __init__(self, num_layers: int) -> None:
        # A dynamic cache would make layers of its own.
        Cache.__init__(self, layers=[ExitCacheLayer() for _ in range(num_layers)])
        self.waiting: WaitingTokens | None = None
        # Of all columns (rows, columns), 1 at tokens and 0 at padding, as the last step had it; None without padding.
        self.attention_mask: Tensor | None = None
        # Exit layers of columns up to the last token that left early, and some room; the rest went to the end.
        self._left: Tensor | None = None

    @property
    def exit_layers(self) -> Tensor:
        """Layer (1-based; rows, columns) behind which each token left, the last one where it went to the end.

        Raises:
            ValueError: the cache is empty.
        """
        keys = self.layers[0].keys
        if keys is None:
            raise ValueError(f"`{CACHE_NAME}` is empty.")
        found = torch.full((len(keys), keys.shape[-2]), len(self.layers), device=keys.device)
        if self._left is not None:
            known = self._left[:, : found.shape[1]]
            found[:, : known.shape[1]] = known
        return found

    def note_exits(self, exit_layers: Tensor) -> None:
        """Keeps the layers (1-based; rows, columns) behind which the last tokens left."""
        length = self.get_seq_length()
        known = 0 if self._left is None else self._left.shape[1]
        if known < length:
            size = (len(exit_layers), length + max(_GROWTH, length // 2) - known)
            room = exit_layers.new_full(size, len(self.layers))
            self._left = room if self._left is None else torch.cat((self._left, room), dim=1)
        assert self._left is not None
        self._left[:, length - exit_layers.shape[1] : length] = exit_layers

    @classmethod
    def from_cache(cls, cache: Cache, num_layers: int, layer_types: Sequence[str] | None = None) -> "EarlyExitCache":
        """The content of a dynamic cache. Both share their layers from then on, so the other one fills as well.

        Args:
            layer_types (sequence of `str`, *optional*):
                Types of attention of the model's layers; by default none looks at a window alone.

        Raises:
            ValueError: the cache is static, quantized or offloaded, or keeps a window of what layers look at in full.
        """
        if isinstance(cache, cls):
            return cache
        slides = [kind == SLIDING for kind in layer_types or [""] * len(cache.layers)]
        others = [
            layer
            for layer, one in zip(cache.layers, slides, strict=False)
            if type(layer) not in (DynamicLayer, ExitCacheLayer, *((DynamicSlidingWindowLayer,) if one else ()))
        ]
        if others or cache.offloading or len(cache.layers) > num_layers:
            kind = type(others[0]).__name__ if others else type(cache).__name__
            raise ValueError(
                f"`{CACHE_NAME}` of layers {kind} cannot hold tokens that leave early; accepted are a plain "
                "`DynamicCache` and an `EarlyExitCache`. Set `exit_threshold`=1.0 to generate without exits."
            )
        own = cls(num_layers)
        for index, layer in enumerate(cache.layers):
            if isinstance(layer, ExitCacheLayer):
                own.layers[index] = layer
            elif layer.is_initialized:
                own.layers[index].take(layer)
        cache.layers[:] = own.layers
        own.layers = cache.layers
        # What `generate` asks of a cache that it was given.
        own._is_user_defined = getattr(cache, "_is_user_defined", False)  # type: ignore[attr-defined]
        return own

    def reserve(self) -> None:
        """Adds one column to every layer.

        Raises:
            ValueError: the cache is empty; the first tokens need a pass through all layers.
        """
        for layer in self.layers:
            if not layer.is_initialized:
                raise ValueError(f"`{CACHE_NAME}` is empty: run the prompt at full depth first, as `generate` does.")
            layer.reserve(1)

    def crop(self, amount: int) -> None:
        """As `Cache.crop` of the installed release; see `ExitCacheLayer.crop`."""
        before = self.get_seq_length()
        for layer in self.layers:
            # Before any of them has lost something.
            layer.cropped(amount)
        super().crop(amount)
        length = self.get_seq_length()
        if self.waiting is not None:
            self._wait(self.waiting.first(max(0, len(self.waiting) + length - before)))
        if self.attention_mask is not None:
            self.attention_mask = self.attention_mask[:, :length]
        if self._left is not None:
            self._left[:, length:] = len(self.layers)

    def reset(self) -> None:
        super().reset()
        self.waiting = self.attention_mask = self._left = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.waiting is not None or self._left is not None:
            keys = self.layers[0].keys
            assert keys is not None
            self._select_rows(torch.arange(len(keys) // repeats).repeat_interleave(repeats))

    def _select_rows(self, rows: Tensor) -> None:
        if self._left is not None:
            self._left = self._left[rows.to(self._left.device)]
        if self.waiting is not None:
            self._wait(self.waiting.select(rows))
            if self.attention_mask is not None:
                self.attention_mask = self.attention_mask[rows.to(self.attention_mask.device)]

    def _wait(self, waiting: WaitingTokens) -> None:
        self.waiting = waiting if len(waiting) else None


class RowView:
    """What a layer sees of the cache: some rows, whose last columns it writes.

    Args:
        cache (`EarlyExitCache`): the cache, its columns reserved.
        rows (`LongTensor`, *optional*): rows of the cache; None stands for all in order.
        only (`BoolTensor` of shape `(rows, columns)`, *optional*): what is False keeps its old content.
    """

    def __init__(self, cache: EarlyExitCache, rows: Tensor | None = None, only: Tensor | None = None) -> None:
        self.cache, self.rows, self.only = cache, rows, only

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return self.cache.layers[layer_idx].write(key_states, value_states, self.rows, self.only)
