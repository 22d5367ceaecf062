# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tensor parallelism as the stock model has it, with exits off and on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed
from transformers import LlamaForCausalLM

from transformers_cee import LlamaForConsistentEECausalLM


SOURCES = Path(__file__).resolve().parents[2] / "src"


@pytest.mark.parametrize("name", ["_tp_plan", "_pp_plan", "_fsdp_plan"])
def test_the_head_is_spread_as_in_the_stock_model(name):
    assert getattr(LlamaForConsistentEECausalLM, name, None) == getattr(LlamaForCausalLM, name, None)


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_gloo_available(), reason="needs gloo")
def test_two_processes(tmp_path):
    path = os.pathsep.join(filter(None, [str(SOURCES), os.environ.get("PYTHONPATH")]))
    script = Path(__file__).with_name("tensor_parallel_run.py")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, tmp_path],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-6000:]
