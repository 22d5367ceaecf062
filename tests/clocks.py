# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Clocks in the place of the timer's, so that no test depends on how long something takes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import pytest
from torch import nn

from transformers_cee.evaluation import timing


def steady_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that is timed lasts a second."""
    ticks = itertools.count()
    monkeypatch.setattr(timing, "perf_counter", lambda: float(next(ticks)))


def layer_clock(layers: Iterable[nn.Module]) -> Callable[[], float]:
    """A clock that stands still but while layers run: a second for each call of one, and for each time it is named."""
    now = [0.0]
    for layer in layers:
        layer.register_forward_pre_hook(lambda *_: now.__setitem__(0, now[0] + 1.0))
    return lambda: now[0]
