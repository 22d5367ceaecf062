# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Numbers as callers write them: Python's, numpy's, torch's, whole ones with or without a point. Inside they are
Python's own, which is also what JSON holds."""

from typing import Any

import numpy as np
from torch import Tensor


def plain(value: Any) -> Any:
    """The same value made of Python's numbers, where it is made of numpy's or torch's: scalars, arrays, and lists and
    tuples of them; anything else is returned as it is."""
    # A tuple, not a union: Dynamo, which sees this in a forward, does not know unions of these types.
    if isinstance(value, (np.generic, np.ndarray, Tensor)):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value


def number(name: str, value: Any, accepted: str = "a number") -> float:
    """One number as a `float`; whether infinity and NaN are in its range is for the caller to say.

    Args:
        name (`str`): of the argument, for the message.
        value: what the caller gave.
        accepted (`str`): what the message says is accepted.

    Raises:
        ValueError: anything else: `None`, a truth value, text, a list.
    """
    found = plain(value)
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise ValueError(f"`{name}`={value!r} must be {accepted}.")
    try:
        return float(found)
    except OverflowError:
        raise ValueError(f"`{name}` has more digits than a `float` holds; accepted is {accepted}.") from None


def numbers(name: str, values: Any, accepted: str = "a list of numbers") -> list[float]:
    """Several numbers as a list of `float`. Raises `ValueError` for anything else, as `number`."""
    found = plain(values)
    if not isinstance(found, list):
        raise ValueError(f"`{name}`={values!r} must be {accepted}.")
    return [number(name, one, accepted) for one in found]


def share(name: str, value: Any) -> float:
    """A number strictly between 0 and 1. Raises `ValueError` otherwise."""
    accepted = "a number strictly between 0 and 1"
    found = number(name, value, accepted)
    if not 0.0 < found < 1.0:
        raise ValueError(f"`{name}`={value!r} must be {accepted}.")
    return found


def whole(value: Any) -> Any:
    """An `int` for a whole number however it is written (`2`, `2.0`, a scalar of numpy or torch); anything else is
    returned as it is, for the caller to refuse."""
    found = plain(value)
    if isinstance(found, float) and found.is_integer():
        return int(found)
    return found


__all__ = ["number", "numbers", "plain", "share", "whole"]
