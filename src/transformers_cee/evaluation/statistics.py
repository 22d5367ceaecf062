# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""How sure a figure is: bootstrap intervals over rows, and differences of two methods over seeds or over rows."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import scipy.stats

from transformers_cee.exits.numbers import share
from transformers_cee.stores.scoring import exits_taken, thresholds_for_depths


if TYPE_CHECKING:
    from torch import Tensor

    from transformers_cee.stores.store import ExitStore

__all__ = [
    "DepthComparison",
    "Interval",
    "PairedDifference",
    "bootstrap_interval",
    "compare_at_depth",
    "paired_bootstrap",
    "paired_differences",
]

Statistic = Callable[..., Any]
METHODS = ("percentile", "BCa")
# Numbers drawn at a time: 80 MB.
_DRAWN = 10_000_000


@dataclass(frozen=True)
class Interval:
    """A figure and the interval around it."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedDifference:
    """First method minus second, over seeds.

    Args:
        mean (`float`): mean difference.
        standard_deviation (`float`, *optional*): of the differences, with `pairs − 1` in the denominator; None of one.
        low, high (`float`, *optional*): Student's t interval of the mean; None of one pair.
        pairs (`int`): seeds at which both methods have a value.
    """

    mean: float
    standard_deviation: float | None
    low: float | None
    high: float | None
    pairs: int


@dataclass(frozen=True)
class DepthComparison:
    """Two criteria at the same wanted depth.

    Args:
        difference (`Interval`): share of correct rows of the first minus that of the second.
        depths (pair of `float`): mean exit layers that they really had.
        thresholds (pair of `float`): that gave these depths.
    """

    difference: Interval
    depths: tuple[float, float]
    thresholds: tuple[float, float]


def bootstrap_interval(
    values: Any,
    *more: Any,
    statistic: Statistic = np.mean,
    confidence: float = 0.95,
    method: Literal["percentile", "BCa"] = "percentile",
    resamples: int = 9999,
    seed: int = 0,
) -> Interval:
    """Bootstrap interval of a statistic of rows (Efron and Tibshirani 1993), rows drawn with replacement.

    Args:
        values, more: arrays (rows,); several (predictions and labels, say) are drawn together.
        statistic: maps the arrays to one number; one that takes `axis` is asked for many resamples at once.
        confidence: coverage of the interval, in (0, 1).
        method: `"percentile"`, or `"BCa"` (bias-corrected and accelerated), which leaves out every row once and so
            takes time quadratic in the rows. Where BCa is undefined because no resample differs, percentiles stand in.
        resamples, seed: how many are drawn, and with what seed.

    Raises:
        ValueError: no rows, arrays of different length, numbers that are not finite, or an argument out of range.
    """
    arrays = tuple(_rows(array) for array in (values, *more))
    confidence = share("confidence", confidence)
    if method not in METHODS:
        raise ValueError(f"`method`={method!r} is unknown; accepted are {', '.join(map(repr, METHODS))}.")
    if resamples < 1:
        raise ValueError(f"`resamples`={resamples} must be at least 1.")
    lengths = [len(array) for array in arrays]
    if len(set(lengths)) > 1:
        raise ValueError(f"`values` must be as many in every array; got {lengths}.")
    estimate = float(statistic(*arrays))
    if lengths[0] == 1:
        return Interval(estimate, estimate, estimate)

    def ends(method: str) -> tuple[float, float]:
        found = scipy.stats.bootstrap(
            arrays,
            statistic,
            paired=True,
            vectorized="axis" in _parameters(statistic),
            batch=max(1, _DRAWN // lengths[0]),
            confidence_level=confidence,
            method=method,
            n_resamples=resamples,
            random_state=np.random.default_rng(seed),
        ).confidence_interval
        return float(found.low), float(found.high)

    with warnings.catch_warnings():
        # Of BCa without spread: the division by zero and what scipy makes of it.
        warnings.simplefilter("ignore", RuntimeWarning)
        low, high = ends(method)
    if np.isnan(low) or np.isnan(high):
        low, high = ends("percentile")
    return Interval(estimate, low, high)


def paired_bootstrap(first: Any, second: Any, *, statistic: Statistic = np.mean, **options: Any) -> Interval:
    """Statistic of the first method's rows minus that of the second's, with a bootstrap interval; both methods keep
    the same rows in every resample (paired bootstrap; Koehn 2004, Berg-Kirkpatrick et al. 2012).

    Args:
        first, second: values (rows,) of each method on the same rows, e.g. whether it is right.
        statistic: maps values (rows,) to one number.
        options: as in `bootstrap_interval`.

    Raises:
        ValueError: as `bootstrap_interval`.
    """
    if "axis" in _parameters(statistic):

        def difference(first: np.ndarray, second: np.ndarray, axis: int = -1) -> Any:
            return statistic(first, axis=axis) - statistic(second, axis=axis)
    else:

        def difference(first: np.ndarray, second: np.ndarray) -> Any:  # type: ignore[misc]
            return statistic(first) - statistic(second)

    return bootstrap_interval(first, second, statistic=difference, **options)


def compare_at_depth(
    store: ExitStore,
    first: tuple[str, Tensor],
    second: tuple[str, Tensor],
    depth: float,
    **options: Any,
) -> DepthComparison:
    """Paired bootstrap over rows of the share of correct ones, of two exit criteria at the same depth. Tokens of one
    text depend on one another: of a decoder's store texts are drawn, with all their tokens.

    Each criterion gets the one threshold whose mean depth on these rows is nearest to `depth`: no labels are looked
    at for that.

    Args:
        store: entries with labels; only those that may leave early count.
        first, second: name of a criterion and its scores (entries, exits − 1), see `score_exits`.
        depth: wanted mean exit layer.
        options: as in `bootstrap_interval`, but `statistic`.

    Raises:
        ValueError: as `bootstrap_interval`, or a depth outside of the store's layers.
    """
    layers = store.layers.tolist()
    if not layers[0] <= depth <= layers[-1]:
        raise ValueError(f"`depth`={depth} must lie between the first and the last exit, {layers[0]}..{layers[-1]}.")
    outcomes, depths, thresholds = [], [], []
    entries = store.deciding()
    correct, (_, row) = store.correct[entries].double(), store.rows[entries].unique(return_inverse=True)
    counts = np.bincount(row.numpy())
    for criterion, scores in (first, second):
        scores = scores[entries]
        threshold = thresholds_for_depths(criterion, scores, layers, [depth])[0]
        exits = exits_taken(criterion, threshold, scores)
        outcomes.append(np.bincount(row.numpy(), correct.gather(1, exits.unsqueeze(1)).squeeze(1).numpy()))
        depths.append(float(store.layers[exits].float().mean()))
        thresholds.append(threshold)
    difference = bootstrap_interval(outcomes[0] - outcomes[1], counts, statistic=_ratio, **options)
    return DepthComparison(difference, (depths[0], depths[1]), (thresholds[0], thresholds[1]))


def paired_differences(
    first: Sequence[float | None], second: Sequence[float | None], *, confidence: float = 0.95
) -> PairedDifference:
    """First method minus second at the same seeds: mean, standard deviation and Student's t interval of the mean.

    Args:
        first, second: one value per seed, in the same order of seeds. Seeds at which either is None do not count.
        confidence: coverage of the interval, in (0, 1).

    Raises:
        ValueError: lists of different length, no seed with both values, numbers that are not finite, or a confidence
            out of range.
    """
    confidence = share("confidence", confidence)
    if len(first) != len(second):
        raise ValueError(f"`first` and `second` must hold as many seeds; got {len(first)} and {len(second)}.")
    pairs = [(one, other) for one, other in zip(first, second, strict=True) if one is not None and other is not None]
    if not pairs:
        raise ValueError("`first` and `second` must share at least one seed with a value; they share none.")
    differences = _rows([one - other for one, other in pairs])
    mean = float(differences.mean())
    if len(pairs) == 1:
        return PairedDifference(mean, None, None, None, 1)
    deviation = float(differences.std(ddof=1))
    half = float(scipy.stats.t.ppf((1 + confidence) / 2, len(pairs) - 1)) * deviation / len(pairs) ** 0.5
    return PairedDifference(mean, deviation, mean - half, mean + half, len(pairs))


def _ratio(sums: np.ndarray, counts: np.ndarray, axis: int = -1) -> Any:
    return sums.sum(axis) / counts.sum(axis)


def _rows(values: Any) -> np.ndarray:
    """Checked numbers (rows,)."""
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"`values` must be numbers of shape (rows,), at least one row; got shape {array.shape}.")
    if not np.isfinite(array).all():
        raise ValueError(f"`values` must be finite; {int((~np.isfinite(array)).sum())} of {len(array)} are not.")
    return array


def _parameters(function: Statistic) -> Sequence[str]:
    try:
        return list(inspect.signature(function).parameters)
    except ValueError:  # compiled functions without a signature
        return []
