# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A promise along the price of a layer: against executed walks, one row and one budget after the other."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import pad, random_rows, tiny_llama, tiny_model

from transformers_cee.calibration.prices import calibrate_price
from transformers_cee.evaluation.exit_budget import fit_exit_budgets
from transformers_cee.exits.policy import all_features
from transformers_cee.stores.store import ExitStore


ROWS = 60
# Of all budgets: rows run one by one.
EVERY = 14
CONDITIONED = {"policy_inputs": "confidence", "policy_condition": "film", "policy_alphas": [0.001, 0.5]}


def conditioned(seed: int = 0):
    """A model whose answers hardly change any more behind its middle."""
    model = tiny_model(seed, **CONDITIONED, exit_threshold=None)
    with torch.no_grad():
        for film in model.exit_policies.films:
            film.weight.normal_(0.0, 0.8)
        for head in model.exit_heads.heads:
            head.weight.copy_(model.classifier.weight)
            head.bias.copy_(model.classifier.bias)
        # A small step per layer: early states resemble the last.
        for layer in model.layers:
            layer.attention.output.dense.weight.mul_(0.1)
            layer.output.dense.weight.mul_(0.1)
    return model


@torch.no_grad()
def store_of(model, rows: list[dict]) -> ExitStore:
    output = model(**pad(rows), output_all_exits=True)
    states, logits = output.all_exit_states, output.all_exit_logits
    unknown, layers = torch.full((len(rows),), math.nan), torch.tensor(model.layer_numbers)
    return ExitStore(states, logits, unknown, layers, "single_label_classification", features=all_features(logits))


@pytest.fixture(scope="module")
def fitted():
    model = conditioned()
    budgets = fit_exit_budgets(model.exit_policies, store_of(model, random_rows(ROWS, seed=1)))
    model.config.exit_budgets = budgets[::EVERY]
    rows = random_rows(ROWS, seed=2)
    walks = {budget: executed(model, rows, alpha, threshold) for budget, alpha, threshold in budgets[::EVERY]}
    return model, rows, store_of(model, rows), walks


@torch.no_grad()
def executed(model, rows: list[dict], alpha: float, threshold: float) -> tuple[list[int], list[bool]]:
    """Exit layer of each row alone, and whether it says something else than at full depth."""
    model.config.exit_operating_points = {
        "asked": {"criterion": "policy", "thresholds": [threshold] * 6, "alpha": alpha}
    }
    full = model(**pad(rows)).logits.argmax(-1).tolist()
    layers, wrong = [], []
    for row, answer in zip(rows, full, strict=True):
        early = model(**pad([row]), exit_threshold="asked")
        layers.append(int(early.exit_layers))
        wrong.append(int(early.logits.argmax()) != answer)
    model.config.exit_operating_points = {}
    return layers, wrong


def passes(wrong: int, rows: int, epsilon: float, delta: float) -> bool:
    """Would so few rows be wrong with at most the probability delta if epsilon were?"""
    chance = sum(
        math.comb(rows, count) * epsilon**count * (1 - epsilon) ** (rows - count) for count in range(wrong + 1)
    )
    return chance <= delta


@pytest.mark.parametrize("epsilon", [0.15, 0.3, 0.5])
def test_against_executed_walks(fitted, epsilon):
    model, rows, store, walks = fitted
    found = calibrate_price(store, model, epsilon, 0.1)
    best = None
    for budget, alpha, threshold in sorted(model.config.exit_budgets, reverse=True):
        layers, wrong = walks[budget]
        if not passes(sum(wrong), ROWS, epsilon, 0.1):
            break
        best = alpha, threshold, layers
    assert best is not None and found.reason is None
    assert (found.alpha, found.thresholds[:-1]) == (best[0], [best[1]] * 5)
    assert found.method == "certified_price" and found.rows == ROWS
    found.save_to(model, "promised")
    with torch.no_grad():
        together = model(**pad(rows), exit_threshold="promised").exit_layers.tolist()
    assert together == best[2] and sum(together) < 6 * ROWS
    model.config.exit_operating_points = {}


def test_depth_falls_with_the_promise(fitted):
    model, _, store, walks = fitted
    depths = []
    for epsilon in (0.02, 0.1, 0.3, 0.6):
        point = calibrate_price(store, model, epsilon, 0.1)
        layers = [6]
        if point.reason is None:
            asked = [point.alpha, point.thresholds[0]]
            (layers,) = [walks[one[0]][0] for one in model.config.exit_budgets if one[1:] == asked]
        depths.append(sum(layers) / len(layers))
    assert depths == sorted(depths, reverse=True) and depths[-1] < depths[0]


def test_too_few_rows(fitted):
    model, _, store, _ = fitted
    with pytest.warns(UserWarning, match="Exits are off: 10 calibration rows are too few for an agreement of 0.99; it "
                                         "takes at least 299"):  # fmt: skip
        point = calibrate_price(store.select(torch.arange(10)), model, 0.01)
    assert point.reason and all(threshold == 1.0 for threshold in point.thresholds)


def test_exits_that_never_agree(fitted):
    model, _, store, _ = fitted
    logits = store.logits.clone()
    logits[:, :-1] = -logits[:, -1:]
    other = ExitStore(
        store.states, logits, store.labels, store.layers, store.problem_type, features=all_features(logits)
    )
    # Whoever leaves early is wrong, and the budgets let many leave.
    with pytest.warns(UserWarning, match="certify no budget of the policy at an agreement of 0.95"):
        point = calibrate_price(other, model, 0.05, budgets=[[0.4, 0.5, 0.0]])
    assert point.reason


@torch.no_grad()
def test_exits_that_were_closed_stay_closed(fitted):
    model, rows, store, _ = fitted
    point = calibrate_price(store, model, 0.5, 0.1, min_exit_layer=4)
    assert point.reason is None and point.thresholds[:3] == [1.0] * 3
    point.save_to(model, "late")
    layers = model(**pad(rows), exit_threshold="late").exit_layers
    assert 4 <= int(layers.min()) < 6
    model.config.exit_operating_points = {}


def test_texts_are_the_units_of_tokens():
    model = tiny_llama(**{**CONDITIONED, "policy_inputs": "state"})
    generator = torch.Generator().manual_seed(0)
    tokens, exits = 400, len(model.layer_numbers)
    predictions = torch.randint(0, 2, (tokens, exits), generator=generator)
    store = ExitStore(
        torch.randn(tokens, exits, 32, generator=generator), None, predictions[:, -1],
        torch.tensor(model.layer_numbers), "single_label_classification", token_losses=torch.zeros(tokens, exits),
        predictions=predictions, rows=torch.arange(tokens) // 8,
    )  # fmt: skip
    point = calibrate_price(store, model, 0.9, 0.1, budgets=fit_exit_budgets(model.exit_policies, store))
    assert point.rows == 50 and point.reason is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epsilon": 0.0}, "`epsilon`=0.0 must be a number strictly between 0 and 1"),
        ({"delta": 1.0}, "`delta`=1.0 must be a number strictly between 0 and 1"),
        ({"budgets": []}, "`budgets` is empty"),
    ],
)
def test_arguments(fitted, change, message):
    model, _, store, _ = fitted
    with pytest.raises(ValueError, match=message):
        calibrate_price(store, model, **{"epsilon": 0.1, **change})


def test_policies_of_one_speed():
    model = tiny_model()
    with pytest.raises(ValueError, match="`policy_condition` of its config is 'none'"):
        calibrate_price(store_of(model, random_rows(8, 0)), model, 0.1)
