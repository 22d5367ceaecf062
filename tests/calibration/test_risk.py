# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Learn-then-Test against loops with math only, its level over many splits, and errors."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from populations import halves, population, slow_exit

from transformers_cee.calibration.risk import (
    calibrate_risk,
    certified_threshold,
    fixed_sequence,
    risk_p_values,
)
from transformers_cee.calibration.scores import excess_risk


SPLITS = 200


def slow_binomial(most: int, rows: int, level: float) -> float:
    return sum(math.comb(rows, k) * level**k * (1 - level) ** (rows - k) for k in range(min(most, rows) + 1))


def slow_p_value(losses: list[float], level: float, p_value: str) -> float:
    rows, total = len(losses), math.fsum(losses)
    risk = total / rows
    if p_value == "hoeffding":
        return math.exp(-2 * rows * max(0.0, level - risk) ** 2)
    if p_value == "binomial":
        return slow_binomial(round(total), rows, level)
    low = min(risk, level)
    parts = [
        (low * math.log(low / level) if low > 0 else 0.0),
        (1 - low) * math.log((1 - low) / (1 - level)) if low < 1 else 0.0,
    ]
    bentkus = math.e * slow_binomial(math.ceil(total - 1e-9), rows, level)
    return min(1.0, math.exp(-rows * sum(parts)), bentkus)


class TestPValues:
    @given(
        st.lists(st.integers(0, 4), min_size=1, max_size=30),
        st.sampled_from([0.05, 0.25, 0.5, 0.9]),
        st.sampled_from(["hoeffding_bentkus", "hoeffding", "binomial"]),
    )
    def test_are_what_the_formulas_say(self, steps, level, p_value):
        losses = [float(step > 2) if p_value == "binomial" else step / 4 for step in steps]
        risks = torch.tensor([sum(losses) / len(losses)], dtype=torch.double)
        found = float(risk_p_values(risks, len(losses), level, p_value))
        assert found == pytest.approx(slow_p_value(losses, level, p_value), rel=1e-9, abs=1e-12)

    @pytest.mark.parametrize("p_value", ["hoeffding_bentkus", "hoeffding", "binomial"])
    def test_are_rarely_small_under_the_hypothesis(self, p_value):
        generator = torch.Generator().manual_seed(0)
        losses = (torch.rand(2000, 50, generator=generator) < 0.2).double()
        values = risk_p_values(losses.mean(1), 50, 0.2, p_value)
        for delta in (0.05, 0.1, 0.3):
            assert float((values <= delta).double().mean()) <= delta + 2 * math.sqrt(delta / 2000)
        # Order of the rows does not matter.
        torch.testing.assert_close(values.flip(0), risk_p_values(losses.mean(1).flip(0), 50, 0.2, p_value))


class TestSequence:
    @given(st.data())
    def test_stops_at_the_first_that_fails(self, data):
        rows, steps = data.draw(st.integers(1, 15)), data.draw(st.integers(1, 6))
        value = st.integers(0, 2).map(lambda step: step / 2)
        losses = [[data.draw(value) for _ in range(steps)] for _ in range(rows)]
        expected = 0
        for step in range(steps):
            if slow_p_value([row[step] for row in losses], 0.4, "hoeffding_bentkus") > 0.3:
                break
            expected += 1
        assert fixed_sequence(torch.tensor(losses), 0.4, 0.3) == expected

    @given(st.data())
    def test_every_threshold_is_tested(self, data):
        rows, exits = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 3))
        value = st.integers(0, 4).map(lambda step: step / 4)
        scores = [[data.draw(value) for _ in range(exits)] for _ in range(rows)]
        losses = [[data.draw(value) for _ in range(exits + 1)] for _ in range(rows)]
        groups = data.draw(st.one_of(st.none(), st.lists(st.integers(0, 3), min_size=rows, max_size=rows)))
        expected = None
        for threshold in sorted({score for row in scores for score in row} | {-math.inf}, reverse=True):
            taken = [loss[slow_exit(row, [threshold] * exits)] for row, loss in zip(scores, losses, strict=True)]
            if groups is not None:
                members = [
                    [loss for loss, group in zip(taken, groups, strict=True) if group == one] for one in range(4)
                ]
                taken = [sum(some) / len(some) for some in members if some]
            if slow_p_value(taken, 0.6, "hoeffding_bentkus") > 0.5:
                break
            expected = threshold
        found = certified_threshold(
            torch.tensor(scores),
            torch.tensor(losses),
            0.6,
            0.5,
            groups=None if groups is None else torch.tensor(groups),
        )
        assert found == expected


class TestRisk:
    @pytest.mark.parametrize("p_value", ["hoeffding_bentkus", "binomial", "hoeffding"])
    @pytest.mark.parametrize("risk,level", [("error", 0.26), ("excess_error", 0.1)])
    def test_level_holds_over_splits(self, p_value, risk, level):
        everything = population(4000, correlation=0.4, seed=3)
        if risk == "excess_error":
            everything = replace(everything, losses=excess_risk(everything.losses), risk=risk)
        violated, depths = 0, []
        for split in range(SPLITS):
            rows, _ = halves(4000, split)
            found = calibrate_risk(everything.select(rows[:500]), level, 0.1, p_value).check(everything)
            violated += not found.held_out["kept"]
            depths.append(found.held_out["depth"])
        assert violated / SPLITS <= 0.1 + 2 * math.sqrt(0.09 / SPLITS)
        assert sum(depths) / SPLITS < 7.5

    def test_the_bolder_level_is_not_deeper(self):
        everything = population(800, seed=3)
        depths = [
            calibrate_risk(everything, level).check(everything).held_out["depth"] for level in (0.21, 0.24, 0.3, 0.6)
        ]
        assert depths == sorted(depths, reverse=True) and depths[-1] == 1

    @pytest.mark.parametrize("criterion", ["max_probability", "entropy"])
    def test_grid(self, criterion):
        everything = population(800, seed=3, criterion=criterion)
        grid = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4] if criterion != "entropy" else [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
        found = calibrate_risk(everything, 0.24, grid=grid)
        free = calibrate_risk(everything, 0.24)
        expected = None
        for threshold in grid:
            sign = 1 if criterion != "entropy" else -1
            rows = (sign * everything.scores).tolist()
            taken = [
                loss[slow_exit(row, [sign * threshold] * 7)]
                for row, loss in zip(rows, everything.losses.tolist(), strict=True)
            ]
            if slow_p_value(taken, 0.24, "hoeffding_bentkus") > 0.05:
                break
            expected = threshold
        assert found.thresholds == [expected] * 8
        assert grid[0] != expected != grid[-1]
        assert free.check(everything).held_out["depth"] <= found.check(everything).held_out["depth"]
        with pytest.raises(ValueError, match="safe to bold"):
            calibrate_risk(everything, 0.24, grid=grid[::-1])
        with pytest.raises(ValueError, match="`grid` is empty"):
            calibrate_risk(everything, 0.24, grid=[])

    @pytest.mark.parametrize("grid", [None, [1.0, 0.5]])
    def test_nothing_passes(self, grid):
        everything = population(400, seed=3)
        with pytest.warns(UserWarning, match="do not certify"):
            found = calibrate_risk(everything, 0.05, grid=grid)
        assert found.thresholds == [1.0] * 8 and "0.05" in found.reason
        assert found.check(everything).held_out["depth"] == 8

    def test_one_exit_and_one_row(self):
        alone = population(400, exits=1)
        assert calibrate_risk(alone, 0.6).check(alone).held_out["depth"] == 1
        with pytest.warns(UserWarning, match="1 calibration rows"):
            assert calibrate_risk(population(1), 0.3).reason

    @pytest.mark.parametrize("level", [0, 1, -0.5, 2.0])
    def test_levels_are_shares(self, level):
        with pytest.raises(ValueError, match="`level`="):
            calibrate_risk(population(5), level)
        with pytest.raises(ValueError, match="`delta`="):
            calibrate_risk(population(5), 0.5, delta=level)

    def test_losses_must_suit(self):
        everything = population(5)
        with pytest.raises(ValueError, match=r"lie in 0.0..3.0; accepted are 0..1"):
            calibrate_risk(replace(everything, losses=torch.linspace(0, 3, 40).view(5, 8)), 0.5)
        with pytest.raises(ValueError, match="'binomial' accepts losses of 0 and 1"):
            calibrate_risk(replace(everything, losses=torch.full((5, 8), 0.5)), 0.5, p_value="binomial")
        with pytest.raises(ValueError, match="`p_value`='t' is unknown"):
            calibrate_risk(everything, 0.5, p_value="t")
        with pytest.raises(ValueError, match="no rows"):
            fixed_sequence(torch.zeros(0, 3), 0.5, 0.1)
        with pytest.raises(ValueError, match=r"`losses` of shape \(50,\) must be \(rows, steps\)"):
            fixed_sequence(torch.zeros(50), 0.5, 0.1)
        with pytest.raises(ValueError, match=r"`groups` of shape \(4,\) must be \(5,\)"):
            fixed_sequence(torch.zeros(5, 3), 0.5, 0.1, groups=torch.zeros(4))
        with pytest.raises(ValueError, match="NaN stands for rows without labels"):
            calibrate_risk(replace(everything, losses=torch.full_like(everything.losses, math.nan)), 0.5)
