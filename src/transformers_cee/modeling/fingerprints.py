# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Fingerprints of weights: which base a set of exits was trained on, whatever dtype it is loaded in.

A checkpoint that is loaded in another dtype has other bytes, so there is one fingerprint for each dtype that the
weights may be loaded in: float32 weights have one as they are, one as bfloat16 rounds them, and one as float16 does.
Whoever loads them in one of these compares bytes with bytes; nothing is compared up to a tolerance.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# More digests at a time gain nothing over the memory that they read from.
_MAX_THREADS = 8


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers of a model by name; what is tied stands once, under its first name."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor) and id(value) not in seen:
            seen.add(id(value))
            found[name] = value
    return found


def fingerprints(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Fingerprints of tensors in their own dtype and in those that hold less of a number.

    Args:
        tensors (mapping of `str` to `Tensor`): weights by name.

    Returns:
        `dict[str, str]`: name of a dtype to a SHA-256 over names, shapes and bytes.
    """
    own = _narrowest(tensors)
    narrower = [name for name, dtype in _DTYPES.items() if dtype.itemsize < _DTYPES[own].itemsize]
    return {name: _fingerprint(tensors, _DTYPES[name]) for name in (own, *narrower)}


def is_of(known: Mapping[str, str], tensors: Mapping[str, Tensor]) -> bool | None:
    """Are these the tensors of a fingerprint, perhaps in another dtype?

    Args:
        known (mapping of `str` to `str`): from `fingerprints`.
        tensors (mapping of `str` to `Tensor`): weights by name.

    Returns:
        `bool`, or None where their dtype holds neither more nor less of a number than that of the fingerprint.
    """
    own = _narrowest(tensors)
    if own not in known:
        # Weights that hold more: what they were made from is found by rounding them.
        widest = max(known, key=lambda name: _DTYPES[name].itemsize)
        if _DTYPES[own].itemsize <= _DTYPES[widest].itemsize:
            return None
        own = widest
    return known[own] == _fingerprint(tensors, _DTYPES[own])


def are_fingerprints(value: Any) -> bool:
    """Is this what `fingerprints` gives?"""
    return (isinstance(value, dict) and bool(value) and value.keys() <= _DTYPES.keys()) and all(
        isinstance(one, str) for one in value.values()
    )


def _narrowest(tensors: Mapping[str, Tensor]) -> str:
    """The dtype that all floating-point tensors can be had in."""
    own = {value.dtype for value in tensors.values() if value.is_floating_point()}
    for name in ("float16", "bfloat16"):
        if _DTYPES[name] in own:
            return name
    return "float32"


def _fingerprint(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> str:
    names = sorted(tensors)
    # Digests leave other threads alone.
    with ThreadPoolExecutor(max(1, min(_MAX_THREADS, os.cpu_count() or 1))) as pool:
        digests = list(pool.map(lambda name: _digest(tensors[name], dtype), names))
    lines = [f"{name} {tuple(tensors[name].shape)} {digest}" for name, digest in zip(names, digests, strict=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _digest(tensor: Tensor, dtype: torch.dtype) -> str:
    value = tensor.detach()
    value = value.to("cpu", dtype if value.is_floating_point() else value.dtype).contiguous()
    return hashlib.sha256(value.reshape(-1).view(torch.uint8).numpy()).hexdigest()


__all__ = ["are_fingerprints", "fingerprints", "is_of", "saved_tensors"]
