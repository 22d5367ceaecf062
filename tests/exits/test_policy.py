# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The exit distribution, and policies on stored states against policies on the way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tiny import random_rows, tiny_model

from transformers_cee.exits.criteria import ExitStep, build_criterion
from transformers_cee.exits.policy import (
    ExitHistory,
    ExitPolicies,
    all_features,
    confidence_scores,
    exit_log_distribution,
    predicted_classes,
)


def naive_distribution(exit_logits: np.ndarray) -> np.ndarray:
    """`π_l = p_l · Π (1 − p_j)`, the last exit takes the rest; as written, in float64."""
    leaves = 1 / (1 + np.exp(-exit_logits.astype(np.float64)))
    result = np.zeros((len(exit_logits), exit_logits.shape[1] + 1))
    for row in range(len(exit_logits)):
        reached = 1.0
        for index in range(exit_logits.shape[1]):
            result[row, index] = reached * leaves[row, index]
            reached *= 1 - leaves[row, index]
        result[row, -1] = reached
    return result


class TestExitDistribution:
    logits = arrays.arrays(
        np.float32, st.tuples(st.integers(1, 4), st.integers(0, 12)), elements=st.floats(-30, 30, width=32)
    )

    @settings(max_examples=100)
    @given(logits)
    def test_is_the_product(self, logits):
        log_distribution = exit_log_distribution(torch.from_numpy(logits))
        assert log_distribution.shape == (logits.shape[0], logits.shape[1] + 1)
        distribution = log_distribution.exp().double().numpy()
        np.testing.assert_allclose(distribution.sum(1), 1, rtol=1e-5)
        np.testing.assert_allclose(distribution, naive_distribution(logits), rtol=2e-4, atol=1e-6)

    @given(arrays.arrays(np.float32, (2, 5), elements=st.sampled_from([-1e4, -200.0, -30.0, 0.0, 30.0, 200.0, 1e4])))
    def test_is_stable_where_the_product_is_not(self, logits):
        tensor = torch.from_numpy(logits).requires_grad_()
        log_distribution = exit_log_distribution(tensor)
        assert log_distribution.isfinite().all()
        torch.testing.assert_close(log_distribution.exp().sum(1), torch.ones(2))
        log_distribution.sum().backward()
        assert tensor.grad.isfinite().all()

    def test_logs_below_the_smallest_float(self):
        log_distribution = exit_log_distribution(torch.full((1, 10), 25.0))
        expected = [-25.0 * index for index in range(10)] + [-250.0]
        torch.testing.assert_close(log_distribution[0], torch.tensor(expected), atol=1e-4, rtol=0)

    def test_gradient_of_expected_reward(self):
        """d Σ π R / d logit against finite differences of the naive product."""
        generator = np.random.default_rng(0)
        logits, rewards = generator.normal(size=(1, 4)), generator.normal(size=5)
        tensor = torch.tensor(logits, requires_grad=True)
        (exit_log_distribution(tensor).exp() * torch.tensor(rewards)).sum().backward()
        for index in range(4):
            step = np.zeros((1, 4))
            step[0, index] = 1e-6
            slope = (naive_distribution(logits + step) - naive_distribution(logits - step))[0] @ rewards / 2e-6
            assert float(tensor.grad[0, index]) == pytest.approx(slope, rel=1e-5)


class TestConfidence:
    @given(
        arrays.arrays(
            np.float32, st.tuples(st.integers(1, 3), st.integers(2, 5)), elements=st.floats(-9, 9, width=32)
        ),
        st.sampled_from(["single_label_classification", "multi_label_classification"]),
    )
    def test_against_plain_python(self, logits, problem_type):
        tensor = torch.from_numpy(logits)
        scores = torch.stack(confidence_scores(tensor, problem_type), dim=1)
        expected = [reference.confidence(row, problem_type) for row in tensor]
        torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float32), rtol=1e-4, atol=1e-5)
        for row, predicted in zip(tensor, predicted_classes(tensor, problem_type), strict=True):
            shares = reference.label_probabilities(row, problem_type)
            for pair, choice in zip(shares, predicted, strict=True):
                assert pair[int(choice)] == pytest.approx(max(pair), abs=1e-6)

    def test_certain_heads(self):
        logits = torch.tensor([[1e4, 0.0, 0.0], [0.0, 0.0, 0.0]])
        maximum, margin, entropy = confidence_scores(logits, "single_label_classification")
        torch.testing.assert_close(maximum, torch.tensor([1.0, 1 / 3]))
        torch.testing.assert_close(margin, torch.tensor([1.0, 0.0]))
        torch.testing.assert_close(entropy, torch.tensor([0.0, 1.0]))

    def test_regression_has_none(self):
        for scores in (confidence_scores, predicted_classes):
            with pytest.raises(ValueError, match=r"`policy_inputs` with.*regression.*accepted are 'state'"):
                scores(torch.zeros(2, 1), "regression")


class TestPolicies:
    @pytest.mark.parametrize("inputs", ["state", "confidence", "log_confidence", "both"])
    @pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification"])
    @torch.no_grad()
    def test_stored_states_are_the_walk(self, inputs, problem_type):
        """`ExitPolicies.forward`, the criterion step by step, and the reference agree."""
        model = tiny_model(policy_inputs=inputs, problem_type=problem_type, exit_norm="layer_norm")
        rows = random_rows(6, seed=1)
        walks = [reference.walk(model, row["input_ids"], "policy", 1.0, problem_type=problem_type) for row in rows]
        states = torch.stack([torch.stack(walk.all_states) for walk in walks])
        logits = torch.stack([torch.stack(walk.all_logits) for walk in walks])
        features = all_features(logits, problem_type)
        assert features.shape == (6, 5, 5)
        stored = model.exit_policies(states, None if inputs == "state" else features)
        assert stored.shape == (6, 5)
        expected = torch.tensor([walk.scores for walk in walks])
        torch.testing.assert_close(stored.sigmoid(), expected, rtol=1e-4, atol=1e-5)
        criterion = build_criterion("policy", 0.5, 6, problem_type, model.exit_policies)
        for index in range(5):
            step = ExitStep(index, states[:, index], lambda _, index=index: logits[:, index])
            torch.testing.assert_close(criterion.score(step), stored[:, index].sigmoid())

    @torch.no_grad()
    def test_memory_follows_the_rows(self):
        model = tiny_model(policy_inputs="both")
        states, logits = torch.randn(5, 6, 32), torch.randn(5, 6, 3)
        stored = model.exit_policies(states, all_features(logits)).sigmoid()
        criterion = build_criterion("policy", 0.5, 6, "single_label_classification", model.exit_policies)
        rows = torch.arange(5)
        for index, kept in enumerate(([0, 2, 3, 4], [0, 3], [1], [0], [0])):
            step = ExitStep(index, states[rows, index], lambda _, index=index, rows=rows: logits[rows, index])
            torch.testing.assert_close(criterion.score(step), stored[rows, index])
            criterion.select(torch.tensor(kept))
            rows = rows[kept]

    def test_select_before_the_first_exit(self):
        history = ExitHistory()
        history.select(torch.tensor([0]))
        assert history.features(torch.zeros(1, 3), "single_label_classification").shape == (1, 5)

    def test_no_internal_exit(self):
        policies = ExitPolicies([], 8, 4, "gelu")
        assert all_features(torch.zeros(3, 1, 2)).shape == (3, 0, 5)
        assert policies(torch.zeros(3, 1, 8), torch.zeros(3, 0, 5)).shape == (3, 0)
        assert policies(torch.zeros(3, 1, 8)).shape == (3, 0)
        assert torch.equal(exit_log_distribution(torch.zeros(3, 0)), torch.zeros(3, 1))

    @pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification"])
    def test_features_row_by_row(self, problem_type):
        logits = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0)) * 3
        for row, features in zip(logits, all_features(logits, problem_type).tolist(), strict=True):
            scores = [reference.confidence(one, problem_type) for one in row]
            predictions = [reference.prediction(one, problem_type) for one in row]
            for index in range(4):
                same = [one == predictions[index] for one in predictions[:index]]
                before = scores[index - 1][1] if index else 0.0
                expected = [*scores[index], before, sum(same) / len(same) if same else 0.0]
                assert features[index] == pytest.approx(expected, abs=1e-5)

    @pytest.mark.parametrize("inputs", ["confidence", "both"])
    def test_features_are_asked_for(self, inputs):
        with pytest.raises(ValueError, match=rf"`policy_inputs`='{inputs}' needs `features`.*None"):
            ExitPolicies([1, 2], 8, 4, "gelu", inputs)(torch.zeros(3, 3, 8))

    def test_features_are_left_alone_by_policies_that_look_at_states(self):
        policies, states = ExitPolicies([1, 2], 8, 4, "gelu"), torch.randn(3, 3, 8)
        assert torch.equal(policies(states, torch.randn(3, 2, 5)), policies(states))

    @pytest.mark.parametrize("inputs,width", [("state", 8), ("confidence", 5), ("log_confidence", 5), ("both", 13)])
    def test_shape_of_a_network(self, inputs, width):
        policies = ExitPolicies([1, 2], 8, 4, "relu", inputs)
        first, activation, second = policies.networks[1]
        assert (first.in_features, first.out_features, second.out_features) == (width, 4, 1)
        assert float(activation(torch.tensor(-1.0))) == 0.0

    def test_logits_stay_where_float32_has_numbers(self):
        policies = ExitPolicies([1], 2, 4, "gelu")
        with torch.no_grad():
            policies.networks[0][-1].bias.fill_(-1e9)
        logit = policies.exit_logit(torch.zeros(1, 2), None, 0)
        assert 0.0 < float(logit.detach().sigmoid()) < 1e-9 and math.isfinite(float(logit.detach()))
