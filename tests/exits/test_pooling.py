# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Many batches on one walk, on the toy architecture of the loop's own test."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toy_exits import HIDDEN, LAYERS, ToyExits

from transformers_cee.exits.criteria import ExitCriterion
from transformers_cee.exits.policy import ExitHistory
from transformers_cee.exits.pooling import run_pooled
from transformers_cee.exits.row_batch import RowBatch


class PlannedByRow(ExitCriterion):
    """Row `i` of the walk leaves at exit `plan[i]`. It has a history, as policies have: what each row has seen."""

    name = "planned by row"
    has_memory = True

    def __init__(self, plan: list[int], exits: int) -> None:
        super().__init__([0.5] * exits)
        self.plan = torch.tensor(plan)
        self.history = ExitHistory()

    def score(self, step) -> Tensor:
        numbers, before = step.rows.unsqueeze(1), self.history
        if step.index:
            # What was seen is of the very same rows, at every earlier exit.
            assert torch.equal(before.predictions, numbers.expand(-1, step.index))
            assert torch.equal(before.margin, numbers + step.index - 1)
            numbers = torch.cat((before.predictions, numbers), dim=1)
        before.predictions, before.margin = numbers, step.rows.unsqueeze(1) + step.index
        return (self.plan[step.rows] == step.index).float()

    def select(self, kept: Tensor) -> None:
        self.history.select(kept)


class Toy(ToyExits):
    """A layer adds to each token the mean of its row's tokens; exits read the mean of all tokens."""

    def layer(self, batch: RowBatch, number: int) -> Tensor:
        hidden = batch.hidden_states
        self.calls.append((number + 1, *hidden.shape[:2]))
        return torch.tanh((hidden + self.state(hidden, batch.padding_mask, 0).unsqueeze(1)) @ self.weights[number])

    def alone(self, tokens: Tensor, exit_index: int) -> Tensor:
        """Logits (labels,) of one row's tokens (time, hidden) at an exit (0-based)."""
        for number in range(self.layer_numbers[exit_index]):
            tokens = torch.tanh(torch.stack([(token + tokens.mean(0)) @ self.weights[number] for token in tokens]))
        return tokens.mean(0) @ self.heads[exit_index]


def batches_of(rows: list[Tensor], size: int):
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        hidden = torch.nn.utils.rnn.pad_sequence(some, batch_first=True)
        lengths = torch.tensor([len(row) for row in some])
        mask = torch.arange(hidden.shape[1]) < lengths.unsqueeze(1)
        yield RowBatch(hidden, padding_mask=None if bool(mask.all()) else mask)


def run(toy: Toy, rows: list[Tensor], plan: list[int], size: int):
    criterion = PlannedByRow(plan, len(toy.layer_numbers))
    return run_pooled(
        batches_of(rows, size), len(rows), toy.layers(), toy, criterion,
        lambda hidden, mask: RowBatch(hidden, padding_mask=mask), batch_size=size,
    )  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    exits=st.lists(st.integers(1, LAYERS - 1), unique=True).map(lambda some: sorted({*some, LAYERS})),
    size=st.integers(1, 5),
    data=st.data(),
)
def test_each_row_is_as_if_alone(lengths, exits, size, data):
    if len(exits) == 1:
        exits = [1, *exits]
    plan = data.draw(st.lists(st.integers(0, len(exits) - 1), min_size=len(lengths), max_size=len(lengths)))
    generator = torch.Generator().manual_seed(sum(lengths))
    rows = [torch.randn(length, HIDDEN, generator=generator) for length in sorted(lengths, reverse=True)]
    toy = Toy(exits)
    found = run(toy, rows, plan, size)
    assert found.exit_layers.tolist() == [exits[index] for index in plan]
    for row, index in enumerate(plan):
        torch.testing.assert_close(found.logits[row], toy.alone(rows[row], index), rtol=1e-4, atol=1e-5)
    for layer in range(1, LAYERS + 1):
        ran = [rows for number, rows, _ in toy.calls if number == layer]
        assert max(ran, default=0) <= size
        assert sum(ran) == sum(exits[index] >= layer for index in plan)


@settings(max_examples=40, deadline=None)
@given(plan=st.lists(st.integers(0, LAYERS - 1), min_size=1, max_size=20), size=st.integers(1, 6))
def test_batches_are_full_until_the_end(plan, size):
    toy = Toy([1, 2, 3, 4, 5])
    run(toy, [torch.ones(2, HIDDEN)] * len(plan), plan, size)
    for layer in range(1, LAYERS + 1):
        ran = [rows for number, rows, _ in toy.calls if number == layer]
        remaining = sum(exit >= layer - 1 for exit in plan)
        assert ran == [size] * (remaining // size) + [remaining % size] * (remaining % size > 0)


def test_rows_do_not_wait_for_much_shorter_ones():
    toy = Toy([1, 5])
    rows = [torch.ones(length, HIDDEN) for length in (9, 8, 8, 7, 5, 4, 4, 4)]
    run(toy, rows, [1, 0, 0, 0, 1, 0, 1, 1], 4)
    # The first batch leaves one row of 9 tokens; the second begins with 5, and joins it.
    assert [call[1:] for call in toy.calls if call[0] == 2] == [(4, 9)]
    toy.calls.clear()
    rows = [torch.ones(length, HIDDEN) for length in (9, 8, 8, 7, 4, 4, 4, 3)]
    run(toy, rows, [1, 0, 0, 0, 1, 1, 0, 1], 4)
    assert [call[1:] for call in toy.calls if call[0] == 2] == [(1, 9), (3, 4)]


def test_rows_that_are_not_told_are_refused():
    toy = Toy([1, 5])
    with pytest.raises(ValueError, match="`rows`=3 must be the rows of all `batches`"):
        run_pooled(
            batches_of([torch.ones(2, HIDDEN)] * 2, 2), 3, toy.layers(), toy, PlannedByRow([0, 0, 0], 2),
            lambda hidden, mask: RowBatch(hidden, padding_mask=mask), batch_size=2,
        )  # fmt: skip
