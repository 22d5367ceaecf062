# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Arguments that nobody takes. A forward of transformers hands on what it does not know, to layers that drop it: a
misspelt name would switch exits off, or on, without a word."""

import inspect
from collections.abc import Callable, Collection, Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any

from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import TransformersKwargs


# What callers within transformers hand to any model, beside `TransformersKwargs`.
_FROM_TRANSFORMERS = frozenset(
    {
        "return_dict",
        "use_cache",
        "cache_position",
        "logits_to_keep",
        # Losses
        "shift_labels",
        "ignore_index",
        # Whatever a tokenizer may return
        "token_type_ids",
        "special_tokens_mask",
        "offset_mapping",
        "overflow_to_sample_mapping",
        "length",
        # Continuous batching
        "block_table",
        "cache",
        "logits_indices",
        "logits_processor_args",
        "max_seqlen_k",
        "max_seqlen_q",
        "read_index",
        "write_index",
    }
)
_ACCEPTED = _FROM_TRANSFORMERS | frozenset(TransformersKwargs.__annotations__)


def unknown_argument(name: str, value: Any, accepted: Collection[str]) -> TypeError:
    """The error for an argument that nobody takes, with the nearest accepted name or, without one, all of them."""
    near = get_close_matches(name, sorted(accepted), n=1)
    hint = f"did you mean `{near[0]}`?" if near else f"accepted are {', '.join(sorted(accepted))}."
    return TypeError(f"`{name}`={value!r} is no argument: {hint}")


def check_arguments(forward: Callable, config: Any, given: Mapping[str, Any]) -> None:
    """Raises `TypeError` for what neither a forward nor transformers takes; it names the nearest accepted argument.

    Args:
        forward (`Callable`): the forward of a model class.
        config (`PreTrainedConfig`): of the model; the attention that it names may take arguments of its own.
        given (`Mapping[str, Any]`): what the forward got. `None` asks for nothing.
    """
    for name in given.keys() - _ACCEPTED:
        if given[name] is None or name in _parameters(forward):
            continue
        if name not in _attention_arguments(config._attn_implementation):
            raise unknown_argument(name, given[name], _parameters(forward))


def check_exit_names(config: Any, accepted: Collection[str]) -> None:
    """Raises `TypeError` for a field of a config of transformers that nobody takes, and whose name is nearly that of
    one of the exits, or begins as they do. `None` asks for nothing.

    Args:
        config (`GenerationConfig`): such configs keep any field.
        accepted (collection of `str`): names of fields.
    """
    names, known = sorted(accepted), {*accepted, *vars(type(config)())}
    for name, value in vars(config).items():
        if value is None or name in known:
            continue
        if name.startswith(("exit_", "exits_")) or get_close_matches(name, names, n=1, cutoff=0.8):
            raise unknown_argument(name, value, accepted)


@cache
def _parameters(forward: Callable) -> tuple[str, ...]:
    return tuple(
        name
        for name, parameter in inspect.signature(forward).parameters.items()
        if name != "self" and parameter.kind is not parameter.VAR_KEYWORD
    )


def _attention_arguments(implementation: str | None) -> Collection[str]:
    attention = ALL_ATTENTION_FUNCTIONS.get(implementation)
    return () if attention is None else inspect.signature(attention).parameters


__all__ = ["check_arguments", "check_exit_names", "unknown_argument"]
