# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Time of exits on each engine beside the same classifier without exits and what else a user may pick, in one run.

    python benchmarks/speed.py --model MODEL --texts TEXTS --engines openvino:int8 torch:float32 --output runs/speed
    python benchmarks/speed.py --random small --quick --output runs/speed
    python benchmarks/speed.py --random base --engines torch:float32 torch:bfloat16 --device cuda --output runs/speed

MODEL is a classifier with or without exits; `--random` makes one without trained weights, whose times are the same.
For every batch size and length all variants run in turn. On each engine these are

- without exits: the whole model in one graph,
- half: everybody is made to leave at the exit nearest to half of the layers, so that what is saved is not executed,
- open: every exit is open and nobody leaves, the worst case of exits.

A share is how much of the layers' speed-up became time: 1 is all of it. "Never slower" is time without exits over
time with open ones. Peers are the stock model in torch (float32, bfloat16, and dynamic int8, whose rows have an
influence on each other), one of half the layers, and a loop of single rows that asks the entropy of each exit, as
early exits are often published. Figures are medians over rounds with their spread; noise is called so.
"""

import argparse
import copy
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from speed_peers import STOCK, SingleRows, by_entropy, dynamic_int8, stock_of
from speed_tables import draw_speedups
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from transformers_cee import BertCeeConfig, BertForConsistentEE
from transformers_cee.auto import model_class_of
from transformers_cee.calibration.scores import boldest_threshold
from transformers_cee.engines import ENGINES
from transformers_cee.engines.costs import nobody_leaves
from transformers_cee.evaluation.environment import timing_environment
from transformers_cee.evaluation.report import markdown_table, write_results
from transformers_cee.evaluation.timing import FEWEST_ROUNDS, Reported, Timer, Timings
from transformers_cee.exits.criteria import CRITERIA
from transformers_cee.files import write_text


RANDOM = {
    "tiny": {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 256},
    "small": {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536},
    "base": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
}
CRITERION = "max_probability"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="folder or Hub name of a classifier")
    what.add_argument("--random", choices=RANDOM, help="a BERT of 12 layers without trained weights")
    parser.add_argument("--texts", type=Path, help="file with a text per line, which int8 takes its scales from")
    parser.add_argument("--engines", nargs="+", default=["torch:float32", "openvino:float32", "openvino:int8"])
    parser.add_argument("--exit_layers", type=int, default=3, help="stride of the exits of a model without")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--rounds", type=int, default=7, help=f"at least {FEWEST_ROUNDS}")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="of the engine torch, and of the peers")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="beside stock float32")
    parser.add_argument("--quick", action="store_true", help="few sizes and rounds: under three minutes")
    parser.add_argument("--output", type=Path, required=True, help="folder for results.json, table.md and speed.png")
    args = parser.parse_args()
    if args.quick:
        args.batch_sizes, args.lengths, args.rounds = [1, 8], [16], FEWEST_ROUNDS
    for engine, precision in (pair_of(word) for word in args.engines):
        ENGINES.find(engine).require()
        ENGINES[engine].check_precision(precision)
    if args.rounds < FEWEST_ROUNDS:
        parser.error(f"`--rounds`={args.rounds} must be at least {FEWEST_ROUNDS}.")
    return args


def pair_of(word: str) -> tuple[str, str]:
    """Engine and precision of `engine:precision`."""
    engine, colon, precision = word.partition(":")
    if not colon:
        raise ValueError(f"`--engines` has {word!r}; accepted are an engine and a precision, as 'openvino:int8'.")
    return engine, precision


def load(args: argparse.Namespace) -> Any:
    """The classifier with exits, in float32."""
    torch.manual_seed(0)
    if args.random:
        config = BertCeeConfig(num_hidden_layers=12, num_labels=6, vocab_size=30_000, **RANDOM[args.random])
        config.exit_layers, config.exit_criterion = args.exit_layers, CRITERION
        return BertForConsistentEE(config).eval()
    classes = model_class_of(args.model, "AutoModelForSequenceClassification")
    model = classes.from_pretrained(args.model, dtype=torch.float32, exit_criterion=CRITERION)
    return model.eval()


def make_variants(args: argparse.Namespace, model: Any, folder: Path) -> tuple[dict[str, Callable], int]:
    """Callables from a batch, by name, and the layer at which everybody leaves halfway."""
    last = model.config.num_hidden_layers
    half = min(model.layer_numbers[:-1], key=lambda layer: abs(layer - last / 2))
    stock = stock_of(model).to(args.device)
    variants: dict[str, Callable] = {STOCK: stock}
    if args.peers:
        variants["stock torch bfloat16"] = copy.deepcopy(stock).to(torch.bfloat16)
        if args.device == "cpu":
            variants["stock torch dynamic int8"] = dynamic_int8(stock)
        variants["stock torch float32, half the layers"] = stock_of(model, last // 2).to(args.device)
        loop = SingleRows(copy.deepcopy(model).to(args.device), by_entropy(2.0), half)
        variants["loop of single rows, half"] = loop
    texts, tokenizer = None, None
    if args.texts is not None:
        texts = [
            line for line in args.texts.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
        ]
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    for word in args.engines:
        engine, precision = pair_of(word)
        place = folder / word.replace(":", "-")
        more = {"calibration_texts": texts, "processing_class": tokenizer} if texts else {}
        model.export(place, engine=engine, precision=precision, exit_criterion=CRITERION, **more)
        device = args.device if engine == "torch" else "cpu"
        exported = AutoModelForSequenceClassification.from_pretrained(place, threads=args.threads, device=device)
        closed = {"exit_criterion": CRITERION, "exit_threshold": CRITERIA[CRITERION].off}
        variants[f"{word}, without exits"] = partial(exported, **closed)
        everybody = {"exit_criterion": CRITERION, "exit_threshold": boldest_threshold(CRITERION)}
        variants[f"{word}, half"] = partial(exported, **everybody, min_exit_layer=half)
        variants[f"{word}, open"] = partial(exported, **nobody_leaves(CRITERION))
    return variants, half


def batch_of(args: argparse.Namespace, model: Any, rows: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, model.config.vocab_size, (rows, length), generator=generator)
    return {"input_ids": ids.to(args.device), "attention_mask": torch.ones_like(ids).to(args.device)}


def cell(found: Timings, baseline: str, variant: str) -> Reported:
    return found.speedups[baseline][variant].reported if baseline != variant else Reported(1.0)


def rows_of(args: argparse.Namespace, found: Timings, layers: float) -> list[dict[str, Any]]:
    """One entry per variant: speed-ups over the stock model and over the engine without exits."""
    entries = []
    for name, figure in found.seconds.items():
        whole = f"{name.partition(', ')[0]}, without exits"
        entry: dict[str, Any] = {"variant": name, "milliseconds": figure.times(1000).to_dict()}
        entry["over_stock"] = cell(found, STOCK, name)._asdict()
        if whole in found.speedups and name != whole:
            gained = cell(found, whole, name)
            entry["over_engine"] = gained._asdict()
            if name.endswith(", half") and gained.value is not None:
                entry["share"] = gained.value / layers
        entries.append(entry)
    return entries


@torch.no_grad()
def main() -> None:
    args = parse_arguments()
    logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    model = load(args)
    with tempfile.TemporaryDirectory() as folder:
        variants, half = make_variants(args, model, Path(folder))
        layers = model.config.num_hidden_layers / half
        baselines = [STOCK, *(name for name in variants if name.endswith(", without exits"))]
        sizes = []
        for length in args.lengths:
            for rows in args.batch_sizes:
                batch = batch_of(args, model, rows, length)
                runs = {name: partial(run, **batch) for name, run in variants.items()}
                found = Timer(rounds=args.rounds).time(runs, baselines, device=args.device)
                sizes.append({"batch_size": rows, "length": length, "variants": rows_of(args, found, layers)})
                print(f"{rows} × {length}: done", flush=True)
    results = {
        "model": args.model or args.random,
        "half": half,
        "layers": model.config.num_hidden_layers,
        "sizes": sizes,
        "environment": timing_environment(torch.device(args.device)) | {"threads": args.threads},
    }
    write_results(results, args.output / "results.json")
    table = table_of(sizes)
    write_text(args.output / "table.md", table + "\n")
    print(table)
    draw_speedups(
        {
            f"{one['batch_size']} × {one['length']}": {
                entry["variant"]: Reported(**entry["over_stock"]) for entry in one["variants"]
            }
            for one in sizes
        },
        args.output / "speed.png",
    )


def table_of(sizes: list[dict[str, Any]]) -> str:
    """Speed-ups over the stock model, and of exits over their engine without them."""
    by_size = {
        f"{one['batch_size']} × {one['length']}": {entry["variant"]: entry for entry in one["variants"]}
        for one in sizes
    }
    first = next(iter(by_size.values()))
    over_stock = [
        [size, *(Reported(**entry["over_stock"]).text() for entry in variants.values())]
        for size, variants in by_size.items()
    ]
    lines = ["Over stock torch:\n", markdown_table(["batch × length", *first], over_stock)]
    with_exits = [name for name, entry in first.items() if "over_engine" in entry]
    header = ["batch × length"]
    for name in with_exits:
        header += [name, "share"] if name.endswith(", half") else [name]
    rows = []
    for size, variants in by_size.items():
        cells = [size]
        for name in with_exits:
            cells.append(Reported(**variants[name]["over_engine"]).text())
            if name.endswith(", half"):
                share = variants[name].get("share")
                cells.append("" if share is None else f"{share:.2f}")
        rows.append(cells)
    return "\n".join([*lines, "\nOver the same engine without exits:\n", markdown_table(header, rows)])


if __name__ == "__main__":
    main()
