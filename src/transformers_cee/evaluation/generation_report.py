# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Operating points of language models as Markdown tables and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from transformers_cee.evaluation import plots
from transformers_cee.evaluation.report import (
    escape_markdown,
    markdown_table,
    method_name,
    operating_points_table,
    short_threshold,
)
from transformers_cee.exits.criteria import CRITERIA


if TYPE_CHECKING:
    from transformers_cee.evaluation.generation import GenerationPoint
    from transformers_cee.evaluation.speeds import Speed

__all__ = ["generation_table", "plot_generation", "setting_name", "speed_table"]

# The order of columns; others follow.
FIRST_METRICS = ("agreement", "identical", "rougeL")


def setting_name(criterion: str, threshold: float | Sequence[float] | str, exit_budget: float | None = None) -> str:
    """A criterion and its threshold in one short text, e.g. `"policy > 0.5"`; just below 1 does not look like 1. With
    a budget, `"policy, budget 0.5"`."""
    if exit_budget is not None:
        return f"{criterion}, budget {exit_budget:.4g}"
    rule = CRITERIA[criterion]
    sign = ("≥" if rule.leaves_at_threshold() else ">") if rule.higher_is_deeper else "<"
    return f"{criterion} {sign} {short_threshold(threshold)}"


def metric_names(points: Sequence[GenerationPoint]) -> list[str]:
    """All metrics of the points, those that compare with full depth first."""
    names = list(dict.fromkeys(name for point in points for name in point.metrics))
    return [name for name in FIRST_METRICS if name in names] + [name for name in names if name not in FIRST_METRICS]


def generation_table(points: Sequence[GenerationPoint]) -> str:
    """One row per operating point: criterion, threshold, depth, saved layers, speed-ups, metrics."""
    return operating_points_table(points, metric_names(points))


def speed_table(points: Sequence[GenerationPoint]) -> str:
    """One row per timed operating point and batch size: tokens per second, full depth of the same run in brackets."""
    header = ["criterion", "batch size", "depth", "tokens/s", "speed-up", "tokens/s without prompt", "speed-up "]
    rows = [
        [
            escape_markdown(method_name(point.criterion)),
            size,
            f"{point.depth:.2f}",
            _beside_full(speed, "tokens_per_second"),
            speed.figure("speedup").text(),
            _beside_full(speed, "decode_tokens_per_second"),
            speed.figure("decode_speedup").text(),
        ]
        for point in points
        for size, speed in point.speeds.items()
    ]
    return markdown_table(header, rows)


def _beside_full(speed: Speed, name: str) -> str:
    """Tokens per second, and those of full depth in brackets."""
    own, full = (speed.figure(one).text(unit="", digits=1) for one in (name, f"full_{name}"))
    return f"{own} ({full})"


def plot_generation(
    curves: Mapping[str, Sequence[GenerationPoint]],
    metrics: Sequence[str],
    path: str | Path,
    full: GenerationPoint,
    title: str | None = None,
) -> Path:
    """Draws each metric against depth (left) and against tokens per second, prompt included (right).

    Args:
        curves: operating points per method, in any order. The right panels show those that were timed, at the first
            batch size, but for noise.
        metrics: keys into the points' `metrics`; one row of panels each.
        path: where to write; the suffix chooses the format (png, svg, pdf).
        full: the model with exits off.
        title: above the panels.

    Returns:
        `path`.

    Raises:
        ImportError: matplotlib is missing; the message names the extra to install.
        ValueError: there is no point to draw, or a point has no value for a metric.
    """
    points = [point for curve in curves.values() for point in curve]
    for metric in metrics:
        plots.check_metric([*points, full] if points else [], metric)
    figure, panels = plots.new_figure(2, len(metrics), height=2.8 + 1.4 / len(metrics), share="row")
    for by_depth, by_speed, metric in zip(panels[::2], panels[1::2], metrics, strict=True):
        for index, (method, curve) in enumerate(curves.items()):
            style = plots.curve_style(index, method)
            plots.draw_curve(by_depth, [(point.depth, point.metrics[metric]) for point in curve], style)
            timed = [(_first_speed(point, "tokens_per_second"), point.metrics[metric]) for point in curve]
            plots.draw_curve(by_speed, [(speed, value) for speed, value in timed if speed is not None], style)
        for axis in (by_depth, by_speed):
            axis.axhline(
                full.metrics[metric], color=plots.REFERENCE_COLOR, linewidth=1, linestyle=(0, (5, 3)), zorder=1
            )
        by_depth.plot(full.depth, full.metrics[metric], "x", color=plots.REFERENCE_COLOR, label="full depth")
        found = [_first_speed(point, "full_tokens_per_second") for point in points]
        speeds = sorted(speed for speed in found if speed is not None)
        if speeds:
            by_speed.plot(speeds[len(speeds) // 2], full.metrics[metric], "x", color=plots.REFERENCE_COLOR)
        by_depth.set_ylabel(metric)
    panels[-2].set_xlabel("depth of generated tokens (mean exit layer)")
    panels[-1].set_xlabel("tokens per second, prompt included")
    return plots.save_figure(figure, panels[0], path, title)


def _first_speed(point: GenerationPoint, name: str) -> float | None:
    """A figure at the first batch size; None without one, and of noise."""
    return next((getattr(speed, name) for speed in point.speeds.values()), None)
