# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The command `transformers-cee`: classifiers get exits and are exported, and files of texts are classified, without
code."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments (sequence of `str`, *optional*): those behind its name; by default those of the process.

    Returns:
        `int`: exit code; 2 where something is not accepted, of which one line on the standard error tells.
    """
    asked = vars(_parser().parse_args(arguments))
    command = asked.pop("command")
    try:
        command(**asked)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"transformers-cee: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def add_exits(model: str, **options: Any) -> None:
    """Gives exits to a model and prints what was reached as JSON."""
    from transformers_cee.adding.run import add_exits

    _check_device(options["device"])
    print(json.dumps(asdict(add_exits(model, **options))))


def classify(model: str, texts: str, workers: int | None, device: str | None, **options: Any) -> None:
    """Classifies a file of texts and prints the summary as JSON."""
    # The help needs no torch.
    from transformers_cee.bulk.classifying import checked_output, classify
    from transformers_cee.bulk.texts import find_texts

    # What a person mistypes is said before weights are loaded.
    find_texts(texts, options["text_column"])
    checked_output(options["output"], texts)
    summary: Any
    if workers is None:
        summary = classify(_load(model, device or "cpu"), texts, **options)
    elif device is not None:
        raise ValueError(f"`--device`={device!r} is of one process; `--workers`={workers} run on CPUs.")
    else:
        from transformers_cee.bulk.ray_data import classify_on_ray

        summary = classify_on_ray(model, texts, workers=workers, **options)
    print(json.dumps(asdict(summary)))


def export(model: str, output: str, calibration_texts: str | None, text_column: str, **options: Any) -> None:
    """Exports a classifier to an engine."""
    from transformers_cee.bulk.texts import find_texts
    from transformers_cee.bulk.windows import checked_model

    texts = None if calibration_texts is None else list(find_texts(calibration_texts, text_column).checked(False))
    checked_model(_load(model)).export(output, calibration_texts=texts, **options)
    print(output)


def _load(model: str, device: str = "cpu") -> Any:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    _check_device(device)
    # An exported model is made for its device, and stays there.
    config = AutoConfig.from_pretrained(model)
    made_for = {} if getattr(config, "exit_engine", None) is None else {"device": device}
    return AutoModelForSequenceClassification.from_pretrained(model, **made_for).to(device)


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].removesuffix(".")
        raise ValueError(f"`--device`={device!r} is no device that torch has here: {reason}.") from error


def exit_threshold(given: str) -> float | list[float] | str:
    """A number, numbers with commas between them, or the name of an operating point."""
    try:
        found = [float(part) for part in given.split(",")]
    except ValueError:
        return given
    return found[0] if len(found) == 1 else found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="transformers-cee", description="Models with early exits: each text, or token, leaves at its own layer."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_exits(commands.add_parser("add-exits", help="give exits to a model", description=_ADD_EXITS))
    _add_classify(commands.add_parser("classify", help="classify a file of texts", description=_CLASSIFY))
    _add_export(commands.add_parser("export", help="export a classifier to an engine", description=_EXPORT))
    return parser


_ADD_EXITS = (
    "Give exits to a fine-tuned classifier of texts, or to a language model, from texts without labels. Its answers "
    "at full depth stay as they are; early ones agree with them as often as is promised, which texts that nothing has "
    "learned from certify. Prints what was reached as JSON."
)
_CLASSIFY = (
    "Classify a file of texts of any length. Each text gets a label, its score and the layer (1-based) at which it "
    "left, in the order of the texts. Prints a summary as JSON."
)
_EXPORT = "Export a classifier with exits to an engine: a folder that `classify` and Auto classes load."
_FILE = ".txt with one text per line, .csv with a header, or .jsonl"


def _add_exits(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=add_exits)
    parser.add_argument("model", metavar="MODEL", help="folder or Hub name of a model without exits")
    parser.add_argument(
        "--texts", required=True, metavar="FILE", help=f"some thousand texts, as the classifier will see them: {_FILE}"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the exits and their card")
    parser.add_argument(
        "--agreement", type=float, nargs="+", default=[0.99],
        help="promised share of answers that are those of full depth; the first is the default (default: 0.99)",
    )  # fmt: skip
    parser.add_argument(
        "--risk", type=float, default=0.05, help="probability with which a promise may fail (default: %(default)s)"
    )
    parser.add_argument("--text_column", default="text", help="column or field of the texts (default: %(default)s)")
    parser.add_argument("--label_column", help="column of true labels, to report the accuracy; nothing learns from it")
    parser.add_argument("--exit_layers", type=int, nargs="+", help="layers (1-based) with an exit (default: all)")
    parser.add_argument("--batch_size", type=int, default=32, help="rows per batch (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="device of torch, as 'cuda' (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="of what is drawn at random (default: %(default)s)")
    parser.add_argument("--disable_tqdm", action="store_true", help="show no progress")


def _add_classify(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=classify)
    parser.add_argument("model", metavar="MODEL", help="folder or Hub name of a classifier with exits, or its export")
    parser.add_argument("texts", metavar="INPUT", help=f"the texts: {_FILE}")
    parser.add_argument("--output", required=True, metavar="OUT", help="file for the results: .jsonl or .csv")
    parser.add_argument("--workers", type=int, help="processes of Ray Data that classify (default: this one alone)")
    parser.add_argument("--text_column", default="text", help="column or field of the texts (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=32, help="rows per batch (default: %(default)s)")
    parser.add_argument("--window", type=int, default=4096, help="texts held at once (default: %(default)s)")
    parser.add_argument(
        "--max_length", type=int, help="tokens that a text is cut to (default, and at most: what the model reads)"
    )
    parser.add_argument(
        "--exit_threshold", type=exit_threshold,
        help="a number, one per exit with commas between, or the name of an operating point (default: the model's)",
    )  # fmt: skip
    parser.add_argument("--exit_criterion", help="rule by which texts leave (default: the model's)")
    parser.add_argument("--exit_budget", type=float, help="wanted mean depth as a share of all layers")
    parser.add_argument("--min_exit_layer", type=int, help="first layer (1-based) at which texts may leave")
    parser.add_argument("--device", help="device of torch that the model runs on, as 'cuda' (default: cpu)")
    parser.add_argument("--disable_tqdm", action="store_true", help="show no progress")


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=export)
    parser.add_argument("model", metavar="MODEL", help="folder or Hub name of a classifier with exits")
    parser.add_argument("output", metavar="OUTPUT", help="folder for the export; it must be empty where it exists")
    parser.add_argument("--engine", default="openvino", help="name of an engine (default: %(default)s)")
    parser.add_argument("--precision", default="int8", help="float32, bfloat16 or int8 (default: %(default)s)")
    parser.add_argument(
        "--calibration_texts", metavar="FILE", help=f"texts that the model is for, which int8 needs: {_FILE}"
    )
    parser.add_argument("--text_column", default="text", help="column or field of the texts (default: %(default)s)")
    parser.add_argument("--exit_criterion", help="criterion whose score is part of the graphs (default: the model's)")
    parser.add_argument(
        "--exit_layers", help="'auto' keeps the exits that take the least time, by costs measured here (default: all)"
    )
    parser.add_argument("--agreement", type=float, default=0.99, help="promised by 'auto' (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=32, help="of calibration, and what 'auto' chooses for")
    parser.add_argument(
        "--measure", action=argparse.BooleanOptionalAction, default=True, help="what layers and checks cost here"
    )


__all__ = ["exit_threshold", "main"]
