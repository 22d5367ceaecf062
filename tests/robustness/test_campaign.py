# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Both campaigns in small; `make test-robustness` runs them in full."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


HERE = Path(__file__).resolve().parent


def run(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(HERE.parents[1] / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run(
        [sys.executable, str(HERE / name), *words], env=environment, capture_output=True, text=True, timeout=1200
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["1", "2"])
def test_hostile_input_works_or_is_refused(seed):
    done = run("fuzz.py", "--inputs", "150", "--seed", seed)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_killed_runs_are_not_lost(tmp_path):
    done = run("kills.py", "--kills", "10", "--seed", "1", "--folder", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
