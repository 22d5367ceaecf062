# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The rows of a batch on their way through the layers, and what must follow them: masks, positions, numbers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor


Rotary = tuple[Tensor, Tensor]
Masks: TypeAlias = Tensor | Mapping[str, Tensor | None] | None
SLIDING = "sliding_attention"


@dataclass
class AtExit:
    """What a graph found at the exit behind its last layer, beside the hidden states.

    Args:
        logits (`Tensor` of shape `(rows, labels)`): of the exit's head.
        state (`Tensor` of shape `(rows, hidden)`, *optional*): exit state, where the graph gives it.
        score (`Tensor` of shape `(rows,)`, *optional*): of the walk's criterion, where it is part of the graph.
    """

    logits: Tensor
    state: Tensor | None = None
    score: Tensor | None = None


@dataclass
class RowBatch:
    """The rows still on their way, with everything that must follow them.

    Args:
        hidden_states (`Tensor` of shape `(rows, time, hidden)`): input of the next layer; of images, maps (rows,
            channels, height, width), which have no columns.
        attention_mask (`Tensor` or mapping of layer types, *optional*):
            What the layers take, of one type or each: `None`, (rows, 1, query, key) for sdpa and eager, or (rows, key)
            for flash attention. Types are named as in `config.layer_types` of transformers.
        padding_mask (`Tensor` of shape `(rows, time)`, *optional*): non-zero at tokens, 0 at padding.
        index (`LongTensor` of shape `(rows,)`, *optional*): number of each row in the original batch.
        spans (`LongTensor` of shape `(rows, 3)`, *optional*): first token, last token, number of tokens of each row.
        start (`int`): column of the original batch that the first position stands in.
        rotary (mapping of layer types, *optional*): cosines and sines, both (1 or rows, time, head size).
        relative (`Tensor` of shape `(1, …, query, key)`, *optional*):
            What lies between two columns, the same in every row: their distance, or what attention adds for it.
        left (`BoolTensor` of shape `(rows,)`, *optional*):
            Rows that left and stay in the batch, where dropping them does not pay; none where it is None.
        at_exit (`AtExit`, *optional*): what the graph that made the hidden states found at its exit, too.
    """

    hidden_states: Tensor
    attention_mask: Masks = None
    padding_mask: Tensor | None = None
    index: Tensor | None = None
    spans: Tensor | None = None
    start: int = 0
    rotary: Mapping[str, Rotary] | None = None
    relative: Tensor | None = None
    left: Tensor | None = None
    at_exit: AtExit | None = None

    @property
    def size(self) -> int:
        """Rows, which an exported graph may leave open."""
        return self.hidden_states.shape[0]

    def mask_of(self, layer_type: str) -> Tensor | None:
        """What layers of a type take as their attention mask."""
        masks = self.attention_mask
        return masks if masks is None or isinstance(masks, Tensor) else masks[layer_type]

    def select(self, kept: Tensor, columns: slice = slice(0, None), dense: bool = False) -> "RowBatch":
        """Rows `kept` (remaining rows,), of which none has left, and token positions `columns`, by default all;
        without masks when no padding is left, but for those that also hide what is far away."""
        padding_mask, masks, rotary = None, self.attention_mask, self.rotary
        if not dense and self.padding_mask is not None:
            padding_mask = self.padding_mask.index_select(0, kept)[:, columns]
        if isinstance(masks, Mapping):
            masks = {name: self._mask(mask, kept, columns, dense and name != SLIDING) for name, mask in masks.items()}
        else:
            masks = self._mask(masks, kept, columns, dense)
        if rotary is not None:
            rotary = {
                name: (_rows_of(cosines, kept)[:, columns], _rows_of(sines, kept)[:, columns])
                for name, (cosines, sines) in rotary.items()
            }
        spans = None
        if not dense and self.spans is not None:
            spans = self.spans.index_select(0, kept) - self.spans.new_tensor((columns.start, columns.start, 0))
        return RowBatch(
            self.hidden_states.index_select(0, kept)[:, columns],
            masks,
            padding_mask,
            None if self.index is None else self.index.index_select(0, kept),
            spans,
            self.start + columns.start,
            rotary,
            None if self.relative is None else self.relative[..., columns, columns],
        )

    def _mask(self, mask: Tensor | None, kept: Tensor, columns: slice, dense: bool) -> Tensor | None:
        if dense or mask is None:
            return None
        time = self.hidden_states.shape[1]
        mask = _rows_of(mask, kept)
        if mask.shape[-1] == time:
            # Otherwise the keys are those of a cache, which keeps its columns.
            mask = mask[..., columns]
        if mask.dim() == 4 and mask.shape[-2] == time:
            mask = mask[..., columns, :]
        return mask


def _rows_of(tensor: Tensor, kept: Tensor) -> Tensor:
    """Rows of a tensor that may hold one for all."""
    return tensor if tensor.shape[0] == 1 else tensor.index_select(0, kept)


def token_spans(padding_mask: Tensor | None) -> Tensor | None:
    """First token, last token and number of tokens of each row, (rows, 3), on the device; None without padding."""
    if padding_mask is None or padding_mask.shape[0] == 1:
        return None
    real = padding_mask != 0
    last = real.shape[1] - 1 - real.flip(1).to(torch.int8).argmax(1)
    return torch.stack((real.to(torch.int8).argmax(1), last, real.sum(1)), dim=1)
