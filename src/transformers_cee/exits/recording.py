# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Hidden states and attentions of walks that rows leave, in the places of the original batch.

The layout is that of Transformers, whatever leaves: one entry for the embeddings (not of attentions) and one for each
layer, each as large as the batch. NaN stands where a row or a token had left before the layer, so that nothing was
computed; 0 at padding that was cut off because no remaining row needed it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from transformers_cee.exits.row_batch import RowBatch


# What the layers of a model gave, as Transformers captures it; None where an entry was not asked for.
Captured = tuple[Tensor | None, ...]
_MISSING = float("nan")


@dataclass(frozen=True)
class Place:
    """Where the rows stood in the original batch when a layer took them.

    Args:
        rows (`LongTensor` of shape `(rows,)`, *optional*): their numbers; None stands for all in order.
        start (`int`): column of their first position.
    """

    rows: Tensor | None = None
    start: int = 0


def recorded(
    walk: Callable[[Sequence[Callable[[RowBatch], Any]]], Any],
    layers: Sequence[Callable[[RowBatch], Any]],
    wanted: dict[str, Any],
) -> dict[str, Any]:
    """A walk's result as `run`, and what is wanted of its layers: for layers that transformers does not record itself.

    Args:
        walk (`Callable`): takes layers that give hidden states alone.
        layers (sequence of callables): give hidden states, or a tuple of these and attention weights, if any.
        wanted (`dict`): what `wants_states` gives.
    """
    found: dict[str, list[Tensor | None]] = {
        name.removeprefix("output_"): [] for name, asked in wanted.items() if asked
    }

    def noting(layer: Callable[[RowBatch], Any]) -> Callable[[RowBatch], Tensor]:
        def note(batch: RowBatch) -> Tensor:
            given = layer(batch)
            hidden_states, attentions, *_ = (given, None) if isinstance(given, Tensor) else (*given, None)
            if "hidden_states" in found:
                if not found["hidden_states"]:
                    found["hidden_states"].append(batch.hidden_states)
                found["hidden_states"].append(hidden_states)
            if "attentions" in found:
                found["attentions"].append(attentions)
            return hidden_states

        return note

    run = walk([noting(layer) for layer in layers])
    return {"run": run, **{name: tuple(values) for name, values in found.items()}}


def restore_states(states: Captured, places: Sequence[Place], num_layers: int) -> Captured:
    """Hidden states (batch, time, hidden), of the embeddings and of every layer; of images, maps (batch, channels,
    height, width), and None for layers that no image reached: how large their maps are is known when they run.

    Args:
        states (tuple): the embeddings (batch, time, hidden) and what each layer that ran gave of its rows and columns.
        places (sequence of `Place`): of each layer that ran.
        num_layers (`int`): layers of the model.
    """
    if not states:
        return states
    if states[0] is not None and states[0].dim() == 4:
        maps = [_of_rows(one, place, len(states[0])) for one, place in zip(states[1:], places, strict=True)]
        return (states[0], *maps, *(None for _ in range(num_layers - len(maps))))
    return (states[0], *_restored(states[1:], places, num_layers, columns=1, like=states[0]))


def restore_attentions(attentions: Captured, places: Sequence[Place], num_layers: int) -> Captured:
    """Attention weights (batch, heads, time, time) of every layer; arguments as in `restore_states`."""
    return attentions and _restored(attentions, places, num_layers, columns=2, like=attentions[0])


def _restored(
    given: Captured, places: Sequence[Place], num_layers: int, columns: int, like: Tensor | None
) -> Captured:
    """Every layer's entry, as large as `like`."""
    found: list[Tensor | None] = [
        None if one is None or like is None else _placed(one, place, tuple(like.shape), columns)
        for one, place in zip(given, places, strict=True)
    ]
    rest = None if like is None else like.new_full((1,) * like.dim(), _MISSING).expand(like.shape)
    return (*found, *(rest for _ in range(num_layers - len(found))))


def _placed(values: Tensor, place: Place, shape: tuple[int, ...], columns: int) -> Tensor | None:
    if values.shape == shape and place.rows is None:
        return values
    if columns == 1:
        # (rows, time, hidden)
        values = F.pad(values, (0, 0, place.start, shape[1] - place.start - values.shape[1]))
    else:
        # (rows, heads, time, time)
        values = F.pad(values, (place.start, shape[-1] - place.start - values.shape[-1]) * 2)
    return _of_rows(values, place, shape[0])


def _of_rows(values: Tensor | None, place: Place, rows: int) -> Tensor | None:
    """Values (remaining rows, …) in the places of all rows."""
    if values is None or place.rows is None:
        return values
    return values.new_full((rows, *values.shape[1:]), _MISSING).index_copy(0, place.rows, values)


def restore_step(found: dict[str, Any], places: Sequence[Place], num_layers: int) -> dict[str, Captured]:
    """Hidden states (batch, 1, hidden) and attention weights (batch, heads, 1, keys) of a decode step.

    Args:
        found (`dict`): what was captured, in which other tokens may stand before the new one.
        places (sequence of `Place`): of each layer that ran.
        num_layers (`int`): layers of the model.
    """
    new = {
        name: tuple(None if one is None else one[..., -1:, :] for one in found[name])
        for name in ("hidden_states", "attentions")
        if found.get(name)
    }
    if "hidden_states" in new:
        new["hidden_states"] = restore_states(new["hidden_states"], places, num_layers)
    if "attentions" in new:
        new["attentions"] = restore_attentions(new["attentions"], places, num_layers)
    return new


def hide_left(values: Captured, exit_layers: Tensor, first: int) -> Captured:
    """NaN where a token had left before the layer, of hidden states (batch, time, hidden) or attention weights (batch,
    heads, time, keys).

    Args:
        exit_layers (`LongTensor` of shape `(batch, time)`): layer (1-based) at which each token left.
        first (`int`): layer that the first entry belongs to: 0 for hidden states, 1 for attentions.
    """
    hidden: list[Tensor | None] = []
    for layer, one in enumerate(values, start=first):
        if one is not None:
            left = (exit_layers < layer).unsqueeze(-1)
            one = one.masked_fill(left if one.dim() == 3 else left.unsqueeze(1), _MISSING)
        hidden.append(one)
    return tuple(hidden)


def wants_states(config: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """What a caller asks for, with the config's defaults: `output_hidden_states` and `output_attentions`."""
    names = ("output_hidden_states", "output_attentions")
    return {name: arguments.get(name, getattr(config, name, False)) for name in names}
