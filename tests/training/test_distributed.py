# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Two processes on CPU (torchrun, gloo) against one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


SCRIPT = Path(__file__).with_name("distributed_run.py")
TEXT_PHASES = ["text_heads", "text_consistent", "text_sampled"]
SOURCES = Path(__file__).resolve().parents[2] / "src"


def in_one(folder: Path) -> dict:
    spec = importlib.util.spec_from_file_location("distributed_run", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main(str(folder))
    return torch.load(folder / "result.pt", weights_only=True)


def in_two(folder: Path) -> dict:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    path = os.pathsep.join(filter(None, [str(SOURCES), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [*torchrun, str(SCRIPT), str(folder)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return torch.load(folder / "result.pt", weights_only=True)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return [run(tmp_path_factory.mktemp(run.__name__)) for run in (in_one, in_two)]


def test_there_were_two(results):
    assert [result["processes"] for result in results] == [1, 2]


def test_memorized_layers(results):
    one, two = results
    assert one["memorized"].tolist() == two["memorized"].tolist() and len(one["memorized"]) == 13
    assert len(set(one["memorized"].tolist())) > 1


@pytest.mark.parametrize("name", ["states", "logits", "labels", "mapped"])
def test_stores(results, name):
    torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["states", "token_losses", "predictions", "labels", "features", "rows", "may_exit", "memorized", "sample"]
)
def test_stores_of_tokens(results, name):
    """Batches of the processes hold different numbers of tokens."""
    one, two = (result[f"text_{name}"] for result in results)
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert len(one) > 13 or name == "sample"


@pytest.mark.parametrize(
    "name", ["layer_weighted", "last", "two_stage", "variational", "consistent", "policy", *TEXT_PHASES]
)
def test_gradients(results, name):
    """Weights after one step on the same 8 rows: no factor by the number of processes, and of a decoder none by how
    many tokens each of them has."""
    one, two = (result[name] for result in results)
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=2e-6, msg=f"{name}: {key}")


def test_whole_run(results):
    for result in results:
        assert len(result["steps"]) == 5
        reported, own, rows = result["evaluation"]
        assert reported == pytest.approx(own) and rows == 24
        assert result["apart"] == 0.0, "processes ended with different weights"


def test_whole_run_of_a_decoder(results):
    for result in results:
        assert len(result["text_steps"]) == 5
        assert result["text_apart"] == 0.0, "processes ended with different weights"


def test_evaluation_of_a_decoder(results):
    one, two = results
    assert two["text_metrics"] == pytest.approx(one["text_metrics"], rel=1e-4)
    assert one["text_histogram"] == two["text_histogram"] and 1.0 < one["text_metrics"]["depth"] < 4.0
