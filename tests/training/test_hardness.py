# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Memorized layers against their definition, and what the fingerprint notices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import task, tiny_model

from transformers_cee.training.hardness import fingerprint, memorized_layers


def by_definition(correct: list[bool], layers: list[int]) -> int:
    """The smallest exit layer from which on every exit is right; the last layer if there is none."""
    for index, layer in enumerate(layers):
        if all(correct[index:]):
            return layer
    return layers[-1]


@given(st.data())
def test_memorized_layers(data):
    layers = sorted(data.draw(st.sets(st.integers(1, 24), min_size=1, max_size=12)))
    row = st.lists(st.booleans(), min_size=len(layers), max_size=len(layers))
    correct = data.draw(st.lists(row, min_size=1, max_size=8))
    given_layers = memorized_layers(torch.tensor(correct), torch.tensor(layers))
    assert given_layers.dtype == torch.int64
    assert given_layers.tolist() == [by_definition(one, layers) for one in correct]


@pytest.mark.parametrize(
    "correct,expected", [([1, 1, 1], 2), ([0, 1, 1], 4), ([1, 0, 1], 6), ([1, 1, 0], 6), ([0, 0, 0], 6)]
)
def test_examples(correct, expected):
    assert memorized_layers(torch.tensor([correct]).bool(), torch.tensor([2, 4, 6])).tolist() == [expected]


class TestFingerprint:
    def test_same_again(self):
        assert fingerprint(tiny_model(), task(5, seed=1)) == fingerprint(tiny_model(), task(5, seed=1))

    def test_policies_do_not_matter(self):
        model = tiny_model()
        before = fingerprint(model, task(5, seed=1))
        with torch.no_grad():
            for parameter in model.exit_policies.parameters():
                parameter.add_(1.0)
        assert fingerprint(model, task(5, seed=1)) == before

    @pytest.mark.parametrize(
        "name",
        [
            "bert.embeddings.word_embeddings.weight",
            "bert.encoder.layer.2.output.dense.bias",
            "bert.pooler.dense.weight",
            "exit_heads.heads.layer_2.weight",
            "exit_norms.norms.layer_1.bias",
            "classifier.bias",
        ],
    )
    def test_every_other_weight_matters(self, name):
        model = tiny_model(exit_norm="layer_norm")
        before = fingerprint(model, task(5, seed=1))
        with torch.no_grad():
            model.get_parameter(name).view(-1)[0].add_(1e-6)
        assert fingerprint(model, task(5, seed=1)) != before

    def test_estimators_do_not_matter(self):
        fitted = tiny_model(exit_estimators=["learning_to_exit", "token_hash"])
        fitted.load_state_dict(tiny_model().state_dict(), strict=False)
        assert fingerprint(fitted, task(5, seed=1)) == fingerprint(tiny_model(), task(5, seed=1))

    def test_rows_matter(self):
        model, rows = tiny_model(), [dict(row) for row in task(5, seed=1)]
        marks = {fingerprint(model, rows)}
        marks.add(fingerprint(model, rows[:4]))
        marks.add(fingerprint(model, rows[::-1]))
        marks.add(fingerprint(model, [*rows[:4], {**rows[4], "labels": rows[4]["labels"] + 1}]))
        marks.add(fingerprint(model, [*rows[:4], {**rows[4], "input_ids": [*rows[4]["input_ids"][:-1], 59]}]))
        marks.add(fingerprint(model, [*rows[:4], {**rows[4], "more": 1}]))
        assert len(marks) == 6

    @pytest.mark.parametrize("kind", [torch.tensor, np.asarray])
    def test_rows_of_arrays(self, kind):
        """Also long ones, of which `repr` shows the ends only, and close values, which it rounds."""
        model, long = tiny_model(), list(range(5000))
        middle = [*long[:2500], 0, *long[2501:]]
        close = float(np.nextafter(np.float32(0.1), np.float32(1)))
        for one, other in ((long, middle), ([0.1], [close])):
            marks = {fingerprint(model, [{"input_ids": kind(values)}]) for values in (one, other)}
            assert len(marks) == 2
            assert fingerprint(model, [{"input_ids": kind(one)}]) in marks

    def test_dtypes_of_weights(self):
        for dtype in (torch.bfloat16, torch.float16):
            assert fingerprint(tiny_model().to(dtype), task(2, seed=1)) != fingerprint(tiny_model(), task(2, seed=1))
