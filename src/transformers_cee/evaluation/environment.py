# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What figures were measured with: versions, processor, device, threads, load."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


LIBRARIES = ("transformers-cee", "transformers", "torch", "accelerate", "datasets", "tokenizers")


def installed_versions(libraries: Sequence[str] = LIBRARIES) -> dict[str, str]:
    """Versions of Python and of those libraries that are installed."""
    versions = {"Python": platform.python_version()}
    for library in libraries:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return versions


def timing_environment(device: torch.device) -> dict[str, Any]:
    """What figures of time depend on, ready for JSON.

    Returns:
        `dict`: `device` and `processor` by name, `threads` of torch, `cores` of the machine, `load_average` of the
        last minute (processes that run or wait; None where the system does not say), and `versions`.
    """
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": installed_versions(("transformers-cee", "transformers", "torch")),
    }


def processor_name(information: Path = Path("/proc/cpuinfo")) -> str:
    """The processor as its maker calls it, or at least its architecture.

    Args:
        information: where Linux says it.
    """
    if information.is_file():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


__all__ = ["LIBRARIES", "installed_versions", "processor_name", "timing_environment"]
