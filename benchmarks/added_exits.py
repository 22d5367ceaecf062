# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What a promise costs exits that learned from texts alone, and exits of the same model that learned from labels.

    python examples/run_add_exits.py ... --output_dir runs/sst2-exits
    python benchmarks/added_exits.py --plain runs/sst2-exits-plain --added runs/sst2-exits --output runs/sst2-labels

The second command trains two-stage ConsistentEE on the same classifier: heads, hardness, policies and both in turn, on
the rows and labels that the classifier was fine-tuned on, while its layers stay as they are. Both sets of exits are
then certified on the same texts, those that `add_exits` certified on: by the price of the policies, by one threshold
of maximum probability, and by one of calibrated probability, whose temperatures are fitted on labelled rows of dev and
test that neither has seen. Budgets of the exits from labels are fitted on the texts that the others learned from.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, set_seed
from transformers.utils import logging

from transformers_cee import ConsistentEETrainer, ConsistentEETrainingArguments
from transformers_cee.adding.data import MOST_CERTIFYING, MOST_LEARNING, prepare, read_texts
from transformers_cee.adding.run import AUTO_CLASS, EXIT_FIELDS
from transformers_cee.auto import model_class_of
from transformers_cee.calibration.agreement import calibrate_agreement
from transformers_cee.calibration.prices import calibrate_price
from transformers_cee.calibration.scores import score_store
from transformers_cee.evaluation.exit_budget import fit_exit_budgets
from transformers_cee.evaluation.report import markdown_table, method_name, write_results
from transformers_cee.exits.deciding import criterion_settings
from transformers_cee.files import read_json, write_text
from transformers_cee.stores.filling import OneProcess, collect_exits
from transformers_cee.stores.store import ExitStore
from transformers_cee.tokenizing import longest_text
from transformers_cee.training.estimators import fit_estimators


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from glue_data import DataArguments, load_corpus, take_split
from run_add_exits import MADE_BY


CALIBRATED = "calibrated_probability"
CRITERIA = ("policy", "max_probability", CALIBRATED)
# Of two-stage ConsistentEE.
TRAINING: dict[str, Any] = {
    "use_cpu": True,
    "trainable": "exits",
    "phases": ["heads", "hardness", "policy", "consistent"],
    "reward_loss": "error",
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


def train_on_labels(plain: Path, output: Path, rows: Dataset, tokenizer: Any, made_by: dict[str, Any]) -> None:
    """Exits of a classifier that learn from labels, in a folder, unless an earlier run made them.

    Raises:
        ValueError: the folder has exits of another classifier.
    """
    if (output / MADE_BY).is_file():
        if read_json(output / MADE_BY, "Remove its folder.") != made_by:
            raise ValueError(
                f"`--output`={str(output.parent)!r} has exits of another classifier; give another folder."
            )
        return
    set_seed(made_by["seed"])
    model_class = model_class_of(str(plain), AUTO_CLASS)
    config = model_class.config_class.from_pretrained(plain, **EXIT_FIELDS)
    model = model_class.from_pretrained(plain, config=config, dtype=torch.float32)
    args = ConsistentEETrainingArguments(str(output), seed=made_by["seed"], **TRAINING)
    trainer = ConsistentEETrainer(
        model, args, train_dataset=rows, processing_class=tokenizer, data_collator=DataCollatorWithPadding(tokenizer)
    )
    trainer.train()
    trainer.save_model()
    write_text(output / MADE_BY, json.dumps(made_by, indent=1))


def tokenized(rows: Dataset, column: str, tokenizer: Any, longest: int | None) -> Dataset:
    """Token ids and labels of texts, as `add_exits` makes them."""
    return rows.map(
        lambda some: {**tokenizer(some[column], truncation=True, max_length=longest), "labels": some["label"]},
        batched=True,
        remove_columns=rows.column_names,
        desc="Tokenize",
    )


def stored(model: Any, rows: Dataset, tokenizer: Any) -> ExitStore:
    """Exits of all rows, with their labels."""
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


def figures(model: Any, held_out: ExitStore, labelled: ExitStore, args: argparse.Namespace) -> dict[str, Any]:
    """Of one set of exits, at every promise and by every criterion."""
    fit_estimators(model, labelled, [CALIBRATED])
    found: dict[str, Any] = {"full": float(held_out.correct[:, -1].float().mean())}
    for level in args.agreement:
        found[f"{level:g}"] = {
            criterion: certified(model, held_out, criterion, level, args.risk) for criterion in CRITERIA
        }
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    rows = [
        [
            exits, promise, method_name(criterion), f"{one['depth']:.2f}", f"{one['agreement']:.4f}",
            f"{one['accuracy']:.4f} ({about['full']:.4f})",
        ]
        for exits, about in found.items()
        for promise in about if promise != "full"
        for criterion, one in about[promise].items()
    ]  # fmt: skip
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
    column, tokenizer = corpus.text_columns[0], AutoTokenizer.from_pretrained(args.plain)
    rows = tokenized(corpus.splits["train"], column, tokenizer, data.max_seq_length)
    train_on_labels(args.plain, args.output / "model", rows, tokenizer, made_by)
    logging.set_verbosity_error()
    unseen = concatenate_datasets([corpus.splits[name] for name in ("validation", "test")])
    found = {}
    for name, folder in (("texts", args.added), ("labels", args.output / "model")):
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
        longest = longest_text(model, tokenizer)
        given = read_texts(texts, column, None, MOST_CERTIFYING + MOST_LEARNING, made_by["seed"])
        halves = prepare(given, None, tokenizer, model, made_by["seed"])
        chosen = texts.select([number - 1 for number in given.numbers])
        store, labelled = (
            stored(model, tokenized(some, column, tokenizer, longest), tokenizer) for some in (chosen, unseen)
        )
        if name == "labels":
            # Of the others they were fitted on what heads said of texts that they had not learned from.
            seen = store.select(halves.learning)
            model.config.exit_budgets = fit_exit_budgets(model.exit_policies, seen)
        found[name] = figures(model, store.select(halves.certifying), labelled, args)
    write_results(found, args.output / "results.json")
    write_text(args.output / "table.md", table(found) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
