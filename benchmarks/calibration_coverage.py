# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""How often are the promises of a calibration kept on other rows, and what do they cost?

    python benchmarks/calibration_coverage.py runs/*/exits.safetensors --output docs/results/calibration.md

Each file is a safetensors file of one model and one exit criterion on rows that neither has learned from:

    scores       float  (rows, exits - 1)  the criterion's own score at every internal exit
    predictions  int    (rows, exits)      class that each exit predicts
    correct      bool   (rows, exits)      is it the true one?
    layers       int    (exits,)           1-based layer of each exit
    metadata     {"criterion": "max_probability", "name": "sst2"}; the name is the file's folder by default

`write_scores` makes one. The rows are split at random again and again: one part calibrates, the other one checks. The
table has, for each promise, level and method: the share of splits in which the promise held on the other part, the
used share of the budget, accuracy, agreement with full depth and mean exit layer there, and in how many splits
calibration switched the exits off.
"""

import argparse
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from transformers_cee.calibration.agreement import calibrate_agreement
from transformers_cee.calibration.budget import calibrate_budget
from transformers_cee.calibration.points import CalibratedPoint
from transformers_cee.calibration.risk import calibrate_risk
from transformers_cee.calibration.scores import ExitScores, excess_risk
from transformers_cee.evaluation.report import markdown_table
from transformers_cee.files import write_json, write_text


Calibrate = Callable[[ExitScores], CalibratedPoint]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="safetensors files of stored scores")
    parser.add_argument("--splits", type=int, default=200, help="random splits of each file")
    parser.add_argument("--calibration_rows", type=float, default=0.5, help="share of the rows that calibrate")
    parser.add_argument("--epsilons", type=float, nargs="+", default=[0.01, 0.05], help="accepted disagreement")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.2, 0.35, 0.5, 0.65, 0.8], help="of full depth")
    parser.add_argument("--risks", type=float, nargs="+", default=[0.01, 0.02], help="accepted additional errors")
    parser.add_argument("--delta", type=float, default=0.05, help="chance to fail of certified promises")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="Markdown file, and a JSON file beside it; default: print only")
    args = parser.parse_args(arguments)
    if args.splits < 1 or not 0 < args.calibration_rows < 1:
        parser.error("--splits must be at least 1 and --calibration_rows a share between 0 and 1.")
    return args


def write_scores(
    path: Path, criterion: str, scores: Tensor, predictions: Tensor, correct: Tensor, layers: Tensor, name: str = ""
) -> None:
    """A file that this command reads; shapes as above."""
    tensors = {"scores": scores, "predictions": predictions, "correct": correct, "layers": layers}
    metadata = {"criterion": criterion, **({"name": name} if name else {})}
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata)


def read_scores(path: Path) -> tuple[str, ExitScores]:
    """Name and scores of a file.

    Raises:
        ValueError: arrays or the criterion are missing.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        missing = {"scores", "predictions", "correct", "layers"} - set(file.keys())
        if missing or "criterion" not in metadata:
            raise ValueError(f"`{path}` lacks {sorted(missing) or 'the criterion in its metadata'}.")
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    predictions = tensors["predictions"]
    return metadata.get("name", path.resolve().parent.name), ExitScores(
        metadata["criterion"],
        tensors["scores"].float(),
        tensors["layers"],
        predictions != predictions[:, -1:],
        (~tensors["correct"].bool()).float(),
    )


def promises(args: argparse.Namespace, layers: Tensor) -> dict[tuple[str, str, str], Calibrate]:
    """What is calibrated, by promise, level and method."""
    calibrations: dict[tuple[str, str, str], Calibrate] = {}
    for epsilon in args.epsilons:
        for method in ("running", "conformal", "certified"):
            calibrations["agreement", f"≥ {1 - epsilon:g}", method] = lambda scores, epsilon=epsilon, method=method: (
                calibrate_agreement(scores, epsilon, method, args.delta)
            )
    for share in args.budgets:
        # A budget below the first exit's cost is one that no calibration can keep.
        budget = max(share * float(layers[-1]), float(layers[0]))
        for method, refine in (("EERO", False), ("EERO, refined", True)):
            calibrations["budget", f"{budget:g} layers", method] = lambda scores, budget=budget, refine=refine: (
                calibrate_budget(scores, budget, refine=refine)
            )
    for level in args.risks:
        calibrations["risk", f"excess error ≤ {level:g}", "Learn then Test"] = lambda scores, level=level: (
            calibrate_risk(replace(scores, losses=excess_risk(scores.losses), risk="excess_error"), level, args.delta)
        )
    return calibrations


def measure(scores: ExitScores, calibrate: Calibrate, splits: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Means over splits of what happens on the rows that did not calibrate."""
    sums: dict[str, float] = defaultdict(float)
    for mine, others in splits:
        found = calibrate(scores.select(mine))
        rest = scores.select(others)
        checked = (
            rest if found.promise != "risk" else replace(rest, losses=excess_risk(rest.losses), risk="excess_error")
        )
        figures = found.check(checked).held_out or {}
        exits = found.taken_exits(rest)
        figures["accuracy"] = 1 - float(rest.losses.gather(1, exits.unsqueeze(1)).double().mean())
        figures["off"] = found.reason is not None
        for name, value in figures.items():
            sums[name] += float(value) / len(splits)
    return dict(sums)


def cover(args: argparse.Namespace) -> list[dict]:
    """One record per file, promise, level and method."""
    records = []
    for path in args.files:
        name, scores = read_scores(path)
        generator = torch.Generator().manual_seed(args.seed)
        count = min(max(1, round(args.calibration_rows * len(scores))), len(scores) - 1)
        orders = [torch.randperm(len(scores), generator=generator) for _ in range(args.splits)]
        splits = [(order[:count], order[count:]) for order in orders]
        for (promise, level, method), calibrate in tqdm(promises(args, scores.layers).items(), desc=name):
            about = {"data": name, "criterion": scores.criterion, "promise": promise, "level": level, "method": method}
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Exits are off")
                figures = measure(scores, calibrate, splits)
            records.append({**about, "calibration_rows": count, "splits": args.splits, **figures})
    return records


def table(records: list[dict]) -> str:
    """The records as a Markdown table."""
    head = [
        "data",
        "criterion",
        "promise",
        "level",
        "method",
        "kept",
        "used budget",
        "accuracy",
        "agreement",
        "depth",
        "off",
    ]
    rows = [
        [
            *(record[name] for name in head[:5]),
            f"{100 * record['kept']:.1f} %",
            f"{100 * record['used_budget']:.1f} %" if "used_budget" in record else "-",
            f"{100 * record['accuracy']:.2f} %",
            f"{100 * record['agreement']:.2f} %",
            f"{record['depth']:.2f}",
            f"{100 * record['off']:.0f} %",
        ]
        for record in records
    ]
    return markdown_table(head, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    records = cover(args)
    sizes: Mapping[str, int] = {record["data"]: record["calibration_rows"] for record in records}
    rows = ", ".join(f"{name} {count}" for name, count in sizes.items())
    text = f"{args.splits} random splits; calibration rows: {rows}.\n\n{table(records)}\n"
    print(text)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.output, text)
        write_json(args.output.with_suffix(".json"), records)


if __name__ == "__main__":
    main()
