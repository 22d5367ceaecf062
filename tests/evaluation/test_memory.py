# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Peak memory sees what is held, also where /proc is missing."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest
import torch

from transformers_cee.evaluation.memory import PeakMemory


CPU = torch.device("cpu")


def peak_with(megabytes: int) -> float:
    """Peak while so much is held. New pages each time: an allocator might hand out what earlier tests have freed and
    the process still has."""
    with PeakMemory(CPU) as memory, mmap.mmap(-1, megabytes * 2**20) as held:
        held.write(b"1" * len(held))
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
