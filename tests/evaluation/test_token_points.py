# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Operating points of stored tokens, in hindsight, against loops over single tokens."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from accelerate import Accelerator
from text_reference import text_tokens
from tiny import collate_text, instructions, tiny_llama

from transformers_cee.evaluation.operating_points import full_depth_point, hindsight_point, oracle_point, token_figures
from transformers_cee.stores.filling import collect_exits
from transformers_cee.stores.scoring import exits_taken, score_exits, thresholds_for_depths
from transformers_cee.stores.store import ExitStore


def stored(model, rows):
    return collect_exits(
        model,
        rows,
        collate_text,
        Accelerator(cpu=True),
        problem_type="single_label_classification",
        batch_size=8,
        disable_tqdm=True,
    )


@pytest.fixture(scope="module")
def known():
    model, rows = tiny_llama(policy_inputs="both"), instructions(15, seed=1)
    with torch.no_grad():
        return model, text_tokens(model, rows), stored(model, rows)


@pytest.mark.parametrize("criterion", ["policy", "max_probability", "margin", "entropy"])
def test_scores(known, criterion):
    model, tokens, store = known
    scores = score_exits(criterion, store, model.exit_policies)
    assert scores.shape == (len(tokens), 3)
    for number, token in enumerate(tokens):
        for index in range(3):
            if criterion == "policy":
                history = token.logits[: index + 1]
                expected = reference.policy_score(model, token.states[index], history, store.problem_type, index)
            else:
                values = reference.confidence(token.logits[index], store.problem_type)
                expected = values[("max_probability", "margin", "entropy").index(criterion)]
            assert float(scores[number, index]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("threshold", [0.0, 0.4, [0.6, 0.5, 0.3, 0.5], 1.0])
def test_point(known, threshold):
    """Tokens that may not leave stay to the end: they count for the loss, not for depth and agreement."""
    model, tokens, store = known
    thresholds = threshold if isinstance(threshold, list) else [threshold] * 4
    losses, right, agree, layers = [], [], [], []
    for token in tokens:
        exit_index = 3
        if token.may_exit:
            for index in reversed(range(3)):
                history = token.logits[: index + 1]
                score = reference.policy_score(model, token.states[index], history, store.problem_type, index)
                exit_index = index if score > thresholds[index] else exit_index
            layers.append(exit_index + 1)
            agree.append(token.predictions[exit_index] == token.predictions[-1])
        losses.append(float(token.losses[exit_index]))
        right.append(token.predictions[exit_index] == token.label)
    scores = score_exits("policy", store, model.exit_policies)
    point = hindsight_point("policy", threshold, scores, store, None)
    loss = sum(losses) / len(losses)
    figures = {"loss": loss, "perplexity": math.exp(loss), "token_accuracy": sum(right) / len(right)}
    assert point.metrics == pytest.approx({**figures, "agreement": sum(agree) / len(agree)}, rel=1e-4)
    assert point.depth == pytest.approx(sum(layers) / len(layers))
    assert point.exit_histogram == {str(layer): layers.count(layer) for layer in (1, 2, 3, 4)}


def test_ends(known):
    _, tokens, store = known
    full = full_depth_point(store, None)
    assert full.depth == 4.0 and full.metrics["agreement"] == 1.0
    oracle = oracle_point(store, None)
    hits = sum(token.label in (token.predictions if token.may_exit else token.predictions[-1:]) for token in tokens)
    assert oracle.metrics["token_accuracy"] == pytest.approx(hits / len(tokens))


def test_thresholds(known):
    model, _, store = known
    some = store.select(store.deciding())
    scores = score_exits("policy", some, model.exit_policies)
    (threshold,) = thresholds_for_depths("policy", scores, [1, 2, 3, 4], [2.5])
    depth = float(some.layers[exits_taken("policy", threshold, scores)].float().mean())
    assert depth == pytest.approx(2.5, abs=0.3)


@torch.no_grad()
def test_criteria_that_tokens_do_not_tell(known):
    _, _, store = known
    with pytest.raises(ValueError, match=r"criterion.*'energy'.*entropy,.* margin, max_probability,.* policy"):
        score_exits("energy", store)
    states_only = stored(tiny_llama(), instructions(3, seed=1))
    with pytest.raises(ValueError, match=r"criterion.*'entropy'.*accepted are exit_cdf,.* policy, state_classifier"):
        score_exits("entropy", states_only)
    assert score_exits("policy", states_only, tiny_llama().exit_policies).shape == (len(states_only), 3)


def test_figures():
    losses, ids = torch.tensor([1.0, 3.0]), torch.tensor([4, 5])
    may_exit = torch.tensor([True, False])
    figures = token_figures(losses, ids, torch.tensor([4, 6]), may_exit, full_depth=torch.tensor([9, 5]))
    expected = {"loss": 2.0, "perplexity": math.exp(2.0), "token_accuracy": 0.5, "agreement": 0.0}
    assert figures == pytest.approx(expected)
    assert "agreement" not in token_figures(losses, ids, ids, may_exit)
    assert token_figures(losses, ids, ids, torch.tensor([False, False]), ids)["agreement"] == 1.0
    assert token_figures(torch.tensor([1e4]), ids[:1], ids[:1], may_exit[:1])["perplexity"] == math.inf


def test_nothing_may_leave():
    """Then everything is at full depth."""
    store = ExitStore(
        torch.zeros(2, 2, 1),
        None,
        torch.tensor([1, 2]),
        torch.tensor([2, 4]),
        "single_label_classification",
        token_losses=torch.ones(2, 2),
        predictions=torch.tensor([[1, 1], [1, 2]]),
        may_exit=torch.tensor([False, False]),
    )
    point = hindsight_point("policy", 0.0, torch.ones(2, 1), store, None)
    assert point.depth == 4.0 and point.metrics["agreement"] == 1.0 and point.metrics["token_accuracy"] == 1.0
