# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Calibration of exit heads: is a head that is 90 % sure right nine times out of ten?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.stats

from transformers_cee.exits.policy import confidence_scores


if TYPE_CHECKING:
    from transformers_cee.stores.store import ExitStore

__all__ = ["Reliability", "exit_reliability", "reliability"]


@dataclass
class Reliability:
    """Confidence against accuracy in bins of rows; bins without rows are NaN.

    Args:
        edges (`ndarray` of shape `(bins + 1,)`): bounds of the bins.
        counts (`ndarray` of shape `(bins,)`): rows of each bin.
        confidence, accuracy (`ndarray` of shape `(bins,)`): mean confidence and share of correct rows of each bin.
    """

    edges: np.ndarray
    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @property
    def expected_calibration_error(self) -> float:
        """Mean distance of accuracy and confidence, bins weighted by their rows (Guo et al. 2017)."""
        full = self.counts > 0
        gaps = np.abs(self.accuracy[full] - self.confidence[full])
        return float((gaps * self.counts[full]).sum() / self.counts.sum())


def reliability(confidence: Any, correct: Any, num_bins: int = 15, equal_mass: bool = False) -> Reliability:
    """Bins of one exit.

    Args:
        confidence (array of shape `(rows,)`): probability of the predicted class, in [0, 1].
        correct (array of shape `(rows,)`): is the prediction right?
        num_bins (`int`): how many; 15 as in Guo et al. 2017, whose bins are open on the left.
        equal_mass (`bool`): bins of as many rows each, by rank (Nixon et al. 2019), instead of equal width.

    Raises:
        ValueError: no rows, shapes that differ, confidences outside of [0, 1] or NaN, or fewer than one bin.
    """
    confidence, correct = np.asarray(confidence, dtype=float), np.asarray(correct, dtype=float)
    if confidence.ndim != 1 or confidence.shape != correct.shape or not len(confidence):
        raise ValueError(
            f"`confidence` of shape {confidence.shape} and `correct` of shape {correct.shape} must both be (rows,), "
            "at least one row."
        )
    if not ((confidence >= 0) & (confidence <= 1)).all():
        raise ValueError(f"`confidence` must lie in [0, 1]; got {confidence.min()}..{confidence.max()}.")
    if num_bins < 1:
        raise ValueError(f"`num_bins`={num_bins} must be at least 1.")
    if equal_mass:
        ranks = scipy.stats.rankdata(confidence, method="ordinal") - 1
        bins: np.ndarray = ranks * num_bins // len(confidence)
        edges = np.quantile(confidence, np.linspace(0, 1, num_bins + 1))
    else:
        edges = np.linspace(0, 1, num_bins + 1)
        bins = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, num_bins - 1)
    counts = np.bincount(bins, minlength=num_bins)
    sums = [np.bincount(bins, weights=weights, minlength=num_bins) for weights in (confidence, correct)]
    means = [np.divide(total, counts, out=np.full(num_bins, np.nan), where=counts > 0) for total in sums]
    return Reliability(edges, counts, *means)


def exit_reliability(store: ExitStore, num_bins: int = 15, equal_mass: bool = False) -> dict[int, Reliability]:
    """Bins of every exit head, by 1-based layer; of stored tokens those of the internal exits.

    Args:
        store: entries with logits, or tokens with confidence features.
        num_bins, equal_mass: as in `reliability`.

    Raises:
        ValueError: a store without one class per entry, or tokens without confidence features.
    """
    if store.problem_type != "single_label_classification":
        raise ValueError(
            f"`store` of the problem type {store.problem_type!r} has no probability of a predicted class; accepted is "
            "'single_label_classification'."
        )
    if store.logits is not None:
        confidence = confidence_scores(store.logits, store.problem_type)[0]
    elif store.features is not None:
        confidence = store.features[..., 0]
    else:
        raise ValueError("`store` of tokens needs confidence features: a model with `policy_inputs`='confidence'.")
    correct = store.correct
    return {
        layer: reliability(confidence[:, index].clamp(0, 1), correct[:, index], num_bins, equal_mass)
        for index, layer in enumerate(store.layers.tolist()[: confidence.shape[1]])
    }
