# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Pictures of operating points. Matplotlib is imported when one is drawn, with the Agg backend (no display needed)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from transformers_cee.files import replacing

from .curves import Axis, curve_values


if TYPE_CHECKING:
    from .operating_points import OperatingPoint
    from .reliability import Reliability

__all__ = ["plot_curves", "plot_exit_histogram", "plot_reliability", "plot_seeds"]

# Okabe and Ito's palette without its yellow (too faint on white); every method also has its own marker and line style.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P")
LINE_STYLES = ("-", "--", "-.", ":")
REFERENCE_COLOR = "#4D4D4D"
ORACLE_LABEL = "oracle (first correct exit)"
AXIS_LABELS = {
    "depth": "depth (mean exit layer)",
    "flops": "FLOPs (mean of one inference)",
    "wall_clock": "wall-clock time (share of full depth)",
}
# Characters of the longest label in a legend of usual size.
LONG_LABEL = 30
# Costs at which seeds are averaged.
_GRID = 101


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
        curves: operating points per method, in any order. The right panel shows those that were timed, but for noise
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
    check_metric(points, metric)
    figure, (by_depth, by_time) = new_figure(columns=2)
    for index, (method, curve) in enumerate(curves.items()):
        style = curve_style(index, method)
        draw_curve(by_depth, [(point.depth, point.metrics[metric]) for point in curve], style)
        timed = [
            (speedup, point.metrics[metric]) for point in curve if (speedup := point.wall_clock_speedup) is not None
        ]
        draw_curve(by_time, timed, style)
    if full is not None:
        for axis in (by_depth, by_time):
            axis.axhline(full.metrics[metric], color=REFERENCE_COLOR, linewidth=1, linestyle=(0, (5, 3)), zorder=1)
        by_depth.plot(full.depth, full.metrics[metric], "x", color=REFERENCE_COLOR, label="full depth")
        by_time.plot(1.0, full.metrics[metric], "x", color=REFERENCE_COLOR)
    if oracle is not None:
        at = oracle.depth, oracle.metrics[metric]
        by_depth.plot(*at, "*", color="black", markersize=11, label=ORACLE_LABEL)
    if not any(point.wall_clock_speedup is not None for curve in curves.values() for point in curve):
        by_time.text(0.5, 0.5, "no wall-clock figures", ha="center", va="center", transform=by_time.transAxes)
    by_depth.set_xlabel("depth (mean exit layer)")
    by_time.set_xlabel("wall-clock speed-up over full depth")
    by_depth.set_ylabel(metric.replace("_", " "))
    return save_figure(figure, by_depth, path, title)


def plot_seeds(
    curves: Mapping[str, Sequence[Sequence[OperatingPoint]]],
    metric: str,
    path: str | Path,
    *,
    axes: Sequence[Axis] = ("depth",),
    exit_costs: Sequence[float] | None = None,
    full: Sequence[OperatingPoint] = (),
    oracle: Sequence[OperatingPoint] = (),
    title: str | None = None,
) -> Path:
    """Draws `metric` against cost, one panel per axis: per method the mean over seeds as a line, and a band of one
    standard deviation on either side. Seeds are interpolated, and averaged over the costs that all of them reach.

    Args:
        curves: per method, the operating points of each seed.
        metric: key into each point's `metrics`.
        path: where to write; the suffix chooses the format.
        axes: what stands on the horizontal axes: `"depth"`, `"flops"`, `"wall_clock"`. Methods with a point that was
            not timed, or is noise, are left out of `"wall_clock"`.
        exit_costs: cost of one inference that stops at each exit, for `"flops"`; see `costs.exit_costs`.
        full: the model with exits off, of each seed; a horizontal line at their mean.
        oracle: the first correct exit of each seed; a star at their mean, where the axis is depth.
        title: above the panels.

    Returns:
        `path`.

    Raises:
        ImportError: matplotlib is missing; the message names the extra to install.
        ValueError: no method, no axis, a method without seeds or whose seeds reach no cost in common, or as
            `curve_values`.
    """
    empty = [method for method, seeds in curves.items() if not seeds]
    if not curves or empty or not axes:
        raise ValueError(
            f"`curves` must hold a method and a seed of each, `axes` one name; got {list(curves)} (without seeds: "
            f"{empty}) and {list(axes)}."
        )
    for points in (full, oracle):
        if points:
            check_metric(points, metric)
    bands = [_seed_bands(curves, metric, axis, exit_costs) for axis in axes]
    figure, panels = new_figure(columns=len(axes))
    for panel, axis, drawn in zip(panels, axes, bands, strict=True):
        for index, method in enumerate(curves):
            # Drawn without data where the method has none, so that the legend of the first panel names all.
            grid, mean, deviation = drawn.get(method, ([], [], []))
            style = curve_style(index, method)
            panel.plot(grid, mean, **{**style, "markevery": 0.1 if len(grid) > 1 else 1})
            if len(curves[method]) > 1 and len(grid):
                low, high = np.subtract(mean, deviation), np.add(mean, deviation)
                panel.fill_between(grid, low, high, color=style["color"], alpha=0.18, linewidth=0)
        if full:
            height = float(np.mean([point.metrics[metric] for point in full]))
            panel.axhline(height, color=REFERENCE_COLOR, linewidth=1, linestyle=(0, (5, 3)), label="full depth")
        if oracle and axis == "depth":
            at = [
                float(np.mean(values)) for values in zip(*((p.depth, p.metrics[metric]) for p in oracle), strict=True)
            ]
            panel.plot(*at, "*", color="black", markersize=11, label=ORACLE_LABEL)
        panel.set_xlabel(AXIS_LABELS[axis])
        if axis == "flops":
            panel.xaxis.set_major_formatter(_thousands())
        if not drawn:
            panel.text(0.5, 0.5, "no method was timed", ha="center", va="center", transform=panel.transAxes)
    panels[0].set_ylabel(metric.replace("_", " "))
    return save_figure(figure, panels[0], path, title)


def _thousands() -> Any:
    """Ticks such as 5 G."""
    from matplotlib.ticker import EngFormatter

    return EngFormatter()


def _seed_bands(
    curves: Mapping[str, Sequence[Sequence[OperatingPoint]]],
    metric: str,
    axis: Axis,
    exit_costs: Sequence[float] | None,
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Per method that has them: costs that all seeds reach, mean and standard deviation there."""
    bands = {}
    for method, seeds in curves.items():
        if axis == "wall_clock" and any(point.wall_clock_speedup is None for seed in seeds for point in seed):
            continue
        found = [curve_values(seed, metric, axis, exit_costs=exit_costs) for seed in seeds]
        start, stop = max(costs[0] for costs, _ in found), min(costs[-1] for costs, _ in found)
        if start > stop:
            raise ValueError(f"`curves` of {method!r} must share a range of {axis}; no cost is reached by all seeds.")
        grid = np.linspace(start, stop, _GRID) if start < stop else np.array([start])
        heights = np.stack([np.interp(grid, costs, values) for costs, values in found])
        bands[method] = grid, heights.mean(0), heights.std(0, ddof=1) if len(heights) > 1 else np.zeros(len(grid))
    return bands


def plot_reliability(
    exits: Mapping[int, Reliability], path: str | Path, columns: int = 4, title: str | None = None
) -> Path:
    """Draws accuracy against confidence, one panel per exit: bars of the bins, paler where they hold fewer rows, the
    diagonal of perfect calibration, and the expected calibration error (ECE).

    Args:
        exits: per 1-based layer, the bins; see `exit_reliability`.
        path: where to write; the suffix chooses the format.
        columns: panels side by side.
        title: above the panels.

    Returns:
        `path`.

    Raises:
        ImportError: matplotlib is missing; the message names the extra to install.
        ValueError: no exit, or fewer than one column.
    """
    if not exits or columns < 1:
        raise ValueError(f"`exits` ({len(exits)}) and `columns` ({columns}) must both be at least 1.")
    columns = min(columns, len(exits))
    figure, panels = new_figure(columns, rows=-(-len(exits) // columns), width=2.6, height=2.6)
    for panel, (layer, bins) in zip(panels, exits.items(), strict=False):
        shown = bins.counts > 0
        widths, left = np.maximum(np.diff(bins.edges), 0.004)[shown], bins.edges[:-1][shown]
        # A bin of three rows says little, whatever its height.
        colors = [(COLORS[0], 0.15 + 0.85 * share) for share in bins.counts[shown] / bins.counts.max()]
        panel.bar(left, bins.accuracy[shown], widths, align="edge", color=colors, edgecolor="white", linewidth=0.5)
        panel.plot([0, 1], [0, 1], color=REFERENCE_COLOR, linewidth=1, linestyle=(0, (5, 3)))
        panel.set_title(f"layer {layer}: ECE {100 * bins.expected_calibration_error:.1f} %", fontsize=9)
        panel.set_xlim(0, 1)
        panel.set_ylim(0, 1)
    for panel in panels[len(exits) :]:
        panel.set_visible(False)
    for panel in panels[: len(exits)][-columns:]:
        panel.set_xlabel("confidence")
    for panel in panels[::columns]:
        panel.set_ylabel("accuracy")
    panels[0].bar(0, 0, color=COLORS[0], label="accuracy of the bin (paler: fewer rows)")
    panels[0].plot([], [], color=REFERENCE_COLOR, linewidth=1, linestyle=(0, (5, 3)), label="perfect calibration")
    return save_figure(figure, panels[0], path, title)


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
    figure, (axis,) = new_figure(columns=1)
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
    return save_figure(figure, axis, path, title)


def check_metric(points: Sequence[OperatingPoint], metric: str) -> None:
    if not points:
        raise ValueError("`curves` must hold at least one operating point; got none.")
    for point in points:
        if metric not in point.metrics:
            raise ValueError(f"`metric` must be in every point's metrics, {sorted(point.metrics)}; got {metric!r}.")


def new_figure(
    columns: int, rows: int = 1, width: float = 5.2, height: float = 4.2, share: Literal["all", "row"] = "all"
) -> tuple[Any, list[Any]]:
    """A figure and its panels, row by row; made without pyplot's global state.

    Args:
        width, height: of one panel, in inches.
        share: which panels share the vertical axis.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Drawing needs matplotlib, which is not installed: pip install 'transformers-cee[plots]'."
        ) from error
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, sharey=share, squeeze=False).flatten()
    for axis in axes:
        axis.grid(color="#E0E0E0", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def curve_style(index: int, label: str) -> dict[str, Any]:
    return {
        "color": COLORS[index % len(COLORS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINE_STYLES[index % len(LINE_STYLES)],
        "linewidth": 1.6,
        "markersize": 5,
        "label": label,
    }


def draw_curve(axis: Any, points: Sequence[tuple[float, float]], style: dict[str, Any]) -> None:
    if points:
        xs, ys = zip(*sorted(points), strict=True)
        axis.plot(xs, ys, **style)


def save_figure(figure: Any, legend_axis: Any, path: str | Path, title: str | None) -> Path:
    handles, labels = legend_axis.get_legend_handles_labels()
    if handles:
        # Two columns fit into the width of a large panel: long labels in small print.
        columns = min(max(1, round(figure.get_figwidth() / 2.6)), len(labels))
        size = 7.5 if columns > 1 and max(map(len, labels)) > LONG_LABEL else None
        legend = figure.legend(
            handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=size
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
    if title is not None:
        # A name may hold dollar signs, which are no formula.
        figure.suptitle(title, fontsize=11, parse_math=False)
    path = Path(path)
    with replacing(path) as beside:
        figure.savefig(beside, dpi=150)
    return path
