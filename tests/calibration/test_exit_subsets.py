# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The search among subsets of exits against loops over all subsets, thresholds and batches."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from cost_tables import cost_table
from hypothesis import given
from hypothesis import strategies as st
from populations import population
from slow_batches import all_subsets, slow_loss, slow_seconds

from transformers_cee.calibration import exit_subsets
from transformers_cee.calibration.cost_table import MeasuredBatch
from transformers_cee.calibration.exit_subsets import (
    Limit,
    expected_seconds,
    find_exits,
    prefixes,
    times_of_exits,
    times_of_subsets,
)


LENGTH = 3


@st.composite
def cases(draw):
    """Scores with ties, losses, layers and a table of costs that need not rise with rows."""
    count, internal, batch_size = draw(st.integers(1, 4)), draw(st.integers(0, 3)), draw(st.integers(1, 2))
    layers = [*sorted(draw(st.sets(st.integers(1, 5), min_size=internal, max_size=internal))), 6]
    score = st.sampled_from([-math.inf, 0.0, 0.25, 0.5, 0.75])
    rows = [draw(st.lists(score, min_size=internal, max_size=internal)) for _ in range(count)]
    seconds = st.integers(0, 8).map(lambda eighths: eighths / 8)
    batches = [
        MeasuredBatch(
            size,
            LENGTH,
            {layer: 0.125 + draw(seconds) for layer in range(1, 7)},
            draw(seconds) / 4,
            {layer: draw(seconds) / 4 for layer in range(1, 7)},
            draw(seconds) / 4,
            draw(seconds) / 4,
        )
        for size in range(1, batch_size + 1)
    ]
    losses = [
        draw(st.lists(st.sampled_from([0.0, 0.0, 1.0]), min_size=internal + 1, max_size=internal + 1)) for _ in rows
    ]
    return rows, losses, layers, cost_table(batches), batch_size


def arrays(case):
    rows, _, layers, table, batch_size = case
    scores = np.array(rows, dtype=float).reshape(len(rows), len(layers) - 1)
    return scores, expected_seconds(table.at(batch_size, LENGTH), layers, len(rows))


def searched(case, limit=None, **options):
    scores, seconds = arrays(case)
    return find_exits(scores, np.unique([-math.inf, *scores.ravel()]), seconds, limit, **options)


def slow_search(case, limit=None, subsets=None):
    """Least seconds of all subsets with all thresholds within the limit, and of those that ask an exit."""
    rows, losses, layers, table, batch_size = case
    full, best = slow_seconds(table, layers, rows, [], math.inf, batch_size, LENGTH), math.inf
    for exits in all_subsets(len(layers) - 1) if subsets is None else subsets:
        for threshold in {-math.inf, *(score for row in rows for score in row)} if exits else ():
            if limit is not None:
                lost = slow_loss(rows, losses, exits, threshold, limit.of_any)
                if sum(lost) > limit.most + 1e-9:
                    continue
            best = min(best, slow_seconds(table, layers, rows, exits, threshold, batch_size, LENGTH))
    return min(full, best), best


def check_honest(case, found, limit=None):
    """What was found takes the seconds that it says, and loses no more than it may."""
    rows, losses, layers, table, batch_size = case
    seconds = slow_seconds(table, layers, rows, found.exits, found.threshold, batch_size, LENGTH)
    assert found.seconds == pytest.approx(seconds, rel=1e-9)
    if limit is not None and found.exits:
        assert sum(slow_loss(rows, losses, found.exits, found.threshold, limit.of_any)) <= limit.most + 1e-9


@given(cases())
def test_every_subset_at_every_threshold(case):
    rows, losses, layers, table, batch_size = case
    scores, seconds = arrays(case)
    thresholds = np.unique([-math.inf, 0.5, *scores.ravel()])
    limits = [
        Limit(np.array(losses), np.ones(len(rows)), most, of_any) for most in range(4) for of_any in (False, True)
    ]
    all_times = [times_of_subsets(scores, thresholds, seconds, limit) for limit in (None, *limits)]
    assert all_times[0].shape == (len(thresholds), 2 ** (len(layers) - 1))
    for exits in all_subsets(len(layers) - 1):
        slow = [slow_seconds(table, layers, rows, exits, one, batch_size, LENGTH) for one in thresholds]
        lost = {
            of_any: [sum(slow_loss(rows, losses, exits, one, of_any)) for one in thresholds]
            for of_any in (False, True)
        }
        for limit, times in zip((None, *limits), all_times, strict=True):
            expected = slow
            if limit is not None:
                pairs = zip(slow, lost[limit.of_any], strict=True)
                expected = [one if loss <= limit.most else math.inf for one, loss in pairs]
            assert times[:, sum(1 << index for index in exits)] == pytest.approx(expected, rel=1e-9)
            if exits:
                of_exits = times_of_exits(scores, exits, thresholds, seconds, limit)
                assert of_exits == pytest.approx(expected, rel=1e-9)


class TestAllSubsets:
    @given(cases())
    def test_without_a_limit(self, case):
        found, (least, next_best) = searched(case), slow_search(case)
        assert found.is_exact and found.seconds == pytest.approx(least, rel=1e-9)
        assert found.next_best == pytest.approx(next_best, rel=1e-9)
        check_honest(case, found)

    @given(cases(), st.integers(0, 3), st.booleans())
    def test_within_a_limit(self, case, most, of_any):
        losses = np.array(case[1])
        limit = Limit(losses, np.ones(len(losses)), float(most), of_any)
        found, (least, next_best) = searched(case, limit), slow_search(case, limit)
        assert found.seconds == pytest.approx(least, rel=1e-9) and found.next_best == pytest.approx(
            next_best, rel=1e-9
        )
        check_honest(case, found, limit)

    @given(cases(), st.data())
    def test_losses_that_are_no_errors_and_weights(self, case, data):
        rows, losses, *rest = case
        losses = [[loss * data.draw(st.sampled_from([0.25, 1.0])) for loss in row] for row in losses]
        weights = data.draw(st.lists(st.sampled_from([0.5, 1.0]), min_size=len(rows), max_size=len(rows)))
        weighted = [[loss * weight for loss in row] for row, weight in zip(losses, weights, strict=True)]
        found = searched(case, Limit(np.array(losses), np.array(weights), 0.75))
        plain = Limit(np.array(weighted), np.ones(len(rows)), 0.75)
        assert found.seconds == pytest.approx(slow_search((rows, weighted, *rest), plain)[0], rel=1e-9)
        check_honest((rows, weighted, *rest), found, plain)

    @given(cases())
    def test_thresholds_in_several_parts(self, case):
        whole = searched(case)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(exit_subsets, "_CHUNK", 1)
            parts = searched(case)
        assert (parts.exits, parts.seconds) == (whole.exits, whole.seconds) and parts.next_best == whole.next_best

    def test_as_few_exits_as_will_do_and_the_highest_threshold(self):
        # Neither checks nor blocks cost, so that exits that nobody takes do no harm.
        free = MeasuredBatch(1, LENGTH, dict.fromkeys(range(1, 7), 1.0), 0.0, dict.fromkeys(range(1, 7), 0.0), 0.0)
        rows, losses = [[0.25, 0.75, 0.75, 0.75], [0.0, 0.5, 0.0, 0.0]], [[0.0] * 5] * 2
        found = searched(
            (rows, losses, [1, 2, 3, 4, 6], cost_table([free]), 1), Limit(np.array(losses), np.ones(2), 0)
        )
        assert (found.exits, found.threshold, found.seconds) == ([0], -math.inf, 1.0)
        # Layer 2 takes no time: both exits at 0.25 do what the first one does at 0.
        quick = replace(free, layer_seconds={**free.layer_seconds, 2: 0.0})
        found = searched(([[0.5, 0.0], [0.25, 0.5]], losses, [1, 2, 6], cost_table([quick]), 1))
        assert (found.exits, found.threshold, found.seconds) == ([0], 0.0, 1.0)
        closed = searched(([[-math.inf] * 2] * 2, losses, [1, 2, 6], cost_table([free]), 1))
        assert (closed.exits, closed.threshold, closed.seconds) == ([], math.inf, 6.0)


class TestManyExits:
    @pytest.fixture(autouse=True)
    def many(self, monkeypatch):
        monkeypatch.setattr(exit_subsets, "MAX_EXACT_EXITS", -1)

    @pytest.mark.parametrize("seed", range(20))
    def test_exact_where_nobody_gets_less_sure(self, seed, monkeypatch):
        numbers = np.random.default_rng(seed)
        batches = [
            MeasuredBatch(
                size,
                LENGTH,
                {layer: 1 + size * numbers.random() for layer in range(1, 9)},
                numbers.random() / 5,
                {layer: numbers.random() / 5 for layer in range(1, 9)},
                2 * numbers.random(),
                numbers.random() / 2,
            )
            for size in (1, 2, 4)
        ]
        rows = np.sort(numbers.random((60, 7)) * np.linspace(0.4, 1.0, 60)[:, None], axis=1)
        seconds = expected_seconds(cost_table(batches).at(4, LENGTH), range(1, 9), 60)
        # At one threshold each: with all of them, everybody leaves at one exit.
        thresholds = [np.array([threshold]) for threshold in (0.2, 0.4, 0.6)]
        found = [find_exits(rows, one, seconds) for one in thresholds]
        assert all(one.is_exact for one in found) and any(one.exits for one in found)
        monkeypatch.setattr(exit_subsets, "MAX_EXACT_EXITS", 7)
        among_all = [find_exits(rows, one, seconds) for one in thresholds]
        assert [one.exits for one in found] == [one.exits for one in among_all]
        assert [one.seconds for one in found] == pytest.approx([one.seconds for one in among_all], rel=1e-9)

    @given(cases(), st.integers(0, 3), st.sampled_from([None, False, True]))
    def test_honest_everywhere(self, case, most, of_any):
        losses = np.array(case[1])
        limit = None if of_any is None else Limit(losses, np.ones(len(losses)), float(most), of_any)
        found, (least, _) = searched(case, limit), slow_search(case, limit)
        full = slow_seconds(case[3], case[2], case[0], [], math.inf, case[4], LENGTH)
        assert least * (1 - 1e-9) <= found.seconds <= full * (1 + 1e-9)
        assert limit is None or not found.is_exact
        check_honest(case, found, limit)

    @pytest.mark.parametrize("of_any", [None, False, True])
    @pytest.mark.parametrize("seed", range(4))
    def test_next_to_the_best_elsewhere(self, of_any, seed, monkeypatch):
        population_, table = population(200, 8, seed=seed), cost_table(check=0.1 * 4**seed)
        scores = population_.scores.double().numpy()
        seconds = expected_seconds(table.at(4, LENGTH), range(1, 9), 200)
        limit = None
        if of_any is not None:
            limit = Limit(population_.disagrees.double().numpy(), np.ones(200), 20.0, of_any)
        thresholds = np.array([0.7]) if limit is None else np.unique(scores)
        found = find_exits(scores, thresholds, seconds, limit)
        monkeypatch.setattr(exit_subsets, "MAX_EXACT_EXITS", 7)
        best = find_exits(scores, thresholds, seconds, limit)
        assert best.exits and best.seconds <= found.seconds <= 1.02 * best.seconds

    def test_some_populations_are_not_nested(self):
        case = ([[0.75, 0.0], [0.0, 0.75]], [[0.0] * 3] * 2, [2, 4, 6], cost_table(layers=6), 1)
        assert not searched(case).is_exact


@given(cases())
def test_only_some_subsets(case):
    subsets = prefixes(len(case[2]) - 1)
    assert [set(subset) for subset in subsets] == [set(range(stop)) for stop in range(1, len(case[2]))]
    found, (least, next_best) = searched(case, subsets=subsets), slow_search(case, subsets=subsets)
    assert found.seconds == pytest.approx(least, rel=1e-9) and found.next_best == pytest.approx(next_best, rel=1e-9)
    assert found.is_exact and found.exits in ([], *subsets)
    check_honest(case, found)
