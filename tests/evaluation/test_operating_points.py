# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Operating points in hindsight against the same points executed."""

from __future__ import annotations

import json

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import accuracy, pad, random_rows, tiny_model

from transformers_cee import OperatingPoint
from transformers_cee.evaluation.operating_points import (
    depth_figures,
    exit_histogram,
    full_depth_point,
    hindsight_curve,
    hindsight_point,
    metric_at_depth,
    oracle_point,
    point_at,
)
from transformers_cee.evaluation.timing import Figure, Reported
from transformers_cee.stores.scoring import exits_taken, score_exits, thresholds_for_depths
from transformers_cee.stores.store import ExitStore


@pytest.fixture(scope="module")
def rows():
    return random_rows(40, seed=1)


@torch.no_grad()
def stored(model, rows, problem_type="single_label_classification"):
    output = model(**pad(rows), output_all_exits=True)
    labels = torch.arange(len(rows)) % 3
    layers = torch.tensor(model.config.exit_layer_numbers)
    return ExitStore(output.all_exit_states, output.all_exit_logits, labels, layers, problem_type)


class TestHindsight:
    @torch.no_grad()
    @pytest.mark.parametrize("criterion", ["policy", "max_probability", "entropy", "patience"])
    @pytest.mark.parametrize("inputs,exit_layers", [("state", None), ("both", [2, 3, 5])])
    @pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification"])
    def test_is_what_happens(self, rows, criterion, inputs, exit_layers, problem_type):
        fields = {"policy_inputs": inputs, "exit_layers": exit_layers, "problem_type": problem_type, "num_labels": 3}
        model = tiny_model(**fields)
        store = stored(model, rows, problem_type)
        if criterion == "patience":
            settings = [1, 2, [1] * (len(store.layers) - 1) + [9], len(store.layers)]
        else:
            spread = reference.spreading_thresholds(model, rows, criterion, problem_type=problem_type)
            settings = [spread, 0.5, 0.0, 1.0]
        scores = score_exits(criterion, store, model.exit_policies)
        assert scores.shape == (40, len(store.layers) - 1)
        for number, threshold in enumerate(settings):
            output = model(**pad(rows), exit_criterion=criterion, exit_threshold=threshold)
            exits = exits_taken(criterion, threshold, scores)
            if number == 0:
                assert len(set(exits.tolist())) >= 2
            assert store.layers[exits].tolist() == output.exit_layers.tolist(), threshold
            torch.testing.assert_close(store.logits[torch.arange(40), exits], output.logits, rtol=1e-4, atol=1e-5)
            point = hindsight_point(criterion, threshold, scores, store, None)
            assert point.depth == pytest.approx(float(output.exit_layers.float().mean()))

    def test_scores_in_parts(self, rows, monkeypatch):
        """States are scored in parts of 4096 rows; the borders must not show."""
        model = tiny_model(policy_inputs="both")
        store = stored(model, rows)
        many = store.select(torch.arange(40).repeat(103)[:4100])
        scores = score_exits("policy", many, model.exit_policies)
        torch.testing.assert_close(scores, score_exits("policy", store, model.exit_policies).repeat(103, 1)[:4100])

    def test_one_exit_only(self, rows):
        model = tiny_model(exit_layers=[6])
        store = stored(model, rows)
        assert score_exits("policy", store, model.exit_policies).shape == (40, 0)

    @given(st.data())
    def test_exits_taken(self, data):
        exits = data.draw(st.integers(2, 5))
        scores = data.draw(
            st.lists(st.lists(st.floats(0, 1), min_size=exits - 1, max_size=exits - 1), min_size=1, max_size=5)
        )
        thresholds = data.draw(st.lists(st.floats(0, 1), min_size=exits, max_size=exits))
        for criterion, leaves in (("max_probability", float.__gt__), ("entropy", float.__lt__)):
            taken = exits_taken(criterion, thresholds, torch.tensor(scores, dtype=torch.float64))
            for row, one in enumerate(scores):
                first = [index for index in range(exits - 1) if leaves(one[index], thresholds[index])]
                assert int(taken[row]) == (first[0] if first else exits - 1)

    def test_wrong_thresholds(self):
        with pytest.raises(ValueError, match=r"exit_threshold"):
            exits_taken("policy", [0.5, 0.5], torch.zeros(2, 2))


class TestPoints:
    def test_figures(self):
        figures = depth_figures(torch.tensor([1, 2, 6, 3]), 6)
        assert figures == pytest.approx({"depth": 3.0, "saved_layers": 0.5, "layer_speedup": 2.0})

    def test_histogram(self):
        assert exit_histogram(torch.tensor([2, 6, 2, 6, 6]), [2, 4, 6]) == {"2": 2, "4": 0, "6": 3}

    def test_point(self, rows):
        model = tiny_model()
        store = stored(model, rows)
        exits = torch.arange(40) % 6
        point = point_at("policy", (0.5,) * 6, exits, store, accuracy)
        right = sum(int(store.logits[row, row % 6].argmax()) == row % 3 for row in range(40))
        assert point.metrics == {"accuracy": pytest.approx(right / 40)}
        assert point.exit_threshold == [0.5] * 6
        assert point.depth == pytest.approx(sum(row % 6 + 1 for row in range(40)) / 40)
        assert sum(point.exit_histogram.values()) == 40 and list(point.exit_histogram) == list("123456")
        assert point.wall_clock_speedup is None
        assert OperatingPoint(**json.loads(json.dumps(point.to_dict()))) == point

    def test_full_depth(self, rows):
        store = stored(tiny_model(), rows)
        point = full_depth_point(store, accuracy)
        assert (point.depth, point.saved_layers, point.layer_speedup) == (6.0, 0.0, 1.0)
        expected = float((store.logits[:, -1].argmax(-1) == store.labels).float().mean())
        assert point.metrics["accuracy"] == pytest.approx(expected)

    def test_oracle(self, rows):
        store = stored(tiny_model(), rows)
        store.labels[:5] = 9  # which no head predicts
        point = oracle_point(store, accuracy)
        right, depth = 0, 0
        for row in range(40):
            hits = [index for index in range(6) if int(store.logits[row, index].argmax()) == int(store.labels[row])]
            right += bool(hits)
            depth += (hits[0] if hits else 0) + 1
        assert point.metrics["accuracy"] == pytest.approx(right / 40) and point.depth == pytest.approx(depth / 40)
        assert 0 < right < 40


class TestThresholdsForDepths:
    @pytest.mark.parametrize("criterion", ["policy", "max_probability", "entropy", "patience"])
    def test_comes_as_close_as_any_threshold(self, criterion, rows):
        model = tiny_model(num_labels=2)
        store = stored(model, rows)
        scores = score_exits(criterion, store, model.exit_policies)
        wanted = [1.0, 2.0, 3.5, 5.0, 6.0]
        grid = [1, 2, 3, 4, 5] if criterion == "patience" else [step / 200 for step in range(201)]
        depth = lambda threshold: float(store.layers[exits_taken(criterion, threshold, scores)].float().mean())  # noqa: E731
        found = thresholds_for_depths(criterion, scores, store.layers.tolist(), wanted)
        assert len(found) == 5
        for target, threshold in zip(wanted, found, strict=True):
            best = min(abs(depth(one) - target) for one in grid)
            # Quantiles of 200 scores against a grid: not always the same neighbours, hence a quarter of a layer.
            assert abs(depth(threshold) - target) <= best + 0.25, (target, threshold, depth(threshold), best)

    def test_ends(self, rows):
        """Depths 1 and L are asked for often; a score that all rows pass, or none, must be among the tries."""
        model = tiny_model()
        store = stored(model, rows)
        for criterion in ("policy", "max_probability", "entropy"):
            scores = score_exits(criterion, store, model.exit_policies)
            deepest = thresholds_for_depths(criterion, scores, store.layers.tolist(), [6.0])
            assert point_at(criterion, deepest, exits_taken(criterion, deepest[0], scores), store, None).depth == 6.0

    def test_curve(self, rows):
        model = tiny_model()
        store = stored(model, rows)
        scores = score_exits("policy", store, model.exit_policies)
        curve = hindsight_curve("policy", [1.0, 0.4, 0.5, 0.6, 0.4, 0.0], scores, store, accuracy)
        depths = [point.depth for point in curve]
        assert depths == sorted(set(depths)) and depths[0] == 1.0 and depths[-1] == 6.0


class TestMetricAtDepth:
    curve = tuple(
        OperatingPoint("policy", 0.5, depth, 0.0, 1.0, metrics={"accuracy": value})
        for depth, value in ((4.0, 0.9), (2.0, 0.5), (3.0, 0.8))
    )

    @pytest.mark.parametrize("depth,expected", [(2.0, 0.5), (2.5, 0.65), (3.0, 0.8), (3.75, 0.875), (4.0, 0.9)])
    def test_between(self, depth, expected):
        assert metric_at_depth(self.curve, "accuracy", depth) == pytest.approx(expected)

    @pytest.mark.parametrize("depth", [1.9, 4.1])
    def test_outside(self, depth):
        assert metric_at_depth(self.curve, "accuracy", depth) is None

    def test_empty(self):
        assert metric_at_depth([], "accuracy", 3.0) is None


def test_noise_is_kept_beside():
    point = OperatingPoint("policy", 0.5, 3.0, 0.5, 2.0)
    point.wall_clock = Figure(1.5, 0.04, 2.0).reported
    assert (point.wall_clock_speedup, point.wall_clock_spread, point.noisy_wall_clock_speedup) == (1.5, 0.04, None)
    assert point.wall_clock == Reported(1.5, 0.04)
    point.wall_clock = Figure(6.1, 0.02, 1.13).reported
    found = point.to_dict()
    assert found["wall_clock_speedup"] is None
    assert (found["wall_clock_spread"], found["noisy_wall_clock_speedup"]) == (0.02, 6.1)
