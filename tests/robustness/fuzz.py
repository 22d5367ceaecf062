# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Hostile files and arguments: each either works or is refused by an error that names what is wrong.

    python tests/robustness/fuzz.py --inputs 1000 --seed 0

An outcome counts as refused when it is a ValueError, TypeError or OSError whose message names the argument, field or
file, or a word of the command line that argparse does not accept. Whatever else is raised, and whatever takes longer
than `SECONDS`, is raw.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mutations
from assets import make_assets, options


OUTCOMES = ("worked", "refused", "raw")
SECONDS = 20

# What is tried: a call, how it is told of, and the words of which a refusal has to name one.
Input = tuple[Callable[[], Any], str, list[str]]


class Hang(BaseException):
    """An input that takes too long."""


def _alarm(*_: Any) -> None:
    raise Hang(f"more than {SECONDS} s")


def configs(generator: random.Random, folder: Path) -> Iterator[Input]:
    """Saved configs with other fields; one that loads has to give a model that runs."""
    import torch
    from tiny import tiny_config, tiny_llama_config

    from transformers_cee import BertForConsistentEE, LlamaForConsistentEECausalLM
    from transformers_cee.exits.configuration import DecoderExitConfigMixin, EncoderExitConfigMixin

    kinds = [
        (tiny_config(policy_inputs="both"), BertForConsistentEE, EncoderExitConfigMixin),
        (tiny_llama_config(exit_threshold=0.5), LlamaForConsistentEECausalLM, DecoderExitConfigMixin),
    ]
    ids = torch.tensor([[5, 6, 7]])
    number = 0
    while True:
        config, model_class, mixin = kinds[number % 2]
        number += 1
        own = [
            name for name in mixin.__dataclass_fields__ if name.startswith(("exit", "policy", "reward", "min", "skip"))
        ]
        base = config.to_dict()
        values, changed = mutations.record(generator, base, [*own, *own, "num_hidden_layers", "model_type"])
        path = folder / f"config-{number}"
        path.mkdir()
        content = mutations.text_of(values).encode()
        if generator.random() < 0.15:
            content = mutations.damaged(generator, content)
            changed = [f"`{name}`" for name in (*own, "num_hidden_layers", "model_type")]
        (path / "config.json").write_bytes(content)

        def call(path: Path = path, model_class: Any = model_class) -> None:
            config = model_class.config_class.from_pretrained(path)
            sizes = (config.num_hidden_layers, config.policy_hidden_size, getattr(config, "exit_head_rank", 1))
            if max(sizes) < 5000:
                with torch.no_grad():
                    model_class(config).eval()(input_ids=ids)

        told = {name: mutations.shown(values[name]) for name in changed if name in values}
        yield call, f"{model_class.__name__} {told or content[:60]}", [*changed, str(path)]


def thresholds(generator: random.Random, folder: Path) -> Iterator[Input]:
    """Files of calibrated thresholds, and operating points and budgets in configs."""
    import torch
    from populations import population
    from tiny import tiny_config, tiny_model

    from transformers_cee.calibration.agreement import calibrate_agreement
    from transformers_cee.calibration.points import CalibratedPoint

    scores = population(200, exits=6)
    base = calibrate_agreement(scores, 0.1).check(scores).to_dict()
    model = tiny_model()
    ids = torch.tensor([[5, 6, 7]])
    while True:
        values, changed = mutations.record(generator, base, [*base, "alpha", "reason"])
        text = mutations.text_of(values)

        def read(text: str = text) -> None:
            found = CalibratedPoint.from_dict(json.loads(text))
            found.check(scores)
            found.save_to(model, "point")
            model(ids, exit_threshold="point")

        def load(text: str = text) -> None:
            config = tiny_config(exit_operating_points={"point": json.loads(text)}, exit_threshold="point")
            assert config.exit_threshold == "point"

        told = {name: mutations.shown(values.get(name, "missing")) for name in changed}
        names = [*changed, "values", "scores", "exit_operating_points", "exit_threshold"]
        yield (read if generator.random() < 0.6 else load), f"{told}", names


def records(generator: random.Random, folder: Path) -> Iterator[Input]:
    """What a run writes about itself: finished steps, Trainer's state, results."""
    import common
    import generate_demo
    from tiny import tiny_trainer
    from transformers import TrainerCallback

    from transformers_cee.training.phases import PhaseLog

    class Stop(Exception):
        """Ends a run."""

    class StopAt(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise Stop

    saved = {"save_strategy": "steps", "save_steps": 2, "phases": ["heads"]}
    run = folder / "run"
    with contextlib.suppress(Stop):
        tiny_trainer(run, rows=24, trainer={"callbacks": [StopAt()]}, num_train_epochs=2, **saved).train()
    state_path = run / "phases" / "heads" / "checkpoint-2" / "trainer_state.json"
    state = json.loads(state_path.read_text())
    done = folder / "done"
    tiny_trainer(done, rows=24, **saved).train()
    finished = json.loads((done / "phases" / "finished.json").read_text())
    point = {"criterion": "policy", "exit_threshold": 0.5, "depth": 2.0}
    results = {"train": {"heads": {"train_loss": 1.0}}, "curves": {"policy": [point, point]}, "train_seconds": 1.0}
    number = 0
    while True:
        number += 1
        kind = generator.randrange(3)
        base, names = ((state, list(state)), (finished, [*finished, "../../x"]), (results, list(results)))[kind]
        values, changed = mutations.record(generator, base, names)
        content = mutations.text_of(values).encode()
        if generator.random() < 0.2:
            content = mutations.damaged(generator, content)
        told = f"{changed} {[mutations.shown(values.get(name, 'missing')) for name in changed]}"
        if kind == 0:

            def call(content: bytes = content) -> None:
                import shutil

                again = folder / "again"
                shutil.rmtree(again, ignore_errors=True)
                shutil.copytree(run, again)
                (again / "phases" / "heads" / "checkpoint-2" / "trainer_state.json").write_bytes(content)
                tiny_trainer(again, rows=24, num_train_epochs=2, **saved).train(resume_from_checkpoint=True)

            yield call, f"trainer_state.json {told}", ["trainer_state.json"]
        elif kind == 1:

            def call(content: bytes = content) -> None:
                (done / "phases" / "finished.json").write_bytes(content)
                log = PhaseLog.of(str(done), True)
                log.resume(("heads", "hardness", "policy"))
                assert {*log.finished} <= {"heads", "hardness", "policy"}
                for step in log.finished:
                    log.result(step)

            yield call, f"finished.json {told}", ["finished.json", "resume_from_checkpoint"]
        else:
            path = folder / f"results-{number}"
            path.mkdir()
            (path / "results.json").write_bytes(content)

            def call(path: Path = path) -> None:
                args = argparse.Namespace(output_dir=str(path), do_train=False)
                common.earlier_training(args, _Silent())
                generate_demo.measured_thresholds(path, "policy")

            yield call, f"results.json {told}", ["results.json"]


class _Silent:
    def warning(self, text: str) -> None:
        """A warning names the file, or it is none."""
        if "results.json" not in text:
            raise AssertionError(text)


ROWS = {
    "glue": {
        ".csv": 'sentence,label\n"a film, with heart",a\nnot a joke,b\nplot,a\nlands,b\nworse,a\nfilm,b\n' * 4,
        ".tsv": "sentence\tlabel\na film\ta\nnot a joke\tb\nplot\ta\nlands\tb\n" * 5,
        ".jsonl": "".join(json.dumps({"sentence": f"film {row}", "label": "ab"[row % 2]}) + "\n" for row in range(24)),
        ".json": json.dumps([{"sentence": f"film {row}", "label": row % 3} for row in range(24)]),
    },
    "clm": {
        ".csv": "instruction,input,output\nname two cats,red,the cats\nname a dog,,a dog .\n" * 8,
        ".txt": "the red cats run and sleep .\nfish swim\n" * 60,
        ".jsonl": "".join(json.dumps({"text": f"the birds fly {row}"}) + "\n" for row in range(120)),
        ".json": json.dumps([{"instruction": "name a dog", "input": "", "output": f"dog {row}"} for row in range(24)]),
    },
}


def readers(generator: random.Random, folder: Path) -> Iterator[Input]:
    """Data files of both scripts."""
    from clm_data import TextArguments, load_text_corpus
    from glue_data import DataArguments, load_corpus
    from tiny_lm import word_tokenizer

    tokenizer = word_tokenizer()
    number = 0
    while True:
        number += 1
        script = generator.choice(("glue", "clm"))
        suffix = generator.choice(sorted(ROWS[script]))
        content = ROWS[script][suffix]
        path = folder / f"rows-{number}{suffix}"
        if suffix.startswith(".json") and generator.random() < 0.6:
            rows = [json.loads(line) for line in content.splitlines()] if suffix == ".jsonl" else json.loads(content)
            index = generator.randrange(len(rows))
            if generator.random() < 0.3:
                rows[index] = mutations.value(generator)
            else:
                rows[index], _ = mutations.record(generator, rows[index], list(rows[index]))
            content = "\n".join(map(json.dumps, rows)) if suffix == ".jsonl" else json.dumps(rows)
            made = content.encode()
        else:
            made = mutations.damaged(generator, content.encode())
        path.write_bytes(made)

        def call(path: Path = path, script: str = script) -> None:
            shares = {"validation_split": 0.2, "test_split": 0.2}
            if script == "glue":
                regression = path.suffix == ".json"
                load_corpus(DataArguments(train_file=str(path), regression=regression, **shares))
            else:
                lengths = {"max_seq_length": 32, "text_prompt_length": 8}
                load_text_corpus(TextArguments(train_file=str(path), **lengths, **shares), tokenizer)

        yield (
            call,
            f"{script} {path.name} {mutations.shown(made)}",
            [str(path), "train_file", "training rows", "`max_seq_length`"],
        )


def script_configs(generator: random.Random, folder: Path) -> Iterator[Input]:
    """YAML and JSON files of options of both scripts."""
    import arguments
    import clm_arguments
    import yaml

    number = 0
    while True:
        number += 1
        module, flow = generator.choice(((arguments, "classifier"), (clm_arguments, "language model")))
        base = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in options(flow, folder / "assets", folder / "out").items()
        }
        more = ("num_hidden_layers", "exit_threshold", "heads_objective", "policy_holdout", "exit_norm", "seed")
        values, changed = mutations.record(generator, base, [*base, *more], most=3)
        suffix = generator.choice((".yaml", ".json"))
        path = folder / f"options-{number}{suffix}"
        try:
            text = yaml.safe_dump(values) if suffix == ".yaml" else json.dumps(values)
        except (yaml.YAMLError, RecursionError):
            text = "a: &a [x]\nb: *a\n"
        made = text.encode()
        if generator.random() < 0.25:
            made, changed = mutations.damaged(generator, made), []
        path.write_bytes(made)

        def call(path: Path = path, module: Any = module) -> None:
            module.parse_arguments([str(path)])

        told = {name: mutations.shown(values.get(name, "missing")) for name in changed}
        # Options that need each other name each other.
        yield (
            call,
            f"{flow} {path.name} {told or mutations.shown(made)}",
            [*changed, str(path), "--", "`", "no option"],
        )


def exit_arguments(generator: random.Random, folder: Path) -> Iterator[Input]:
    """Exit arguments of `forward`, `generate` and calibration."""
    import numpy as np
    import torch
    from populations import population
    from tiny import tiny_llama, tiny_model

    from transformers_cee.calibration.agreement import calibrate_agreement
    from transformers_cee.calibration.budget import calibrate_budget
    from transformers_cee.calibration.risk import calibrate_risk
    from transformers_cee.exits.criteria import CRITERIA

    bert, llama = tiny_model(), tiny_llama()
    budgets = {"policy_condition": "film", "exit_budgets": [[0.3, 0.1, 0.5], [0.8, 0.01, 0.5]]}
    film = tiny_model(**budgets)
    scores = population(100, exits=6)
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    arrays = (
        np.float32(0.5),
        np.int64(3),
        np.array(0.5),
        np.array([0.5] * 6),
        np.array([[0.5]]),
        np.array(["a"]),
        torch.tensor(0.5),
        torch.full((6,), 0.5),
        torch.full((2, 2), 0.5),
        torch.tensor([], dtype=torch.long),
        {0.5},
        object(),
        b"x",
        1j,
        lambda: 0.5,
    )
    own = ("exit_threshold", "exit_criterion", "exit_budget")
    calls: dict[str, tuple[Callable, tuple[str, ...]]] = {
        "forward": (lambda **kwargs: bert(ids, **kwargs), own),
        "forward of any speed": (lambda **kwargs: film(ids, **kwargs), own),
        "forward of a decoder": (lambda **kwargs: llama(ids, **kwargs), (*own, "min_exit_layer", "skipped_kv")),
        "generate": (
            lambda **kwargs: llama.generate(ids, max_new_tokens=2, do_sample=False, **kwargs),
            (*own, "min_exit_layer", "skipped_kv", "exit_threshold_decay"),
        ),
        "calibrate_agreement": (lambda **kwargs: calibrate_agreement(scores, **{"epsilon": 0.1, **kwargs}),
                                ("epsilon", "method", "delta", "coverage")),
        "calibrate_budget": (lambda **kwargs: calibrate_budget(scores, **{"budget": 4.0, **kwargs}),
                             ("budget", "costs", "beta", "delta", "batch_rows", "risks")),
        "calibrate_risk": (lambda **kwargs: calibrate_risk(scores, **{"level": 0.4, **kwargs}),
                           ("level", "delta", "p_value", "grid")),
    }  # fmt: skip
    while True:
        name = generator.choice(sorted(calls))
        function, known = calls[name]
        asked = {}
        for argument in generator.sample(known, generator.choice((1, 1, 2))):
            kind = generator.random()
            if argument == "exit_criterion" and kind < 0.6:
                asked[argument] = generator.choice(sorted(CRITERIA))
            else:
                asked[argument] = (
                    generator.choice(arrays) if kind < 0.75 and kind > 0.5 else mutations.value(generator)
                )

        def call(function: Callable = function, asked: dict = asked) -> None:
            with torch.no_grad():
                function(**asked)

        told = {key: mutations.shown(value) for key, value in asked.items()}
        # An argument may be refused because of what the model's config lacks.
        yield call, f"{name} {told}", [*asked, "exit_criterion", "exit_threshold", "exit_estimators", "costs"]


KINDS: dict[str, tuple[Callable[[random.Random, Path], Iterator[Input]], float]] = {
    "saved configs": (configs, 0.2),
    "thresholds": (thresholds, 0.15),
    "records of a run": (records, 0.12),
    "data files": (readers, 0.23),
    "options of scripts": (script_configs, 0.12),
    "exit arguments": (exit_arguments, 0.18),
}


def judge(call: Callable[[], Any], names: list[str]) -> tuple[str, str]:
    """The outcome of an input, and what was raised."""
    stderr = io.StringIO()
    signal.signal(signal.SIGALRM, _alarm)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(stderr):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call()
        return "worked", ""
    except SystemExit:
        text = stderr.getvalue().strip().splitlines()[-1:]
        is_named = bool(text) and "error: " in text[0]
        return ("refused" if is_named else "raw"), f"SystemExit: {text}"
    except (Exception, Hang) as error:
        message = f"{type(error).__name__}: {error}"
        is_named = any(name in str(error) for name in names)
        # Errors of JSON and Unicode are ValueErrors, too.
        is_clear = type(error) in (ValueError, TypeError, OSError, FileNotFoundError) and is_named
        if not is_clear:
            frames = traceback.extract_tb(error.__traceback__)[-3:]
            message += "".join(f"\n      {frame.filename}:{frame.lineno} {frame.line}" for frame in frames)
        return ("refused" if is_clear else "raw"), message
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def campaign(inputs: int, seed: int, folder: Path, kinds: list[str] | None = None, tell: Any = print) -> dict:
    """Outcomes by kind of input; what is raw is told."""
    import datasets
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "calibration"))
    make_assets(folder / "assets")
    counts: dict[str, Counter] = {}
    for kind in kinds or KINDS:
        make, share = KINDS[kind]
        counts[kind] = Counter()
        own = folder / kind.replace(" ", "-")
        own.mkdir()
        os.symlink(folder / "assets", own / "assets")
        with contextlib.redirect_stdout(io.StringIO()):
            source = make(random.Random(f"{seed} {kind}"), own)
            first = next(source)
        for number in range(-(-int(inputs * share * 1000) // 1000)):
            call, told, names = first if number == 0 else next(source)
            verdict, message = judge(call, names)
            counts[kind][verdict] += 1
            if verdict == "raw":
                tell(f"raw: {kind}: {told}\n   -> {message}")
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS))
    args = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        counts = campaign(args.inputs, args.seed, Path(folder), args.kinds)
    from assets import table

    rows = [[kind, sum(count.values()), *(count[name] for name in OUTCOMES)] for kind, count in counts.items()]
    rows.append(["all", *(sum(row[column] for row in rows) for column in range(1, len(OUTCOMES) + 2))])
    print(table(["input", "tried", *OUTCOMES], rows))
    print(f"{time.monotonic() - started:.0f} s, seed {args.seed}")
    return int(rows[-1][-1] > 0)


if __name__ == "__main__":
    sys.exit(main())
