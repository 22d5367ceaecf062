# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Ways to generate that exits do not go with, found in whatever a call of `generate` says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import GenerationConfig


# Fields that make generation check several drafted tokens at once, which is not a decode step.
_DRAFTING = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")


def asked_in(asked: dict[str, Any], *configs: GenerationConfig | None) -> Callable[[str], Any]:
    """Finds what a call of `generate` says under a name: among its arguments, or in configs, first come first."""

    def value(name: str) -> Any:
        if name in asked:
            return asked[name]
        found = (getattr(config, name, None) for config in configs)
        return next((one for one in found if one is not None), None)

    return value


def check_way_to_generate(ask: Callable[[str], Any]) -> None:
    """Raises `ValueError` where exits meet a way to generate that does not support them."""
    for name in _DRAFTING:
        if ask(name):
            raise ValueError(
                f"`{name}` and exits exclude each other; set `exit_threshold`=1.0, or `exit_verify`=True to let "
                "exits draft."
            )
    check_caches(ask)


def check_caches(ask: Callable[[str], Any]) -> None:
    """Raises `ValueError` for caches that single rows cannot write into."""
    if ask("use_cache") is False:
        raise ValueError("`use_cache`=False leaves no decode steps to exit from; set `exit_threshold`=1.0.")
    if ask("cache_implementation") not in (None, "dynamic"):
        raise ValueError(
            f"`cache_implementation`={ask('cache_implementation')!r} does not work with exits; accepted "
            "are None and 'dynamic'. Set `exit_threshold`=1.0 for other caches."
        )


__all__ = ["asked_in", "check_caches", "check_way_to_generate"]
