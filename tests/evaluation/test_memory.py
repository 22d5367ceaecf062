# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Peak memory sees what is held, also where /proc is missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from transformers_cee.evaluation.memory import PeakMemory


CPU = torch.device("cpu")


def peak_with(megabytes: int) -> float:
    with PeakMemory(CPU) as memory:
        held = torch.ones(megabytes * 2**18)
        del held
    return memory.peak_mb


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux starts the count anew")
def test_the_count_starts_anew():
    large, small = peak_with(300), peak_with(1)
    assert large - small > 150


def test_systems_without_proc(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError

    monkeypatch.setattr(Path, "write_text", fail)
    monkeypatch.setattr(Path, "read_text", fail)
    assert peak_with(1) > 50
