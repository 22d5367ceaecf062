# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
from __future__ import annotations

import copy

import pytest
import torch
from clocks import steady_clock
from transformers import EvalPrediction

from transformers_cee import BertCeeConfig, BertForConsistentEE
from transformers_cee.evaluation.comparison import DEPTH_TOLERANCE, compare_criteria, exit_points, time_points
from transformers_cee.evaluation.operating_points import hindsight_point
from transformers_cee.exits.deciding import criterion_settings
from transformers_cee.stores.scoring import score_exits, thresholds_for_depths
from transformers_cee.stores.store import ExitStore


LAYERS = 4


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def make_store(rows: int, seed: int) -> ExitStore:
    """Exits whose logits grow more certain and more often right with depth."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (rows,), generator=generator)
    signal = torch.nn.functional.one_hot(labels, 3)[:, None] * torch.arange(1.0, LAYERS + 1)[None, :, None]
    logits = signal + torch.randn(rows, LAYERS, 3, generator=generator)
    states = torch.randn(rows, LAYERS, 16, generator=generator)
    return ExitStore(states, logits, labels, torch.arange(1, LAYERS + 1), "single_label_classification")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = BertCeeConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        num_labels=3,
        policy_inputs="confidence",
    )
    return BertForConsistentEE(config).eval()


def test_thresholds_come_from_dev_and_figures_from_test(model):
    dev, test, depths = make_store(400, 1), make_store(300, 2), [1.5, 2.5, 3.5]
    criteria = ["policy", "max_probability", "entropy"]
    comparison = compare_criteria(criteria, dev, test, model.exit_policies, accuracy, "accuracy", depths)
    assert list(comparison.curves) == criteria
    for curve in comparison.curves.values():
        assert all(sum(point.exit_histogram.values()) == 300 for point in curve)
    for criterion in ("max_probability", "entropy"):
        found = [point.depth for point in comparison.curves[criterion]]
        assert found == pytest.approx(depths, abs=0.3)
    other = make_store(300, 3)
    again = compare_criteria(criteria, dev, other, model.exit_policies, accuracy, "accuracy", depths)
    for criterion in criteria:
        thresholds = {point.exit_threshold for point in again.curves[criterion]}
        assert thresholds == {point.exit_threshold for point in comparison.curves[criterion]}


def test_matched_depths_lie_between_first_exit_and_full_depth(model):
    dev, test = make_store(400, 1), make_store(300, 2)
    depths = [1.0, 2.0, 4.0]
    criteria = ["max_probability", "patience"]
    comparison = compare_criteria(criteria, dev, test, model.exit_policies, accuracy, "accuracy", depths)
    first, last = comparison.exits[0].metrics["accuracy"], comparison.full.metrics["accuracy"]
    for values in comparison.matched.values():
        assert values[1.0] == pytest.approx(first)
        assert values[4.0] == pytest.approx(last)
        assert values[2.0] is not None
    assert comparison.matched["max_probability"][2.0] > comparison.exits[1].metrics["accuracy"]
    assert comparison.oracle.metrics["accuracy"] >= last


def test_the_models_own_threshold_joins_its_curve_once(model):
    store = make_store(300, 1)
    arguments = (["policy", "entropy"], store, store, model.exit_policies, accuracy, "accuracy", [2.0])
    without = compare_criteria(*arguments)
    threshold = without.curves["policy"][0].exit_threshold
    assert len(compare_criteria(*arguments, own=("policy", threshold)).curves["policy"]) == 1
    comparison = compare_criteria(*arguments, own=("policy", [0.0] * LAYERS))
    assert [0.0] * LAYERS in [point.exit_threshold for point in comparison.curves["policy"]]
    assert len(comparison.curves["entropy"]) == 1


@pytest.mark.parametrize("condition", ["none", "film"])
def test_exits_that_the_model_closes(model, condition):
    """Points are those that a walk of the model can reach."""
    config = copy.deepcopy(model.config)
    config.policy_condition, config.policy_inputs = condition, "state"
    torch.manual_seed(0)
    closed = BertForConsistentEE(config).eval()
    dev, test, criteria = make_store(300, 1), make_store(200, 2), ["policy", "entropy", "patience"]
    family = {} if condition == "film" else {"family": {0.1: closed.exit_policies}}

    def compare():
        settings = criterion_settings(closed)
        return compare_criteria(
            criteria,
            dev,
            test,
            closed.exit_policies,
            accuracy,
            "accuracy",
            [1.0, 2.5, 3.5],
            more_policies=family,
            settings=(settings, settings),
        )

    curves = compare().curves
    assert all(any(point.exit_histogram["2"] for point in curve) for curve in curves.values())
    closed.config.min_exit_layer = 3
    comparison = compare()
    assert list(comparison.curves) == [*family, *criteria]
    for name, curve in comparison.curves.items():
        for point in curve:
            assert point.exit_histogram["3"] + point.exit_histogram["4"] == 200
        assert comparison.matched[name][1.0] is None
        assert comparison.matched[name][3.5] is not None


def test_exit_points():
    store = make_store(200, 1)
    points = exit_points(store, accuracy)
    assert [point.depth for point in points] == [1.0, 2.0, 3.0, 4.0]
    expected = (store.logits.argmax(-1) == store.labels[:, None]).float().mean(0)
    assert [point.metrics["accuracy"] for point in points] == pytest.approx(expected.tolist())


def test_time_points_executes(model, monkeypatch):
    steady_clock(monkeypatch)
    store = make_store(50, 1)
    curves = compare_criteria(["entropy"], store, store, model.exit_policies, accuracy, "accuracy", [2.0]).curves
    batches = [{"input_ids": torch.randint(20, (4, 7)), "attention_mask": torch.ones(4, 7, dtype=torch.long)}] * 2
    timed = time_points(model, batches, curves["entropy"])
    assert timed[0].exit_threshold == curves["entropy"][0].exit_threshold
    assert (timed[0].wall_clock_speedup, timed[0].wall_clock_spread) == (1.0, 0.0)
    assert sum(timed[0].exit_histogram.values()) == 8
    assert timed[0].layer_speedup == pytest.approx(LAYERS / timed[0].depth)


def test_a_family_of_policies_serves_each_depth_by_the_member_that_is_best_on_dev(model):
    dev, test, depths = make_store(400, 1), make_store(300, 2), [1.5, 2.5, 3.5]
    torch.manual_seed(1)
    family = {0.1: copy.deepcopy(model.exit_policies), 0.2: copy.deepcopy(model.exit_policies)}
    family[0.2].reset_parameters()
    comparison = compare_criteria(
        ["policy"], dev, test, model.exit_policies, accuracy, "accuracy", depths, more_policies={"family": family}
    )
    scores = {
        name: (score_exits("policy", dev, one), score_exits("policy", test, one)) for name, one in family.items()
    }
    expected = []
    for depth in depths:
        tried = []
        for on_dev, on_test in scores.values():
            threshold = thresholds_for_depths("policy", on_dev, list(range(1, LAYERS + 1)), [depth])[0]
            point = hindsight_point("policy", threshold, on_dev, dev, accuracy)
            tried.append((abs(point.depth - depth), point.metrics["accuracy"], threshold, on_test))
        near = [one for one in tried if one[0] <= DEPTH_TOLERANCE]
        best = max(near, key=lambda one: one[1]) if near else min(tried, key=lambda one: one[0])
        expected.append(hindsight_point("policy", best[2], best[3], test, accuracy))
    by_depth = {point.depth: point for point in expected}
    assert comparison.curves["family"] == [by_depth[depth] for depth in sorted(by_depth)]
    assert list(comparison.matched["family"]) == depths
