# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A kind and a range for each field of what is read from files: one check, one message."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard


# More of anything is a damaged file: a list of so many layers alone would fill the memory.
MAX_LAYERS = 10_000
MAX_SIZE = 2**20


@dataclass(frozen=True)
class Kind:
    """What a field accepts.

    Args:
        accepts (`Callable`): is this value accepted? It may get any value and raises nothing.
        spoken (`str`): what it accepts, behind "must be".
    """

    accepts: Callable[[Any], bool]
    spoken: str

    def or_none(self) -> Kind:
        return Kind(lambda value: value is None or self.accepts(value), f"{self.spoken}, or None")


def is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Is it a finite number, one that a float can hold?"""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300 and value == value


def whole(low: int, high: int = MAX_SIZE) -> Kind:
    return Kind(lambda value: is_whole(value) and low <= value <= high, f"a whole number in {low}..{high}")


def number(low: float, high: float = math.inf, above: bool = False) -> Kind:
    """A finite number of at least `low`, or `above` it, and at most `high`."""
    if high < math.inf:
        spoken = f"a number in {'(' if above else '['}{low:g}, {high:g}]"
    else:
        spoken = f"a number {'above' if above else 'of at least'} {low:g}"
    return Kind(lambda value: is_number(value) and (value > low if above else value >= low) and value <= high, spoken)


def choice(accepted: Collection[str]) -> Kind:
    return Kind(lambda value: isinstance(value, str) and value in accepted, f"one of {', '.join(sorted(accepted))}")


def listed(kind: Kind) -> Kind:
    return Kind(
        lambda value: isinstance(value, list | tuple) and all(kind.accepts(one) for one in value),
        f"a list, each {kind.spoken}",
    )


flag = Kind(lambda value: isinstance(value, bool), "True or False")
text = Kind(lambda value: isinstance(value, str), "a text")
mapping = Kind(lambda value: isinstance(value, dict) and all(isinstance(key, str) for key in value), "a dictionary")


def check_field(name: str, value: Any, kind: Kind, more: str = "") -> None:
    """Raises `ValueError` unless a value is of its kind.

    Args:
        name (`str`): full name of the field, as a person finds it.
        more (`str`, *optional*): what to add to the message.
    """
    if not kind.accepts(value):
        raise ValueError(f"`{name}`={shown(value)} must be {kind.spoken}.{more}")


def check_fields(values: Mapping[str, Any], kinds: Mapping[str, Kind], needed: Collection[str], where: str) -> None:
    """Raises `ValueError` for a field that is missing, unknown, or not of its kind.

    Args:
        where (`str`): what the fields belong to, for the message.
    """
    missing, unknown = set(needed) - set(values), {str(name) for name in values if name not in kinds}
    if missing or unknown:
        lacks = f"lacks {sorted(missing)}" if missing else f"has unknown fields {shown(sorted(unknown))}"
        raise ValueError(f"`{where}` {lacks}; accepted are {', '.join(kinds)}, needed {', '.join(needed)}.")
    for name, value in values.items():
        check_field(f"{where}.{name}", value, kinds[name])


def shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 200:
        # Python refuses to print some.
        return f"a whole number of {value.bit_length()} bits"
    return _short.repr(value)


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 200
_short.maxlist = _short.maxtuple = 20
