# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Kills training runs of both scripts at random moments, resumes them, and compares what comes out.

    python tests/robustness/kills.py --kills 100 --seed 0

Each run is a process of its own (forked from one that has imported everything) and is ended by SIGKILL. Its
continuation may be killed, too. In the end the weights have to be, bit for bit, those of a run that nobody killed, and
the figures of the phases the same; or the script has to say why not, in an error of its own. Everything else is lost.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

from assets import make_assets, options, table, words


SCRIPTS = {"classifier": "run_glue_cee", "language model": "run_clm_cee"}
OUTCOMES = ("equal", "said why not", "lost")
# A continuation is killed again this often.
AGAIN = 0.3


def start(flow: str, assets: Path, output: Path, resume: bool) -> int:
    """The process of a run."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        output.mkdir(parents=True, exist_ok=True)
        log = os.open(output.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        module = importlib.import_module(SCRIPTS[flow])
        more = {"resume_from_checkpoint": "true"} if resume else {}
        module.main(words(options(flow, assets, output) | more))
        code = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def finish(process: int, seconds: float | None = None) -> int | None:
    """The exit code of a process; None if it was killed after a time."""
    if seconds is not None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        os.kill(process, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return None if code == -signal.SIGKILL else code


def outcome(output: Path) -> tuple[dict[str, bytes], dict[str, float]]:
    """Weights, and the mean training loss of each phase."""
    from safetensors.torch import load_file

    tensors = load_file(output / "model.safetensors")
    train = json.loads((output / "results.json").read_text())["train"]
    weights = {name: value.numpy().tobytes() for name, value in tensors.items()}
    return weights, {name: step["train_loss"] for name, step in train.items()}


def is_same(one: tuple, other: tuple) -> bool:
    """The same weights bit for bit; losses are sums, which a stop adds up in another order."""
    (weights, losses), (other_weights, other_losses) = one, other
    return (
        weights == other_weights
        and list(losses) == list(other_losses)
        and all(math.isclose(losses[name], other_losses[name], rel_tol=1e-4, abs_tol=1e-6) for name in losses)
    )


def judge(code: int | None, output: Path, expected: tuple) -> str:
    if code == 0:
        return "equal" if is_same(outcome(output), expected) else "lost"
    last = output.with_suffix(".log").read_text().strip().splitlines()[-1]
    is_ours = last.startswith(("ValueError: ", "OSError: ")) and str(output) in last
    return "said why not" if is_ours else "lost"


def campaign(kills: int, seed: int, folder: Path, tell=print) -> dict[str, Counter]:
    """Outcomes of at least so many kills, by script, with `kills` and `runs` among the counts."""
    # Everything is imported before the first fork.
    for script in SCRIPTS.values():
        importlib.import_module(script)
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    assets = folder / "assets"
    make_assets(assets)
    generator = random.Random(seed)
    counts: dict[str, Counter] = {flow: Counter() for flow in SCRIPTS}
    for flow, count in counts.items():
        whole = folder / f"{flow.replace(' ', '-')}-whole"
        started = time.monotonic()
        if finish(start(flow, assets, whole, False)):
            raise RuntimeError(f"The run that nobody kills failed: see {whole.with_suffix('.log')}.")
        seconds = time.monotonic() - started
        expected = outcome(whole)
        while count["kills"] < -(-kills // len(SCRIPTS)):
            output = folder / f"{flow.replace(' ', '-')}-{count['runs']}"
            code = finish(start(flow, assets, output, False), generator.uniform(0.0, seconds))
            while code is None:
                count["kills"] += 1
                again = generator.random() < AGAIN
                limit = generator.uniform(0.0, seconds) if again else None
                code = finish(start(flow, assets, output, True), limit)
            verdict = judge(code, output, expected)
            count["runs"] += 1
            count[verdict] += 1
            if verdict != "equal":
                last = output.with_suffix(".log").read_text().strip().splitlines()[-1]
                tell(f"{flow}, run {count['runs'] - 1}: {verdict}: {last}")
            if verdict != "lost":
                shutil.rmtree(output)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="Where the runs lie; kept. Default: a temporary folder.")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="kills-"))
    started = time.monotonic()
    counts = campaign(args.kills, args.seed, folder)
    names = ("runs", "kills", *OUTCOMES)
    rows = [[flow, *(count[name] for name in names)] for flow, count in counts.items()]
    rows.append(["all", *(sum(count[name] for count in counts.values()) for name in names)])
    print(table(["script", *names], rows))
    print(f"{time.monotonic() - started:.0f} s, seed {args.seed}")
    lost = sum(count["lost"] for count in counts.values())
    if args.folder is None and not lost:
        shutil.rmtree(folder)
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
