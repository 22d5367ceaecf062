# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A promise is about walks that ask the exits it was made with; whoever closes some is told."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import pytest
import torch
from slow_llama import prompts
from tiny import tiny_llama, tiny_model

from transformers_cee import CalibratedPoint, calibrate_risk
from transformers_cee.calibration.scores import ExitScores
from transformers_cee.exits import deciding
from transformers_cee.exits.criteria import CRITERIA


IDS = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
SAID = "`min_exit_layer` closes exits at which the operating point lets rows leave"


def point(thresholds, method="certified", promise="agreement"):
    return CalibratedPoint("max_probability", thresholds, promise, {"epsilon": 0.1, "delta": 0.1}, method, 100)


@pytest.fixture(autouse=True)
def say_again():
    deciding.logger.warning_once.cache_clear()


@pytest.mark.parametrize(
    ("thresholds", "first", "method", "is_told"),
    [
        ([0.5, 0.5, 0.5, 1.0], 3, "certified", True),
        # Exits that were closed when the promise was made may stay so.
        ([1.0, 1.0, 0.5, 1.0], 3, "certified", False),
        ([1.0, 1.0, 0.5, 1.0], 4, "certified", True),
        ([0.5, 0.5, 0.5, 1.0], 1, "certified", False),
        ([0.5, 0.5, 0.5, 1.0], None, "certified", False),
        # Whichever of them are asked.
        ([0.5, 0.5, 0.5, 1.0], 3, "chosen_by_cost_any_of_them", False),
    ],
)
@torch.no_grad()
def test_exits_that_a_promise_was_made_with(thresholds, first, method, is_told, caplog):
    classifier, decoder = tiny_model(num_hidden_layers=4).eval(), tiny_llama().eval()
    for model in (classifier, decoder):
        count = len(model.layer_numbers)
        point([*thresholds[: count - 1], 1.0], method).save_to(model, "promised")
    with caplog.at_level(logging.WARNING):
        classifier(IDS, exit_threshold="promised", min_exit_layer=first)
    assert (SAID in caplog.text) == is_told
    caplog.clear()
    deciding.logger.warning_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        decoder.generate(
            **prompts([4, 3]), exit_threshold="promised", min_exit_layer=first, max_new_tokens=3, pad_token_id=0
        )
    assert (SAID in caplog.text) == is_told


@torch.no_grad()
def test_the_layer_of_the_config_counts_as_well(caplog):
    model = tiny_model(num_hidden_layers=4).eval()
    point([0.5, 0.5, 0.5, 1.0]).save_to(model, "promised")
    model.config.min_exit_layer = 3
    with caplog.at_level(logging.WARNING):
        model(IDS, exit_threshold="promised")
    assert SAID in caplog.text


def test_steps_that_skip_exits_break_a_promise(caplog):
    model = tiny_llama()
    point([0.5] * (len(model.layer_numbers) - 1) + [1.0]).save_to(model, "promised")
    asked = {"exit_threshold": "promised", "max_new_tokens": 2, "pad_token_id": 0}
    with caplog.at_level(logging.WARNING):
        model.generate(**prompts([4]), **asked)
        assert "skips exits" not in caplog.text
        model.generate(**prompts([4]), **asked, exits_must_pay=True)
    assert "`exits_must_pay`=True skips exits where asking them has not paid, and the promise" in caplog.text


@torch.no_grad()
@pytest.mark.parametrize("grid", [None, [0.99, 0.9, 0.6, 0.4]])
def test_points_are_used_as_they_were_calibrated(grid, caplog):
    """Exits that were closed then are closed in the point."""
    torch.manual_seed(0)
    scores = torch.rand(300, 3)
    scores[:, 0] = math.inf
    zeros = torch.zeros(300, 4)
    made = ExitScores("max_probability", -scores, torch.arange(1, 5), zeros.bool(), zeros, "error")
    made = replace(made, scores=torch.where(scores.isinf(), -math.inf, scores))
    found = calibrate_risk(made, 0.1, 0.1, grid=grid)
    assert found.reason is None and found.thresholds[0] == CRITERIA["max_probability"].off
    model = tiny_model(num_hidden_layers=4, min_exit_layer=2).eval()
    found.save_to(model, "calibrated")
    with caplog.at_level(logging.WARNING):
        model(IDS, exit_threshold="calibrated")
    assert SAID not in caplog.text
