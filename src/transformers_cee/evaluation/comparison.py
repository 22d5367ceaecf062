# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Exit criteria side by side: same model, same heads, same rows; thresholds picked on dev, figures taken on test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from transformers_cee.evaluation.operating_points import (
    Metrics,
    OperatingPoint,
    depth_figures,
    exit_histogram,
    full_depth_point,
    hindsight_curve,
    hindsight_point,
    measure_wall_clock,
    metric_at_depth,
    oracle_point,
    score_exits,
    thresholds_for_depths,
)


if TYPE_CHECKING:
    from transformers_cee.evaluation.store import ExitStore
    from transformers_cee.exits.criteria import Thresholds
    from transformers_cee.exits.policy import ExitPolicies

__all__ = ["Comparison", "compare_criteria", "exit_points", "time_points"]

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
    own: tuple[str, Thresholds] | None = None,
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
        if own is not None and own[0] == criterion:
            point = hindsight_point(*own, test_scores, test, metrics)
            others = [other for other in curves[criterion] if other.depth != point.depth]
            curves[criterion] = sorted([*others, point], key=lambda point: point.depth)
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


@torch.no_grad()
def time_points(
    model: nn.Module, batches: Sequence[dict[str, Tensor]], points: Sequence[OperatingPoint]
) -> list[OperatingPoint]:
    """The same operating points as executed on `batches`: depth, exit histogram and wall-clock speed-up, no metrics.

    Args:
        model: an early-exit model.
        batches: tokenised inputs without labels, on the model's device.
        points: which criteria and thresholds.
    """
    settings = [(point.criterion, point.exit_threshold) for point in points]
    timed = []
    for (criterion, threshold), speedup in zip(settings, measure_wall_clock(model, batches, settings), strict=True):
        outputs = [model(**batch, exit_criterion=criterion, exit_threshold=threshold) for batch in batches]
        layers = torch.cat([output.exit_layers for output in outputs])
        figures = depth_figures(layers, model.config.num_hidden_layers)
        histogram = exit_histogram(layers, model.config.exit_layer_numbers)
        timed.append(
            OperatingPoint(criterion, threshold, **figures, wall_clock_speedup=speedup, exit_histogram=histogram)
        )
    return timed
