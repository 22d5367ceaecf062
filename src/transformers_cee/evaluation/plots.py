# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Pictures of operating points. Matplotlib is imported when one is drawn, with the Agg backend (no display needed)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .operating_points import OperatingPoint

__all__ = ["plot_curves", "plot_exit_histogram"]

# Okabe and Ito's palette without its yellow (too faint on white); every method also has its own marker and line style.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P")
LINE_STYLES = ("-", "--", "-.", ":")
REFERENCE_COLOR = "#4D4D4D"


def plot_curves(
    curves: Mapping[str, Sequence[OperatingPoint]],
    metric: str,
    path: str | Path,
    full: OperatingPoint | None = None,
    oracle: OperatingPoint | None = None,
    title: str | None = None,
) -> Path:
    """Draws `metric` against depth (left) and against wall-clock speed-up (right) and saves the picture.

    Args:
        curves: operating points per method, in any order. The right panel shows those that were timed
            (`wall_clock_speedup` is not None).
        metric: key into each point's `metrics`.
        path: where to write; the suffix chooses the format (png, svg, pdf).
        full: the model with exits off; a horizontal line, and the x position of 1x.
        oracle: the first correct exit, read from the labels; a star, because no rule can reach it.
        title: above both panels.

    Returns:
        `path`.

    Raises:
        ImportError: matplotlib is missing; the message names the extra to install.
        ValueError: there is no point to draw, or a point has no value for `metric`.
    """
    reference_points = [point for point in (full, oracle) if point is not None]
    points = [point for curve in curves.values() for point in curve] + reference_points
    _check_metric(points, metric)
    figure, (by_depth, by_time) = _figure(columns=2)
    for index, (method, curve) in enumerate(curves.items()):
        style = _style(index, method)
        _draw_curve(by_depth, [(point.depth, point.metrics[metric]) for point in curve], style)
        timed = [point for point in curve if point.wall_clock_speedup is not None]
        _draw_curve(by_time, [(point.wall_clock_speedup, point.metrics[metric]) for point in timed], style)
    if full is not None:
        for axis in (by_depth, by_time):
            axis.axhline(full.metrics[metric], color=REFERENCE_COLOR, linewidth=1, linestyle=(0, (5, 3)), zorder=1)
        by_depth.plot(full.depth, full.metrics[metric], "x", color=REFERENCE_COLOR, label="full depth")
        by_time.plot(1.0, full.metrics[metric], "x", color=REFERENCE_COLOR)
    if oracle is not None:
        label = "oracle (first correct exit)"
        by_depth.plot(oracle.depth, oracle.metrics[metric], "*", color="black", markersize=11, label=label)
    if not any(point.wall_clock_speedup is not None for curve in curves.values() for point in curve):
        by_time.text(0.5, 0.5, "no point was timed", ha="center", va="center", transform=by_time.transAxes)
    by_depth.set_xlabel("depth (mean exit layer)")
    by_time.set_xlabel("wall-clock speed-up over full depth")
    by_depth.set_ylabel(metric.replace("_", " "))
    return _finish(figure, by_depth, path, title)


def plot_exit_histogram(
    histograms: Mapping[str, Mapping[str, int]],
    path: str | Path,
    title: str | None = None,
) -> Path:
    """Draws the share of rows that leave at each layer, one group of bars per layer, and saves the picture.

    Args:
        histograms: per method (or threshold) the number of rows by 1-based exit layer, e.g.
            `{"policy": {"3": 120, "6": 80}}`.
        path: where to write; the suffix chooses the format.
        title: above the picture.

    Returns:
        `path`.

    Raises:
        ImportError: matplotlib is missing; the message names the extra to install.
        ValueError: there is no row to draw.
    """
    totals = {name: sum(histogram.values()) for name, histogram in histograms.items()}
    if not totals or not all(totals.values()):
        raise ValueError(f"`histograms` must hold at least one row for every name; got row counts {totals}.")
    layers = sorted({int(layer) for histogram in histograms.values() for layer in histogram})
    figure, (axis,) = _figure(columns=1)
    width = 0.8 / len(histograms)
    for index, (name, histogram) in enumerate(histograms.items()):
        counts = {int(layer): count for layer, count in histogram.items()}
        shares = [100 * counts.get(layer, 0) / totals[name] for layer in layers]
        offset = (index - (len(histograms) - 1) / 2) * width
        positions = [position + offset for position in range(len(layers))]
        axis.bar(positions, shares, width, label=name, color=COLORS[index % len(COLORS)])
    axis.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    axis.set_xlabel("exit layer")
    axis.set_ylabel("rows that leave there (%)")
    return _finish(figure, axis, path, title)


def _check_metric(points: Sequence[OperatingPoint], metric: str) -> None:
    if not points:
        raise ValueError("`curves` must hold at least one operating point; got none.")
    for point in points:
        if metric not in point.metrics:
            raise ValueError(f"`metric` must be in every point's metrics, {sorted(point.metrics)}; got {metric!r}.")


def _figure(columns: int) -> tuple[Any, Sequence[Any]]:
    """A figure with `columns` panels that share the vertical axis, made without pyplot's global state."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Drawing needs matplotlib, which is not installed: pip install 'transformers-cee[plots]'."
        ) from error
    figure = Figure(figsize=(5.2 * columns, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, sharey=True, squeeze=False)[0]
    for axis in axes:
        axis.grid(color="#E0E0E0", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _style(index: int, label: str) -> dict[str, Any]:
    return {
        "color": COLORS[index % len(COLORS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINE_STYLES[index % len(LINE_STYLES)],
        "linewidth": 1.6,
        "markersize": 5,
        "label": label,
    }


def _draw_curve(axis: Any, points: Sequence[tuple[float, float]], style: dict[str, Any]) -> None:
    if points:
        xs, ys = zip(*sorted(points), strict=True)
        axis.plot(xs, ys, **style)


def _finish(figure: Any, legend_axis: Any, path: str | Path, title: str | None) -> Path:
    handles, labels = legend_axis.get_legend_handles_labels()
    if handles:
        # Two columns fit below one panel, whatever the labels.
        columns = min(2 * len(figure.axes), len(labels))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    if title is not None:
        figure.suptitle(title, fontsize=11)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
