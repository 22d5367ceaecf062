# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What comes of adding exits: their folder, and what was reached, in Python, in `results.json`, and in a part of the
card."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from transformers_cee.evaluation.environment import timing_environment
from transformers_cee.evaluation.report import (
    WALL_CLOCK_NOTE,
    escape_markdown,
    markdown_table,
    method_name,
    write_results,
)
from transformers_cee.evaluation.timing import Reported
from transformers_cee.files import write_text
from transformers_cee.modeling.exits_folder import CARD


RESULTS = "results.json"


@dataclass(kw_only=True)
class CertifiedSpeed:
    """What a promise brought.

    Args:
        name (`str`): of the operating point, for `exit_threshold=`.
        promised (`float`): agreement with full depth.
        criterion (`str`): what decides, `"policy"` or `"max_probability"`: whichever is shallower.
        depth (`float`): mean exit layer of the certifying texts.
        agreement (`float`): with full depth, of the certifying texts.
        alone (`dict[str, float]`):
            Depth of either criterion if it were the only one; of two, each has half the risk.
        accuracy (`float`, *optional*): of the certifying texts, where labels are known.
        reason (`str`, *optional*): why exits are off, if they are.
        speedups (`dict[str, Reported]`): time at full depth over time with exits, by batch size.
        identical (`float`, *optional*): of a language model, share of the timed answers that are full depth's.
    """

    name: str
    promised: float
    criterion: str
    depth: float
    agreement: float
    alone: dict[str, float]
    accuracy: float | None = None
    reason: str | None = None
    speedups: dict[str, Reported] = field(default_factory=dict)
    identical: float | None = None


@dataclass(kw_only=True)
class AddedExits:
    """What [`add_exits`] has done.

    Args:
        output (`str`): folder of the exits.
        base (`str`): the classifier.
        num_layers (`int`): of it.
        learning, certifying (`int`): texts that exits learned from, and that promises were certified on.
        risk (`float`): probability with which a promise may fail.
        speeds (`list[CertifiedSpeed]`): one per agreement, as they were asked for.
        accuracy (`float`, *optional*): of full depth on the certifying texts, where labels are known.
        seconds (`dict[str, float]`): of the pass over the texts, of all that was learned from it, and of the whole.
        promises (`str`, *optional*, defaults to `"texts"`): what agrees, `"tokens"` of a language model.
    """

    output: str
    base: str
    num_layers: int
    learning: int
    certifying: int
    risk: float
    speeds: list[CertifiedSpeed]
    seconds: dict[str, float]
    accuracy: float | None = None
    promises: str = "texts"


def save_added(model: Any, base: str | os.PathLike[str], output: str | os.PathLike[str]) -> None:
    """Saves the exits of a model, and beside them, where pipelines look for it, the tokenizer of their base.

    Args:
        model: with its exits.
        base (`str` or `os.PathLike`): folder or Hub name of what the exits were added to.
        output (`str` or `os.PathLike`): folder of the exits.
    """
    # The folder is found from everywhere, so its base must be, too.
    model.save_exits(output, base=os.path.abspath(base) if os.path.isdir(base) else base)
    # As it was: one that has read texts may cut or pad them otherwise.
    AutoTokenizer.from_pretrained(base).save_pretrained(output)


def write_report(added: AddedExits, model: Any) -> None:
    """Writes `results.json` beside the exits, and what was measured into their card."""
    folder = Path(added.output)
    write_results(asdict(added) | {"environment": timing_environment(model.device)}, folder / RESULTS)
    card = folder / CARD
    write_text(card, f"{card.read_text(encoding='utf-8').rstrip()}\n\n{measured(added)}\n")


_PROMISES = {
    "texts": "at least the promised share of answers is that of full depth.",
    "tokens": "at least the promised share of a text's first tokens, in the mean over texts, is followed by the most "
    "probable token of full depth.",
}


def measured(added: AddedExits) -> str:
    """The part of the card, in Markdown."""
    sizes = sorted({size for speed in added.speeds for size in speed.speedups}, key=int)
    ways = list(dict.fromkeys(way for speed in added.speeds for way in speed.alone))
    ways = ways if len(ways) > 1 else []
    header = ["promised agreement", "exit criterion", "depth", "layer speed-up", "agreement"]
    header += [f"depth by {method_name(way)} alone" for way in ways]
    header += [f"wall-clock speed-up, batch {size}" for size in sizes]
    has_tokens = added.promises == "tokens"
    header += ["accuracy"] * (added.accuracy is not None) + ["same answers"] * has_tokens
    table = markdown_table(header, [_row(added, speed, ways, sizes) for speed in added.speeds])
    full = "" if added.accuracy is None else f" Accuracy at full depth: {added.accuracy:.4f}."
    off = [f"`{speed.name}` is off: {escape_markdown(speed.reason)}" for speed in added.speeds if speed.reason]
    both = (
        " The shallower of both criteria decides, and each is certified at half the risk for that; alone, it had the "
        "whole risk."
    )
    # Timed on a few, which say little of how many texts stay the same.
    same = "Same answers are those of the timed prompts that are full depth's, word by word. " * has_tokens
    return "\n\n".join(
        [
            "## What is promised",
            f"Exits learned from {added.learning} texts without labels what `{escape_markdown(added.base)}` says at "
            f"full depth. {added.certifying} others certify the promise: with probability {1 - added.risk:g} over "
            f"them, on texts of the same kind, {_PROMISES[added.promises]}",
            table,
            f"Depth is the mean exit layer of {added.num_layers}, on the certifying {added.promises}."
            f"{both if ways else ''}{full} {same}{WALL_CLOCK_NOTE}",
            *off,
        ]
    )


def _row(added: AddedExits, speed: CertifiedSpeed, ways: list[str], sizes: list[str]) -> list[str]:
    cells = [
        f"{speed.promised:g}",
        method_name(speed.criterion),
        f"{speed.depth:.2f}",
        f"{added.num_layers / speed.depth:.2f}x",
        f"{speed.agreement:.4f}",
        *(f"{speed.alone[way]:.2f}" for way in ways),
        *(speed.speedups[size].text() if size in speed.speedups else "-" for size in sizes),
    ]
    if added.accuracy is not None:
        cells.append(f"{speed.accuracy:.4f}")
    if added.promises == "tokens":
        cells.append("-" if speed.identical is None else f"{speed.identical:.0%}")
    return cells
