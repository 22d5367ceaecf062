# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What a model promises is fitted on the engine that serves, and on nothing else."""

import logging

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

from transformers_cee import (
    CalibratedPoint,
    calibrate_agreement,
    calibrate_budget,
    calibrate_price,
    calibrate_risk,
    collect_exits,
    score_store,
)
from transformers_cee.engines.promises import Promises, exits_of, fit_promises


FITTED_ON = "openvino float32"
LAYERS = [1.0, 2.0, 3.0, 4.0]
BUDGETS = [[0.5, 0.1, 0.5], [0.9, 0.01, 0.7], [1.0, 0.01, 0.9999]]


def stored(model, rows, tokenizer):
    options = {"problem_type": "single_label_classification", "disable_tqdm": True}
    return collect_exits(model, rows, DataCollatorWithPadding(tokenizer), Accelerator(cpu=True), **options)


def old_points(scores):
    """Operating points as they are fitted on the model in torch, by name."""
    with pytest.warns(UserWarning, match="Exits are off"):
        tight = calibrate_agreement(scores, 0.001)
    points = {
        "loose": calibrate_agreement(scores, 0.9),
        "tight": tight,
        "running": calibrate_agreement(scores, 0.5, "running", coverage="min"),
        "conformal": calibrate_agreement(scores, 0.6, "conformal", published=True),
        "budget": calibrate_budget(scores, 3.0),
        "seconds": calibrate_budget(scores, 3.0, LAYERS, unit="milliseconds"),
        "risk": calibrate_risk(scores, 0.95),
        "own risk": calibrate_risk(scores, 0.95),
    }
    points["own risk"].levels["risk"] = "own"
    found = {name: point.to_dict() for name, point in points.items()}
    return found | {"bare": {"criterion": "max_probability", "thresholds": [0.5] * 4}}


@pytest.fixture(scope="module")
def rows(tokenizer, texts):
    made = tokenizer(texts)
    return Dataset.from_dict({**made, "labels": [number % 3 for number in range(len(texts))]})


@pytest.fixture(scope="module")
def exported(make_model, rows, tokenizer, texts, tmp_path_factory):
    """The exported model, and what its original promised."""
    model = make_model(exit_criterion="max_probability", policy_condition="film")
    store = stored(model, rows, tokenizer)
    points = old_points(score_store(store, "max_probability", model))
    points["price"] = calibrate_price(store, model, 0.9, budgets=BUDGETS).to_dict()
    model.config.exit_operating_points, model.config.exit_budgets = points, BUDGETS
    model.config.exit_threshold = "loose"
    before = model.config.to_dict()
    options = {"precision": "float32", "measure": False, "processing_class": tokenizer, "calibration_texts": texts}
    labels = rows["labels"]
    with pytest.warns(UserWarning, match="Exits are off at 'tight': 60 calibration rows are too few"):
        made = model.export(tmp_path_factory.mktemp("out") / "model", calibration_labels=labels, **options)
    assert model.config.to_dict() == before
    return made, before["exit_operating_points"]


def test_points_are_fitted_on_the_engine(exported, rows, tokenizer):
    model, old = exported
    found = model.config.exit_operating_points
    assert set(found) == {"loose", "tight", "running", "conformal", "budget", "risk", "price"}
    store = stored(model, rows, tokenizer)
    scores = score_store(store, "max_probability", model)
    with pytest.warns(UserWarning, match="Exits are off"):
        tight = calibrate_agreement(scores, 0.001)
    risks = scores.disagrees.double().mean(0)
    expected = {
        "loose": calibrate_agreement(scores, 0.9),
        "tight": tight,
        "running": calibrate_agreement(scores, 0.5, "running", coverage="min"),
        "conformal": calibrate_agreement(scores, 0.6, "conformal", published=True),
        "budget": calibrate_budget(scores, 3.0, risks=risks),
        "risk": calibrate_risk(scores, 0.95),
        # Budgets that were fitted on these rows would certify nothing.
        "price": calibrate_price(store, model, 0.9, budgets=BUDGETS),
    }
    for name, point in expected.items():
        assert CalibratedPoint.from_dict(found[name]) == point
        assert found[name]["fitted_on"] == FITTED_ON
        assert {key: found[name][key] for key in ("promise", "method")} == {
            key: old[name][key] for key in ("promise", "method")
        }
    assert "it takes at least" in found["tight"]["reason"] and found["tight"]["thresholds"] == [1.0] * 4
    assert model.config.exit_threshold == "loose"
    budgets = [budget for budget, _, _ in model.config.exit_budgets]
    assert budgets and budgets == sorted(budgets)


@torch.no_grad()
def test_points_of_anything_else_are_refused(exported, rows, tokenizer, texts, make_model):
    model, old = exported
    batch = tokenizer(texts[:4], padding=True, return_tensors="pt")
    elsewhere = CalibratedPoint.from_dict(old["loose"])
    with pytest.raises(ValueError, match=r"'again' was fitted on the model itself.*'openvino float32'.*anew"):
        elsewhere.save_to(model, "again")
    again = AutoModelForSequenceClassification.from_pretrained(model.name_or_path)
    again.config.exit_operating_points["by hand"] = old["loose"]
    with pytest.raises(ValueError, match="'by hand' was fitted on the model itself"):
        again(**batch, exit_threshold="by hand")
    original = make_model(exit_criterion="max_probability", policy_condition="film")
    with pytest.raises(ValueError, match="`store` was collected on the engine 'openvino float32'"):
        score_store(stored(model, rows, tokenizer), "max_probability", original)


def test_what_cannot_be_fitted_is_dropped_with_the_reason(exported, rows, tokenizer, caplog):
    model, old = exported
    again = AutoModelForSequenceClassification.from_pretrained(model.name_or_path, exit_threshold=None)
    again.config.exit_operating_points = {}
    store = exits_of(again, rows.remove_columns("labels"), tokenizer)
    promises = Promises({name: old[name] for name in ("loose", "seconds", "risk", "own risk", "bare")}, [], None, None)
    logger = logging.getLogger("transformers_cee.engines.promises")
    logger.addHandler(caplog.handler)
    fit_promises(again, promises, store)
    assert list(again.config.exit_operating_points) == ["loose"]
    for words in (
        "without 'seconds': its costs, in milliseconds, were measured",
        "without 'risk': its promise is a bound on the error, which takes labels: give `calibration_labels`",
        "without 'own risk': its promise is a bound on the risk 'own'",
        "without 'bare': it holds thresholds without a promise",
    ):
        assert words in caplog.text
    fit_promises(again, promises, None)
    logger.removeHandler(caplog.handler)
    assert "without 'loose', 'seconds', 'risk', 'own risk', 'bare': there are no `calibration_texts`" in caplog.text


def test_labels_are_those_of_the_texts(make_model, tokenizer, texts, tmp_path):
    model = make_model()
    options = {"precision": "float32", "processing_class": tokenizer, "calibration_texts": texts[:2]}
    for labels, words in (
        ([0], "one label for each of 2 `calibration_texts`; got 1"),
        (["good", "bad"], "begin with 'good'"),
        ([0, 5], r"must lie in 0\.\.2"),
        ("ab", "must be a list"),
    ):
        with pytest.raises(ValueError, match=words):
            model.export(tmp_path / "out", calibration_labels=labels, **options)
    assert not any(tmp_path.iterdir())
