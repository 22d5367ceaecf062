# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Policies learn for a moment, and few rows are timed: figures of tiny models say nothing anyway."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="session")
def in_a_moment():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers_cee.adding.learning.POLICY_STEPS", 60)
        patch.setattr("transformers_cee.adding.run.TIMED_ROWS", 3)
        yield
