# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What a step of the phase `heads` and filling a store take beside the stock model's fine-tuning and evaluation.

    python benchmarks/training_cost.py --model MODEL --output runs/training_cost
    python benchmarks/training_cost.py --output runs/training_cost

MODEL is an encoder, by default a BERT of 12 layers without trained weights, given an exit behind every layer. A step
is forward, loss, backward, clipping of gradients and AdamW, of both alike. All objectives run in turn with the stock
step. A store is filled in one pass; beside it stands the stock model's pass over the same batches without gradients.
Memory is what a step adds to what the process has.
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerState, set_seed
from transformers.utils import logging

from transformers_cee import BertCeeConfig, BertForConsistentEE, ConsistentEETrainingArguments
from transformers_cee.auto import model_class_of
from transformers_cee.evaluation.environment import timing_environment
from transformers_cee.evaluation.memory import PeakMemory
from transformers_cee.evaluation.report import markdown_table, write_results
from transformers_cee.evaluation.timing import FEWEST_ROUNDS, Reported, Timer
from transformers_cee.stores.filling import collect_exits
from transformers_cee.training.model_step import heads_phase


STOCK, FILL, PASS = "stock fine-tuning", "filling a store", "stock evaluation"
LABELS = 6


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub name of an encoder")
    parser.add_argument("--objectives", nargs="+", default=["layer_weighted", "gradient_equilibrium", "last"])
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--rounds", type=int, default=7, help=f"at least {FEWEST_ROUNDS}")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True, help="folder for results.json")
    args = parser.parse_args()
    if args.rounds < FEWEST_ROUNDS:
        parser.error(f"`--rounds`={args.rounds} must be at least {FEWEST_ROUNDS}.")
    return args


def load(name: str | None) -> Any:
    """An encoder with an exit behind every layer."""
    if name is None:
        sizes = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536, "num_hidden_layers": 12}
        return BertForConsistentEE(BertCeeConfig(num_labels=LABELS, vocab_size=30_000, **sizes))
    classes = model_class_of(name, "AutoModelForSequenceClassification")
    return classes.from_pretrained(name, dtype=torch.float32, num_labels=LABELS)


def step_of(model: nn.Module, loss: Callable[[dict[str, Tensor]], Tensor], batch: dict[str, Tensor]) -> Callable:
    """One step of training."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        optimizer.zero_grad()
        loss(batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def steps(args: argparse.Namespace, model: Any, batch: dict[str, Tensor]) -> dict[str, Callable[[], None]]:
    """A step of the stock model, and one per objective."""
    config = copy.deepcopy(model.config)
    stock = model.stock_class(config).train()
    found = {STOCK: step_of(stock, lambda given: stock(**given).loss, batch)}
    for objective in args.objectives:
        ours = copy.deepcopy(model).train()
        asked = ConsistentEETrainingArguments(output_dir=str(args.output), heads_objective=objective, use_cpu=True)
        stage = next(iter(asked.make_heads_objective().stages))
        phase = heads_phase(asked, ours, stage)
        state = TrainerState(max_steps=100)
        found[objective] = step_of(ours, lambda given, p=phase, m=ours, s=state: p.loss(m, given, s)[0], batch)
    return found


def passes(model: Any, batch: dict[str, Tensor]) -> dict[str, Callable[[], Any]]:
    """Filling a store with a batch, and the stock model's evaluation of it."""
    stock, ours = model.stock_class(copy.deepcopy(model.config)).eval(), copy.deepcopy(model).eval()
    rows = Dataset.from_dict({name: value.tolist() for name, value in batch.items()})

    def collate(some: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {name: torch.tensor([row[name] for row in some]) for name in some[0]}

    def fill() -> None:
        collect_exits(
            ours, rows, collate, Accelerator(cpu=True), problem_type="single_label_classification",
            batch_size=len(rows),
        )  # fmt: skip

    @torch.no_grad()
    def evaluate() -> None:
        stock(**collate([rows[row] for row in range(len(rows))]))

    return {PASS: evaluate, FILL: fill}


def memory_of(step: Callable[[], None]) -> float:
    """Megabytes."""
    with PeakMemory(torch.device("cpu")) as before:
        pass
    with PeakMemory(torch.device("cpu")) as peak:
        step()
    return peak.peak_mb - before.peak_mb


def main() -> None:
    args = parse_arguments()
    logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    set_seed(0)
    model = load(args.model)
    sizes = []
    for length in args.lengths:
        ids = torch.randint(5, model.config.vocab_size, (args.batch_size, length))
        labels = torch.randint(0, LABELS, (args.batch_size,))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        trained, filled = steps(args, model, batch), passes(model, batch)
        found, looked = Timer(args.rounds).time(trained, STOCK), Timer(args.rounds).time(filled, PASS)
        sizes.append(
            {
                "batch_size": args.batch_size,
                "length": length,
                "seconds": {name: figure.reported._asdict() for name, figure in found.seconds.items()},
                "cost": {name: cost._asdict() for name, cost in (costs(found, STOCK) | costs(looked, PASS)).items()},
                "memory_mb": {name: memory_of(step) for name, step in trained.items()},
            }
        )
    results = {"model": args.model, "sizes": sizes, "environment": timing_environment(torch.device("cpu"))}
    write_results(results, args.output / "results.json")
    print(table(sizes))


def costs(found: Any, baseline: str) -> dict[str, Reported]:
    """Time over that of a baseline."""
    return {name: figure.inverse().reported for name, figure in found.speedups[baseline].items()}


def table(sizes: list[dict[str, Any]]) -> str:
    """Time over the stock model's, and memory, by size."""
    header = ["time over stock (memory)", *(f"{one['batch_size']} × {one['length']}" for one in sizes)]
    names = [STOCK, *sizes[0]["cost"]]
    lines = []
    for name in names:
        cells = []
        for one in sizes:
            text = "1.00x" if name == STOCK else Reported(**one["cost"][name]).text()
            memory = one["memory_mb"].get(name)
            cells.append(text if memory is None else f"{text} ({memory:.0f} MB)")
        lines.append([name, *cells])
    return markdown_table(header, lines)


if __name__ == "__main__":
    main()
