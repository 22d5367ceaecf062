# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The reward against its formula, number by number."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transformers_cee.training.rewards import layer_reward


@given(
    layers=st.sets(st.integers(1, 12), min_size=1, max_size=6).map(sorted),
    rows=st.integers(1, 4),
    alpha=st.floats(0, 2),
    hardness=st.booleans(),
    seed=st.integers(0, 99),
)
def test_formula(layers, rows, alpha, hardness, seed):
    generator = torch.Generator().manual_seed(seed)
    losses = torch.rand(rows, len(layers), generator=generator)
    memorized = torch.tensor(layers)[torch.randint(len(layers), (rows,), generator=generator)]
    rewards = layer_reward(losses, torch.tensor(layers), memorized, 12, alpha, hardness)
    for row in range(rows):
        for index, layer in enumerate(layers):
            price = alpha * (1 - int(memorized[row]) / 12) if hardness else alpha
            assert float(rewards[row, index]) == pytest.approx(-float(losses[row, index]) - price * layer, abs=1e-5)


def test_the_hardest_rows_pay_nothing():
    losses = torch.tensor([[0.5, 0.1], [0.5, 0.1]])
    rewards = layer_reward(losses, torch.tensor([2, 4]), torch.tensor([4, 2]), 4, 0.1)
    assert torch.equal(rewards[0], -losses[0])
    torch.testing.assert_close(rewards[1], torch.tensor([-0.6, -0.3]))
