# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformers_cee.evaluation.curves import area_under_curve, curve_values, elue_score, metric_at_speedup
from transformers_cee.evaluation.operating_points import OperatingPoint, metric_at_depth


LAYERS = 12


def point(depth: float, accuracy: float, wall_clock: float | None = None, rows: dict[str, int] | None = None):
    return OperatingPoint(
        "policy", 0.5, depth, 1 - depth / LAYERS, LAYERS / depth, wall_clock, {"accuracy": accuracy}, rows or {}
    )


def line(points: list[tuple[float, float]], x: float) -> float:
    """Height of a polygon of rising abscissas at `x`, segment by segment."""
    for (left, low), (right, high) in itertools.pairwise(points):
        if left <= x <= right:
            return low + (high - low) * (x - left) / (right - left)
    assert points[0][0] == x == points[-1][0]
    return points[0][1]


def slow_area(points: list[tuple[float, float]], low: float, high: float) -> float:
    """Sum of trapezia over the segments, each cut to the range."""
    total = 0.0
    for (left, _), (right, _) in itertools.pairwise(points):
        start, stop = max(left, low), min(right, high)
        if start < stop:
            total += (stop - start) * (line(points, start) + line(points, stop)) / 2
    return total / (high - low)


# Depths apart from each other, so that slopes stay tame.
CURVES = st.lists(
    st.tuples(st.integers(4, 48).map(lambda quarters: quarters / 4), st.floats(0, 1)),
    min_size=2,
    max_size=8,
    unique_by=lambda pair: pair[0],
)


@given(CURVES, st.floats(0, 1), st.floats(0, 1))
def test_area_is_the_sum_of_trapezia(pairs, first, second):
    ordered = sorted(pairs)
    start, stop = ordered[0][0], ordered[-1][0]
    low, high = sorted((start + first * (stop - start), start + second * (stop - start)))
    low, high = min(low, stop), min(high, stop)
    found = area_under_curve([point(*pair) for pair in pairs], "accuracy", low=low, high=high)
    if high - low < 1e-6:
        assert found == pytest.approx(line(ordered, low), abs=1e-5)
    else:
        assert found == pytest.approx(slow_area(ordered, low, high), abs=1e-6)


@given(CURVES)
def test_pareto_takes_the_running_best(pairs):
    costs, values = curve_values([point(*pair) for pair in pairs], "accuracy", pareto=True)
    expected = [max(value for other, value in pairs if other <= cost) for cost, _ in sorted(pairs)]
    assert costs.tolist() == sorted(cost for cost, _ in pairs)
    assert values.tolist() == expected


def test_a_dominated_point_pulls_the_area_down_unless_pareto():
    curve = [point(2.0, 0.8), point(4.0, 0.4), point(6.0, 0.8)]
    assert area_under_curve(curve, "accuracy") == pytest.approx(0.6)
    assert area_under_curve(curve, "accuracy", pareto=True) == pytest.approx(0.8)


def test_points_of_equal_cost_are_one():
    curve = [point(2.0, 0.5), point(4.0, 0.6), point(4.0, 0.8)]
    assert curve_values(curve, "accuracy")[1].tolist() == pytest.approx([0.5, 0.7])
    assert curve_values(curve, "accuracy", pareto=True)[1].tolist() == pytest.approx([0.5, 0.8])


def test_area_of_one_point_is_its_metric():
    assert area_under_curve([point(3.0, 0.7)], "accuracy") == 0.7
    assert area_under_curve([point(3.0, 0.7)], "accuracy", low=2.0) is None


@pytest.mark.parametrize(("low", "high"), [(1.0, 4.0), (2.0, 6.5)])
def test_area_beyond_the_curve(low, high):
    assert area_under_curve([point(2.0, 0.5), point(6.0, 0.9)], "accuracy", low=low, high=high) is None


def test_area_against_flops_and_wall_clock():
    curve = [point(2.0, 0.5, 4.0, {"2": 4, "10": 0}), point(6.0, 0.9, 2.0, {"2": 1, "10": 3})]
    costs, _ = curve_values(curve, "accuracy", "flops", exit_costs=[100.0, 500.0])
    assert costs.tolist() == [100.0, (100 + 3 * 500) / 4]
    # A histogram whose layers do not stand in order means the same.
    turned = [point(2.0, 0.5, 4.0, {"10": 0, "2": 4})]
    assert curve_values(turned, "accuracy", "flops", exit_costs=[100.0, 500.0])[0].tolist() == [100.0]
    assert curve_values(curve, "accuracy", "wall_clock")[0].tolist() == [0.25, 0.5]
    assert area_under_curve(curve, "accuracy", "wall_clock", low=0.25, high=0.375) == pytest.approx(0.6)


@given(CURVES, CURVES, st.sampled_from(["clamp", "leave_out"]))
def test_elue_score_point_by_point(mine, theirs, outside):
    ordered = sorted(theirs)
    start, stop = ordered[0][0], ordered[-1][0]
    heights = []
    for depth, accuracy in mine:
        if not start <= depth <= stop and outside == "leave_out":
            continue
        heights.append(accuracy - line(ordered, min(max(depth, start), stop)))
    curves = ([point(*pair) for pair in mine], [point(*pair) for pair in theirs])
    found = elue_score(*curves, "accuracy", outside=outside)
    if heights:
        assert found == pytest.approx(sum(heights) / len(heights), abs=1e-6)
    else:
        assert found is None


def test_a_curve_scores_zero_against_itself():
    curve = [point(2.0, 0.5), point(4.0, 0.65), point(6.0, 0.9)]
    assert elue_score(curve, curve, "accuracy") == 0.0


def test_elue_score_counts_points_of_equal_cost_each():
    reference = [point(2.0, 0.5)]
    assert elue_score([point(2.0, 0.5), point(2.0, 0.5), point(3.0, 0.8)], reference, "accuracy") == pytest.approx(0.1)


@given(CURVES, st.sampled_from([1.5, 2.0, 3.0]))
def test_metric_at_speedup_is_the_metric_at_that_depth(pairs, speedup):
    curve = [point(*pair) for pair in pairs]
    expected = metric_at_depth(curve, "accuracy", LAYERS / speedup)
    found = metric_at_speedup(curve, "accuracy", speedup, LAYERS)
    assert found == (None if expected is None else pytest.approx(expected, abs=1e-9))


def test_metric_at_speedup_outside():
    curve = [point(5.0, 0.7), point(7.0, 0.9)]
    assert metric_at_speedup(curve, "accuracy", 2, LAYERS) == pytest.approx(0.8)
    assert metric_at_speedup(curve, "accuracy", 1.5, LAYERS) is None
    assert metric_at_speedup(curve, "accuracy", 3, LAYERS) is None


@pytest.mark.parametrize(
    ("curve", "options", "message"),
    [
        ([], {}, "at least one operating point"),
        ([point(2.0, 0.5)], {"metric": "f1"}, r"`metric` must be in.*accuracy.*'f1'"),
        ([point(2.0, math.nan)], {}, r"finite values of 'accuracy'.*2\.0"),
        ([point(2.0, 0.5)], {"x": "joules"}, r"`x`='joules'.*'depth', 'flops', 'wall_clock'"),
        ([point(2.0, 0.5)], {"x": "wall_clock"}, r"timed.*2\.0"),
        ([point(2.0, 0.5)], {"x": "flops"}, "needs `exit_costs`"),
        ([point(2.0, 0.5, None, {"2": 3})], {"x": "flops", "exit_costs": [1.0, 2.0]}, "`exit_costs` has 2 numbers"),
        ([point(2.0, 0.5, None, {"2": 0})], {"x": "flops", "exit_costs": [1.0]}, "at least one row"),
        ([point(2.0, 0.5)], {"low": 3.0, "high": 2.0}, r"`low`=3\.0 must not be above `high`=2\.0"),
    ],
)
def test_refusals(curve, options, message):
    with pytest.raises(ValueError, match=message):
        area_under_curve(curve, **{"metric": "accuracy", **options})


def test_more_refusals():
    curve = [point(2.0, 0.5)]
    with pytest.raises(ValueError, match=r"`outside`='drop'.*'clamp', 'leave_out'"):
        elue_score(curve, curve, "accuracy", outside="drop")
    with pytest.raises(ValueError, match="finite"):
        elue_score([point(2.0, math.nan)], curve, "accuracy")
    with pytest.raises(ValueError, match="`speedup`=0"):
        metric_at_speedup(curve, "accuracy", 0, LAYERS)
