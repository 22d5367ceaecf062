# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What engines need while they trace a model: masks of any length, and loggers as they were."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS


# Before this release masks take a length that is a tensor, as sizes are in a trace, for the positions of a cache.
_LENGTHS_MAY_BE_TENSORS = Version("5.9")


@contextmanager
def tracing() -> Iterator[None]:
    """While graphs are traced, for the whole process."""
    with warnings.catch_warnings(), _masks_of_any_length(), _no_scripts(), _level_kept(logging.getLogger()):
        # Sizes that a trace takes for constants are constants: numbers of labels, widths.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        yield


@contextmanager
def _masks_of_any_length() -> Iterator[None]:
    if Version(version("transformers")) >= _LENGTHS_MAY_BE_TENSORS:
        yield
        return
    # An entry of the object's own stands before those that all such objects share.
    own = dict(ALL_MASK_ATTENTION_FUNCTIONS._local_mapping)
    for name in ("sdpa", "eager"):
        ALL_MASK_ATTENTION_FUNCTIONS[name] = partial(_of_positions, ALL_MASK_ATTENTION_FUNCTIONS[name])
    try:
        # Of positions it says that they are deprecated.
        with _level_kept(logging.getLogger("transformers.masking_utils"), logging.ERROR):
            yield
    finally:
        ALL_MASK_ATTENTION_FUNCTIONS._local_mapping = own


@contextmanager
def _no_scripts() -> Iterator[None]:
    """Functions that `torch.jit.script` has compiled, such as those of DeBERTa in transformers 5.8, are what they were
    made of: both ways of an `if` in one would stand in the graph, and converters refuse two types."""
    scripts = [
        (module, name, value)
        for key, module in list(sys.modules.items())
        if key.startswith("transformers.models.") and key.rpartition(".")[2].startswith("modeling_")
        for name, value in list(vars(module).items())
        if isinstance(value, torch.jit.ScriptFunction)
    ]
    for module, name, script in scripts:
        # What compilers of torch take for it, too.
        setattr(module, name, getattr(script, "_torchdynamo_inline", script))
    try:
        yield
    finally:
        for module, name, script in scripts:
            setattr(module, name, script)


def _of_positions(make: Callable[..., Any], *, q_length: Any, **asked: Any) -> Any:
    """A mask of as many queries as there are positions, which it counts."""
    return make(q_length=torch.arange(q_length) if isinstance(q_length, Tensor) else q_length, **asked)


@contextmanager
def _level_kept(logger: logging.Logger, level: int | None = None) -> Iterator[None]:
    """Gives a logger its level back, which converters raise and, after an error, leave.

    Args:
        level (`int`, *optional*): until then; as it is by default.
    """
    before = logger.level
    if level is not None:
        logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


__all__ = ["tracing"]
