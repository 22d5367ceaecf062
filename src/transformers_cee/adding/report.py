# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What was measured when exits were added: `results.json`, and a part of the card."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers_cee.evaluation.environment import timing_environment
from transformers_cee.evaluation.report import WALL_CLOCK_NOTE, escape_markdown, markdown_table, write_results
from transformers_cee.files import write_text
from transformers_cee.modeling.exits_folder import CARD


if TYPE_CHECKING:
    from transformers_cee.adding.run import AddedExits, CertifiedSpeed

RESULTS = "results.json"


def write_report(added: AddedExits, model: Any) -> None:
    """Writes `results.json` beside the exits, and what was measured into their card."""
    folder = Path(added.output)
    write_results(asdict(added) | {"environment": timing_environment(model.device)}, folder / RESULTS)
    card = folder / CARD
    write_text(card, f"{card.read_text(encoding='utf-8').rstrip()}\n\n{measured(added)}\n")


def measured(added: AddedExits) -> str:
    """The part of the card, in Markdown."""
    sizes = sorted({size for speed in added.speeds for size in speed.speedups}, key=int)
    header = ["promised agreement", "depth", "layer speed-up", "agreement", *(f"time, batch {size}" for size in sizes)]
    if added.accuracy is not None:
        header.append("accuracy")
    table = markdown_table(header, [_row(added, speed, sizes) for speed in added.speeds])
    full = "" if added.accuracy is None else f" Accuracy at full depth: {added.accuracy:.4f}."
    off = [f"`{speed.name}` is off: {escape_markdown(speed.reason)}" for speed in added.speeds if speed.reason]
    return "\n\n".join(
        [
            "## What is promised",
            f"Exits learned from {added.learning} texts without labels what `{escape_markdown(added.base)}` says at "
            f"full depth. {added.certifying} others certify the promise: with probability {1 - added.risk:g} over "
            "them, on texts of the same kind, at least the promised share of answers is that of full depth.",
            table,
            f"Depth is the mean exit layer of {added.num_layers}, on the certifying texts.{full} {WALL_CLOCK_NOTE}",
            *off,
        ]
    )


def _row(added: AddedExits, speed: CertifiedSpeed, sizes: list[str]) -> list[str]:
    cells = [
        f"{speed.promised:g}",
        f"{speed.depth:.2f}",
        f"{added.num_layers / speed.depth:.2f}x",
        f"{speed.agreement:.4f}",
        *(speed.speedups[size].text() if size in speed.speedups else "-" for size in sizes),
    ]
    return cells if added.accuracy is None else [*cells, f"{speed.accuracy:.4f}"]
