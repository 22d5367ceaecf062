# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Operating points as Markdown tables and as JSON."""

from __future__ import annotations

import html
import math
import re
import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers_cee.files import write_json


if TYPE_CHECKING:
    from .operating_points import OperatingPoint

__all__ = [
    "WALL_CLOCK_NOTE",
    "escape_markdown",
    "markdown_table",
    "matched_depth_table",
    "method_name",
    "operating_points_table",
    "spread",
    "spread_table",
    "write_results",
]

METHOD_NAMES = {"policy": "ConsistentEE (policy)", "max_probability": "maximum probability", "full": "full depth"}
METHOD_NAMES |= {"policies_by_alpha": "ConsistentEE, one policy per α"}


# What Markdown reads as more than a character. An underscore within a word is none of it.
MARKUP = re.compile(r"[\\`*\[\]|~]|(?<!\w)_|_(?!\w)|^\s*(?:[-+#]|\d+[.)])(?=\s)")


def method_name(criterion: str) -> str:
    """What tables and pictures call a criterion."""
    return METHOD_NAMES.get(criterion, criterion.replace("_", " "))


def escape_markdown(text: Any) -> str:
    """A name or a note as one line of Markdown that shows as it is written: no HTML, no markup, no cell of a table."""
    line = " ".join(str(text).split())
    return html.escape(MARKUP.sub(lambda found: found[0][:-1] + "\\" + found[0][-1], line), quote=False)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns also line up as plain text: first column to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + " |"

    return "\n".join(line(cells) for cells in (header, rule, *rows))


# What tables of wall-clock figures are read with.
WALL_CLOCK_NOTE = (
    "Wall-clock figures are medians over rounds in which everything that is compared runs in turn, ± half of the "
    "rounds' interquartile range; `noise` stands where that range was above 15 % of the median, or the speed above "
    "what the saved layers allow."
)


def operating_points_table(points: Sequence[OperatingPoint], metrics: Sequence[str]) -> str:
    """One row per operating point: criterion, threshold or budget, depth, saved layers, both speed-ups, metrics.

    Args:
        points: in the order of the rows. Wall-clock figures as in `timing.Reported`.
        metrics: keys into each point's `metrics`.
    """
    header = ["criterion", "threshold", "depth", "saved layers", "layer speed-up", "wall-clock speed-up", *metrics]
    rows = [
        [
            escape_markdown(method_name(point.criterion)),
            short_threshold(point.exit_threshold) if point.exit_budget is None else f"budget {point.exit_budget:.4g}",
            f"{point.depth:.2f}",
            f"{point.saved_layers:.1%}",
            f"{point.layer_speedup:.2f}x",
            point.wall_clock.text(),
            *(_number(point.metrics.get(metric)) for metric in metrics),
        ]
        for point in points
    ]
    return markdown_table([escape_markdown(name.replace("_", " ")) for name in header], rows)


def matched_depth_table(values: Mapping[str, Mapping[float, float | None]], metric: str, num_layers: int) -> str:
    """`metric` of every method at the same depths, so that methods can be compared.

    Args:
        values: per method, the metric by depth in layers; None where the method's curve does not reach that depth.
        metric: what the values are.
        num_layers: layers of the model, for the heading.
    """
    depths = sorted({depth for by_depth in values.values() for depth in by_depth})
    header = [
        f"{escape_markdown(metric.replace('_', ' '))} at depth (of {num_layers})",
        *(f"{depth:.2f}" for depth in depths),
    ]
    rows = [
        [escape_markdown(method_name(method)), *(_number(by_depth.get(depth)) for depth in depths)]
        for method, by_depth in values.items()
    ]
    return markdown_table(header, rows)


def spread(values: Sequence[float | None], digits: int = 1, scale: float = 100.0) -> str:
    """`mean ± standard deviation` of one value per seed (`n − 1` in the denominator), the mean alone of one value, `-`
    of none.

    Args:
        values: None and NaN do not count.
        digits: behind the point.
        scale: what values are multiplied with; 100 turns shares into percent.
    """
    known = [scale * value for value in values if value is not None and not math.isnan(value)]
    if not known:
        return "-"
    mean = f"{statistics.mean(known):.{digits}f}"
    return f"{mean} ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else mean


def spread_table(
    values: Mapping[str, Mapping[str, Sequence[float | None]]],
    heading: str = "method",
    *,
    digits: int = 1,
    scale: float = 100.0,
    lower_is_better: Collection[str] = (),
) -> str:
    """One row per method, one column per figure, `mean ± standard deviation` over seeds, the best mean of each column
    in bold, with all that look the same.

    Args:
        values: per method and column, one value per seed; None where there is none. Columns stand in the order in
            which they first come.
        heading: of the first column.
        digits, scale: as in `spread`.
        lower_is_better: columns whose best mean is the lowest.

    Raises:
        ValueError: no methods, or `lower_is_better` names a column that is not there.
    """
    columns = list(dict.fromkeys(column for row in values.values() for column in row))
    if not values or not set(lower_is_better) <= set(columns):
        raise ValueError(
            f"`values` must hold at least one method, and the columns {list(lower_is_better)} of `lower_is_better`; "
            f"got the methods {list(values)} and the columns {columns}."
        )
    cells = {column: [spread(row.get(column, ()), digits, scale) for row in values.values()] for column in columns}
    for column, texts in cells.items():
        # Means as they are printed: who is a hundredth ahead of what stands there is not better.
        means = [float(text.split()[0]) for text in texts if text != "-"]
        best = (min if column in lower_is_better else max)(means, default=None)
        cells[column] = [f"**{text}**" if text != "-" and float(text.split()[0]) == best else text for text in texts]
    rows = [
        [method_name(method), *(cells[column][index] for column in columns)] for index, method in enumerate(values)
    ]
    return markdown_table([heading, *columns], rows)


def write_results(results: Mapping[str, Any], path: str | Path) -> Path:
    """Writes nested results as JSON in the place of what the file held: operating points become dictionaries, NaN and
    infinities null.

    Returns:
        `path`.

    Raises:
        TypeError: a value is neither a number, a text, a container of them nor an operating point.
    """
    path = Path(path)
    write_json(path, _plain(results))
    return path


def _plain(value: Any) -> Any:
    """`value` with nothing in it that standard JSON lacks."""
    if hasattr(value, "to_dict"):
        return _plain(value.to_dict())
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy scalars and arrays, tensors
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.4f}"


def short_threshold(value: float | Sequence[float] | str | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return escape_markdown(value)
    if isinstance(value, int | float):
        # A threshold just below 1 must not look like exits switched off.
        return f"{value:.4g}" if value == 1 or f"{value:.4g}" != "1" else f"{value:.9g}"
    return "per exit"
