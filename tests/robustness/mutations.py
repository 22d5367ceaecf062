# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Hostile values, and hostile versions of JSON and of bytes."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Sequence
from typing import Any


DEEP: Any = []
for _ in range(200):
    DEEP = [DEEP]

VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    10**8,
    -(10**30),
    10**400,
    0.5,
    1.0,
    -0.0,
    1.5,
    -2.5,
    1e-320,
    float("nan"),
    float("inf"),
    float("-inf"),
    "",
    " ",
    "x",
    "policy",
    "entropy",
    "max_probability",
    "0.5",
    "../../x",
    "/etc/passwd",
    "a\x00b",
    "\u202e<b>é\U0001f600",
    "x" * 5000,
    [],
    [0.5],
    [1, 2],
    [0.5, None],
    [None],
    [True, False],
    ["a", "b"],
    [[0.1, 0.2, 0.3]],
    [[0.5, 0.1, 0.5], [0.4, 0.1, 0.5]],
    [float("nan")],
    [1] * 100,
    DEEP,
    {},
    {"a": 1},
    {"": None},
    {"criterion": "policy"},
    {"criterion": "policy", "thresholds": [0.5]},
    {"criterion": 3, "thresholds": "x"},
)


def value(generator: random.Random) -> Any:
    return copy.copy(generator.choice(VALUES))


def shown(value: Any) -> str:
    """A value for a report."""
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."


def record(
    generator: random.Random, base: dict[str, Any], fields: Sequence[str], most: int = 2
) -> tuple[dict[str, Any], list[str]]:
    """A copy of a record in which one or two fields hold something else, are missing or are unknown, and their
    names."""
    made = copy.deepcopy(base)
    changed = generator.sample(list(fields), generator.randint(1, min(most, len(fields))))
    for name in changed:
        kind = generator.random()
        if kind < 0.1:
            made.pop(name, None)
        elif kind < 0.15:
            made[name + "_x"] = value(generator)
        elif kind < 0.35 and isinstance(made.get(name), dict) and made[name]:
            # Deeper inside.
            key = generator.choice(sorted(made[name]))
            made[name][key] = value(generator)
        elif kind < 0.45 and isinstance(made.get(name), list) and made[name]:
            made[name][generator.randrange(len(made[name]))] = value(generator)
        else:
            made[name] = value(generator)
    return made, changed


def damaged(generator: random.Random, content: bytes) -> bytes:
    """Bytes that were cut, doubled, emptied, or overwritten in places."""
    kind = generator.randrange(8)
    position = generator.randrange(len(content) + 1)
    if kind == 0:
        return content[:position]
    if kind == 1:
        return content[:position] + bytes(generator.randrange(256) for _ in range(8)) + content[position:]
    if kind == 2:
        return b""
    if kind == 3:
        return content[:position] + content[position + 8 :]
    if kind == 4:
        return content + content[:position]
    if kind == 5:
        return (
            content[:position]
            + generator.choice(
                [
                    b"\x00",
                    b"\xff\xfe",
                    b'"',
                    b"\n",
                    b"\r",
                    b",",
                    b"[" * 5000,
                    b"{",
                    b"\xe2\x80\xa8",
                    b"1e999",
                    b"NaN",
                    b"null",
                ]
            )
            + content[position:]
        )
    if kind == 6:
        return generator.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"PK\x03\x04", b"\x1f\x8b"]) + content
    return bytes(generator.randrange(256) for _ in range(64))


def text_of(value: Any) -> str:
    """JSON as Python writes it, NaN and infinities included."""
    return json.dumps(value)
