# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
from __future__ import annotations

import os

import datasets
import evaluate
import numpy as np
import pytest
import torch
from tiny_models import run_python

from transformers_cee import load_metric
from transformers_cee.evaluation.exit_metrics import METRICS, metric_path


OPTIONS = {"layer_speedup": {"num_layers": 6}}


@pytest.fixture
def load(tmp_path):
    """Metrics whose temporary files stay in the test's own folder."""
    return lambda name, **kwargs: load_metric(name, cache_dir=str(tmp_path), **{**OPTIONS.get(name, {}), **kwargs})


class Accuracy(evaluate.Metric):
    """Stands for a metric of the Hub."""

    def _info(self):
        features = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(description="", citation="", features=datasets.Features(features))

    def _compute(self, predictions, references):
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


@pytest.mark.parametrize("as_type", [list, np.array, torch.tensor])
def test_depth_and_layer_speedup(load, as_type):
    layers = as_type([1, 2, 6, 3])
    assert load("depth").compute(exit_layers=layers) == {"depth": 3.0}
    assert load("layer_speedup").compute(exit_layers=layers) == {"layer_speedup": 2.0, "saved_layers": 0.5}


def test_agreement(load):
    found = load("agreement").compute(predictions=[0, 1, 2, 1], full_depth_predictions=[0, 2, 2, 1])
    assert found == {"agreement": 0.75}
    many = load("agreement", config_name="multilabel")
    assert many.compute(predictions=[[1, 0], [1, 1]], full_depth_predictions=[[1, 0], [1, 0]]) == {"agreement": 0.5}


def test_they_are_metrics_of_evaluate(load):
    for name in METRICS:
        metric = load(name)
        assert isinstance(metric, evaluate.Metric)
        assert (metric.name, metric.module_type) == (name, "metric")


def test_batches(load):
    metric = load("depth")
    for layers in ([1, 2], [6], [3]):
        metric.add_batch(exit_layers=layers)
    assert metric.compute() == {"depth": 3.0}
    # A second round starts anew.
    metric.add(exit_layers=5)
    assert metric.compute() == {"depth": 5.0}


def test_combined_with_a_metric_of_the_task(load, tmp_path):
    combined = evaluate.combine([Accuracy(cache_dir=str(tmp_path)), *map(load, METRICS)])
    for start in (0, 2):
        rows = slice(start, start + 2)
        combined.add_batch(
            predictions=[0, 1, 2, 1][rows],
            references=[0, 1, 2, 0][rows],
            exit_layers=[1, 2, 6, 3][rows],
            full_depth_predictions=[0, 2, 0, 1][rows],
        )
    expected = {"accuracy": 0.75, "agreement": 0.5, "depth": 3.0, "layer_speedup": 2.0, "saved_layers": 0.5}
    assert combined.compute() == expected


def test_combined_in_one_call(load):
    combined = evaluate.combine([load("depth"), load("agreement"), load("layer_speedup")])
    found = combined.compute(predictions=[0, 1], full_depth_predictions=[0, 0], exit_layers=[2, 4])
    assert found == {"depth": 3.0, "agreement": 0.5, "layer_speedup": 2.0, "saved_layers": 0.5}


LOAD = """
import sys
import evaluate
from transformers_cee.evaluation.exit_metrics import metric_path

depth = evaluate.load(metric_path("depth"))
assert type(depth).__module__.startswith("evaluate_modules."), type(depth)
assert depth.compute(exit_layers=[1, 2, 6, 3]) == {"depth": 3.0}
speedup = evaluate.load(metric_path("layer_speedup"), num_layers=6)
assert speedup.compute(exit_layers=[1, 2, 6, 3])["layer_speedup"] == 2.0
agreement = evaluate.load(metric_path("agreement"), "multilabel")
assert agreement.compute(predictions=[[1, 0]], full_depth_predictions=[[1, 0]]) == {"agreement": 1.0}
"""


def test_evaluate_loads_the_files(tmp_path):
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_EVALUATE_OFFLINE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = run_python(LOAD, environment=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert any((tmp_path / "modules").rglob("depth.py"))


@pytest.mark.parametrize(
    ("name", "options", "inputs", "message"),
    [
        ("depth", {}, {"exit_layers": [0, 3]}, r"counted from 1; got \[0, 3\]"),
        ("layer_speedup", {}, {"exit_layers": [3, 7]}, r"1\.\.6; got \[3, 7\]"),
        ("depth", {}, {"exit_layers": []}, "at least one layer"),
        ("layer_speedup", {}, {"exit_layers": []}, "at least one layer"),
        ("agreement", {}, {"predictions": [], "full_depth_predictions": []}, "at least one row"),
        ("agreement", {}, {"predictions": [1], "full_depth_predictions": [1, 2]}, "Mismatch in the number"),
        ("layer_speedup", {"num_layers": None}, {}, "`num_layers`=None"),
        ("layer_speedup", {"num_layers": 0}, {}, "`num_layers`=0"),
    ],
)
def test_refusals(load, name, options, inputs, message):
    with pytest.raises(ValueError, match=message):
        load(name, **options).compute(**inputs)


@pytest.mark.parametrize("function", [load_metric, metric_path])
def test_unknown_name(function):
    with pytest.raises(ValueError, match=r"`name`='speed'.*'agreement', 'depth', 'layer_speedup'"):
        function("speed")
