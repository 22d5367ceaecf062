# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What a cache is called: `cache` since transformers 5.24, `past_key_values` before. Nothing else in the project knows
both names."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from importlib.metadata import version
from typing import Any

from packaging.version import Version
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast


_OLD_NAME, _NEW_NAME = "past_key_values", "cache"
# Of the installed release: the argument of models, layers and masks, and the field of outputs.
CACHE_NAME = _NEW_NAME if _NEW_NAME in {one.name for one in fields(CausalLMOutputWithPast)} else _OLD_NAME
# By which PEFT asks whether its virtual tokens are in the cache. Before 0.22 it knows the old name only, and would put
# them in again at every step.
PEFT_CACHE_NAME = CACHE_NAME if Version(version("peft")) >= Version("0.22.0.dev0") else _OLD_NAME


def rename_cache(arguments: dict[str, Any], name: str = CACHE_NAME) -> None:
    """Puts the cache among keyword arguments, given by either name, under `name`, in place.

    Raises:
        ValueError: two different caches are given.
    """
    given = [arguments.pop(known) for known in (_OLD_NAME, _NEW_NAME) if known in arguments]
    caches = [cache for cache in given if cache is not None]
    if len(caches) == 2 and caches[0] is not caches[1]:
        raise ValueError(f"`{_NEW_NAME}` and `{_OLD_NAME}` are two names of one argument; give one of them.")
    if given:
        arguments[name] = caches[0] if caches else None


def named_cache(cache: Any) -> dict[str, Any]:
    """A cache as the argument that models of the installed release take it by. Before 5.24, the one of continuous
    batching is no argument of a model, but one that attention takes."""
    if CACHE_NAME == _OLD_NAME and cache is not None and not isinstance(cache, Cache):
        from transformers.generation.continuous_batching.cache import PagedAttentionCache

        if isinstance(cache, PagedAttentionCache):
            return {_NEW_NAME: cache}
    return {CACHE_NAME: cache}


def takes_cache(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method with an argument `cache` that takes it by either name, without a warning. Its signature, which
    `generate`, Trainer and PEFT read, shows the installed release's name."""

    @functools.wraps(method)
    def renamed(*args: Any, **kwargs: Any) -> Any:
        rename_cache(kwargs, _NEW_NAME)
        return method(*args, **kwargs)

    signature = inspect.signature(method)
    renamed.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[
            one.replace(name=CACHE_NAME) if name == _NEW_NAME else one for name, one in signature.parameters.items()
        ]
    )
    return renamed
