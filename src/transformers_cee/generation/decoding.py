# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""One decode step with exits: a token per row walks the layers, and the layers that it skips still get its keys and
values, by `copy` or `deferred`.

The decoder is known by little: layers of transformers' usual signature, its rotary embedding, and a function that
projects a state to a layer's keys and values.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from transformers_cee.exits.cache_name import CACHE_NAME
from transformers_cee.exits.criteria import ExitCriterion
from transformers_cee.exits.recording import Place
from transformers_cee.exits.row_batch import Rotary, RowBatch
from transformers_cee.exits.runner import ExitRun, Exits, Layer, run_exits
from transformers_cee.generation.cache import EarlyExitCache, ExitCacheLayer, RowView, WaitingTokens
from transformers_cee.generation.masks import causal_masks


@dataclass
class Decoder:
    """What a decode step needs of a model.

    Args:
        config (`PreTrainedConfig`): the model's.
        layers (sequence of `nn.Module`): decoder layers.
        layer_types (sequence of `str`): which kind of attention each layer has, see `generation.masks`.
        rotary (`Callable`): cosines and sines (rows, time, head size) from hidden states and position ids.
        project (`Callable`):
            Keys and values (layers, rows, heads, time, head size) that the layers `start..stop−1` (0-based) make of
            input states (rows, time, hidden), with the cosines and sines of their positions.
    """

    config: PreTrainedConfig
    layers: Sequence[nn.Module]
    layer_types: Sequence[str]
    rotary: Callable[[Tensor, Tensor], Rotary]
    project: Callable[[int, int, Tensor, Rotary], tuple[Tensor, Tensor]]


@torch.no_grad()
def decode_step(
    decoder: Decoder,
    exits: Exits,
    criterion: ExitCriterion,
    cache: EarlyExitCache,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor,
    *,
    first_exit: int = 0,
    skipped_kv: str = "copy",
    layer_arguments: dict[str, Any] | None = None,
    places: list[Place] | None = None,
    head_state: Callable[[Tensor, int], Tensor] | None = None,
) -> ExitRun:
    """Runs one token per row until all have left, without gradients.

    Args:
        hidden_states (`Tensor` of shape `(rows, 1, hidden)`): embedded tokens.
        attention_mask (`Tensor` of shape `(rows, past + 1)`, *optional*): 1 at tokens, 0 at padding.
        position_ids (`LongTensor` of shape `(1 or rows, 1)`): positions of the tokens.
        first_exit (`int`): exit (0-based) before which no token leaves.
        skipped_kv (`str`): `"copy"` or `"deferred"`.
        layer_arguments (`dict`, *optional*): further keyword arguments of the layers.
        places (`list[Place]`, *optional*): gets, for each layer that runs, which rows it saw.
        head_state (`Callable`, *optional*): as in `run_exits`.
    """
    past = cache.get_seq_length()
    masks = _masks(decoder, hidden_states, attention_mask, past, position_ids)
    cache.reserve()
    cache.attention_mask = attention_mask
    step_class = {"copy": _CopyStep, "deferred": _DeferredStep}[skipped_kv]
    step = step_class(decoder, cache, hidden_states, attention_mask, position_ids, layer_arguments or {})
    layers: list[Layer] = [step.bind(index) for index in range(len(decoder.layers))]
    run = run_exits(
        RowBatch(hidden_states, masks),
        layers,
        exits,
        criterion,
        first_exit,
        step.leave,
        score_closed=False,
        places=places,
        head_state=head_state,
        drops=partial(drop_pays, hidden_states.device.type, skipped_kv),
    )
    step.finish(run)
    cache.note_exits(run.exit_layers.unsqueeze(1))
    return run


def drop_pays(device: str, skipped_kv: str, rows: int, staying: int) -> bool:
    """Does a layer become cheaper if those rows go on alone which have not left?

    A layer on one token per row waits for its weights, which are read once for all rows; what the rows that left add
    to that is less than what it takes to gather keys and values of the others. On a CPU, where arithmetic soon takes
    longer than reading, it is more as soon as most rows have left. A token that waits (`"deferred"`) saves nothing by
    it: the same arithmetic is done later, in a column of its own.

    Args:
        device (`str`): type of the device that the layers run on.
        skipped_kv (`str`): `"copy"` or `"deferred"`.
        rows (`int`): rows of the batch.
        staying (`int`): those of them that have not left.
    """
    return device == "cpu" and skipped_kv == "copy" and 4 * staying <= rows


@torch.no_grad()
def complete_waiting(decoder: Decoder, cache: EarlyExitCache, layer_arguments: dict[str, Any] | None = None) -> None:
    """Runs all waiting tokens through the layers that they have not seen; the cache then holds what the full model
    would have put there."""
    if cache.waiting is None:
        return
    waiting, mask = cache.waiting, cache.attention_mask
    step = _DeferredStep(decoder, cache, waiting.states, mask, waiting.positions, layer_arguments or {})
    step.has_new = False
    for index in range(len(decoder.layers)):
        step.catch_up(index)
    cache.waiting = None


class _Step(ABC):
    """What both ways of filling skipped layers have in common."""

    def __init__(
        self,
        decoder: Decoder,
        cache: EarlyExitCache,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        layer_arguments: dict[str, Any],
    ) -> None:
        self.decoder, self.cache = decoder, cache
        self.attention_mask, self.layer_arguments = attention_mask, layer_arguments
        self.num_rows = len(hidden_states)
        self.position_ids = position_ids
        self.rotary = decoder.rotary(hidden_states, position_ids)
        self.left: list[tuple[Tensor, Tensor, int]] = []

    def leave(self, rows: Tensor, hidden_states: Tensor, layer: int) -> None:
        """Notes rows that no layer behind this one (1-based) sees."""
        self.left.append((rows, hidden_states, layer))

    def rows_of(self, batch: RowBatch) -> Tensor | None:
        """The batch's rows of the cache; None while all are there."""
        return None if len(batch.hidden_states) == self.num_rows else batch.index

    def run_layer(
        self, index: int, states: Tensor, mask: Tensor | None, rotary: Rotary, positions: Tensor, view: RowView
    ) -> Tensor:
        return self.decoder.layers[index](
            states,
            attention_mask=mask,
            position_embeddings=rotary,
            position_ids=positions,
            use_cache=True,
            **{CACHE_NAME: view},
            **self.layer_arguments,
        )

    @abstractmethod
    def bind(self, index: int) -> Layer:
        """The layer `index` (0-based) as a function of the batch."""

    @abstractmethod
    def finish(self, run: ExitRun) -> None:
        """Sees to the layers that tokens have skipped, once all rows have left."""

    def run_token(self, index: int, batch: RowBatch) -> Tensor:
        """The layer on the batch's new tokens alone."""
        rows = self.rows_of(batch)
        rotary, positions = _rows_of_rotary(self.rotary, rows), _rows(self.position_ids, rows)
        view = RowView(self.cache, rows)
        mask = batch.mask_of(self.decoder.layer_types[index])
        return self.run_layer(index, batch.hidden_states, mask, rotary, positions, view)


class _CopyStep(_Step):
    """Skipped layers take a token's keys and values from its exit state (Elbayad et al. 2020; CALM, Schuster et al.
    2022)."""

    def bind(self, index: int) -> Layer:
        return lambda batch: self.advance(index, batch)

    def advance(self, index: int, batch: RowBatch) -> Tensor:
        """The layer on the batch's new tokens. Those that left keep the states of their exits, of which the next
        layers make keys and values as they do of any."""
        after = self.run_token(index, batch)
        if batch.left is None:
            return after
        return torch.where(batch.left[:, None, None], batch.hidden_states, after)

    def finish(self, run: ExitRun) -> None:
        """Fills the skipped layers, those between two exits in one go for all rows that skipped them."""
        ends = [layer for _, _, layer in self.left[1:]] + [len(self.decoder.layers)]
        for number, stop in enumerate(ends[: len(self.left)]):
            gone = self.left[: number + 1]
            states = gone[0][1] if number == 0 else torch.cat([part for _, part, _ in gone])
            # All rows at once come in their own order.
            rows = None if len(gone[0][0]) == self.num_rows else torch.cat([part for part, _, _ in gone])
            start = gone[-1][2]
            keys, values = self.decoder.project(start, stop, states, _rows_of_rotary(self.rotary, rows))
            for index, layer in enumerate(self.cache.layers[start:stop]):
                layer.put(keys[index], values[index], rows)


class _DeferredStep(_Step):
    """A token that left waits at the next layer; when a later token of its row comes there, both pass it together
    (EE-LLM, Chen et al. 2024; FREE, Bae et al. 2023). Keys and values are those of the full model.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.waiting = self.cache.waiting
        self.block_masks: Mapping[str, Tensor | None] = {}
        self.block_rotary: Rotary | None = None
        self.has_block = False
        # Does a block of columns end with the new tokens?
        self.has_new = True

    def bind(self, index: int) -> Layer:
        return lambda batch: self.advance(index, batch)

    def advance(self, index: int, batch: RowBatch) -> Tensor:
        """The layer on the batch's new tokens and on what waits there in their rows."""
        rows = self.rows_of(batch)
        pending = None if self.waiting is None else self._pending(index, rows)
        if pending is None:
            return self.run_token(index, batch)
        return self._run_block(index, pending, rows, batch.hidden_states)

    def catch_up(self, index: int) -> None:
        """The layer on all that waits there, without new tokens."""
        pending = self._pending(index, None)
        if pending is not None:
            self._run_block(index, pending, None, None)

    def _pending(self, index: int, rows: Tensor | None) -> Tensor | None:
        """What waits at a layer in the last columns, (rows, columns) on the host, as few columns as possible."""
        assert self.waiting is not None
        done = self.waiting.layers_done if rows is None else self.waiting.layers_done[rows.cpu()]
        waits = done == index
        columns = waits.any(0)
        if not bool(columns.any()):
            return None
        return waits[:, int(columns.int().argmax()) :]

    def _run_block(self, index: int, pending: Tensor, rows: Tensor | None, new: Tensor | None) -> Tensor:
        """A layer on the last columns of some rows. Tokens among them that have passed it already are computed along
        and thrown away."""
        waiting = self.waiting
        assert waiting is not None
        count = pending.shape[1]
        place = waiting.states[:, len(waiting) - count :]
        states = old = place if rows is None else place.index_select(0, rows)
        only = pending.to(states.device)
        if new is not None:
            states = torch.cat((states, new), dim=1)
            writes = torch.cat((only, only.new_ones(len(only), 1)), dim=1)
        else:
            writes = only
        length = states.shape[1]
        mask, rotary, positions = self._block(self.decoder.layer_types[index], length, rows)
        view = RowView(self.cache, rows, None if bool(pending.all()) else writes)
        after = self.run_layer(index, states, mask, rotary, positions, view)
        moved = torch.where(only[..., None], after[:, :count], old)
        if rows is None:
            place.copy_(moved)
            waiting.layers_done[:, len(waiting) - count :][pending] = index + 1
        else:
            place.index_copy_(0, rows, moved)
            host = rows.cpu()
            done = waiting.layers_done[host]
            done[:, len(waiting) - count :][pending] = index + 1
            waiting.layers_done[host] = done
        return after[:, count:]

    def _block(self, layer_type: str, columns: int, rows: Tensor | None) -> tuple[Tensor | None, Rotary, Tensor]:
        """Mask, cosines and sines, and position ids of the last columns of some rows, for a type of layer."""
        waiting = self.waiting
        assert waiting is not None
        if not self.has_block:
            total = self.cache.get_seq_length()
            positions = waiting.positions
            if self.has_new:
                positions = torch.cat((positions, self.position_ids.expand(self.num_rows, 1)), dim=1)
            self.block_positions = positions
            like = waiting.states.new_empty(self.num_rows, positions.shape[1], waiting.states.shape[-1])
            self.block_rotary = self.decoder.rotary(like, positions)
            past = total - positions.shape[1]
            self.block_masks = _masks(self.decoder, like, self.attention_mask, past, positions)
            self.has_block = True
        assert self.block_rotary is not None
        cosines, sines = (_rows(part, rows)[:, -columns:] for part in self.block_rotary)
        mask = self.block_masks[layer_type]
        if mask is not None:
            mask = _rows(mask, rows)
            mask = mask[:, :, -columns:] if mask.dim() == 4 else mask
        return mask, (cosines, sines), _rows(self.block_positions, rows)[:, -columns:]

    def finish(self, run: ExitRun) -> None:
        """Lets the new tokens wait where they left."""
        num_layers = len(self.decoder.layers)
        done = torch.full((self.num_rows, 1), num_layers)
        states: Tensor | None = None
        for rows, hidden_states, layer in self.left:
            if states is None:
                states = hidden_states.new_zeros(self.num_rows, 1, hidden_states.shape[-1])
            states.index_copy_(0, rows, hidden_states)
            done[rows.cpu()] = layer
        if states is not None:
            positions = self.position_ids.expand(self.num_rows, 1)
            new = WaitingTokens(states, positions, done)
            self.waiting = new if self.waiting is None else self.waiting.append(new)
        elif self.waiting is not None:
            # Every row went to the end and took all that waited with it.
            self.waiting = None
        waiting = None if self.waiting is None else self.waiting.without_done(num_layers)
        self.cache.waiting = waiting if waiting is not None and len(waiting) else None


def _rows(tensor: Tensor, rows: Tensor | None) -> Tensor:
    """Some rows of a tensor that may hold one row for all."""
    return tensor if rows is None or len(tensor) == 1 else tensor.index_select(0, rows)


def _rows_of_rotary(rotary: Rotary, rows: Tensor | None) -> Rotary:
    return _rows(rotary[0], rows), _rows(rotary[1], rows)


def _masks(
    decoder: Decoder, hidden_states: Tensor, attention_mask: Tensor | None, past: int, position_ids: Tensor
) -> dict[str, Tensor | None]:
    """Masks of the last columns by type of layer, as the attention implementation takes them."""
    layer = ExitCacheLayer()
    layer.length = past
    masks = causal_masks(
        decoder.config, decoder.layer_types, hidden_states, attention_mask, position_ids, Cache(layers=[layer])
    )
    columns = hidden_states.shape[1]
    if columns > 1 and past == 0 and "flash" not in str(decoder.config._attn_implementation):
        # No mask stands for a plain causal one over all columns; of a block only the last columns are used.
        plain = torch.ones(columns, columns, dtype=torch.bool, device=hidden_states.device).tril()[None, None]
        masks = {name: plain if mask is None else mask for name, mask in masks.items()}
    return masks
