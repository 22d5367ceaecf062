# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Wrong values for any field of a JSON file, and a JSON value with one of its parts changed."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any


def _deep(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


WRONG_VALUES = (
    None, True, False, -1, 0, 1, 2, 1.5, -0.5, 10**8, 10**30, 10**400, math.nan, math.inf, -math.inf, "", "text", "1",
    "\u2028", [], [None], ["text"], [1.5], [math.nan], [0, 10**9], [[1]], [{}], {}, {"text": 1}, {"1": None},
    {"text": {"text": []}}, _deep(50), "x" * 10_000,
)  # fmt: skip


def mutated(value: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """The path of every part of a JSON value, and the value with that part replaced or left out, or with one more."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        for wrong in WRONG_VALUES:
            yield (*path, key), _with(value, key, copy.deepcopy(wrong))
        less = copy.deepcopy(value)
        del less[key]
        yield (*path, key), less
        for inner, changed in mutated(part, (*path, key)):
            yield inner, _with(value, key, changed)
    if isinstance(value, dict):
        yield (*path, "extra"), {**value, "extra": 1}


def _with(value: Any, key: Any, part: Any) -> Any:
    changed = copy.copy(value)
    changed[key] = part
    return changed
