# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
from __future__ import annotations

import math
import random
import statistics as plain

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from transformers_cee.evaluation.statistics import (
    bootstrap_interval,
    compare_at_depth,
    paired_bootstrap,
    paired_differences,
)
from transformers_cee.stores.store import ExitStore


def slow_percentiles(rows: list[float], resamples: int = 4000, confidence: float = 0.95) -> tuple[float, float]:
    """Means of resamples drawn row by row, sorted, and cut at both ends."""
    draw = random.Random(5)
    means = sorted(sum(draw.choice(rows) for _ in rows) / len(rows) for _ in range(resamples))
    tail = (1 - confidence) / 2
    return means[int(tail * resamples)], means[int((1 - tail) * resamples) - 1]


@pytest.mark.parametrize("method", ["percentile", "BCa"])
def test_bootstrap_of_a_mean(method):
    rows = np.random.default_rng(0).exponential(size=40).tolist()
    interval = bootstrap_interval(rows, method=method, resamples=4000)
    low, high = slow_percentiles(rows)
    assert interval.estimate == pytest.approx(sum(rows) / len(rows))
    # BCa moves a skewed distribution's interval, but not far.
    room = 0.03 if method == "percentile" else 0.12
    assert interval.low == pytest.approx(low, abs=room)
    assert interval.high == pytest.approx(high, abs=room)
    if method == "BCa":
        assert interval.high > bootstrap_interval(rows, resamples=4000).high


def test_more_confidence_is_wider_and_seeds_repeat():
    rows = np.random.default_rng(1).normal(size=30)
    narrow, wide = (bootstrap_interval(rows, confidence=share, resamples=500) for share in (0.5, 0.95))
    assert wide.low < narrow.low < narrow.estimate < narrow.high < wide.high
    assert bootstrap_interval(rows, resamples=500, seed=3) == bootstrap_interval(rows, resamples=500, seed=3)
    assert bootstrap_interval(rows, resamples=500, seed=3) != bootstrap_interval(rows, resamples=500, seed=4)


def test_bootstrap_of_a_statistic_of_two_columns_draws_them_together():
    generator = np.random.default_rng(2)
    labels = generator.integers(0, 2, 60)
    predictions = np.where(generator.random(60) < 0.8, labels, 1 - labels)
    f1 = bootstrap_interval(labels, predictions, statistic=f1_score, resamples=200)
    assert f1.low < f1.estimate < f1.high
    assert f1.estimate == pytest.approx(f1_score(labels, predictions))
    # Predictions that are the labels stay so in every resample.
    same = bootstrap_interval(labels, labels, statistic=lambda a, b: float(np.mean(a == b)), resamples=50)
    assert (same.low, same.estimate, same.high) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("rows", [[1.0] * 5, [0.25]])
@pytest.mark.parametrize("method", ["percentile", "BCa"])
def test_bootstrap_without_spread(rows, method):
    interval = bootstrap_interval(rows, method=method, resamples=50)
    assert (interval.low, interval.estimate, interval.high) == (rows[0],) * 3


@pytest.mark.parametrize("statistic", [np.mean, lambda rows: sum(rows) / len(rows)])
def test_paired_bootstrap_keeps_rows_together(statistic):
    generator = np.random.default_rng(3)
    hard = generator.random(200)
    first, second = hard < 0.7, hard < 0.65
    paired = paired_bootstrap(first, second, statistic=statistic, resamples=500)
    assert paired.estimate == pytest.approx(first.mean() - second.mean())
    low, high = slow_percentiles([float(a) - float(b) for a, b in zip(first, second, strict=True)], 2000)
    assert (paired.low, paired.high) == (pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01))
    # Were the rows of both drawn apart, the interval would reach far below zero.
    assert paired.low >= 0.0


def test_paired_differences_by_hand():
    first, second = [0.9, 0.8, 0.95, None], [0.85, 0.81, 0.9, 0.7]
    found = paired_differences(first, second)
    differences = [0.05, -0.01, 0.05]
    half = 4.302653 * plain.stdev(differences) / math.sqrt(3)  # t table, 2 degrees of freedom, 0.975
    assert found.pairs == 3
    assert found.mean == pytest.approx(0.03)
    assert found.standard_deviation == pytest.approx(plain.stdev(differences))
    assert (found.low, found.high) == (pytest.approx(0.03 - half), pytest.approx(0.03 + half))


def test_paired_difference_of_one_seed_and_of_equal_seeds():
    one = paired_differences([0.9], [0.8])
    assert (one.mean, one.standard_deviation, one.low, one.high) == (pytest.approx(0.1), None, None, None)
    equal = paired_differences([0.5, 0.75], [0.25, 0.5])
    assert (equal.standard_deviation, equal.low, equal.high) == (0.0, 0.25, 0.25)


def make_store(rows: int = 60, exits: int = 4) -> ExitStore:
    generator = torch.Generator().manual_seed(0)
    return ExitStore(
        states=torch.zeros(rows, exits, 2),
        logits=torch.randn(rows, exits, 3, generator=generator),
        labels=torch.randint(0, 3, (rows,), generator=generator),
        layers=torch.tensor([2, 4, 6, 8]),
        problem_type="single_label_classification",
    )


def test_comparison_at_a_depth():
    store = make_store()
    scores = torch.rand(60, 3, generator=torch.Generator().manual_seed(1))
    other = torch.rand(60, 3, generator=torch.Generator().manual_seed(2))
    found = compare_at_depth(store, ("max_probability", scores), ("entropy", other), 4.5, resamples=100)
    right = []
    for table, threshold, leaves in zip(
        (scores, other), found.thresholds, (lambda s, t: s > t, lambda s, t: s < t), strict=True
    ):
        layers, correct = [], []
        for row in range(60):
            taken = next((exit for exit in range(3) if leaves(table[row, exit], threshold)), 3)
            layers.append(2 * (taken + 1))
            correct.append(int(store.logits[row, taken].argmax() == store.labels[row]))
        right.append(sum(correct) / 60)
        assert found.depths[len(right) - 1] == pytest.approx(sum(layers) / 60)
    assert all(abs(depth - 4.5) < 0.2 for depth in found.depths)
    assert found.difference.estimate == pytest.approx(right[0] - right[1])
    assert found.difference.low <= found.difference.estimate <= found.difference.high


def test_entries_without_a_choice_do_not_count():
    store = make_store()
    scores, other = torch.rand(2, 60, 3, generator=torch.Generator().manual_seed(1))
    store.may_exit[::3] = False
    some = store.select(store.deciding())
    found, expected = (
        compare_at_depth(one, ("margin", scores[kept]), ("entropy", other[kept]), 4.5, resamples=50)
        for one, kept in ((store, slice(None)), (some, store.deciding()))
    )
    assert found == expected


def test_a_criterion_against_itself():
    scores = torch.rand(60, 3, generator=torch.Generator().manual_seed(1))
    found = compare_at_depth(make_store(), ("margin", scores), ("margin", scores), 5.0, resamples=50)
    assert (found.difference.low, found.difference.estimate, found.difference.high) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_interval([]), "at least one row"),
        (lambda: bootstrap_interval([[1.0, 2.0]]), r"shape \(1, 2\)"),
        (lambda: bootstrap_interval([1.0, math.nan, 2.0]), "1 of 3 are not"),
        (lambda: bootstrap_interval([1.0, 2.0], [1.0], statistic=f1_score), r"as many.*\[2, 1\]"),
        (lambda: bootstrap_interval([1.0, 2.0], confidence=95), "`confidence`=95"),
        (lambda: bootstrap_interval([1.0, 2.0], method="basic"), "`method`='basic'.*'percentile', 'BCa'"),
        (lambda: bootstrap_interval([1.0, 2.0], resamples=0), "`resamples`=0"),
        (lambda: paired_bootstrap([1.0, 2.0], [1.0]), r"as many.*\[2, 1\]"),
        (lambda: paired_differences([0.1], [0.1, 0.2]), "got 1 and 2"),
        (lambda: paired_differences([None, 0.1], [0.1, None]), "share none"),
        (lambda: paired_differences([], []), "share none"),
        (lambda: paired_differences([0.1], [0.2], confidence=0.0), "`confidence`=0.0"),
        (lambda: paired_differences([math.nan, 0.1], [0.2, 0.1]), "1 of 2 are not"),
        (lambda: compare_at_depth(make_store(), None, None, 9.0), r"`depth`=9.0 must lie.*2\.\.8"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_tokens_are_drawn_text_by_text():
    """Each text's tokens are all alike: an interval over tokens would be much too narrow."""
    texts, tokens, generator = 12, 50, torch.Generator().manual_seed(0)
    alike = torch.randint(0, 2, (texts, 3), generator=generator).repeat_interleave(tokens, 0)
    store = ExitStore(
        states=torch.zeros(texts * tokens, 3, 2),
        logits=None,
        labels=torch.zeros(texts * tokens, dtype=torch.long),
        layers=torch.tensor([1, 2, 3]),
        problem_type="single_label_classification",
        predictions=alike,
        token_losses=torch.zeros(texts * tokens, 3),
        rows=torch.arange(texts).repeat_interleave(tokens),
    )
    first, second = torch.zeros(texts * tokens, 2), torch.zeros(texts * tokens, 2)
    first[:, 0], second[:, 1] = 1.0, 1.0
    # Everybody leaves at the first exit, or at the second.
    found = compare_at_depth(store, ("margin", first), ("margin", second), 1.0, resamples=2000)
    assert found.depths[0] == 1.0
    by_text = [float(row[0] == 0) - float(row[1 if found.depths[1] == 2.0 else 0] == 0) for row in alike[::tokens]]
    low, high = slow_percentiles(by_text)
    assert found.difference.estimate == pytest.approx(sum(by_text) / texts)
    assert found.difference.low == pytest.approx(low, abs=0.09)
    assert found.difference.high == pytest.approx(high, abs=0.09)
