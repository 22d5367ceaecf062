# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What a promise costs exits that learned from texts alone, and exits of the same model that learned from labels.

    python examples/run_add_exits.py ... --output_dir runs/sst2-exits
    python benchmarks/added_exits.py --plain runs/sst2-exits-plain --added runs/sst2-exits --output runs/sst2-labels

The second command trains two-stage ConsistentEE on the same classifier: heads, hardness, policies and both in turn, on
the rows and labels that the classifier was fine-tuned on, while its layers stay as they are. Both sets of exits are
then certified on the same half of the texts, by the price of the policies, by one threshold of maximum probability,
and by one of calibrated probability, whose temperatures are fitted on the labels of the other half.
"""

from __future__ import annotations

import argparse
import csv
import sys
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding
from transformers.utils import logging

from transformers_cee.calibration.agreement import calibrate_agreement
from transformers_cee.calibration.prices import calibrate_price
from transformers_cee.calibration.scores import score_store
from transformers_cee.evaluation.exit_budget import fit_exit_budgets
from transformers_cee.evaluation.report import markdown_table, method_name, write_results
from transformers_cee.exits.deciding import criterion_settings
from transformers_cee.files import read_json, write_text
from transformers_cee.stores.filling import OneProcess, collect_exits
from transformers_cee.stores.store import ExitStore
from transformers_cee.training.estimators import fit_estimators


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import run_glue_cee
from glue_data import Corpus, DataArguments, load_corpus, take_split
from run_add_exits import MADE_BY


CALIBRATED = "calibrated_probability"
CRITERIA = ("policy", "max_probability", CALIBRATED)
# Of two-stage ConsistentEE, beside the exits as `add_exits` places them.
OPTIONS: dict[str, Any] = {
    "do_train": True,
    "use_cpu": True,
    "trainable": "exits",
    "phases": ["heads", "hardness", "policy", "consistent"],
    "exit_pooling": "internal_mean",
    "policy_inputs": "log_confidence",
    "policy_condition": "film",
    "reward_loss": "error",
    "reward_alpha": 0.01,
    "num_train_epochs": 2,
    "exit_learning_rate": 5e-4,
    "learning_rate": 5e-5,
    "policy_num_train_epochs": 60,
    "policy_learning_rate": 5e-3,
    "policy_gradient": "optimal_stopping",
    "consistent_num_train_epochs": 1,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "train_sampling_strategy": "group_by_length",
    "eval_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "dataloader_pin_memory": False,
}


def train_on_labels(plain: Path, output: Path, corpus: Corpus, seed: int) -> None:
    """Exits of a classifier that learn from labels, in a folder, unless an earlier run made them."""
    if (output / "config.json").is_file():
        return
    rows, names = corpus.splits["train"], corpus.label_names
    path = output.with_suffix(".csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        texts = zip(rows[corpus.text_columns[0]], (names[label] for label in rows["label"]), strict=True)
        csv.writer(file).writerows([("text", "label"), *texts])
    options = OPTIONS | {"model_name_or_path": plain, "train_file": path, "output_dir": output, "seed": seed}
    words = []
    for name, value in options.items():
        words += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    run_glue_cee.main(words)


def stored(model: Any, texts: Dataset, column: str, tokenizer: Any) -> ExitStore:
    """Exits of all texts, with their labels."""
    rows = texts.map(
        lambda some: {**tokenizer(some[column], truncation=True, max_length=128), "labels": some["label"]},
        batched=True,
        remove_columns=texts.column_names,
    )
    return collect_exits(
        model,
        rows,
        DataCollatorWithPadding(tokenizer),
        OneProcess(torch.device("cpu")),
        problem_type="single_label_classification",
    )


def certified(model: Any, store: ExitStore, criterion: str, level: float, risk: float) -> dict[str, float]:
    """Depth, agreement and accuracy at a promise that a store's rows certify, as `add_exits` tells them."""
    with warnings.catch_warnings():
        # Exits that are off have the depth of all layers.
        warnings.simplefilter("ignore")
        if criterion == "policy":
            point = calibrate_price(store, model, 1 - level, risk)
        else:
            point = calibrate_agreement(score_store(store, criterion, model), 1 - level, delta=risk)
    settings = criterion_settings(model, point.alpha)
    taken = point.taken_exits(score_store(store, criterion, model, settings)).unsqueeze(1)
    return {
        "depth": float(store.layers[taken].float().mean()),
        "agreement": 1 - float(store.disagrees.gather(1, taken).float().mean()),
        "accuracy": float(store.correct.gather(1, taken).float().mean()),
    }


def figures(model: Any, store: ExitStore, halves: tuple[Tensor, Tensor], args: argparse.Namespace) -> dict[str, Any]:
    """Of one set of exits, at every promise and by every criterion."""
    learning, held_out = (store.select(half) for half in halves)
    fit_estimators(model, learning, [CALIBRATED])
    model.config.exit_budgets = fit_exit_budgets(
        model.exit_policies, learning, min_exit_layer=model.config.min_exit_layer
    )
    found: dict[str, Any] = {"full": float(held_out.correct[:, -1].float().mean())}
    for level in args.agreement:
        found[f"{level:g}"] = {
            criterion: certified(model, held_out, criterion, level, args.risk) for criterion in CRITERIA
        }
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    rows = []
    for exits, about in found.items():
        for promise in (name for name in about if name != "full"):
            for criterion, one in about[promise].items():
                rows.append(
                    [
                        exits, promise, method_name(criterion), f"{one['depth']:.2f}", f"{one['agreement']:.4f}",
                        f"{one['accuracy']:.4f} ({about['full']:.4f})",
                    ]
                )  # fmt: skip
    header = ["exits learned from", "promise", "criterion", "depth", "agreement", "accuracy (full depth)"]
    return markdown_table(header, rows)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain", type=Path, required=True, help="classifier that run_add_exits.py has fine-tuned")
    parser.add_argument("--added", type=Path, required=True, help="its exits")
    parser.add_argument("--agreement", type=float, nargs="+", default=[0.99, 0.97])
    parser.add_argument("--risk", type=float, default=0.05)
    parser.add_argument("--output", type=Path, required=True, help="folder for the other exits and the results")
    args = parser.parse_args(argv)
    if not (args.plain / MADE_BY).is_file():
        parser.error(f"--plain={args.plain}: run_add_exits.py has not fine-tuned it; there is no {MADE_BY}.")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    made_by = read_json(args.plain / MADE_BY, "Run run_add_exits.py again.")
    data = DataArguments(**{one.name: made_by[one.name] for one in fields(DataArguments)})
    corpus = load_corpus(data)
    corpus.splits["train"], texts = take_split(corpus.splits["train"], made_by["texts"], data.split_seed)
    train_on_labels(args.plain, args.output / "model", corpus, made_by["seed"])
    logging.set_verbosity_error()
    # The same halves as in `add_exits`.
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(made_by["seed"]))
    half = len(texts) // 2
    halves = order[half:].sort().values, order[:half].sort().values
    tokenizer = AutoTokenizer.from_pretrained(args.plain)
    found = {}
    for name, folder in (("texts", args.added), ("labels", args.output / "model")):
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
        found[name] = figures(model, stored(model, texts, corpus.text_columns[0], tokenizer), halves, args)
    write_results(found, args.output / "results.json")
    write_text(args.output / "table.md", table(found) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
