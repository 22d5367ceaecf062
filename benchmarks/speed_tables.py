# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tables and the picture of `speed.py` and `speed_tasks.py`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speed_peers import STOCK

from transformers_cee.evaluation.report import markdown_table
from transformers_cee.evaluation.timing import Reported


CHOICES = ["", "exits", "agreement on dev", "on test", "accuracy", "depth", "over the engine"]


def tables(results: dict[str, Any]) -> str:
    """What was found, as Markdown."""
    parts = [f"Full depth in float32: {results['full']:.4f} on {results['rows']['test']} test rows.\n"]
    header = ["", "accuracy", "depth", "ms per text", "over stock torch", "over the engine", "share", "exits"]
    for one in results["sizes"]:
        lines = [[STOCK, "", "", "", "1.00x", "", "", ""]]
        for name, about in one["variants"].items():
            over = Reported(**about["over_engine"]).text() if "over_engine" in about else ""
            exits = f"{about['exit_layers'][:-1]}, {about['criterion']}" if "exit_layers" in about else ""
            share = about.get("share")
            lines.append(
                [name, f"{about['accuracy']:.4f}", f"{about['depth']:.2f}", Reported(**about["milliseconds"]).text(""),
                 Reported(**about["over_stock"]).text(), over, "" if share is None else f"{share:.2f}", exits]
            )  # fmt: skip
        parts.append(f"Batch {one['batch_size']}:\n\n{markdown_table(header, lines)}\n")
        slower = [
            [word, *(Reported(**figure).text() for figure in found.values())]
            for word, found in one["never_slower"].items()
        ]
        parts.append(
            "Time without exits over time with them, all exits open, at mean depths of so many of all layers:\n\n"
            + markdown_table(["", *next(iter(one["never_slower"].values()))], slower)
            + "\n"
        )
        if one["choice"]:
            lines = [
                [name, str(found["layers"][:-1]), f"{found['agreement_on_dev']:.4f}", f"{found['agreement']:.4f}",
                 f"{found['accuracy']:.4f}", f"{found['depth']:.2f}", Reported(**found["over_engine"]).text()]
                for name, found in one["choice"].items()
            ]  # fmt: skip
            parts.append(
                "The exits chosen by cost, as certified, and others with the boldest threshold that reaches their "
                "agreement on dev:\n\n" + markdown_table(CHOICES, lines) + "\n"
            )
    header = ["", "agreement", "accuracy", "depth before", "accuracy", "depth refitted", "accuracy"]
    names = ["agreement", "accuracy", "depth_before", "accuracy_before", "depth_after", "accuracy_after"]
    lines = [
        [word, *(f"{found[name]:.2f}" if "depth" in name else f"{found[name]:.4f}" for name in names)]
        for word, found in results["quantised"].items()
    ]
    parts.append(
        "Beside float32 at full depth, and at half the layers with thresholds fitted in float32 and refitted:\n\n"
        + markdown_table(header, lines)
        + "\n"
    )
    return "\n".join(parts)


def draw_speedups(groups: Mapping[str, Mapping[str, Reported]], path: Path) -> None:
    """Bars of the speed-up over the stock model, by group and variant; noise has none."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(name for figures in groups.values() for name in figures))
    figure, axes = pyplot.subplots(figsize=(10, 1.2 + 0.32 * len(names)))
    height = 0.8 / len(groups)
    for number, (group, figures) in enumerate(groups.items()):
        values = [figures[name].value or 0.0 if name in figures else 0.0 for name in names]
        axes.barh([place + number * height for place in range(len(names))], values, height, label=group)
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(names))], names)
    axes.invert_yaxis()
    axes.set_xlabel(f"speed-up over {STOCK} (none: noise, or not run)")
    axes.legend(title="rows per batch")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
