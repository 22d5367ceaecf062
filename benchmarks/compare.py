# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Every method on every task: trains, evaluates on the same stored exits, and reports. Resumable; one JSON per run.

    python benchmarks/compare.py train benchmarks/configs/compare.yaml --model MODEL --data DATA --runs runs/compare
    python benchmarks/compare.py evaluate benchmarks/configs/compare.yaml --data DATA --runs runs/compare
    python benchmarks/compare.py report benchmarks/configs/compare.yaml

`train` makes a model folder per task, objective and seed with `examples/run_glue_cee.py`, and every exit's state and
logits of all splits beside it. `evaluate` fits what criteria need (temperatures, classifiers, policies), picks
thresholds on dev, takes figures from test, and writes `docs/results/compare/TASK-OBJECTIVE-SEED.json`; scores for
`calibration_coverage.py` go to the model folder. `report` makes
`docs/results/compare.md` and its pictures of all such files. A run whose result is there is not repeated; `--tasks`,
`--objectives` and `--seeds` choose some.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from transformers_cee.evaluation.report import write_results


SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "run_glue_cee.py"
PATHS = ("train_file", "validation_file", "test_file", "data_dir")


@dataclass(frozen=True)
class Run:
    """One trained model.

    Args:
        task, objective, seed: what it is.
        options: of `run_glue_cee.py`; paths still without the data folder.
        start: objective whose model of the same task and seed it continues.
        criteria: exit criteria to evaluate; all of them by default.
        policies_at: prices of a layer for which policies are trained apart, in the evaluation.
    """

    task: str
    objective: str
    seed: int
    options: dict[str, Any]
    start: str | None = None
    criteria: list[str] | None = None
    policies_at: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.task}-{self.objective}-{self.seed}"

    def command(self, model: str, data: Path, runs: Path) -> list[str]:
        """The command that trains it."""
        options: dict[str, Any] = {"do_train": True, "save_exits": True, "seed": self.seed, "use_cpu": True}
        options |= self.options | {"output_dir": runs / self.name, "model_name_or_path": model}
        if self.start is not None:
            options["model_name_or_path"] = runs / f"{self.task}-{self.start}-{self.seed}"
        options |= {name: data / options[name] for name in PATHS if name in options}
        words = [sys.executable, str(SCRIPT)]
        for name, value in options.items():
            words += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
        return words


def read_runs(args: argparse.Namespace) -> list[Run]:
    """All runs of the configuration that were asked for, those that others continue first."""
    config = yaml.safe_load(args.config.read_text(encoding="utf-8"))
    runs = []
    for task, about in config["tasks"].items():
        for objective, how in config["objectives"].items():
            options = {**config["options"], **about["options"], **how["options"]}
            others = {name: how[name] for name in ("start", "criteria", "policies_at") if name in how}
            runs += [Run(task, objective, seed, options, **others) for seed in about["seeds"]]
    seeds = sorted({run.seed for run in runs})
    for name, known in (("tasks", config["tasks"]), ("objectives", config["objectives"]), ("seeds", seeds)):
        wrong = set(getattr(args, name) or ()) - set(known)
        if wrong:
            raise ValueError(f"`{name}`={sorted(wrong)} unknown; accepted are {', '.join(map(str, known))}.")
    chosen = {"task": args.tasks, "objective": args.objectives, "seed": args.seeds}
    return [run for run in runs if all(not some or getattr(run, name) in some for name, some in chosen.items())]


def _check_given(args: argparse.Namespace, *names: str) -> None:
    missing = [f"`--{name}`" for name in names if getattr(args, name) is None]
    if missing:
        raise ValueError(f"`{args.stage}` needs {' and '.join(missing)}; got None.")


def train(args: argparse.Namespace) -> None:
    """Trains what has no model yet, `--jobs` runs at a time, one thread each."""
    _check_given(args, "model", "data")
    todo = [run for run in read_runs(args) if not (args.runs / run.name / "exits-test.safetensors").is_file()]
    failed: list[str] = []
    for wave in _waves(todo):
        with ThreadPoolExecutor(args.jobs) as pool:
            outcomes = pool.map(lambda run: _train(run, args), wave)
            failed += [run.name for run, is_trained in zip(wave, outcomes, strict=True) if not is_trained]
    if failed:
        sys.exit(f"No model of {', '.join(failed)}; their logs are in {args.runs}.")


def _waves(runs: list[Run]) -> Iterator[list[Run]]:
    """Runs in groups, each of which continues models of earlier groups at most."""
    yield [run for run in runs if run.start is None]
    yield [run for run in runs if run.start is not None]


def _train(run: Run, args: argparse.Namespace) -> bool:
    """Did it succeed?"""
    args.runs.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    start = time.perf_counter()
    with (args.runs / f"{run.name}.log").open("w") as log:
        done = subprocess.run(
            run.command(args.model, args.data, args.runs), stdout=log, stderr=subprocess.STDOUT, env=environment
        )
    outcome = "trained" if done.returncode == 0 else f"FAILED, see {log.name}"
    print(f"{run.name}: {outcome} in {time.perf_counter() - start:.0f} s", flush=True)
    return done.returncode == 0


def evaluate(args: argparse.Namespace) -> None:
    """Evaluates what has exits and no result yet."""
    _check_given(args, "data")
    from compare_evaluate import evaluate_run, write_held_out_scores

    args.results.mkdir(parents=True, exist_ok=True)
    for run in read_runs(args):
        folder, path = args.runs / run.name, args.results / f"{run.name}.json"
        if path.is_file() or not (folder / "exits-test.safetensors").is_file():
            continue
        start = time.perf_counter()
        torch.set_num_threads(args.threads)
        words = run.command("-", args.data, args.runs)[2:]
        figures = {"task": run.task, "objective": run.objective, "seed": run.seed}
        if run.criteria != []:
            write_held_out_scores(folder)
        write_results(figures | evaluate_run(folder, words, run.policies_at, run.criteria), path)
        print(f"{run.name}: evaluated in {time.perf_counter() - start:.0f} s", flush=True)


def report(args: argparse.Namespace) -> None:
    """Writes the page and the pictures."""
    from compare_report import write_report

    config, root = args.config.resolve(), SCRIPT.parents[1]
    name = config.relative_to(root).as_posix() if config.is_relative_to(root) else config.name
    wanted = [(run.task, run.objective, run.seed) for run in read_runs(args)]
    print(write_report(wanted, args.results, args.output, name))


STAGES = {"train": train, "evaluate": evaluate, "report": report}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("config", type=Path, help="tasks, objectives and options")
    parser.add_argument("--model", help="folder or Hub name of a BERT checkpoint")
    parser.add_argument("--data", type=Path, help="folder that the paths of the configuration start from")
    parser.add_argument("--runs", type=Path, default=Path("runs/compare"), help="model folders")
    parser.add_argument("--results", type=Path, default=Path("docs/results/compare"), help="one JSON per run")
    parser.add_argument("--output", type=Path, default=Path("docs/results/compare.md"), help="page of the report")
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--objectives", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads per run")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    STAGES[args.stage](args)


if __name__ == "__main__":
    main()
