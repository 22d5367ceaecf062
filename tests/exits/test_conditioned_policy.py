# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Policies conditioned on the price of a layer, and budgets that turn into prices."""

import math

import pytest
import torch
from tiny import pad, random_rows, tiny_model

from transformers_cee import BertForConsistentEE
from transformers_cee.exits.deciding import resolve_decision
from transformers_cee.exits.policy import ExitPolicies


BUDGETS = [[0.25, 0.4, 0.5], [0.5, 0.1, 0.5], [1.0, 0.001, 0.7]]


def slow_logit(policies, state, index, alpha):
    """One row, one exit, in plain steps."""
    low, high = map(math.log, policies.alphas)
    condition = torch.tensor([(2 * math.log(alpha) - low - high) / (high - low)])
    widen, activation, narrow = policies.networks[index]
    if policies.condition == "input":
        state = torch.cat((state, condition))
    hidden = widen.weight @ state + widen.bias
    if policies.condition == "film":
        both = policies.films[index].weight @ condition + policies.films[index].bias
        half = len(both) // 2
        hidden = hidden * (1 + both[:half]) + both[half:]
    return narrow.weight[0] @ activation(hidden) + narrow.bias[0]


@pytest.mark.parametrize("condition", ["input", "film"])
class TestConditionedPolicies:
    def make(self, condition, **options):
        torch.manual_seed(0)
        return ExitPolicies([1, 2, 3], 8, 4, "gelu", condition=condition, alphas=(0.001, 0.5), **options)

    def test_slow_reference(self, condition):
        policies, states = self.make(condition), torch.randn(5, 4, 8)
        alphas = torch.tensor([0.001, 0.02, 0.3, 0.5, 0.05])
        found = policies(states, None, alphas)
        for row in range(5):
            for index in range(3):
                expected = slow_logit(policies, states[row, index], index, float(alphas[row]))
                torch.testing.assert_close(found[row, index], expected, rtol=1e-4, atol=1e-5)

    def test_one_price_for_all(self, condition):
        policies, states = self.make(condition), torch.randn(5, 4, 8)
        torch.testing.assert_close(policies(states, None, 0.02), policies(states, None, torch.full((5,), 0.02)))

    def test_default_price(self, condition):
        policies, states = self.make(condition, default_alpha=7.0).eval(), torch.randn(5, 4, 8)
        assert policies.default_alpha == 0.5, "clipped to what is learned"
        torch.testing.assert_close(policies(states), policies(states, None, 0.5))

    def test_price_of_a_walk(self, condition):
        policies, states = self.make(condition, default_alpha=0.3).eval(), torch.randn(5, 8)
        for alpha in (0.001, 0.02, None):
            for index in range(3):
                found = policies.exit_logit(states, None, index, alpha)
                expected = [slow_logit(policies, state, index, alpha or 0.3) for state in states]
                torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)

    def test_drawn_in_training(self, condition):
        policies, states = self.make(condition).train(), torch.randn(1, 4, 8).expand(6, 4, 8)
        torch.manual_seed(1)
        alphas = policies.draw_alphas(6)
        torch.manual_seed(1)
        torch.testing.assert_close(policies(states), policies(states, None, alphas))
        assert bool((alphas >= 0.001).all() and (alphas <= 0.5).all()) and len(alphas.unique()) == 6


class TestUnconditioned:
    def test_price_changes_nothing(self):
        policies, states = ExitPolicies([1, 2, 3], 8, 4, "gelu"), torch.randn(5, 4, 8)
        assert not policies.is_conditioned
        torch.testing.assert_close(policies(states), policies(states, None, 0.3))


class TestBudgets:
    def config(self, **options):
        return tiny_model(policy_condition="film", exit_budgets=BUDGETS, **options).config

    @pytest.mark.parametrize(
        ("budget", "alpha", "threshold"),
        [
            (0.25, 0.4, 0.5),
            (0.375, 0.2, 0.5),
            (0.5, 0.1, 0.5),
            (0.75, 0.01, 0.6),
            (1.0, 0.001, 1.0),
        ],
    )
    def test_between_the_points(self, budget, alpha, threshold):
        decision = resolve_decision(self.config(), exit_budget=budget)
        assert decision.criterion == "policy"
        assert decision.alpha == pytest.approx(alpha) and decision.threshold == pytest.approx(threshold)

    @pytest.mark.parametrize("budget", [0.0, 1.1, -0.5, True, "half"])
    def test_out_of_range(self, budget):
        with pytest.raises(ValueError, match=r"`exit_budget`=.*\(0, 1\]"):
            resolve_decision(self.config(), exit_budget=budget)

    def test_no_budgets(self):
        with pytest.raises(ValueError, match=r"`exit_budget`=0\.5: this model has no fitted budgets"):
            resolve_decision(tiny_model().config, exit_budget=0.5)

    @pytest.mark.parametrize("other", [{"exit_threshold": 0.5}, {"exit_criterion": "entropy"}])
    def test_not_beside_others(self, other):
        with pytest.raises(ValueError, match=r"`exit_budget`=0\.5 excludes"):
            resolve_decision(self.config(), exit_budget=0.5, **other)

    def test_saved_default(self, tmp_path):
        model = tiny_model(policy_condition="film", exit_budgets=BUDGETS, exit_budget=0.5).eval()
        model.save_pretrained(tmp_path)
        again = BertForConsistentEE.from_pretrained(tmp_path).eval()
        batch = pad(random_rows(6, seed=1))
        wanted = model(**batch, exit_budget=0.5)
        found = again(**batch)
        assert found.exit_layers.tolist() == wanted.exit_layers.tolist()
        torch.testing.assert_close(found.exit_probabilities, wanted.exit_probabilities, equal_nan=True)
        # Whoever asks for a threshold or another rule gets it.
        assert again(**batch, exit_threshold=1.0).exit_layers.tolist() == [6] * 6
        assert resolve_decision(again.config, exit_criterion="max_probability").criterion == "max_probability"
