# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Puts a trained model on OpenVINO in int8 and compares it, on the same test texts, with torch and with no exits.

    python examples/engines_demo.py --model runs/demo --data runs/assets/trec --output runs/demo-engines

It writes the exported model to OUTPUT/openvino-int8, the figures to OUTPUT/results.json, and prints them as a table.
Thresholds are fitted on the engine: the first half of the validation texts gives the scales, without labels, and the
second half the threshold of the exits for a depth of half of the layers.
"""

import argparse
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from transformers_cee.engines.promises import exits_of
from transformers_cee.evaluation.environment import timing_environment
from transformers_cee.evaluation.report import markdown_table, write_results
from transformers_cee.evaluation.timing import Timer
from transformers_cee.stores.filling import length_sorted_batches
from transformers_cee.stores.scoring import score_exits, thresholds_for_depths


TORCH, WITHOUT, WITH = "torch float32", "OpenVINO int8, without exits", "OpenVINO int8, with exits"


def tokenized(texts: list[str], tokenizer: Any) -> Dataset:
    return Dataset.from_dict(dict(tokenizer(texts, truncation=True)))


def batches_of(rows: Dataset, tokenizer: Any, batch_size: int) -> list[dict[str, torch.Tensor]]:
    """Padded batches of similar length, with labels."""
    return [
        dict(tokenizer.pad([rows[row] for row in some], return_tensors="pt"))
        for some in length_sorted_batches(rows, batch_size)
    ]


@torch.no_grad()
def answered(model: Callable[..., Any], batches: list[dict[str, torch.Tensor]]) -> tuple[float, float]:
    """Accuracy, and mean exit layer."""
    right, layers, rows = 0, 0, 0
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        output = model(**inputs)
        right += int((output.logits.argmax(-1) == batch["labels"]).sum())
        layers += int(output.exit_layers.sum())
        rows += len(batch["labels"])
    return right / rows, layers / rows


def threshold_at_half(model: Any, rows: Dataset, tokenizer: Any) -> float:
    """The threshold of the model's criterion whose depth on these texts is nearest to half of the layers."""
    store = exits_of(model, rows, tokenizer)
    scores = score_exits(model.config.exit_criterion, store, model.exit_policies)
    depth = model.config.num_hidden_layers / 2
    return thresholds_for_depths(model.config.exit_criterion, scores, model.layer_numbers, [depth])[0]


def timed(variants: dict[str, Callable[..., Any]], batches: list[dict[str, torch.Tensor]]) -> Any:
    inputs = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]

    def over_all(model: Callable[..., Any]) -> list[Callable[[], Any]]:
        return [partial(model, **one) for one in inputs]

    with torch.inference_mode():
        return Timer().time({name: over_all(model) for name, model in variants.items()}, [TORCH, WITHOUT])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a trained classifier of texts")
    parser.add_argument("--data", type=Path, required=True, help="folder with validation.csv and test.csv")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--text_column", default="sentence")
    parser.add_argument("--label_column", default="label")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[32, 1])
    parser.add_argument("--timed_rows", type=int, default=128)
    args = parser.parse_args(argv)
    logging.set_verbosity_error()
    files = {name: str(args.data / f"{name}.csv") for name in ("validation", "test")}
    data = load_dataset("csv", data_files=files)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForSequenceClassification.from_pretrained(args.model).eval()
    place = args.output / "openvino-int8"
    shutil.rmtree(place, ignore_errors=True)
    texts = list(data["validation"][args.text_column])
    exported = model.export(
        place,
        engine="openvino",
        precision="int8",
        calibration_texts=texts[: len(texts) // 2],
        processing_class=tokenizer,
    )
    half = tokenized(texts[len(texts) // 2 :], tokenizer)
    criterion = exported.config.exit_criterion
    early = {"exit_criterion": criterion, "exit_threshold": threshold_at_half(exported, half, tokenizer)}
    off = {"exit_criterion": "policy", "exit_threshold": 1.0}
    variants = {TORCH: partial(model, **off), WITHOUT: partial(exported, **off), WITH: partial(exported, **early)}
    test = tokenized(list(data["test"][args.text_column]), tokenizer)
    labels = [model.config.label2id[str(label)] for label in data["test"][args.label_column]]
    test = test.add_column("labels", labels)
    results: dict[str, Any] = {"environment": timing_environment(torch.device("cpu")), "variants": {}, "speed": {}}
    for name, variant in variants.items():
        accuracy, depth = answered(variant, batches_of(test, tokenizer, 32))
        results["variants"][name] = {"accuracy": accuracy, "depth": depth}
    rows = test.select(range(min(args.timed_rows, len(test))))
    for size in args.batch_sizes:
        results["speed"][str(size)] = timed(variants, batches_of(rows, tokenizer, size)).to_dict()
    write_results(results, args.output / "results.json")
    print(table(results, len(rows)))
    draw(results, args.output / "engines.png")


def table(results: dict[str, Any], rows: int) -> str:
    """Accuracy, depth and, per batch size, texts per second and the speed-up over torch."""
    sizes = list(results["speed"])
    header = [
        "",
        "accuracy",
        "depth",
        *(f"texts/s, batch {size}" for size in sizes),
        *(f"over torch, {size}" for size in sizes),
    ]
    lines = []
    for name, about in results["variants"].items():
        speeds = [per_second(results, size, name, rows) for size in sizes]
        ratios = [results["speed"][size]["speedups"][TORCH].get(name, {"value": 1.0}) for size in sizes]
        lines.append(
            [
                name,
                f"{about['accuracy']:.4f}",
                f"{about['depth']:.2f}",
                *("noise" if speed is None else f"{speed:.0f}" for speed in speeds),
                *("noise" if ratio["value"] is None else f"{ratio['value']:.2f}x" for ratio in ratios),
            ]
        )
    return markdown_table(header, lines)


def per_second(results: dict[str, Any], size: str, name: str, rows: int) -> float | None:
    """Texts per second; None of noise."""
    seconds = results["speed"][size]["seconds"][name]["value"]
    return None if seconds is None else rows / seconds


def draw(results: dict[str, Any], path: Path) -> None:
    """Bars of the speed-up over torch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes, names = list(results["speed"]), list(results["variants"])
    figure, axes = pyplot.subplots(figsize=(7, 3))
    for number, size in enumerate(sizes):
        ratios = [
            results["speed"][size]["speedups"][TORCH].get(name, {"value": 1.0})["value"] or 0.0 for name in names
        ]
        axes.barh([place + 0.4 * number for place in range(len(names))], ratios, 0.38, label=f"batch {size}")
    axes.set_yticks([place + 0.2 for place in range(len(names))], names)
    axes.invert_yaxis()
    axes.set_xlabel("speed-up over torch float32 (0: noise)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
