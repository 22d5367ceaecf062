# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Highest memory use of a stretch of code."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch


class PeakMemory:
    """Measures the highest memory use between entering and leaving.

    On CUDA that is what torch has allocated on the device. Elsewhere it is the resident memory of the process; only
    Linux can start that count anew, and other systems give the highest value since the process began.

    Args:
        device: where the model is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peak_mb = float("nan")

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            _restart_count()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.device.type == "cuda":
            self.peak_mb = torch.cuda.max_memory_allocated(self.device) / 2**20
        else:
            self.peak_mb = _resident_peak() / 2**20


def _restart_count() -> None:
    try:
        # "5" sets the kernel's mark of the highest resident size to the present one (proc_pid_clear_refs(5)).
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def _resident_peak() -> int:
    """Bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        # Not on every system, so not at the top.
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used if sys.platform == "darwin" else used * 1024
