# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transformers_cee.evaluation.overthinking import overthinking


LAYERS = [2, 3, 7]
ROWS = st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans(), st.integers(0, 2)), min_size=1, max_size=12)


@given(ROWS)
def test_row_by_row(rows):
    wasteful, destructive, rescues = [0] * 3, 0, [0] * 3
    depth, ever = 0, 0
    for *right, taken in rows:
        wasteful[taken] += any(right[:taken])
        destructive += any(right[:-1]) and not right[-1]
        for exit, correct in enumerate(right):
            rescues[exit] += correct and not right[-1]
        depth += LAYERS[right.index(True)] if any(right) else LAYERS[0]
        ever += any(right)
    correct = torch.tensor([row[:3] for row in rows])
    found = overthinking(correct, torch.tensor(LAYERS), torch.tensor([row[3] for row in rows]))
    count = len(rows)
    assert found.wasteful == pytest.approx(sum(wasteful) / count)
    assert found.wasteful_by_exit == pytest.approx([value / count for value in wasteful])
    assert found.destructive == pytest.approx(destructive / count)
    assert found.destructive_by_exit == pytest.approx([value / count for value in rescues])
    assert found.oracle_depth == pytest.approx(depth / count)
    assert found.oracle_accuracy == pytest.approx(ever / count)


def test_without_exits_every_row_is_taken_at_the_last():
    correct = torch.tensor([[True, True, True], [False, False, True], [True, False, False], [False, False, False]])
    found = overthinking(correct, torch.tensor(LAYERS))
    assert found.wasteful == 0.5
    assert found.wasteful_by_exit == [0.0, 0.0, 0.5]
    assert found.destructive == 0.25
    assert found.destructive_by_exit == [0.25, 0.0, 0.0]
    assert found.oracle_depth == (2 + 7 + 2 + 2) / 4
    assert found.oracle_accuracy == 0.75


def test_the_oracle_wastes_nothing():
    correct = torch.rand(50, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    assert overthinking(correct, torch.tensor(LAYERS), correct.int().argmax(1)).wasteful == 0.0


def test_one_exit():
    found = overthinking(torch.tensor([[True], [False]]), torch.tensor([12]))
    assert (found.wasteful, found.destructive, found.oracle_depth) == (0.0, 0.0, 12.0)


@pytest.mark.parametrize(
    ("correct", "layers", "exits", "message"),
    [
        (torch.zeros(0, 3, dtype=torch.bool), LAYERS, None, r"`correct` of shape \(0, 3\)"),
        (torch.zeros(3, dtype=torch.bool), LAYERS, None, r"`correct` of shape \(3,\)"),
        (torch.zeros(2, 3, dtype=torch.bool), [1, 2], None, r"`layers` of shape \(2,\)"),
        (torch.zeros(2, 3, dtype=torch.bool), LAYERS, torch.tensor([0]), r"`exits` must be"),
        (torch.zeros(2, 3, dtype=torch.bool), LAYERS, torch.tensor([0, 3]), r"0\.\.2"),
    ],
)
def test_refusals(correct, layers, exits, message):
    with pytest.raises(ValueError, match=message):
        overthinking(correct, torch.tensor(layers), exits)
