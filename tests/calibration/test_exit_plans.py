# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Which exits to ask at given thresholds: rates of held-out rows against loops, plans against all subsets."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from cost_tables import cost_table, measured_batch
from hypothesis import given
from hypothesis import strategies as st
from populations import population
from safetensors.torch import save_file
from slow_batches import all_subsets, slow_seconds

from transformers_cee import ExitRates, plan_exits
from transformers_cee.calibration import exit_subsets
from transformers_cee.calibration.exit_plans import rates_at


LAYERS = [2, 3, 5, 8]


def rates(rows=6, seed=0, criterion="max_probability", **options) -> ExitRates:
    scores = population(rows, 4, seed=seed, criterion=criterion)
    return replace(ExitRates.of(scores), layers=torch.tensor(LAYERS), **options)


class TestRates:
    @pytest.mark.parametrize("criterion", ["max_probability", "entropy"])
    @pytest.mark.parametrize("thresholds", [0.5, [0.9, 0.2, 0.6, 0.5]])
    def test_who_comes_past_each_exit(self, criterion, thresholds):
        held_out = rates(50, criterion=criterion)
        limits = thresholds if isinstance(thresholds, list) else [thresholds] * 4
        counts = dict.fromkeys(LAYERS[:-1], 0)
        for row in held_out.scores.tolist():
            for layer, score, limit in zip(LAYERS, row, limits, strict=False):
                if score < limit if criterion == "entropy" else score > limit:
                    break
                counts[layer] += 1
        found = held_out.survivors(thresholds)
        assert found == {layer: count / 50 for layer, count in counts.items()} and 0 < found[5] < 1

    def test_a_criterion_that_leaves_at_its_threshold(self):
        scores = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 1.0]])
        found = ExitRates("patience", scores, torch.tensor([1, 2, 3, 4]), has_memory=True)
        assert found.survivors(2.0) == {1: 1.0, 2: 1.0, 3: 0.5} and found.survivors(1.0) == {1: 1.0, 2: 0.5, 3: 0.0}

    def test_prices_between_others(self):
        low, middle, high = (rates(seed=number, alpha=price) for number, price in enumerate((0.01, 0.04, 0.1)))
        prices = (low, middle, high)
        assert [rates_at(prices, alpha) for alpha in (0.001, 0.01, 0.04, 0.1, 0.5)] == [low, low, middle, high, high]
        # Half way from 0.01 to 0.04 in the logarithm.
        between = rates_at(prices, 0.02)
        torch.testing.assert_close(between.scores, (low.scores + middle.scores) / 2)
        assert between.alpha == 0.02 and rates_at(prices, 0.02) is between and rates_at((low,), 7.0) is low

    def test_as_many_rows_as_fit(self, tmp_path):
        scores = population(5000, 12)
        found = ExitRates.of(scores, seed=3)
        found.save(tmp_path / "rates.safetensors")
        size = (tmp_path / "rates.safetensors").stat().st_size
        assert 95_000 < size < 101_000 and torch.equal(found.scores, ExitRates.of(scores, seed=3).scores)
        assert not torch.equal(found.scores, ExitRates.of(scores, seed=4).scores)
        for threshold in (0.6, 0.8, 0.95):
            whole = ExitRates("max_probability", scores.scores, scores.layers).survivors(threshold)
            # Four standard errors of a share, had they been drawn with replacement.
            assert found.survivors(threshold) == pytest.approx(whole, abs=2 / math.sqrt(len(found.scores)))
        assert len(ExitRates.of(population(30, 12)).scores) == 30

    def test_what_comes_from_scores(self):
        scores = replace(population(9, 4), alpha=0.5, has_memory=True)
        found = ExitRates.of(scores)
        assert torch.equal(found.scores, scores.scores) and torch.equal(found.layers, scores.layers)
        assert (found.criterion, found.alpha, found.has_memory) == ("max_probability", 0.5, True)

    @pytest.mark.parametrize("alpha", [None, 0.3])
    @pytest.mark.parametrize("has_memory", [True, False])
    def test_files(self, tmp_path, alpha, has_memory):
        held_out = rates(has_memory=has_memory, alpha=alpha)
        held_out.save(tmp_path / "rates.safetensors")
        loaded = ExitRates.load(tmp_path / "rates.safetensors")
        for name in ("criterion", "has_memory", "alpha"):
            assert getattr(loaded, name) == getattr(held_out, name)
        assert torch.equal(loaded.scores, held_out.scores) and torch.equal(loaded.layers, held_out.layers)

    def test_no_rates(self, tmp_path):
        path = tmp_path / "rates.safetensors"
        good = {"scores": torch.zeros(2, 1), "layers": torch.tensor([1, 2])}
        about = {"criterion": "margin", "has_memory": "False", "alpha": "None"}
        save_file(good, path, metadata=about)
        assert ExitRates.load(path).criterion == "margin"
        for tensors, metadata in (
            (good, None),
            (good, {**about, "criterion": "none of ours"}),
            (good, {**about, "has_memory": "perhaps"}),
            (good, {**about, "alpha": "much"}),
            (good, {"criterion": "margin"}),
            ({"scores": good["scores"]}, about),
            ({**good, "scores": torch.full((2, 1), math.nan)}, about),
            ({**good, "scores": torch.zeros(2, 3)}, about),
            ({**good, "scores": torch.zeros(0, 1)}, about),
            ({**good, "layers": torch.tensor([2, 2])}, about),
            ({**good, "layers": torch.tensor([0, 2])}, about),
            ({**good, "layers": torch.tensor([1.0, 2.0])}, about),
        ):
            save_file(tensors, path, metadata=metadata)
            with pytest.raises(ValueError, match="holds no rates of exits"):
                ExitRates.load(path)
        path.write_bytes(b"text")
        with pytest.raises(ValueError, match="holds no rates of exits"):
            ExitRates.load(path)
        with pytest.raises(FileNotFoundError):
            ExitRates.load(tmp_path / "nowhere")


class TestPlans:
    @given(
        st.integers(0, 50),
        st.integers(1, 2),
        st.lists(st.sampled_from([0.3, 0.5, 0.7, 0.9, 1.0]), min_size=4, max_size=4),
        st.sampled_from([0.0, 0.5, 2.0, 8.0]),
    )
    def test_against_all_subsets(self, seed, batch_size, thresholds, check):
        held_out, table = rates(5, seed), cost_table(check=check)
        # A row leaves where 1 is above 0.
        leaves = held_out.leaves(thresholds).float().tolist()
        expected = {
            tuple(LAYERS[index] for index in exits): slow_seconds(table, LAYERS, leaves, exits, 0.0, batch_size, 2)
            for exits in all_subsets(3)
        }
        found = plan_exits(held_out, thresholds, table, batch_size, 2)
        assert found.is_exact and found.seconds == pytest.approx(min(expected.values()), rel=1e-9)
        assert found.seconds == pytest.approx(expected[found.exit_layers], rel=1e-9)
        assert found.full_seconds == pytest.approx(expected[()], rel=1e-9) and found.seconds <= found.full_seconds
        asked = [LAYERS.index(layer) for layer in found.exit_layers]
        vain = slow_seconds(table, LAYERS, [[0.0] * 3], asked, 0.0, batch_size, 2) - found.full_seconds
        assert found.in_vain == pytest.approx(vain, abs=1e-9)

    @given(st.integers(0, 20), st.sampled_from([0.3, 0.5, 0.7]), st.sampled_from([0.0, 0.5, 2.0]))
    def test_memory_is_asked_from_the_first_exit_on(self, seed, threshold, check):
        held_out, table = rates(5, seed, has_memory=True), cost_table(check=check)
        leaves = held_out.leaves(threshold).float().tolist()
        expected = {
            tuple(LAYERS[:stop]): slow_seconds(table, LAYERS, leaves, range(stop), 0.0, 2, 2) for stop in range(4)
        }
        found = plan_exits(held_out, threshold, table, 2, 2)
        assert found.seconds == pytest.approx(min(expected.values()), rel=1e-9) and found.exit_layers in expected

    def test_what_does_not_pay_is_not_asked(self):
        held_out = rates(500)
        # Checks as dear as all layers; then free ones; then thresholds that let nobody out.
        assert plan_exits(held_out, 0.5, cost_table(check=50.0), 1, 2).exit_layers == ()
        free = cost_table([measured_batch(1, 2, block=0.0, check=-1 / 16)])
        assert plan_exits(held_out, 0.5, free, 1, 2).exit_layers == (2, 3, 5)
        assert plan_exits(held_out, 1.0, free, 1, 2).exit_layers == ()
        only_one = plan_exits(held_out, [1.0, 0.5, 1.0, 1.0], free, 1, 2)
        assert only_one.exit_layers == (3,) and only_one.seconds < only_one.full_seconds

    def test_one_row_may_pay_where_a_batch_does_not(self):
        # Eight rows take as long as one does: only an empty batch saves anything.
        flat = cost_table([measured_batch(1, 1), replace(measured_batch(1, 1), batch_size=8)])
        held_out = rates(500)
        assert plan_exits(held_out, 0.6, flat, 1, 1).exit_layers
        assert not plan_exits(held_out, 0.6, flat, 8, 1).exit_layers

    def test_never_more_than_without_exits(self, monkeypatch):
        for many in (False, True):
            if many:
                monkeypatch.setattr(exit_subsets, "MAX_EXACT_EXITS", 2)
            held_out, table = ExitRates.of(population(300, 8, seed=int(many))), cost_table(check=4.0)
            for threshold in torch.linspace(0.05, 0.95, 10).tolist():
                found = plan_exits(held_out, threshold, table, 4, 3)
                assert found.seconds <= found.full_seconds and found.is_exact is not many

    def test_a_model_with_its_last_exit_alone(self):
        alone = ExitRates("margin", torch.zeros(3, 0), torch.tensor([8]))
        found = plan_exits(alone, 0.5, cost_table(), 2, 2)
        assert found.exit_layers == () and found.seconds == found.full_seconds and alone.survivors(0.5) == {}

    def test_the_same_question_is_answered_from_memory(self):
        held_out, table = rates(20), cost_table()
        found = plan_exits(held_out, 0.5, table, 2, 2)
        assert plan_exits(held_out, [0.5] * 4, table, np.int64(2), 2.0) is found
        assert plan_exits(held_out, torch.tensor(0.5), table, 2, 2) is found
        assert plan_exits(replace(held_out), 0.5, table, 2, 2) is not found

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"thresholds": 1.5}, "`exit_threshold`=1.5"),
            ({"thresholds": [0.5, 0.5]}, "`exit_threshold` has 2 values"),
            ({"thresholds": [[0.5]] * 4}, "`exit_threshold`="),
            ({"batch_size": 0}, "`batch_size`=0"),
            ({"batch_size": 2.5}, "`batch_size`=2.5"),
            ({"length": 0}, "`length`=0"),
            ({"length": math.nan}, "`length`=nan"),
            ({"costs": cost_table(exits=(2, 5, 8))}, r"checks at layers \[2, 5, 8\]"),
            ({"costs": cost_table(layers=9)}, "needed are exits at layers"),
        ],
    )
    def test_wrong_arguments(self, change, message):
        arguments = {"rates": rates(), "thresholds": 0.5, "costs": cost_table(), "batch_size": 2, "length": 2}
        with pytest.raises(ValueError, match=message):
            plan_exits(**{**arguments, **change})
