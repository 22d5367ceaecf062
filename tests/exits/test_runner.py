# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The loop alone, on a toy architecture of the test: any form of mask, any criterion, rows in any pattern."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toy_exits import HIDDEN, LAYERS, ToyExits

from transformers_cee.exits.criteria import ExitCriterion
from transformers_cee.exits.runner import RowBatch, collect_states, run_all_exits, run_exits


class Planned(ExitCriterion):
    """Row `i` leaves at exit `plan[i]`; scores are the plan's, so that they can be told apart."""

    name = "planned"

    def __init__(self, plan: list[int], exits: int) -> None:
        super().__init__([0.5] * exits)
        self.plan = torch.tensor(plan)

    def score(self, step) -> Tensor:
        assert len(self.plan) == len(step.state)
        return (self.plan == step.index).float()

    def select(self, kept: Tensor) -> None:
        self.plan = self.plan[kept]


class Toy(ToyExits):
    """A layer adds to each token a mean over the tokens it may see; exits read the mean of unmasked tokens."""

    def layer(self, batch: RowBatch, number: int) -> Tensor:
        hidden, mask = batch.hidden_states, batch.attention_mask
        self.calls.append((number + 1, *hidden.shape[:2], None if mask is None else tuple(mask.shape)))
        rows, time = hidden.shape[:2]
        if mask is None:
            seen = hidden.new_ones(rows, time, time)
        elif mask.dim() == 2:
            seen = mask.float()[:, None].expand(rows, time, time)
        elif mask.dtype == torch.bool:
            seen = mask[:, 0].float().expand(rows, time, time)
        else:
            seen = mask[:, 0].exp().expand(rows, time, time)
        context = seen @ hidden / seen.sum(-1, keepdim=True)
        return torch.tanh((hidden + context) @ self.weights[number])

    def reference(self, tokens: Tensor) -> list[Tensor]:
        """Hidden states (time, hidden) of one row without padding behind every layer."""
        states = []
        for number in range(LAYERS):
            tokens = torch.tanh(torch.stack([(token + tokens.mean(0)) @ self.weights[number] for token in tokens]))
            states.append(tokens)
        return states


def masks_of(mask: Tensor, form: str) -> Tensor | None:
    time = mask.shape[1]
    return {
        "flash": mask,
        "sdpa": mask[:, None, None].expand(-1, 1, time, time),
        "sdpa, one query": mask[:, None, None],
        "eager": torch.where(mask, 0.0, -1e9)[:, None, None].expand(-1, 1, time, time),
    }[form]


@settings(max_examples=120)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    side=st.sampled_from(["left", "right"]),
    extra=st.integers(0, 2),
    form=st.sampled_from(["flash", "sdpa", "sdpa, one query", "eager"]),
    exits=st.lists(st.integers(1, LAYERS - 1), unique=True).map(lambda some: sorted({*some, LAYERS})),
    data=st.data(),
)
def test_any_pattern(lengths, side, extra, form, exits, data):
    plan = data.draw(st.lists(st.integers(0, len(exits) - 1), min_size=len(lengths), max_size=len(lengths)))
    toy, time = Toy(exits), max(lengths) + extra
    hidden = torch.randn(len(lengths), time, HIDDEN, generator=torch.Generator().manual_seed(sum(lengths)))
    mask = torch.zeros(len(lengths), time, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, slice(0, length) if side == "right" else slice(time - length, time)] = True
    run = run_exits(RowBatch(hidden, masks_of(mask, form), mask), toy.layers(), toy, Planned(plan, len(exits)))
    assert run.exit_layers.tolist() == [exits[index] for index in plan]
    for row, index in enumerate(plan):
        state = toy.reference(hidden[row, mask[row]])[exits[index] - 1].mean(0)
        torch.testing.assert_close(run.logits[row], toy.logits(state, index), rtol=1e-4, atol=1e-5)
        asked = min(index + 1, len(exits) - 1)
        assert run.scores[row, :asked].tolist() == [float(one == index) for one in range(asked)]
        assert run.scores[row, asked:].isnan().all()
    for number, rows, width, shape in toy.calls:
        left = [row for row, index in enumerate(plan) if exits[index] >= number]
        assert rows == len(left)
        narrow = max(lengths[row] for row in left)
        assert width == (time if rows == len(lengths) else narrow)
        if shape is not None:
            assert shape[0] == rows and shape[-1] == width
            assert len(shape) == 2 or shape[-2] in (1, width)
    assert toy.calls[-1][0] == max(exits[index] for index in plan)


@settings(max_examples=60)
@given(plan=st.lists(st.integers(0, LAYERS - 1), min_size=1, max_size=6), data=st.data())
def test_rows_may_stay(plan, data):
    """Whether rows that left go or stay changes what runs, and nothing that comes out."""
    hidden = torch.randn(len(plan), 2, HIDDEN, generator=torch.Generator().manual_seed(len(plan)))
    toy, told, asked, kept = Toy([1, 2, 3, 4, 5]), {}, [], []
    pays = data.draw(st.lists(st.booleans(), min_size=LAYERS, max_size=LAYERS))

    def drops(rows, staying):
        asked.append((rows, staying))
        return pays[len(asked) - 1]

    def leaving(rows, states, layer):
        told.update({row: (layer, state) for row, state in zip(rows.tolist(), states, strict=True)})

    layers = [lambda batch, one=one: (kept.append(batch.left), one(batch))[1] for one in toy.layers()]
    run = run_exits(RowBatch(hidden), layers, toy, Planned(plan, 5), leaving=leaving, drops=drops)
    usual = run_exits(RowBatch(hidden), toy.layers(), toy, Planned(plan, 5))
    assert torch.equal(run.exit_layers, usual.exit_layers)
    torch.testing.assert_close(run.logits, usual.logits)
    torch.testing.assert_close(run.scores, usual.scores, equal_nan=True)
    # Every exit at which some leave and some do not is asked about, and `left` tells the layers of what came of it.
    remaining = [sum(exit >= layer for exit in plan) for layer in range(LAYERS + 1)]
    mixed = [layer for layer in range(1, LAYERS) if 0 < remaining[layer] < remaining[layer - 1]]
    assert [staying for _, staying in asked] == [remaining[layer] for layer in mixed]
    size, gone = len(plan), {}
    for layer in range(1, max(plan) + 2):
        left = kept[layer - 1]
        assert toy.calls[layer - 1][1] == size
        assert size - (0 if left is None else int(left.sum())) == remaining[layer - 1]
        if layer in mixed and pays[mixed.index(layer)]:
            gone |= {row: layer for row, exit in enumerate(plan) if exit < layer and row not in gone}
            size = remaining[layer]
    if max(plan) < LAYERS - 1:
        gone |= {row: max(plan) + 1 for row in range(len(plan)) if row not in gone}
    assert {row: layer for row, (layer, _) in told.items()} == gone
    for row, (layer, state) in told.items():
        torch.testing.assert_close(state, toy.reference(hidden[row])[layer - 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("plan", [[2, 0, 1], [0, 0, 0], [4, 4, 4], [4, 0, 0]])
def test_without_masks(plan):
    toy = Toy([1, 2, 3, 4, 5])
    hidden = torch.randn(3, 4, HIDDEN)
    run = run_exits(RowBatch(hidden), toy.layers(), toy, Planned(plan, 5))
    for row, index in enumerate(plan):
        state = toy.reference(hidden[row])[index].mean(0)
        torch.testing.assert_close(run.logits[row], toy.logits(state, index), rtol=1e-4, atol=1e-5)
    assert {call[2:] for call in toy.calls} == {(4, None)}


def test_padding_mask_without_attention_mask():
    """As flash attention without padding in this very batch: pooling still needs its mask."""
    toy = Toy([1, 2, 3, 4, 5])
    hidden = torch.randn(3, 4, HIDDEN)
    run = run_exits(RowBatch(hidden, None, torch.ones(3, 4)), toy.layers(), toy, Planned([0, 2, 1], 5))
    assert run.exit_layers.tolist() == [1, 3, 2]
    torch.testing.assert_close(run.logits[1], toy.logits(toy.reference(hidden[1])[2].mean(0), 2), rtol=1e-4, atol=1e-5)


def test_all_exits():
    toy = Toy([2, 4, 5])
    hidden = torch.randn(3, 4, HIDDEN)
    run = run_all_exits(RowBatch(hidden), toy.layers(), toy)
    assert run.all_logits.shape == (3, 3, 2) and run.all_states.shape == (3, 3, HIDDEN)
    for row in range(3):
        states = toy.reference(hidden[row])
        for index, layer in enumerate(toy.layer_numbers):
            torch.testing.assert_close(run.all_states[row, index], states[layer - 1].mean(0), rtol=1e-4, atol=1e-5)
    assert torch.equal(run.logits, run.all_logits[:, -1])
    assert run.exit_layers.tolist() == [5, 5, 5] and run.scores.isnan().all()
    collected = collect_states(RowBatch(hidden), toy.layers(), toy)
    assert torch.equal(torch.stack(collected, dim=1), run.all_states)


class TestFirstExit:
    @pytest.mark.parametrize("first", range(6))
    def test_nobody_leaves_before(self, first):
        """Rows that wanted to leave before go to the end: their turn is over."""
        toy, plan = Toy([1, 2, 3, 4, 5]), [2, 0, 1, 4, 3]
        hidden = torch.randn(5, 4, HIDDEN)
        run = run_exits(RowBatch(hidden), toy.layers(), toy, Planned(plan, 5), first)
        expected = [exit + 1 if exit >= first else 5 for exit in plan]
        assert run.exit_layers.tolist() == expected
        for row, layer in enumerate(expected):
            state = toy.reference(hidden[row])[layer - 1].mean(0)
            torch.testing.assert_close(run.logits[row], toy.logits(state, layer - 1), rtol=1e-4, atol=1e-5)
        assert run.scores[:, :first].isnan().all(), "exits before the first are not asked"
        if first < 4:
            assert not run.scores[:, first].isnan().any()

    def test_memory_is_kept_from_earlier_exits(self):
        """A criterion that remembers is asked at closed exits, too."""
        toy = Toy([1, 2, 3, 4, 5])
        criterion = Planned([2, 0, 1, 4, 3], 5)
        criterion.has_memory = True
        run = run_exits(RowBatch(torch.randn(5, 4, HIDDEN)), toy.layers(), toy, criterion, 2)
        assert run.exit_layers.tolist() == [3, 5, 5, 5, 4]
        assert run.scores[:, 0].tolist() == [0, 1, 0, 0, 0] and run.scores[:, 1].tolist() == [0, 0, 1, 0, 0]

    def test_closed_by_threshold(self):
        toy = Toy([1, 2, 3, 4, 5])
        criterion = Planned([2, 0, 1, 4, 3], 5)
        criterion.thresholds = [1.0, 0.5, 1.0, 0.5, 0.5]
        run = run_exits(RowBatch(torch.randn(5, 4, HIDDEN)), toy.layers(), toy, criterion)
        assert run.exit_layers.tolist() == [5, 5, 2, 5, 4]
        assert not run.scores[:, :2].isnan().any(), "a closed exit is asked, but nobody leaves there"


@pytest.mark.parametrize("plan", [[2, 0, 1, 4], [0, 0, 0, 0], [4, 4, 4, 4], [4, 0, 0, 3], [1, 1, 3, 3]])
def test_leaving_is_told(plan):
    """Of rows that leave before the last exit: numbers, hidden states and layer."""
    toy, told = Toy([1, 2, 3, 4, 5]), []
    hidden = torch.randn(4, 2, HIDDEN)
    run_exits(RowBatch(hidden), toy.layers(), toy, Planned(plan, 5), leaving=lambda *one: told.append(one))
    seen = {}
    for rows, states, layer in told:
        assert len(rows) == len(states) > 0
        seen |= {int(row): (layer, state) for row, state in zip(rows, states, strict=True)}
    assert {row: layer for row, (layer, _) in seen.items()} == {row: e + 1 for row, e in enumerate(plan) if e < 4}
    assert [layer for *_, layer in told] == sorted({exit + 1 for exit in plan if exit < 4})
    for row, (layer, state) in seen.items():
        torch.testing.assert_close(state, toy.reference(hidden[row])[layer - 1], rtol=1e-4, atol=1e-5)


def test_gradients_flow_to_the_rows_own_path():
    toy = Toy([1, 2, 3, 4, 5])
    toy.weights = nn.Parameter(toy.weights)
    hidden = torch.randn(3, 4, HIDDEN)
    run = run_exits(RowBatch(hidden), toy.layers(), toy, Planned([2, 0, 1], 5))
    run.logits.sum().backward()
    given = toy.weights.grad.clone()
    toy.weights.grad = None
    sum(
        toy.logits(toy.reference(hidden[row])[index].mean(0), index).sum() for row, index in enumerate([2, 0, 1])
    ).backward()
    torch.testing.assert_close(given, toy.weights.grad, rtol=1e-4, atol=1e-5)
    assert not given[3:].any() and given[:3].any()
    assert not run.scores.requires_grad


class TestSelect:
    def batch(self, mask: Tensor | None, attention_mask: Tensor | None, rows: int = 4, time: int = 5) -> RowBatch:
        hidden = torch.arange(rows * time).view(rows, time, 1).float()
        spans = torch.tensor([[0, 4, 5]]).repeat(rows, 1) if mask is not None else None
        return RowBatch(hidden, attention_mask, mask, torch.arange(rows) + 10, spans)

    def test_two_dimensional(self):
        mask = torch.arange(20).view(4, 5)
        some = self.batch(mask, mask).select(torch.tensor([1, 3]), slice(1, 4), dense=False)
        assert some.hidden_states[:, :, 0].tolist() == [[6, 7, 8], [16, 17, 18]]
        assert some.attention_mask.tolist() == some.padding_mask.tolist() == [[6, 7, 8], [16, 17, 18]]
        assert some.index.tolist() == [11, 13]
        assert some.spans.tolist() == [[-1, 3, 5], [-1, 3, 5]]

    def test_four_dimensional(self):
        mask = torch.arange(100).view(4, 1, 5, 5)
        some = self.batch(torch.ones(4, 5), mask).select(torch.tensor([2]), slice(0, 2), dense=False)
        assert some.attention_mask.tolist() == [[[[50, 51], [55, 56]]]]

    def test_one_row_for_all(self):
        """A mask that is broadcast over rows stays so."""
        some = self.batch(torch.ones(4, 5), torch.arange(5).view(1, 1, 1, 5)).select(
            torch.tensor([2, 3]), slice(1, 3), dense=False
        )
        assert some.attention_mask.tolist() == [[[[1, 2]]]]

    def test_keys_of_a_cache_stay(self):
        """The mask of one query over more keys than there are tokens."""
        hidden = torch.randn(3, 1, 2)
        batch = RowBatch(hidden, torch.arange(12).view(3, 1, 1, 4), None, torch.arange(3))
        some = batch.select(torch.tensor([2, 0]), slice(0, 1), dense=False)
        assert some.attention_mask.tolist() == [[[[8, 9, 10, 11]]], [[[0, 1, 2, 3]]]]
        batch = RowBatch(hidden, torch.arange(12).view(3, 4), None, torch.arange(3))
        some = batch.select(torch.tensor([1]), slice(0, 1), dense=False)
        assert some.attention_mask.tolist() == [[4, 5, 6, 7]] and some.hidden_states.shape == (1, 1, 2)

    def test_none(self):
        some = self.batch(None, None).select(torch.tensor([0]), slice(0, 5), dense=False)
        assert some.attention_mask is None and some.padding_mask is None and some.spans is None

    def test_dense_drops_masks(self):
        some = self.batch(torch.ones(4, 5), torch.ones(4, 5)).select(torch.tensor([0]), slice(0, 3), dense=True)
        assert some.attention_mask is None and some.padding_mask is None and some.spans is None
        assert some.hidden_states.shape == (1, 3, 1)
