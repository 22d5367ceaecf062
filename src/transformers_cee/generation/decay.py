# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A threshold that falls as a text grows."""

from __future__ import annotations

import math
from typing import Any

from transformers_cee.exits.criteria import CRITERIA, Thresholds


def decayed(threshold: Thresholds, decay: float, progress: float) -> Thresholds:
    """CALM's decaying threshold `0.9·λ + 0.1·exp(−τ·t/N)`, clipped to [0, 1] (Schuster et al. 2022). A threshold of 1,
    which closes an exit, stays.

    Args:
        threshold (`float` or sequence of `float`): λ.
        decay (`float`): τ.
        progress (`float`): t/N, the share of the new tokens that are there.
    """
    rest = 0.1 * math.exp(-decay * progress)
    if isinstance(threshold, int | float):
        return 1.0 if threshold >= 1.0 else min(1.0, 0.9 * threshold + rest)
    return [1.0 if value >= 1.0 else min(1.0, 0.9 * value + rest) for value in threshold]


def check_decay(decay: Any, criterion: str) -> None:
    """Raises `ValueError` unless τ is a number that a threshold of this criterion can decay by."""
    if not isinstance(decay, int | float) or isinstance(decay, bool) or not 0 <= decay < math.inf:
        raise ValueError(f"`exit_threshold_decay`={decay!r} must be a finite number of at least 0.")
    cls = CRITERIA[criterion]
    if not (cls.higher_is_deeper and cls.check(0.0)):
        raise ValueError(
            f"`exit_threshold_decay` needs a criterion whose scores lie in [0, 1] and whose larger thresholds send "
            f"tokens deeper; `exit_criterion`={criterion!r} is not one."
        )


__all__ = ["check_decay", "decayed"]
