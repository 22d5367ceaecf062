# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A fixed number of threads (`OMP_NUM_THREADS`, else one), repeatable property tests, and the shared modules of this
folder (`tiny`, `reference`, `counters`)."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import pytest


TESTS = str(Path(__file__).resolve().parent)
if TESTS not in sys.path:
    sys.path.insert(0, TESTS)


def pytest_configure(config: pytest.Config) -> None:
    from hypothesis import HealthCheck, settings

    settings.register_profile(
        "repeatable",
        max_examples=40,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    settings.load_profile("repeatable")


@pytest.fixture(autouse=True, scope="session")
def threads():
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))


@pytest.fixture(autouse=True, scope="session")
def imported_modules_are_no_garbage():
    """Every training begins with a collection of garbage, most of whose time is spent on what was imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
