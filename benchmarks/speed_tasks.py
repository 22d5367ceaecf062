# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A trained classifier on each engine, with exits and without, on the texts of its test split: accuracy and time.

    python benchmarks/speed_tasks.py --model runs/trec --train_file data/trec/train.csv \\
        --test_file data/trec/test.csv --engines openvino:int8 torch:float32 --output runs/speed-trec

Files and splits are those of `run_glue_cee.py`, with its options. Scales of int8 come from training texts. Criterion,
exits and thresholds are chosen on dev, by measured costs, as `export(exit_layers="auto")` chooses them: for every
criterion the exits with the least expected time under the promise that a share `--agreement` of all texts is answered
as at full depth; of these the fastest. Everything reported comes from test.

Beside the comparison it tells, of each engine, what quantisation does to predictions and to the depth of a budget; how
often times with exits are above times without ("never slower"); and what the choice of exits brings.
"""

import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from speed_peers import STOCK, SingleRows, by_entropy, by_patience, dynamic_int8, stock_of
from speed_served import Chosen, Data, Served, accuracy_of, agreement_of, agreement_on, boldest, share_as_full
from speed_tables import draw_speedups, tables
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser
from transformers.utils import logging

from transformers_cee.calibration.exit_choice import choose_exits
from transformers_cee.calibration.scores import score_store
from transformers_cee.engines import ENGINES
from transformers_cee.engines.costs import measure_costs
from transformers_cee.engines.promises import exits_of
from transformers_cee.engines.serving import of_layers, rates_of
from transformers_cee.evaluation.environment import timing_environment
from transformers_cee.evaluation.report import write_results
from transformers_cee.evaluation.timing import FEWEST_ROUNDS, Reported, Timer, Timings
from transformers_cee.exits.criteria import CRITERIA
from transformers_cee.exits.numbers import share
from transformers_cee.files import write_text
from transformers_cee.stores.scoring import exits_taken, thresholds_for_depths


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from glue_data import DataArguments, load_corpus
from run_glue_cee import tokenize


SCALE_TEXTS = 256
OFF = {"exit_criterion": "max_probability", "exit_threshold": CRITERIA["max_probability"].off}
# Mean depths, as shares of all layers, at which times with exits are compared with times without.
DEPTHS = (1.0, 0.9, 0.75, 0.5)


@dataclass
class SpeedArguments:
    """What is compared."""

    model: str = field(metadata={"help": "Folder of a trained classifier with exits."})
    output: str = field(metadata={"help": "Folder for results.json, table.md and speed.png."})
    engines: list[str] = field(
        default_factory=lambda: ["openvino:int8", "openvino:float32", "onnxruntime:int8", "torch:float32"],
        metadata={"help": "Engines and precisions; the choice of exits is looked at on the first one."},
    )
    criteria: list[str] = field(default_factory=lambda: ["policy", "max_probability"])
    agreement: float = field(default=0.98, metadata={"help": "Promised share of answers as at full depth, in (0, 1)."})
    batch_sizes: list[int] = field(default_factory=lambda: [1, 32])
    half_model: str | None = field(default=None, metadata={"help": "Folder of a shallower model, fine-tuned alike."})
    timed_rows: int = field(default=128, metadata={"help": "Rows of test that are timed; all are answered."})
    rounds: int = 5
    threads: int = 1

    def __post_init__(self) -> None:
        if self.rounds < FEWEST_ROUNDS:
            raise ValueError(f"`rounds`={self.rounds} must be at least {FEWEST_ROUNDS}.")
        for word in self.engines:
            engine, colon, precision = word.partition(":")
            if not colon:
                raise ValueError(f"`engines` has {word!r}; accepted are an engine and a precision: 'openvino:int8'.")
            ENGINES.find(engine).require()
            ENGINES[engine].check_precision(precision)
        for name in self.criteria:
            CRITERIA.find(name, "criteria")
        self.agreement = share("agreement", self.agreement)


def serve(args: SpeedArguments, data: Data, model: Any, word: str, folder: Path) -> Served:
    """Exports a model, measures costs, and collects exits."""
    engine, _, precision = word.partition(":")

    def export(criterion: str) -> Any:
        place = folder / f"{word.replace(':', '-')}-{criterion}"
        if not place.exists():
            model.export(
                place, engine=engine, precision=precision, calibration_texts=data.texts, exit_criterion=criterion,
                processing_class=data.tokenizer, measure=False,
            )  # fmt: skip
        return AutoModelForSequenceClassification.from_pretrained(place, threads=args.threads)

    made = export(args.criteria[0])
    lengths = sorted({max(1, round(data.length())), 64})
    made.costs = measure_costs(made, batch_sizes=args.batch_sizes, lengths=lengths, disable_tqdm=True)
    stores = [exits_of(made, rows, data.tokenizer) for rows in (data.dev, data.test)]
    made.rates = rates_of(made, stores[0])
    print(f"{word}: exported", flush=True)
    return Served(word, export, made, *stores)


def choose(args: SpeedArguments, data: Data, served: Served, batch_size: int) -> Chosen | None:
    """The criterion and the exits with the least expected time under the promise; None where none pays."""
    found = []
    for criterion in args.criteria:
        with warnings.catch_warnings():
            # Too few rows for the promise: exits are off then.
            warnings.simplefilter("ignore")
            choice = choose_exits(
                served.scores(criterion), served.model.costs, batch_size=batch_size, length=data.length(),
                epsilon=1 - args.agreement, rescore=partial(served.scores, criterion),
            )  # fmt: skip
        if choice.reason is None:
            found.append(Chosen(criterion, choice))
    return min(found, key=lambda one: one.choice.seconds, default=None)


def with_exits(served: Served, chosen: Chosen) -> Callable[..., Any]:
    """A call of the model with the chosen exits alone."""
    model = of_layers(served.with_criterion(chosen.criterion), chosen.choice.exit_layers)
    chosen.choice.point.save_to(model, "chosen")
    return partial(model, exit_threshold="chosen")


@torch.inference_mode()
def answered(call: Callable[..., Any], batches: Iterable[dict[str, Tensor]], layers: int) -> dict[str, float]:
    """Accuracy, and mean exit layer, of the executed calls."""
    right, depth, rows = 0, 0.0, 0
    for batch in batches:
        output = call(**{name: value for name, value in batch.items() if name != "labels"})
        right += int((output.logits.argmax(-1) == batch["labels"]).sum())
        left = getattr(output, "exit_layers", None)
        depth += layers * len(batch["labels"]) if left is None else int(left.sum())
        rows += len(batch["labels"])
    return {"accuracy": right / rows, "depth": depth / rows}


def peers(args: SpeedArguments, model: Any) -> dict[str, Callable[..., Any]]:
    """Stock models with the trained weights; that in float32 is the model without exits."""
    found: dict[str, Callable[..., Any]] = {}
    found["stock torch dynamic int8"] = partial(dynamic_int8(model), **OFF)
    if args.half_model is not None:
        half = AutoModelForSequenceClassification.from_pretrained(args.half_model, dtype=torch.float32).eval()
        found[f"torch float32, {half.config.num_hidden_layers} layers fine-tuned alike"] = partial(half, **OFF)
    return found


def loops(model: Any, served: Served, agreement: float) -> dict[str, Callable[..., Any]]:
    """Loops over single rows, at the boldest setting with such an agreement on dev."""
    found = {}
    for criterion, rule, name in (("entropy", by_entropy, "DeeBERT"), ("patience", by_patience, "PABEE")):
        scores = served.scores(criterion)
        tried = [float(count) for count in range(1, scores.num_exits)]
        if criterion == "entropy":
            tried = [step / 50 for step in range(50, -1, -1)]
        for threshold in tried:
            if share_as_full(scores, exits_taken(criterion, threshold, scores.scores)) >= agreement:
                found[f"loop of single rows as {name}"] = SingleRows(model, rule(threshold))
                break
    return found


def timed(
    rounds: int, calls: dict[str, Callable[..., Any]], batches: list[dict[str, Tensor]], baselines: list[str]
) -> Timings:
    """Times of all batches, by variant."""
    inputs = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
    runs = {name: [partial(call, **one) for one in inputs] for name, call in calls.items()}
    with torch.inference_mode():
        return Timer(rounds=rounds).time(runs, baselines)


def quantised(full: Served, served: Served, criterion: str) -> dict[str, float]:
    """What an engine and precision do to predictions, and to the depth of half the layers, fitted before and anew."""
    layers = served.test.layers
    last = [store.logits[:, -1].argmax(-1) for store in (full.test, served.test)]  # type: ignore[index]
    tests = score_store(served.test, criterion, served.model).scores
    told = {"agreement": float((last[0] == last[1]).float().mean()), "accuracy": accuracy_of(served.test)}
    for name, source in (("before", full), ("after", served)):
        dev = source.scores(criterion).scores
        (threshold,) = thresholds_for_depths(criterion, dev, layers.tolist(), [float(layers[-1]) / 2])
        taken = exits_taken(criterion, threshold, tests)
        told[f"depth_{name}"] = float(layers[taken].float().mean())
        told[f"accuracy_{name}"] = accuracy_of(served.test, taken)
    return told


def never_slower(args: SpeedArguments, data: Data, served: Served, rows: Any, size: int) -> dict[str, Any]:
    """Time without exits over time with them, at several mean depths, all exits of the model open."""
    criterion = args.criteria[0]
    scores, layers = served.scores(criterion).scores, served.dev.layers.tolist()
    thresholds = thresholds_for_depths(criterion, scores, layers, [depth * layers[-1] for depth in DEPTHS])
    calls = {
        f"{depth:g}": partial(served.model, exit_criterion=criterion, exit_threshold=threshold)
        for depth, threshold in zip(DEPTHS, thresholds, strict=True)
    }
    # Differences of a hundredth are looked for.
    found = timed(3 * args.rounds, {"off": partial(served.model, **OFF), **calls}, data.batches(rows, size), ["off"])
    return {name: figure.reported._asdict() for name, figure in found.speedups["off"].items()}


def exit_choices(
    args: SpeedArguments, data: Data, served: Served, chosen: Chosen, rows: Any, size: int
) -> dict[str, dict[str, Any]]:
    """The exits chosen by cost, every exit, and every third, at one agreement on dev: what the choice has there."""
    last = served.model.config.num_hidden_layers
    known, criterion = served.dev.layers.tolist(), chosen.criterion
    sets = {
        "by cost": chosen.choice.exit_layers,
        "every exit": known,
        "every third": [layer for layer in known if layer % 3 == 0 or layer == last],
    }
    agreement = agreement_on(served, chosen)
    calls: dict[str, Callable[..., Any]] = {}
    told: dict[str, dict[str, Any]] = {}
    whole = served.with_criterion(criterion)
    for name, layers in sets.items():
        point = chosen.choice.point
        if name != "by cost":
            point = boldest(served.scores(criterion, layers), agreement)
        model = of_layers(whole, layers)
        # These exits are asked, whether they pay or not.
        model.costs = None
        point.save_to(model, "same")
        calls[name] = partial(model, exit_threshold="same")
        told[name] = {
            "layers": layers,
            "agreement_on_dev": agreement_of(served.scores(criterion, layers), point),
            "agreement": agreement_of(served.scores(criterion, layers, served.test), point),
            **answered(calls[name], data.batches(data.test, 32), last),
        }
    calls["off"] = partial(served.model, **OFF)
    found = timed(args.rounds, calls, data.batches(rows, size), ["off"])
    for name, about in told.items():
        about["over_engine"] = found.speedups["off"][name].reported._asdict()
    return told


def load_data(args: SpeedArguments, data_args: DataArguments) -> tuple[Data, list[str]]:
    corpus, tokenizer = load_corpus(data_args), AutoTokenizer.from_pretrained(args.model)
    splits = tokenize(corpus, tokenizer, data_args.max_seq_length)
    train = corpus.splits["train"].select(range(min(SCALE_TEXTS, len(corpus.splits["train"]))))
    texts = [" ".join(row[column] for column in corpus.text_columns) for row in train]
    return Data(splits["validation"], splits["test"], texts, tokenizer), corpus.notes


def main(words: Sequence[str] | None = None) -> None:
    parser = HfArgumentParser([SpeedArguments, DataArguments], description=__doc__)
    args, data_args = parser.parse_args_into_dataclasses(words)
    logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    data, notes = load_data(args, data_args)
    model = AutoModelForSequenceClassification.from_pretrained(args.model, dtype=torch.float32).eval()
    output = Path(args.output)
    results: dict[str, Any] = {
        "model": args.model, "notes": notes, "rows": {"dev": len(data.dev), "test": len(data.test)},
        "promised_agreement": args.agreement,
        "environment": timing_environment(torch.device("cpu")) | {"threads": args.threads},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        words_of = dict.fromkeys(["torch:float32", *args.engines])
        engines = {word: serve(args, data, model, word, Path(folder)) for word in words_of}
        full = engines["torch:float32"]
        results["full"] = accuracy_of(full.test)
        criterion = args.criteria[0]
        results["quantised"] = {
            word: quantised(full, served, criterion) for word, served in engines.items() if served is not full
        }
        results["sizes"] = []
        for size in args.batch_sizes:
            results["sizes"].append(compared(args, data, model, engines, size))
            # What was found is there, whatever comes later.
            write_results(results, output / "results.json")
            write_text(output / "table.md", tables(results))
    print(tables(results))
    draw_speedups(
        {
            str(one["batch_size"]): {name: Reported(**about["over_stock"]) for name, about in one["variants"].items()}
            for one in results["sizes"]
        },
        output / "speed.png",
    )


def compared(args: SpeedArguments, data: Data, model: Any, engines: dict[str, Served], size: int) -> dict[str, Any]:
    """All variants at one batch size."""
    last = model.config.num_hidden_layers
    stock = stock_of(model)
    full = engines["torch:float32"]
    calls: dict[str, Callable[..., Any]] = {
        "torch float32, without exits": partial(model, **OFF),
        **peers(args, model),
    }
    chosen = {word: choose(args, data, served, size) for word, served in engines.items()}
    if size == 1:
        ours = chosen["torch:float32"]
        calls |= loops(model, full, args.agreement if ours is None else agreement_on(full, ours))
    for word in args.engines:
        calls[f"{word}, without exits"] = partial(engines[word].model, **OFF)
        if (found := chosen[word]) is not None:
            calls[f"{word}, with exits"] = with_exits(engines[word], found)
    test = data.batches(data.test, size)
    told: dict[str, dict[str, Any]] = {name: answered(call, test, last) for name, call in calls.items()}
    rows = data.test.shuffle(seed=0).select(range(min(args.timed_rows, len(data.test))))
    whole = [f"{word}, without exits" for word in args.engines]
    found = timed(args.rounds, {STOCK: stock, **calls}, data.batches(rows, size), [STOCK, *whole])
    for name, about in told.items():
        word, _, what = name.partition(", ")
        about["milliseconds"] = found.seconds[name].times(1000 / len(rows)).reported._asdict()
        about["over_stock"] = found.speedups[STOCK][name].reported._asdict()
        if what == "with exits" and (one := chosen[word]) is not None:
            over = found.speedups[f"{word}, without exits"][name].reported
            about |= {
                "over_engine": over._asdict(),
                "share": None if over.value is None else over.value * about["depth"] / last,
                "exit_layers": one.choice.exit_layers,
                "criterion": one.criterion,
                "is_exact": one.choice.is_exact,
            }
    first = args.engines[0]
    one = chosen[first]
    return {
        "batch_size": size,
        "variants": told,
        "never_slower": {word: never_slower(args, data, engines[word], rows, size) for word in args.engines},
        "choice": {} if one is None else exit_choices(args, data, engines[first], one, rows, size),
    }


if __name__ == "__main__":
    main()
