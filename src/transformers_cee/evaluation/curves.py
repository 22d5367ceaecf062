# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""One number from a whole curve of operating points: area, mean height over a reference, metric at a speed-up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np


if TYPE_CHECKING:
    from .operating_points import OperatingPoint

__all__ = ["Axis", "area_under_curve", "curve_values", "elue_score", "metric_at_speedup"]

Axis = Literal["depth", "flops", "wall_clock"]
AXES = ("depth", "flops", "wall_clock")
OUTSIDE = ("clamp", "leave_out")


def curve_values(
    curve: Sequence[OperatingPoint],
    metric: str,
    x: Axis = "depth",
    *,
    exit_costs: Sequence[float] | None = None,
    pareto: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Costs and metrics of a curve, both (points,), by rising cost, each cost once.

    Args:
        curve: operating points in any order.
        metric: key into each point's `metrics`.
        x: what a point costs: `"depth"` (mean exit layer), `"flops"` (mean of `exit_costs` over its exit histogram) or
            `"wall_clock"` (share of the time at full depth, `1 / wall_clock_speedup`).
        exit_costs: cost of one inference that stops at each exit, of `"flops"`; see `costs.exit_costs`.
        pareto: give every point the best metric that any point of no higher cost has. Otherwise a point that costs
            more and does worse stays as it is, and points of equal cost become their mean.

    Raises:
        ValueError: no points, an unknown axis or metric, a metric that is not finite, a point that was not timed, or
            exit costs that are missing or do not fit the points' exits.
    """
    costs = _costs(curve, x, exit_costs)
    for point in curve:
        if metric not in point.metrics:
            raise ValueError(f"`metric` must be in every point's metrics, {sorted(point.metrics)}; got {metric!r}.")
    values = np.array([point.metrics[metric] for point in curve], dtype=float)
    if not np.isfinite(values).all():
        where = [float(cost) for cost in costs[~np.isfinite(values)]]
        raise ValueError(f"`curve` must hold finite values of {metric!r}; those at {x}={where} are not.")
    unique, position = np.unique(costs, return_inverse=True)
    if pareto:
        best = np.full(len(unique), -np.inf)
        np.maximum.at(best, position, values)
        return unique, np.maximum.accumulate(best)
    return unique, np.bincount(position, weights=values) / np.bincount(position)


def _costs(curve: Sequence[OperatingPoint], x: str, exit_costs: Sequence[float] | None) -> np.ndarray:
    if x not in AXES:
        raise ValueError(f"`x`={x!r} is unknown; accepted are {', '.join(map(repr, AXES))}.")
    if not len(curve):
        raise ValueError("`curve` must hold at least one operating point; got none.")
    if x == "depth":
        return np.array([point.depth for point in curve], dtype=float)
    if x == "wall_clock":
        untimed = [point.depth for point in curve if point.wall_clock_speedup is None]
        if untimed:
            raise ValueError(
                f"`x`='wall_clock' needs points that were timed; those at depths {untimed} were not, or are noise."
            )
        return np.array([1 / point.wall_clock_speedup for point in curve if point.wall_clock_speedup], dtype=float)
    if exit_costs is None:
        raise ValueError("`x`='flops' needs `exit_costs`, one number per exit; got None.")
    shares = []
    for point in curve:
        rows = [point.exit_histogram[layer] for layer in sorted(point.exit_histogram, key=int)]
        if len(rows) != len(exit_costs) or not sum(rows):
            raise ValueError(
                f"`exit_costs` has {len(exit_costs)} numbers; a point with the exit histogram {point.exit_histogram} "
                "needs one per exit, and at least one row."
            )
        shares.append(np.array(rows) / sum(rows))
    return np.stack(shares) @ np.asarray(exit_costs, dtype=float)


def area_under_curve(
    curve: Sequence[OperatingPoint],
    metric: str,
    x: Axis = "depth",
    *,
    low: float | None = None,
    high: float | None = None,
    exit_costs: Sequence[float] | None = None,
    pareto: bool = False,
) -> float | None:
    """Area under the metric against its cost, linear between points, divided by `high − low`: the mean metric over
    that range of costs. Areas of two curves compare over the same range only.

    Args:
        curve, metric, x, exit_costs, pareto: as in `curve_values`.
        low, high: range of costs, in the unit of `x`; by default the whole curve. At `low == high`, the metric there.

    Returns:
        `float`, or None where the curve does not reach from `low` to `high`.

    Raises:
        ValueError: as `curve_values`, or `low` above `high`.
    """
    costs, values = curve_values(curve, metric, x, exit_costs=exit_costs, pareto=pareto)
    low = float(costs[0]) if low is None else low
    high = float(costs[-1]) if high is None else high
    if not low <= high:
        raise ValueError(f"`low`={low} must not be above `high`={high}.")
    if low < costs[0] or high > costs[-1]:
        return None
    ends = np.interp([low, high], costs, values)
    if low == high:
        return float(ends[0])
    inside = (costs > low) & (costs < high)
    nodes = np.concatenate(([low], costs[inside], [high]))
    heights = np.concatenate((ends[:1], values[inside], ends[1:]))
    return float(np.trapezoid(heights, nodes) / (high - low))


def elue_score(
    curve: Sequence[OperatingPoint],
    reference: Sequence[OperatingPoint],
    metric: str,
    x: Axis = "depth",
    *,
    exit_costs: Sequence[float] | None = None,
    outside: Literal["clamp", "leave_out"] = "clamp",
) -> float | None:
    """Mean, over a curve's points, of the metric minus the reference's metric at the same cost: above 0 the method
    does better than the reference where it was measured. The score of the ELUE benchmark (Liu et al. 2022, *Towards
    Efficient NLP: A Standard Evaluation and A Strong Baseline*, NAACL), which takes FLOPs as cost and ElasticBERT as
    reference.

    Args:
        curve, metric, x, exit_costs: as in `curve_values`; points of equal cost all count.
        reference: operating points of the reference, linear in between.
        outside: `"clamp"` compares points cheaper or dearer than the whole reference with its nearest end,
            `"leave_out"` does not count them.

    Returns:
        `float`, or None when all points are left out.

    Raises:
        ValueError: as `curve_values`, or an unknown `outside`.
    """
    if outside not in OUTSIDE:
        raise ValueError(f"`outside`={outside!r} is unknown; accepted are {', '.join(map(repr, OUTSIDE))}.")
    curve_values(curve, metric, x, exit_costs=exit_costs)  # checks
    reference_costs, reference_values = curve_values(reference, metric, x, exit_costs=exit_costs)
    costs = _costs(curve, x, exit_costs)
    heights = np.array([point.metrics[metric] for point in curve]) - np.interp(
        costs, reference_costs, reference_values
    )
    if outside == "leave_out":
        heights = heights[(costs >= reference_costs[0]) & (costs <= reference_costs[-1])]
    return float(heights.mean()) if len(heights) else None


def metric_at_speedup(
    curve: Sequence[OperatingPoint], metric: str, speedup: float, num_layers: int, *, pareto: bool = False
) -> float | None:
    """Metric at a layer speed-up `L/depth`, linear in depth between points; None where the curve does not reach it.

    Args:
        curve, metric, pareto: as in `curve_values`.
        speedup: layer speed-up, e.g. 1.5, 2 or 3.
        num_layers: layers of the model.

    Raises:
        ValueError: as `curve_values`, or a number that is not positive.
    """
    if not speedup > 0 or not num_layers > 0:
        raise ValueError(f"`speedup`={speedup} and `num_layers`={num_layers} must be positive.")
    depth = num_layers / speedup
    return area_under_curve(curve, metric, low=depth, high=depth, pareto=pareto)
