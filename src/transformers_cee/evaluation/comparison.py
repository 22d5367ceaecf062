# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Exit criteria side by side: same model, same heads, same rows; thresholds picked on dev, figures taken on test."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from transformers_cee.evaluation.exit_budget import budgets_for_depths, fit_exit_budgets
from transformers_cee.evaluation.operating_points import (
    Metrics,
    OperatingPoint,
    by_depth,
    depth_figures,
    exit_histogram,
    full_depth_point,
    hindsight_curve,
    hindsight_point,
    metric_at_depth,
    oracle_point,
)
from transformers_cee.evaluation.timing import Timer
from transformers_cee.evaluation.wall_clock import measure_wall_clock
from transformers_cee.exits.criteria import CriterionSettings
from transformers_cee.exits.deciding import price_of_budget
from transformers_cee.stores.scoring import score_exits, thresholds_for_depths


if TYPE_CHECKING:
    from transformers_cee.exits.criteria import Thresholds
    from transformers_cee.exits.policy import ExitPolicies
    from transformers_cee.stores.store import ExitStore

__all__ = ["Comparison", "compare_criteria", "exit_points", "time_points"]

# The points of one method by rising depth, from wanted depths.
PointsAt = Callable[[Sequence[float]], list["OperatingPoint"]]
# Thresholds per curve on which metrics at matched depths are interpolated.
DENSE_POINTS = 48
# Layers by which a point on dev may miss a wanted depth and still compete for it.
DEPTH_TOLERANCE = 0.25


@dataclass
class Comparison:
    """Operating points on test.

    Args:
        curves: per exit criterion, the points at the wanted depths, by rising depth.
        full: all rows at the last exit.
        oracle: all rows at their first correct exit; knows the labels.
        matched: per exit criterion, the headline metric by wanted depth, interpolated on a dense curve.
        exits: all rows at one exit, for each exit.
    """

    curves: dict[str, list[OperatingPoint]]
    full: OperatingPoint
    oracle: OperatingPoint
    matched: dict[str, dict[float, float | None]]
    exits: list[OperatingPoint]


def compare_criteria(
    criteria: Sequence[str],
    dev: ExitStore,
    test: ExitStore,
    policies: ExitPolicies,
    metrics: Metrics,
    metric: str,
    depths: Sequence[float],
    own: tuple[str, Thresholds] | None = None,
    more_policies: Mapping[str, Mapping[float, ExitPolicies]] | None = None,
    settings: tuple[CriterionSettings, CriterionSettings] | None = None,
) -> Comparison:
    """Compares exit criteria at the same depths.

    Args:
        criteria: names of the registry, e.g. `["policy", "entropy"]`.
        dev: rows on which thresholds are picked; nothing else is read from them.
        test: rows on which everything is reported.
        policies: the model's policy networks.
        metrics: the task's metrics.
        metric: the headline, a key of what `metrics` returns.
        depths: wanted mean exit layers, in 1..L.
        own: the model's own criterion and threshold, a further point of that criterion's curve.
        more_policies:
            By name, families of policies for the same exits, each trained for another price of a layer. Their curve
            takes, at every depth, the policies and threshold that are best on dev.
        settings:
            What some criteria need besides, for the rows of dev and of test, as `criterion_settings` takes it from the
            model: then nothing leaves before its `min_exit_layer`.
    """
    on_dev, on_test = settings or (None, None)
    first = 0 if on_test is None else on_test.first_exit
    layers = test.layers.tolist()
    points: dict[str, PointsAt] = {}
    own_point: OperatingPoint | None = None
    for name, family in (more_policies or {}).items():
        points[name] = _Choices(list(family.values()), dev, test, metrics, metric, layers[first])
    for criterion in criteria:
        if criterion == "policy" and policies.is_conditioned:
            points[criterion] = partial(budget_curve, policies, dev, test, metrics, min_exit_layer=layers[first])
            continue
        dev_scores = score_exits(criterion, dev, policies, on_dev)
        test_scores = score_exits(criterion, test, policies, on_test)
        points[criterion] = partial(_threshold_curve, criterion, dev_scores, test_scores, test, metrics)
        if own is not None and own[0] == criterion:
            own_point = hindsight_point(*own, test_scores, test, metrics)
    exits = exit_points(test, metrics)
    dense = torch.linspace(layers[first], layers[-1], DENSE_POINTS).tolist()
    curves, matched = {}, {}
    for name, at in points.items():
        curves[name] = at(depths)
        # Every criterion can send all rows to the first exit that is open, or to the last one.
        curve = [exits[first], *at(dense), exits[-1]]
        matched[name] = {depth: metric_at_depth(curve, metric, depth) for depth in depths}
    if own_point is not None:
        curves[own_point.criterion] = by_depth([*curves[own_point.criterion], own_point])
    return Comparison(curves, full_depth_point(test, metrics), oracle_point(test, metrics), matched, exits)


def _threshold_curve(
    criterion: str,
    dev_scores: Tensor,
    test_scores: Tensor,
    test: ExitStore,
    metrics: Metrics,
    depths: Sequence[float],
) -> list[OperatingPoint]:
    """Points on test of a criterion, by rising depth, at the thresholds that have the wanted depths on dev."""
    thresholds = thresholds_for_depths(criterion, dev_scores, test.layers.tolist(), depths)
    return hindsight_curve(criterion, thresholds, test_scores, test, metrics)


class _Choices:
    """Operating points of several policies; dev says which one serves a depth.

    Args:
        family: policies for the same exits.
        dev, test, metrics, metric: as in `compare_criteria`.
        min_exit_layer: first layer (1-based) to leave at.
    """

    def __init__(
        self,
        family: Sequence[ExitPolicies],
        dev: ExitStore,
        test: ExitStore,
        metrics: Metrics,
        metric: str,
        min_exit_layer: int,
    ) -> None:
        self.dev, self.test, self.metrics, self.metric = dev, test, metrics, metric

        def score(store: ExitStore, policies: ExitPolicies) -> Tensor:
            return score_exits("policy", store, policies, min_exit_layer=min_exit_layer)

        self.scores = [(score(dev, one), score(test, one)) for one in family]

    def __call__(self, depths: Sequence[float]) -> list[OperatingPoint]:
        """One point on test per depth, by rising depth, each depth once."""
        layers = self.dev.layers.tolist()
        candidates: list[list[_Candidate]] = [[] for _ in depths]
        for on_dev, on_test in self.scores:
            thresholds = thresholds_for_depths("policy", on_dev, layers, depths)
            known: dict[float, OperatingPoint] = {}
            for candidate, threshold in zip(candidates, thresholds, strict=True):
                if threshold not in known:
                    known[threshold] = hindsight_point("policy", threshold, on_dev, self.dev, self.metrics)
                candidate.append(_Candidate(known[threshold], threshold, on_test))
        return by_depth([self._pick(depth, candidate) for depth, candidate in zip(depths, candidates, strict=True)])

    def _pick(self, depth: float, candidates: Sequence[_Candidate]) -> OperatingPoint:
        """The best on dev of those that come near the depth, or else the nearest."""
        near = [one for one in candidates if abs(one.on_dev.depth - depth) <= DEPTH_TOLERANCE]
        if near:
            chosen = max(near, key=lambda one: one.on_dev.metrics[self.metric])
        else:
            chosen = min(candidates, key=lambda one: abs(one.on_dev.depth - depth))
        return hindsight_point("policy", chosen.threshold, chosen.scores, self.test, self.metrics)


class _Candidate(NamedTuple):
    """One of several policies at one threshold: its point on dev, and its scores on test."""

    on_dev: OperatingPoint
    threshold: float
    scores: Tensor


def budget_curve(
    policies: ExitPolicies,
    dev: ExitStore,
    test: ExitStore,
    metrics: Metrics,
    depths: Sequence[float],
    min_exit_layer: int | None = None,
) -> list[OperatingPoint]:
    """Points on test of policies conditioned on α, by rising depth: each wanted depth is asked for as a budget, whose
    price was fitted on dev.

    Args:
        policies: conditioned policies.
        dev, test, metrics, depths: as in `compare_criteria`.
        min_exit_layer (*optional*): first layer (1-based) to leave at; all by default.
    """
    prices = fit_exit_budgets(policies, dev, min_exit_layer=min_exit_layer)
    points = []
    for budget in budgets_for_depths(prices, depths, int(dev.layers[-1])):
        alpha, threshold = price_of_budget(prices, budget)
        scores = score_exits("policy", test, policies, CriterionSettings(alpha=alpha), min_exit_layer)
        point = hindsight_point("policy", threshold, scores, test, metrics)
        point.exit_budget = budget
        points.append(point)
    return by_depth(points)


def exit_points(store: ExitStore, metrics: Metrics) -> list[OperatingPoint]:
    """The operating point of each exit when all rows leave there."""
    num_exits = len(store.layers)
    points = []
    for index in range(num_exits):
        thresholds = [1.0] * index + [0.0] * (num_exits - index)
        scores = torch.full((len(store), num_exits - 1), 0.5)
        points.append(hindsight_point("policy", thresholds, scores, store, metrics))
    return points


def time_points(
    model: nn.Module,
    batches: Sequence[dict[str, Tensor]],
    points: Sequence[OperatingPoint],
    timer: Timer | None = None,
) -> list[OperatingPoint]:
    """The same operating points as executed on `batches`: depth, exit histogram and wall-clock speed-up, no metrics.

    Args:
        model: an early-exit model.
        batches: tokenised inputs without labels, on the model's device.
        points: which criteria and thresholds.
        timer (*optional*): as in `measure_wall_clock`.

    Raises:
        ValueError: no batches.
    """
    settings = [point.exit_arguments for point in points]
    timed = []
    for point, executed in zip(points, measure_wall_clock(model, batches, settings, timer), strict=True):
        figures = depth_figures(executed.exit_layers, model.config.num_hidden_layers)
        histogram = exit_histogram(executed.exit_layers, model.config.exit_layer_numbers)
        found = OperatingPoint(
            point.criterion,
            point.exit_threshold,
            **figures,
            exit_histogram=histogram,
            exit_budget=point.exit_budget,
        )
        found.wall_clock = executed.speedup.reported
        timed.append(found)
    return timed
