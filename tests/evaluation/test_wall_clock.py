# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Speed-ups of encoders on clocks that count what runs, and the largest speed-up that can be true against loops."""

from __future__ import annotations

import pytest
import torch
from clocks import layer_clock
from hypothesis import given
from hypothesis import strategies as st
from tiny import pad, random_rows, tiny_model

from transformers_cee.evaluation.timing import Timer
from transformers_cee.evaluation.wall_clock import allowed_speedup, executed_work, measure_wall_clock


SETTINGS = [
    {"exit_criterion": "policy", "exit_threshold": 0.0},
    {"exit_criterion": "entropy", "exit_threshold": 0.5},
    {"exit_criterion": "policy", "exit_threshold": [0.5] * 6},
]


@pytest.fixture
def batches():
    rows = random_rows(12, 3)
    return [pad(rows[:8]), pad(rows[8:])]


def measure(model, batches, settings):
    return measure_wall_clock(model, batches, settings, Timer(rounds=3, clock=layer_clock(model.bert.encoder.layer)))


def test_speedups_are_those_of_what_ran(batches):
    """One second per call of a layer: a batch takes as many as its deepest row has layers."""
    model = tiny_model().train()
    found = measure(model, batches, SETTINGS)
    assert model.training
    for setting, executed in zip(SETTINGS, found, strict=True):
        with torch.no_grad():
            layers = [model.eval()(**batch, **setting).exit_layers for batch in batches]
        assert executed.exit_layers.tolist() == torch.cat(layers).tolist()
        assert executed.speedup.value == pytest.approx(12 / sum(int(one.max()) for one in layers))
        assert executed.speedup.spread == 0.0


def test_models_that_return_tuples_are_timed_too(batches):
    model, tuples = tiny_model(), tiny_model()
    tuples.config.return_dict = False
    found, wanted = measure(tuples, batches, SETTINGS[:2]), measure(model, batches, SETTINGS[:2])
    assert [one.exit_layers.tolist() for one in found] == [one.exit_layers.tolist() for one in wanted]


def test_all_run_in_turn_without_dropout(batches):
    model, seen = tiny_model().train(), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((module.training, kwargs["exit_threshold"])), with_kwargs=True
    )
    measure(model, batches, SETTINGS[:2])
    assert not any(training for training, _ in seen)
    noted, timed = seen[: 1 + 4], [threshold for _, threshold in seen[1 + 4 :]]
    assert [threshold for _, threshold in noted] == [1.0, 0.0, 0.0, 0.5, 0.5]
    assert len(timed) == 3 * 2 * 3
    assert {tuple(sorted(timed[at : at + 3])) for at in range(0, len(timed), 3)} == {(0.0, 0.5, 1.0)}


def test_more_speed_than_was_saved_is_noise(batches):
    """Layers that all cost the same, and a machine on which the last one takes as long as eleven others."""
    model = tiny_model()
    layers = list(model.bert.encoder.layer)
    calm, busy = (
        measure_wall_clock(model, batches, SETTINGS[:1], Timer(rounds=3, clock=layer_clock(clocked)))[0].speedup
        for clocked in (layers, [*layers, *layers[-1:] * 10])
    )
    assert (calm.value, calm.allowed) == (6.0, 6.0)
    assert busy.is_noise and busy.median == 16.0 and busy.spread == 0.0


def slow_work(exit_layers, lengths, weights):
    calls, kinds = 0, [0.0] * 6
    for index, weight in enumerate(weights):
        there = [length for layer, length in zip(exit_layers, lengths, strict=True) if layer > index]
        calls += bool(there)
        for power in range(3):
            tokens = sum(max(there) ** power for _ in there)
            kinds[power] += tokens
            kinds[3 + power] += weight * tokens
    return [calls, *kinds]


ROWS = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9)), min_size=1, max_size=6)
PRICES = st.lists(st.floats(0, 10), min_size=7, max_size=7)


@given(ROWS)
def test_work_by_kind(rows):
    layers, lengths = zip(*rows, strict=True)
    weights = [1.0, 3.0, 2.0, 5.0]
    found = executed_work(torch.tensor(layers), torch.tensor(lengths), torch.tensor(weights, dtype=torch.float64))
    assert found.tolist() == pytest.approx(slow_work(layers, lengths, weights))


@given(ROWS, PRICES, st.floats(0, 100), st.floats(0, 100))
def test_no_machine_is_faster_than_allowed(rows, prices, fixed, extra):
    """Whatever calls, rows, tokens, pairs of tokens and everything else cost."""
    model = PricedLayers()
    layers, lengths = zip(*rows, strict=True)
    batch = {"input_ids": torch.zeros(len(rows), max(lengths)), "attention_mask": mask_of(lengths)}

    def seconds(layers, lengths):
        return sum(a * b for a, b in zip(prices, slow_work(layers, lengths, model.weights), strict=True))

    full = fixed + seconds([4] * len(rows), [max(lengths)] * len(rows))
    early = fixed + extra + seconds(layers, lengths)
    allowed = allowed_speedup(model, [batch], [torch.tensor(layers)])
    assert full <= early * allowed * (1 + 1e-9)


class PricedLayers:
    weights = (1, 3, 2, 5)

    def item_flops(self, length):
        from transformers_cee.modeling.flops import ItemFlops

        return ItemFlops(list(self.weights), [], [], [], 0)


def mask_of(lengths):
    return (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).long()


def test_single_rows_are_allowed_the_layers_that_they_save():
    batches = [{"input_ids": torch.full((1, 7), 5)} for _ in range(3)]
    assert allowed_speedup(tiny_model(), batches, torch.tensor([[1], [2], [6]])) == pytest.approx(18 / 9)


def test_long_rows_that_leave_allow_more():
    """Two rows of 9 and 3 tokens, padded to 9: behind the exit of the long one, 3 columns are left of 9."""
    batch = {"input_ids": torch.full((2, 9), 5), "attention_mask": mask_of((9, 3))}
    found = allowed_speedup(tiny_model(), [batch], [torch.tensor([2, 6])])
    assert found == pytest.approx(6 * 2 * 81 / (2 * 2 * 81 + 4 * 9))
    assert allowed_speedup(tiny_model(), [batch], [torch.tensor([6, 2])]) == pytest.approx(12 / 8)


def test_images_of_layers_that_differ():
    """FLOPs say what a layer saves where layers are no alike."""
    images = {"pixel_values": torch.zeros(2, 3, 8, 8)}
    assert allowed_speedup(PricedLayers(), [images], [torch.tensor([2, 2])]) == pytest.approx(11 / 4)


def test_refusals(batches):
    model = tiny_model().train()
    with pytest.raises(ValueError, match=r"`batches` \(0\) must be at least 1"):
        measure_wall_clock(model, [], SETTINGS)
    with pytest.raises(ValueError, match="'luck' is unknown"):
        measure_wall_clock(model, batches, [{"exit_criterion": "luck", "exit_threshold": 0.5}])
    assert model.training, "whatever happens"
