# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The reward against its formula, number by number."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transformers_cee.training.rewards import (
    REWARDS,
    RewardStep,
    check_reward,
    hardness_guided,
    rewards_and_prices,
    rewards_of,
)


@given(
    layers=st.sets(st.integers(1, 12), min_size=1, max_size=6).map(sorted),
    rows=st.integers(1, 4),
    alpha=st.floats(0, 2),
    name=st.sampled_from(sorted(REWARDS)),
    seed=st.integers(0, 99),
)
def test_formula(layers, rows, alpha, name, seed):
    generator = torch.Generator().manual_seed(seed)
    losses = torch.rand(rows, len(layers), generator=generator)
    memorized = torch.tensor(layers)[torch.randint(len(layers), (rows,), generator=generator)]
    step = RewardStep(losses, torch.tensor(layers), memorized, 12, alpha)
    rewards, (free, prices) = rewards_of(name, step), rewards_and_prices(name, step)
    for row in range(rows):
        for index, layer in enumerate(layers):
            price = layer * {"hardness_guided": 1 - int(memorized[row]) / 12, "per_layer": 1}[name]
            assert float(rewards[row, index]) == pytest.approx(-float(losses[row, index]) - alpha * price, abs=1e-5)
            assert float(free[row, index]) == -float(losses[row, index])
            assert float(prices[row, index]) == pytest.approx(price, rel=1e-6)
    assert rewards.dtype == free.dtype == prices.dtype == torch.float32


def test_the_hardest_rows_pay_nothing():
    losses = torch.tensor([[0.5, 0.1], [0.5, 0.1]])
    rewards = hardness_guided(RewardStep(losses, torch.tensor([2, 4]), torch.tensor([4, 2]), 4, 0.1))
    assert torch.equal(rewards[0], -losses[0])
    torch.testing.assert_close(rewards[1], torch.tensor([-0.6, -0.3]))


@pytest.mark.parametrize(
    "own,conditioned,message",
    [
        (lambda step: step.losses[:, :1], False, r"`reward`='own' gave shape \(3, 1\), needed a tensor of \(3, 2\)"),
        (lambda step: 1.0, True, r"`reward`='own' gave shape float, needed a tensor of \(3, 2\)"),
        (lambda step: -step.losses * step.alpha**2, True, r"`reward`='own' is not linear in `alpha`"),
    ],
)
def test_what_is_refused_before_there_are_rows(monkeypatch, own, conditioned, message):
    monkeypatch.setitem(REWARDS, "own", own)
    with pytest.raises(ValueError, match=message):
        check_reward("own", [2, 4], 4, conditioned)


def test_one_price_need_not_be_linear(monkeypatch):
    monkeypatch.setitem(REWARDS, "own", lambda step: -step.losses * step.alpha**2)
    check_reward("own", [2, 4], 4, is_conditioned=False)
    for name in ("hardness_guided", "per_layer"):
        check_reward(name, [1, 3, 4], 4, is_conditioned=True)
        check_reward(name, [4], 4, is_conditioned=False)


def test_unknown_names():
    with pytest.raises(
        ValueError, match="`reward`='none' is unknown; accepted are hardness_guided, per_layer, and wh"
    ):
        check_reward("none", [2, 4], 4, is_conditioned=False)
