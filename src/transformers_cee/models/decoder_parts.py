# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Small parts of the ways to run a decoder with exits, whatever its family."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.utils.output_capturing import capture_outputs

from transformers_cee.exits.runner import Layer


# Arguments of `forward` that layers know nothing of.
OUTPUT_FLAGS = ("output_hidden_states", "output_attentions", "return_dict")


class PickedExits:
    """A model's exits for one walk; `pick` chooses the positions that are looked at."""

    def __init__(self, model: Any, pick: Callable[[Tensor], Tensor]) -> None:
        self.layer_numbers = model.layer_numbers
        self.logits = model.exit_logits
        self._model, self._pick = model, pick
        # Hidden states (batch, time, hidden) of the last exit that was asked for its state.
        self.seen: Tensor

    def state(self, hidden_states: Tensor, padding_mask: Tensor | None, index: int) -> Tensor:
        """Normed state (…, hidden) of exit `index` (0-based) at the picked positions."""
        self.seen = hidden_states
        return self._model.exit_state(self._pick(hidden_states), index)


@capture_outputs
def captured_by(model: nn.Module, walk: Callable[[], Any], **kwargs: Any) -> dict[str, Any]:
    """A walk's result as `run`, and what its layers gave. Asked of the part of the model that captures at full depth:
    hooks of transformers on both would note everything twice."""
    return {"run": walk()}


def bind(layer: nn.Module, arguments: dict[str, Any]) -> Layer:
    """A layer with the arguments that stay the same for all batches of a walk."""
    return lambda batch: layer(batch.hidden_states, attention_mask=batch.attention_mask, **arguments)


def positions_of(position_ids: Tensor | None, inputs_embeds: Tensor, cache: Cache | None) -> Tensor:
    """Position ids (1 or batch, time), counted on behind the cache where none are given."""
    if position_ids is not None:
        return position_ids
    past = 0 if cache is None else cache.get_seq_length()
    return torch.arange(past, past + inputs_embeds.shape[1], device=inputs_embeds.device).unsqueeze(0)


def kept(tensor: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Positions of (batch, time, …) whose logits are wanted."""
    if isinstance(logits_to_keep, int):
        return tensor[:, -logits_to_keep:] if logits_to_keep else tensor
    return tensor[:, logits_to_keep]


def reduced(losses: Tensor, items: Any) -> Tensor:
    """Mean of losses (tokens,), or their sum over the number of items."""
    return losses.mean() if items is None else losses.sum() / items


def check_inputs(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> tuple[int, ...]:
    """(batch, time) of the input.

    Raises:
        ValueError: no or both inputs, or an empty one.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
    given = input_ids if inputs_embeds is None else inputs_embeds
    assert given is not None
    shape = tuple(given.shape[:2])
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"The input of shape {shape} is empty; (batch, time) with at least one row and token needed.")
    return shape


def check_known_text(skipped_kv: str | None, cache: Cache | None) -> None:
    """Raises `ValueError` where tokens of a known text would wait for their keys and values."""
    if skipped_kv == "deferred" and cache is not None:
        raise ValueError(
            "`skipped_kv`='deferred' with several tokens at once is not supported: give one token per row, or use "
            "'copy'."
        )
