# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Objectives against their formulas; the mean of many `reinforce` gradients against the `exact` one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transformers_cee.exits.policy import exit_log_distribution
from transformers_cee.training.objectives import (
    closed_before,
    consistent_expected,
    consistent_sampled,
    exploring_logits,
    policy_exact,
    policy_loss,
    policy_reinforce,
    staying_where_forced,
)


LOSSES = torch.tensor([[3.0, 2.0, 0.5], [0.1, 0.2, 4.0]])
DISTRIBUTION = torch.tensor([[0.2, 0.3, 0.5], [0.7, 0.2, 0.1]])


class TestConsistent:
    def test_expected(self):
        losses = LOSSES.clone().requires_grad_()
        log_distribution = DISTRIBUTION.log().requires_grad_()
        loss = consistent_expected(losses, log_distribution)
        assert float(loss.detach()) == pytest.approx((0.6 + 0.6 + 0.25 + 0.07 + 0.04 + 0.4) / 2)
        loss.backward()
        torch.testing.assert_close(losses.grad, DISTRIBUTION / 2)
        assert log_distribution.grad is None, "the exit distribution is held fixed"

    def test_sampled_is_expected_on_average(self):
        torch.manual_seed(0)
        samples = 40_000
        losses = LOSSES.clone().requires_grad_()
        loss = consistent_sampled(losses, DISTRIBUTION.log().requires_grad_(), samples)
        loss.backward()
        # Standard error of a share p of n draws: sqrt(p (1 − p) / n) ≤ 0.0025; five of them.
        torch.testing.assert_close(losses.grad * 2, DISTRIBUTION, rtol=0, atol=5 * 0.0025)
        assert float(loss.detach()) == pytest.approx(float(consistent_expected(LOSSES, DISTRIBUTION.log())), abs=0.03)

    def test_sampled_takes_that_many(self):
        losses = torch.tensor([[1.0, 10.0, 100.0]]).repeat(50, 1).requires_grad_()
        torch.manual_seed(1)
        consistent_sampled(losses, torch.full((50, 3), 1 / 3).log(), 4).backward()
        counts = losses.grad * 50 * 4
        torch.testing.assert_close(counts, counts.round())
        assert counts.sum(1).tolist() == pytest.approx([4.0] * 50) and len(counts.unique(dim=0)) > 5


class TestWhereNothingLeaves:
    logits = torch.tensor([[0.4, -1.0, 0.8], [-2.0, 1.5, 0.1]])

    @pytest.mark.parametrize("first_exit", [0, 1, 2, 3])
    def test_closed_exits(self, first_exit):
        logits = self.logits.clone().requires_grad_()
        log_distribution = exit_log_distribution(closed_before(logits, first_exit))
        expected = exit_log_distribution(self.logits[:, first_exit:]).exp()
        assert not log_distribution.exp()[:, :first_exit].any()
        torch.testing.assert_close(log_distribution.exp()[:, first_exit:], expected)
        rewards = torch.arange(8.0).view(2, 4)
        policy_loss(closed_before(logits, first_exit), rewards, entropy_bonus=0.1).backward()
        assert bool(logits.grad.isfinite().all()) and not logits.grad[:, :first_exit].any()
        assert bool(logits.grad[:, first_exit:].all())

    def test_forced_rows(self):
        log_distribution = exit_log_distribution(self.logits)
        forced = staying_where_forced(log_distribution, torch.tensor([True, False])).exp()
        torch.testing.assert_close(forced[0], log_distribution[0].exp())
        assert forced[1].tolist() == [0.0, 0.0, 0.0, 1.0]
        losses = torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 2)
        only = consistent_expected(losses[1:], forced[1:].log())
        assert float(only) == 4.0


class TestExploration:
    @given(st.floats(-20, 20), st.floats(0.01, 0.99))
    def test_a_coin_decides_sometimes(self, logit, share):
        mixed = exploring_logits(torch.tensor([[logit]], dtype=torch.float64), share).sigmoid()
        p = 1 / (1 + torch.tensor(-logit, dtype=torch.float64).exp())
        assert float(mixed) == pytest.approx(float((1 - share) * p + share / 2), abs=1e-9)

    @pytest.mark.parametrize("share", [0.2, 1.0])
    def test_closed_exits_stay_closed(self, share):
        logits = closed_before(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), 4)
        reached = exit_log_distribution(exploring_logits(logits, share)).exp()
        assert bool((reached[:, :4] == 0).all())
        torch.testing.assert_close(reached.sum(1), torch.ones(4))

    def test_off(self):
        logits = torch.randn(2, 3)
        assert exploring_logits(logits, 0.0) is logits


class TestPolicy:
    logits = torch.tensor([[0.4, -1.0, 0.8], [-2.0, 1.5, 0.1]])
    rewards = torch.tensor([[-1.0, -0.4, -0.9, -0.2], [-0.1, -0.8, -0.3, -2.0]])

    def exact_gradient(self) -> torch.Tensor:
        logits = self.logits.clone().requires_grad_()
        policy_exact(exit_log_distribution(logits), self.rewards).backward()
        return logits.grad

    def test_exact_is_the_expected_reward(self):
        p = self.logits.sigmoid()
        expected = 0.0
        for row in range(2):
            reached = 1.0
            for index in range(3):
                expected += reached * float(p[row, index]) * float(self.rewards[row, index])
                reached *= 1 - float(p[row, index])
            expected += reached * float(self.rewards[row, 3])
        assert float(policy_loss(self.logits, self.rewards)) == pytest.approx(-expected / 2, rel=1e-5)

    @pytest.mark.parametrize("samples", [1, 2, 8])
    def test_mean_of_reinforce_is_exact(self, samples):
        """40,000 independent estimates; the mean must lie within 5 of its own standard errors, which are so small
        that the factor K/(K − 1) of a baseline that contains the draw itself would be seen."""
        copies = 40_000
        torch.manual_seed(samples)
        logits = self.logits.repeat(copies, 1).requires_grad_()
        loss = policy_reinforce(exit_log_distribution(logits), self.rewards.repeat(copies, 1), samples)
        loss.backward()
        estimates = logits.grad.view(copies, 2, 3) * copies
        mean, error = estimates.mean(0), estimates.std(0) / copies**0.5
        exact = self.exact_gradient()
        assert bool(((mean - exact).abs() < 5 * error).all()), (mean, exact, error)
        if samples == 2:
            biased = mean / 2
            assert bool(((biased - exact).abs() > 5 * error).any()), "the test could not tell"
        if samples > 1:
            assert float((error / exact.abs()).min()) < 0.05

    def test_baseline_reduces_variance(self):
        spread = {}
        for samples in (1, 2):
            torch.manual_seed(0)
            logits = self.logits.repeat(5000, 1).requires_grad_()
            # As many draws in all: the second takes half of the rows.
            rewards = self.rewards.repeat(5000, 1) - 10.0
            policy_reinforce(exit_log_distribution(logits), rewards, samples).backward()
            spread[samples] = float((logits.grad.view(5000, 2, 3) * 5000).var(0).mean()) * samples
        assert spread[2] < spread[1] / 5

    def test_rewards_may_be_shifted(self):
        """A constant per row changes no gradient."""
        gradients = []
        for shift in (0.0, 7.0):
            logits = self.logits.clone().requires_grad_()
            policy_loss(logits, self.rewards + shift).backward()
            gradients.append(logits.grad)
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)

    def test_entropy_bonus(self):
        distribution = exit_log_distribution(self.logits).exp().double()
        entropy = float(-(distribution * distribution.log()).sum(1).mean())
        plain = float(policy_loss(self.logits, self.rewards))
        assert float(policy_loss(self.logits, self.rewards, entropy_bonus=0.3)) == pytest.approx(plain - 0.3 * entropy)

    def test_exploration_changes_the_distribution_that_is_rewarded(self):
        mixed = (0.6 * self.logits.sigmoid() + 0.2).logit()
        expected = policy_loss(mixed, self.rewards)
        torch.testing.assert_close(policy_loss(self.logits, self.rewards, exploration=0.4), expected)

    def test_options_reach_reinforce(self):
        torch.manual_seed(0)
        first = policy_loss(self.logits, self.rewards, gradient="reinforce", samples=3)
        torch.manual_seed(0)
        assert torch.equal(first, policy_reinforce(exit_log_distribution(self.logits), self.rewards, 3))


class TestOptimalStopping:
    def slow(self, logits, rewards):
        total, count = 0.0, 0
        for row in range(len(logits)):
            for index in range(logits.shape[1]):
                if logits[row, index] <= -1e4:
                    continue
                later = [exit for exit in range(index + 1, logits.shape[1]) if logits[row, exit] > 0]
                worth = rewards[row, later[0] if later else -1]
                total += float(logits[row, index] / 10 - (rewards[row, index] - worth)) ** 2
                count += 1
        return total / count

    @pytest.mark.parametrize("first_exit", [0, 2])
    def test_slow_reference(self, first_exit):
        torch.manual_seed(0)
        logits, rewards = closed_before(torch.randn(9, 4), first_exit), torch.randn(9, 5)
        loss = policy_loss(logits, rewards, gradient="optimal_stopping")
        assert float(loss) == pytest.approx(self.slow(logits, rewards), rel=1e-5)

    def test_learns_the_best_exit(self):
        """With free logits per row, every row ends up leaving where its reward is highest."""
        torch.manual_seed(0)
        rewards = torch.randn(16, 5)
        logits = torch.zeros(16, 4, requires_grad=True)
        optimizer = torch.optim.SGD([logits], lr=500.0)
        for _ in range(300):
            optimizer.zero_grad()
            policy_loss(logits, rewards, gradient="optimal_stopping").backward()
            optimizer.step()
        leaves = torch.cat((logits > 0, torch.ones(16, 1, dtype=torch.bool)), dim=1)
        assert leaves.int().argmax(1).tolist() == rewards.argmax(1).tolist()
