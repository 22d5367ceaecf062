# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What a policy should see and learn from: variants on the stored exits of trained runs, judged on dev.

    python benchmarks/policy_variants.py benchmarks/configs/compare.yaml --data DATA --runs runs/compare \\
        --objectives layer_weighted --output docs/results/policy_variants.md

Every variant is one set of policies conditioned on the price of a layer, but for the first, which trains one set per
price and lets dev pick. Figures are the metric at layer speed-ups, mean over runs; those on dev choose, those on test
are for the reader. Policies that learn from dev rows are judged on dev by two-fold cross-fitting.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from compare import read_runs
from compare_evaluate import Evaluation
from glue_data import make_compute_metrics
from tqdm.auto import tqdm

from transformers_cee.evaluation.comparison import budget_curve, compare_criteria, exit_points
from transformers_cee.evaluation.operating_points import metric_at_depth
from transformers_cee.evaluation.report import markdown_table
from transformers_cee.exits.policy import all_features
from transformers_cee.files import write_text
from transformers_cee.stores.store import ExitStore


SPEEDUPS = (1.5, 2.0, 3.0, 4.0)
CURVE_POINTS = 24
# Name, fields of the config, training arguments, and the rows that the policies learn from.
# The gradient is exact where none is named, whatever the configuration says.
VARIANTS: tuple[tuple[str, dict[str, Any], dict[str, Any], str], ...] = (
    ("state, CE", {"policy_inputs": "state"}, {"reward_loss": "ce"}, "train"),
    ("state, error", {"policy_inputs": "state"}, {}, "train"),
    ("confidence, CE", {}, {"reward_loss": "ce"}, "train"),
    ("confidence, error", {}, {}, "train"),
    ("confidence, error, no hardness", {}, {"reward": "per_layer"}, "train"),
    ("both, error", {"policy_inputs": "both"}, {}, "train"),
    ("confidence, error, optimal stopping", {}, {"policy_gradient": "optimal_stopping"}, "train"),
    ("confidence, error, α as input", {"policy_condition": "input"}, {}, "train"),
    ("confidence, error, held-out rows", {}, {}, "validation"),
)


def with_features(store: ExitStore) -> ExitStore:
    """The store with confidence features, whatever the policies of its model looked at."""
    return replace(store, features=all_features(store.logits, store.problem_type))


def measure(run: Evaluation, policies: Any, dev: ExitStore, rows: ExitStore) -> dict[float, float | None]:
    """Metric on `rows` by speed-up; prices for the depths are picked on `dev`."""
    metrics, metric = make_compute_metrics(run.corpus.metrics), run.corpus.metrics[0]
    layers = int(rows.layers[-1])
    exits = exit_points(rows, metrics)
    depths = torch.linspace(1, layers, CURVE_POINTS).tolist()
    curve = [exits[0], *budget_curve(policies, dev, rows, metrics, depths), exits[-1]]
    return {speedup: metric_at_depth(curve, metric, layers / speedup) for speedup in SPEEDUPS}


def try_variant(run: Evaluation, fields: dict, arguments: dict, split: str) -> tuple[dict, dict]:
    """Metric by speed-up on dev and on test."""
    config, args = run.model.config, run.arguments
    arguments = {"policy_gradient": "exact", **arguments}
    kept = {name: getattr(config, name) for name in fields}, {name: getattr(args, name) for name in arguments}
    for name, value in fields.items():
        setattr(config, name, value)
    for name, value in arguments.items():
        setattr(args, name, value)
    dev, test = run.stores["validation"], run.stores["test"]
    try:
        policies = run.conditioned_policies(run.stores[split])
        on_test = measure(run, policies, dev, test)
        if split == "train":
            return measure(run, policies, dev, dev), on_test
        order = torch.randperm(len(dev), generator=torch.Generator().manual_seed(args.seed))
        folds = order[: len(dev) // 2], order[len(dev) // 2 :]
        found = []
        for mine, other in (folds, folds[::-1]):
            policies = run.conditioned_policies(dev.select(mine))
            found.append(measure(run, policies, dev.select(mine), dev.select(other)))
        return {speedup: _mean([one[speedup] for one in found]) for speedup in SPEEDUPS}, on_test
    finally:
        for thing, values in zip((config, args), kept, strict=True):
            for name, value in values.items():
                setattr(thing, name, value)


def references(run: Evaluation, alphas: list[float]) -> dict[str, tuple[dict, dict]]:
    """Maximum probability, and the paper's policies: state, CE, one set per price."""
    run.model.config.policy_inputs, inputs = "state", run.model.config.policy_inputs
    run.arguments.reward_loss, loss = "ce", run.arguments.reward_loss
    run.arguments.policy_gradient, gradient = "exact", run.arguments.policy_gradient
    family = {"state, CE, one set per α": run.policies_at(alphas)}
    run.model.config.policy_inputs, run.arguments.reward_loss = inputs, loss
    run.arguments.policy_gradient = gradient
    dev, layers = run.stores["validation"], run.model.config.num_hidden_layers
    found = []
    for rows in (dev, run.stores["test"]):
        comparison = compare_criteria(
            ["max_probability"],
            dev,
            rows,
            run.model.exit_policies,
            make_compute_metrics(run.corpus.metrics),
            run.corpus.metrics[0],
            [layers / speedup for speedup in SPEEDUPS],
            more_policies=family,
        )
        found.append(comparison.matched)
    return {
        name: tuple({speedup: one[name][layers / speedup] for speedup in SPEEDUPS} for one in found)  # type: ignore[misc]
        for name in ("max_probability", *family)
    }


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def table(found: dict[str, list[tuple[dict, dict]]], which: int) -> str:
    """Mean over runs of the metric in percent, by variant and speed-up, and the mean over all of them."""
    rows = []
    for name, results in found.items():
        values = [_mean([result[which][speedup] for result in results]) for speedup in SPEEDUPS]
        rows.append([name, *("-" if value is None else f"{100 * value:.1f}" for value in [*values, _mean(values)])])
    return markdown_table(["policy", *(f"{speedup:g}x" for speedup in SPEEDUPS), "mean"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/compare"))
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--objectives", nargs="+", default=["layer_weighted"])
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--alphas", nargs="+", type=float, default=[0.002, 0.005, 0.01, 0.02, 0.05, 0.1])
    parser.add_argument("--output", type=Path, help="Markdown file; without it the tables are only printed")
    args = parser.parse_args()
    found: dict[str, list[tuple[dict, dict]]] = {}
    names = []
    for about in read_runs(args):
        folder = args.runs / about.name
        if not (folder / "exits-test.safetensors").is_file():
            continue
        names.append(about.name)
        run = Evaluation.load(folder, about.command("-", args.data, args.runs)[2:])
        run.stores = {name: with_features(store) for name, store in run.stores.items()}
        for name, result in references(run, args.alphas).items():
            found.setdefault(name.replace("max_probability", "maximum probability"), []).append(result)
        for name, fields, arguments, split in tqdm(VARIANTS, desc=about.name):
            found.setdefault(name, []).append(try_variant(run, fields, arguments, split))
    text = f"Runs: {', '.join(names)}.\n\nDev\n\n{table(found, 0)}\n\nTest\n\n{table(found, 1)}\n"
    print(text)
    if args.output is not None:
        command = " ".join(["python", "benchmarks/policy_variants.py", *map(str, sys.argv[1:])])
        write_text(args.output, f"# What policies see and learn from\n\n    {command}\n\n{text}")


if __name__ == "__main__":
    main()
