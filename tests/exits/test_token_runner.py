# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The walk in which single tokens leave, on a toy architecture whose tokens see those before them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from transformers_cee.exits.criteria import ExitCriterion
from transformers_cee.exits.row_batch import RowBatch
from transformers_cee.exits.token_runner import run_token_exits


HIDDEN, LAYERS = 3, 5


class Toy:
    """A layer adds to each token the mean of tokens up to it; exits double their states."""

    def __init__(self, layer_numbers):
        generator = torch.Generator().manual_seed(0)
        self.layer_numbers = layer_numbers
        self.weights = torch.randn(LAYERS, HIDDEN, HIDDEN, generator=generator)

    def layers(self):
        def run(batch, number):
            hidden = batch.hidden_states
            context = hidden.cumsum(1) / torch.arange(1, hidden.shape[1] + 1)[:, None]
            return torch.tanh((hidden + context) @ self.weights[number])

        return [lambda batch, number=number: run(batch, number) for number in range(LAYERS)]

    def state(self, hidden: Tensor, padding_mask, index: int) -> Tensor:
        return hidden * (index + 2)

    def logits(self, state: Tensor, index: int) -> Tensor:
        return state[:, :2]

    def slow(self, tokens: Tensor, exits: list[int], copies: bool) -> list[Tensor]:
        """Each token's state at its exit, one token and one layer at a time."""
        hidden, at_exit = [list(tokens)], []
        for number in range(LAYERS):
            behind = []
            for column, token in enumerate(hidden[-1]):
                context = sum(hidden[-1][: column + 1]) / (column + 1)
                left = copies and number + 1 > self.layer_numbers[exits[column]]
                behind.append(token if left else torch.tanh((token + context) @ self.weights[number]))
            hidden.append(behind)
        for column, exit in enumerate(exits):
            at_exit.append(hidden[self.layer_numbers[exit]][column] * (exit + 2))
        return at_exit


class Planned(ExitCriterion):
    """Active token `i` leaves at exit `plan[i]`; it remembers the plan only, so it must follow the tokens."""

    name = "planned"

    def __init__(self, plan, exits):
        super().__init__([0.5] * exits)
        self.plan = torch.tensor(plan, dtype=torch.long)

    def score(self, step):
        assert len(self.plan) == len(step.state) == len(step.logits)
        return (self.plan == step.index).float()

    def select(self, kept):
        self.plan = self.plan[kept]


@settings(max_examples=80)
@given(
    rows=st.integers(1, 3),
    time=st.integers(1, 5),
    exits=st.lists(st.integers(1, LAYERS - 1), unique=True).map(lambda some: sorted({*some, LAYERS})),
    copies=st.booleans(),
    data=st.data(),
)
def test_any_pattern(rows, time, exits, copies, data):
    last, toy = len(exits) - 1, Toy(exits)
    may = [[data.draw(st.booleans()) for _ in range(time)] for _ in range(rows)]
    plan = [[data.draw(st.integers(0, last)) for _ in range(time)] for _ in range(rows)]
    first = data.draw(st.integers(0, last))
    active = [
        exit for some, open_ in zip(plan, may, strict=True) for exit, yes in zip(some, open_, strict=True) if yes
    ]
    hidden = torch.randn(rows, time, HIDDEN, generator=torch.Generator().manual_seed(rows * time))
    run = run_token_exits(
        RowBatch(hidden),
        toy.layers(),
        toy,
        Planned(active, len(exits)),
        torch.tensor(may),
        first_exit=first,
        copy_states=copies,
    )
    taken = [
        [exit if yes and exit >= first else last for exit, yes in zip(some, open_, strict=True)]
        for some, open_ in zip(plan, may, strict=True)
    ]
    assert run.exits.tolist() == taken
    expected = [state for row in range(rows) for state in toy.slow(hidden[row], taken[row], copies)]
    torch.testing.assert_close(run.states, torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert run.scores.shape == (rows, time, len(exits)) and run.scores[..., last].isnan().all()
    for row in range(rows):
        for column in range(time):
            asked = min(taken[row][column] + 1, last) if may[row][column] else 0
            scores = run.scores[row, column]
            assert scores[:asked].tolist() == [float(plan[row][column] == index) for index in range(asked)]
            assert scores[asked:].isnan().all()


@pytest.mark.parametrize("copies", [True, False])
def test_gradients_take_each_tokens_own_way(copies):
    toy, taken = Toy([1, 2, 3, 4, 5]), [[0, 4, 2], [1, 1, 3]]
    toy.weights.requires_grad_()
    hidden = torch.randn(2, 3, HIDDEN)
    criterion = Planned([exit for row in taken for exit in row], 5)
    run = run_token_exits(
        RowBatch(hidden), toy.layers(), toy, criterion, torch.ones(2, 3, dtype=torch.bool), copy_states=copies
    )
    run.states.square().sum().backward()
    given_ = toy.weights.grad.clone()
    toy.weights.grad = None
    states = [state for row in range(2) for state in toy.slow(hidden[row], taken[row], copies)]
    torch.stack(states).square().sum().backward()
    torch.testing.assert_close(given_, toy.weights.grad, rtol=1e-4, atol=1e-5)
    assert not run.scores.requires_grad


def test_draws():
    """With probability of the score, whatever the thresholds."""

    class Half(Planned):
        def score(self, step):
            assert len(self.plan) == len(step.state)
            return torch.full((len(step.state),), [0.0, 0.5, 1.0, 0.3][step.index])

    torch.manual_seed(0)
    toy, count = Toy([1, 2, 3, 4, 5]), 4000
    run = run_token_exits(
        RowBatch(torch.randn(count, 1, HIDDEN)),
        toy.layers(),
        toy,
        Half([0] * count, 5),
        torch.ones(count, 1, dtype=torch.bool),
        draw=True,
    )
    assert run.exits.unique().tolist() == [1, 2]
    assert abs(float((run.exits == 1).float().mean()) - 0.5) < 0.04
