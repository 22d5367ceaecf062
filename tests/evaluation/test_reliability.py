# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transformers_cee.evaluation.reliability import exit_reliability, reliability
from transformers_cee.stores.store import ExitStore


ROWS = st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=30)


def slow_error(bins: list[list[tuple[float, bool]]]) -> float:
    rows = sum(len(rows) for rows in bins)
    total = 0.0
    for members in filter(None, bins):
        confidence = sum(one for one, _ in members) / len(members)
        accuracy = sum(right for _, right in members) / len(members)
        total += len(members) / rows * abs(accuracy - confidence)
    return total


@given(ROWS, st.integers(1, 6))
def test_equal_width_row_by_row(rows, num_bins):
    bins: list[list] = [[] for _ in range(num_bins)]
    edges = np.linspace(0, 1, num_bins + 1)
    for confidence, right in rows:
        # Open on the left, so that a confidence on a bound belongs below; 0 belongs to the first.
        index = next(index for index in range(num_bins) if confidence <= edges[index + 1])
        bins[index].append((confidence, right))
    found = reliability(*zip(*rows, strict=True), num_bins=num_bins)
    assert found.counts.tolist() == [len(members) for members in bins]
    assert found.expected_calibration_error == pytest.approx(slow_error(bins), abs=1e-9)
    for members, confidence, accuracy in zip(bins, found.confidence, found.accuracy, strict=True):
        assert math.isnan(confidence) == math.isnan(accuracy) == (not members)


@given(ROWS, st.integers(1, 6))
def test_equal_mass_row_by_row(rows, num_bins):
    bins: list[list] = [[] for _ in range(num_bins)]
    for rank, row in enumerate(sorted(rows, key=lambda row: row[0])):
        bins[rank * num_bins // len(rows)].append(row)
    found = reliability(*zip(*rows, strict=True), num_bins=num_bins, equal_mass=True)
    assert found.counts.tolist() == [len(members) for members in bins]
    assert found.counts.max() - found.counts.min() <= 1
    assert found.expected_calibration_error == pytest.approx(slow_error(bins), abs=1e-9)
    assert (np.diff(found.edges) >= 0).all()


def test_special_cases():
    assert reliability([1.0, 1.0], [True, True]).expected_calibration_error == 0.0
    assert reliability([1.0, 1.0], [False, False]).expected_calibration_error == 1.0
    # One bin: the gap of the means.
    assert reliability([0.9, 0.5], [True, False], num_bins=1).expected_calibration_error == pytest.approx(0.2)


def make_store(**fields) -> ExitStore:
    generator = torch.Generator().manual_seed(0)
    return ExitStore(
        **{
            "states": torch.zeros(40, 3, 2),
            "logits": 2 * torch.randn(40, 3, 4, generator=generator),
            "labels": torch.randint(0, 4, (40,), generator=generator),
            "layers": torch.tensor([1, 4, 6]),
            "problem_type": "single_label_classification",
            **fields,
        }
    )


def test_every_exit_of_a_store():
    store = make_store()
    found = exit_reliability(store, num_bins=5)
    assert list(found) == [1, 4, 6]
    for index, layer in enumerate(found):
        bins: list[list] = [[] for _ in range(5)]
        for logits, label in zip(store.logits[:, index].tolist(), store.labels.tolist(), strict=True):
            shares = [math.exp(value) / sum(map(math.exp, logits)) for value in logits]
            confidence = max(shares)
            bins[math.ceil(confidence * 5) - 1].append((confidence, shares.index(confidence) == label))
        assert found[layer].expected_calibration_error == pytest.approx(slow_error(bins), abs=1e-6)


def test_stored_tokens_have_internal_exits_only():
    features = torch.rand(40, 2, 5, generator=torch.Generator().manual_seed(1))
    predictions = torch.randint(0, 4, (40, 3), generator=torch.Generator().manual_seed(2))
    store = make_store(logits=None, token_losses=torch.zeros(40, 3), predictions=predictions, features=features)
    found = exit_reliability(store, equal_mass=True)
    assert list(found) == [1, 4]
    expected = reliability(features[:, 1, 0], predictions[:, 1] == store.labels, equal_mass=True)
    assert found[4].expected_calibration_error == expected.expected_calibration_error


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: reliability([], []), "at least one row"),
        (lambda: reliability([0.5], [True, False]), r"\(1,\) and `correct` of shape \(2,\)"),
        (lambda: reliability([0.5, 1.5], [True, False]), r"\[0, 1\]; got 0\.5\.\.1\.5"),
        (lambda: reliability([math.nan], [True]), r"\[0, 1\]; got nan"),
        (lambda: reliability([0.5], [True], num_bins=0), "`num_bins`=0"),
        (lambda: exit_reliability(make_store(problem_type="regression")), "'regression'.*accepted"),
        (
            lambda: exit_reliability(
                make_store(logits=None, token_losses=torch.zeros(40, 3), predictions=torch.zeros(40, 3))
            ),
            "needs confidence features",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
