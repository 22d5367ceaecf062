# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Causal masks by type of layer: some layers of a decoder see all tokens before, others those of a window."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from transformers_cee.exits.cache_name import CACHE_NAME
from transformers_cee.exits.row_batch import SLIDING


FULL = "full_attention"
_MASKS = {FULL: create_causal_mask, SLIDING: create_sliding_window_causal_mask}


def layer_types_of(config: Any) -> list[str]:
    """Type of attention of each layer: what the config names, or the same of all.

    Raises:
        ValueError: a type that exits do not know.
    """
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or [FULL if window is None else SLIDING] * config.num_hidden_layers
    wrong = sorted({*types} - {*_MASKS})
    if wrong:
        raise ValueError(f"`layer_types` has {wrong[0]!r}, which exits do not know; accepted are {', '.join(_MASKS)}.")
    return list(types)


def causal_masks(
    config: Any,
    layer_types: Sequence[str],
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor,
    cache: Cache | None,
) -> dict[str, Tensor | None]:
    """Masks by type of layer, as the attention implementation takes them; None where it needs none.

    Args:
        config (`PreTrainedConfig`): the decoder's.
        layer_types (sequence of `str`): of all layers.
        inputs_embeds (`Tensor` of shape `(rows, time, hidden)`): tokens that look.
        attention_mask (`Tensor` of shape `(rows, past + time)` or `(rows, 1, time, past + time)`, *optional*):
            what may be looked at.
        position_ids (`LongTensor` of shape `(1 or rows, time)`): their positions.
        cache (`Cache`, *optional*): of the tokens before.
    """
    return {
        name: _MASKS[name](
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE_NAME: cache},
        )
        for name in dict.fromkeys(layer_types)
    }
