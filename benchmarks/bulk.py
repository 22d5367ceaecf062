# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A long file of short texts classified from disk to disk: rows per second, and memory over time.

    python benchmarks/bulk.py --model runs/trec-openvino --texts questions.txt --rows 1000000 --output runs/bulk
    python benchmarks/bulk.py --model runs/trec-openvino --texts questions.txt --workers 2 --kill_after 60 --output ...

The texts are repeated, in an order that changes, until there are as many as asked for. Memory is that of the process
and all its children, where workers are. `--kill_after` kills one worker in the middle. The digest of the output tells
whether two runs have the same results.
"""

import argparse
import hashlib
import os
import random
import signal
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging

from transformers_cee.bulk.classifying import classify
from transformers_cee.cli import exit_threshold
from transformers_cee.evaluation.environment import timing_environment
from transformers_cee.evaluation.report import write_results


# Seconds between two looks at memory.
INTERVAL = 1.0
# How a worker of Ray shows among processes.
WORKER = "MapWorker"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a classifier, exported or not")
    parser.add_argument("--texts", type=Path, required=True, help="file with a text per line")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1, help="of the one process; workers share the processor")
    parser.add_argument("--workers", type=int, default=1, help="above 1: workers of Ray")
    parser.add_argument("--kill_after", type=float, help="seconds after which one worker is killed")
    parser.add_argument("--exit_threshold", type=exit_threshold, help="a number, or the name of an operating point")
    parser.add_argument("--output", type=Path, required=True, help="folder for results.json and memory.png")
    args = parser.parse_args()
    if args.kill_after is not None and args.workers < 2:
        parser.error(f"`--kill_after`={args.kill_after} takes `--workers` of at least 2.")
    return args


def write_texts(source: Path, rows: int, path: Path) -> None:
    """The texts again and again, each time in another order."""
    lines = [line for line in source.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    drawn, left = random.Random(0), rows
    with open(path, "w", encoding="utf-8") as file:
        while left:
            drawn.shuffle(lines)
            some = lines[:left]
            file.writelines(line + "\n" for line in some)
            left -= len(some)


class Memory(threading.Thread):
    """Resident megabytes of this process and its children, over time."""

    def __init__(self, kill_after: float | None) -> None:
        super().__init__(daemon=True)
        self.kill_after, self.killed = kill_after, False
        self.samples: list[tuple[float, float]] = []
        self.done = threading.Event()

    def run(self) -> None:
        start, own = time.perf_counter(), psutil.Process()
        while True:
            passed, used = time.perf_counter() - start, 0
            for process in (own, *own.children(recursive=True)):
                try:
                    used += process.memory_info().rss
                    if self._is_to_die(process, passed):
                        os.kill(process.pid, signal.SIGKILL)
                        self.killed = True
                except psutil.NoSuchProcess:
                    continue
            self.samples.append((passed, used / 2**20))
            if self.done.wait(INTERVAL):
                return

    def _is_to_die(self, process: psutil.Process, passed: float) -> bool:
        due = self.kill_after is not None and passed > self.kill_after and not self.killed
        return due and WORKER in " ".join(process.cmdline())


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    args = parse_arguments()
    logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    texts, labels = args.output / "texts.txt", args.output / "labels.jsonl"
    write_texts(args.texts, args.rows, texts)
    asked = {"output": labels, "batch_size": args.batch_size, "exit_threshold": args.exit_threshold}
    memory = Memory(args.kill_after)
    memory.start()
    if args.workers > 1:
        from transformers_cee.bulk.ray_data import classify_on_ray

        summary: Any = classify_on_ray(args.model, texts, workers=args.workers, **asked)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(args.model)
        summary = classify(model, texts, **asked)
    memory.done.set()
    memory.join()
    results = {
        **asdict(summary),
        "workers": args.workers,
        "killed_a_worker": memory.killed,
        "peak_megabytes": max(used for _, used in memory.samples),
        "digest": digest(labels),
        "environment": timing_environment(torch.device("cpu")),
        "memory": memory.samples,
    }
    write_results(results, args.output / "results.json")
    draw(memory.samples, args.output / "memory.png")
    print({name: value for name, value in results.items() if name not in ("memory", "environment")})


def draw(samples: list[tuple[float, float]], path: Path) -> None:
    """Memory over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 2.5))
    axes.plot([passed for passed, _ in samples], [used for _, used in samples])
    axes.set_xlabel("seconds")
    axes.set_ylabel("resident MB")
    axes.set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
