# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Exit criteria side by side: same model, same heads, same rows; thresholds picked on dev, figures taken on test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from transformers_cee.evaluation.operating_points import (
    Metrics,
    OperatingPoint,
    full_depth_point,
    hindsight_curve,
    hindsight_point,
    metric_at_depth,
    oracle_point,
    score_exits,
    thresholds_for_depths,
)


if TYPE_CHECKING:
    from transformers_cee.exits.policy import ExitPolicies
    from transformers_cee.training.store import ExitStore

__all__ = ["Comparison", "compare_criteria", "exit_points"]

# Thresholds per curve on which metrics at matched depths are interpolated.
DENSE_POINTS = 48


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
    """
    layers = test.layers.tolist()
    exits = exit_points(test, metrics)
    curves, matched = {}, {}
    dense = torch.linspace(layers[0], layers[-1], DENSE_POINTS).tolist()
    for criterion in criteria:
        dev_scores = score_exits(criterion, dev, policies)
        test_scores = score_exits(criterion, test, policies)
        thresholds = thresholds_for_depths(criterion, dev_scores, layers, depths)
        curves[criterion] = hindsight_curve(criterion, thresholds, test_scores, test, metrics)
        thresholds = thresholds_for_depths(criterion, dev_scores, layers, dense)
        # Every criterion can send all rows to the first or to the last exit.
        curve = [exits[0], *hindsight_curve(criterion, thresholds, test_scores, test, metrics), exits[-1]]
        matched[criterion] = {depth: metric_at_depth(curve, metric, depth) for depth in depths}
    return Comparison(curves, full_depth_point(test, metrics), oracle_point(test, metrics), matched, exits)


def exit_points(store: ExitStore, metrics: Metrics) -> list[OperatingPoint]:
    """The operating point of each exit when all rows leave there."""
    num_exits = len(store.layers)
    points = []
    for index in range(num_exits):
        thresholds = [1.0] * index + [0.0] * (num_exits - index)
        scores = torch.full((len(store), num_exits - 1), 0.5)
        points.append(hindsight_point("policy", thresholds, scores, store, metrics))
    return points
