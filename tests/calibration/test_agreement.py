# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Agreement: running, conformal and certified thresholds against loops, and their levels over many splits."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from populations import halves, population, slow_exit
from scipy.stats import binom

from transformers_cee.calibration.agreement import calibrate_agreement, conformal_agreement, running_agreement
from transformers_cee.calibration.risk import certified_threshold


SPLITS = 200


def slow_running(scores: list[float], wrong: list[bool], epsilon: Fraction, coverage: str) -> float:
    """One exit, with exact fractions."""
    order = sorted(range(len(scores)), key=lambda row: -scores[row])
    valid = []
    for count in range(1, len(order) + 1):
        if count < len(order) and scores[order[count]] == scores[order[count - 1]]:
            continue
        right = sum(not wrong[row] for row in order[:count])
        if Fraction(right, count) >= 1 - epsilon:
            valid.append(count)
    if not valid:
        return scores[order[0]]
    return scores[order[(max if coverage == "max" else min)(valid) - 1]]


def slow_conformal(rows: list[list[float]], wrong: list[list[bool]], epsilon: Fraction, published: bool) -> float:
    highest = []
    for scores, flags in zip(rows, wrong, strict=True):
        bad = [score for score, flag in zip(scores, flags, strict=False) if flag]
        if bad or not published:
            highest.append(max(bad, default=-math.inf))
    highest = sorted([*highest, math.inf])
    if published:
        return highest[math.ceil((1 - epsilon) * (len(highest) - 1))]
    return highest[math.ceil((1 - epsilon) * len(highest)) - 1]


@st.composite
def cases(draw):
    rows, exits = draw(st.integers(1, 12)), draw(st.integers(1, 3))
    value = st.integers(0, 5).map(lambda step: step / 8)
    scores = [[draw(value) for _ in range(exits)] for _ in range(rows)]
    wrong = [[*(draw(st.booleans()) for _ in range(exits)), False] for _ in range(rows)]
    return scores, wrong, Fraction(draw(st.integers(1, 19)), 20)


class TestAgainstLoops:
    @given(cases(), st.sampled_from(["max", "min"]))
    def test_running(self, case, coverage):
        scores, wrong, epsilon = case
        found = running_agreement(torch.tensor(scores), torch.tensor(wrong), float(epsilon), coverage)
        for index, threshold in enumerate(found.tolist()):
            column, flags = [row[index] for row in scores], [row[index] for row in wrong]
            assert threshold == slow_running(column, flags, epsilon, coverage)

    @given(cases(), st.booleans())
    def test_conformal(self, case, published):
        scores, wrong, epsilon = case
        found = conformal_agreement(torch.tensor(scores), torch.tensor(wrong), float(epsilon), published)
        assert found == slow_conformal(scores, wrong, epsilon, published)
        assert published or found <= conformal_agreement(
            torch.tensor(scores), torch.tensor(wrong), float(epsilon), True
        )

    @given(cases(), st.sampled_from([0.05, 0.3, 0.9]))
    def test_certified(self, case, delta):
        scores, wrong, epsilon = case
        expected = None
        # From infinity down; between two scores nothing changes.
        for threshold in sorted({score for row in scores for score in row} | {-math.inf}, reverse=True):
            pairs = zip(scores, wrong, strict=True)
            errors = sum(flags[slow_exit(row, [threshold] * len(row))] for row, flags in pairs)
            if binom.cdf(errors, len(scores), float(epsilon)) > delta:
                break
            expected = threshold
        losses = torch.tensor(wrong).double()
        found = certified_threshold(torch.tensor(scores), losses, float(epsilon), delta, "binomial")
        assert found == expected


class TestOverSplits:
    @pytest.mark.parametrize("correlation", [0.0, 0.6, 1.0])
    @pytest.mark.parametrize("epsilon", [0.1, 0.25])
    def test_levels_hold(self, correlation, epsilon):
        everything = population(4000, correlation=correlation, seed=3)
        kept, means = 0, []
        for split in range(SPLITS):
            rows, _ = halves(4000, split)
            calibration = everything.select(rows[:400])
            certified = calibrate_agreement(calibration, epsilon, delta=0.1).check(everything)
            kept += certified.held_out["kept"]
            others = everything.select(rows[400:])
            means.append(calibrate_agreement(calibration, epsilon, "conformal").check(others).held_out["agreement"])
            assert certified.held_out["depth"] < 8
        # The population is all rows: at most a tenth may fail, and a little chance.
        assert kept / SPLITS >= 0.9 - 2 * math.sqrt(0.09 / SPLITS)
        assert sum(means) / SPLITS >= 1 - epsilon - 0.005

    def test_running_agreement_promises_less(self):
        everything = population(4000, correlation=0.5, seed=3)
        kept = 0
        for split in range(SPLITS // 4):
            rows, others = halves(4000, split)
            found = calibrate_agreement(everything.select(rows[:400]), 0.1, "running")
            kept += found.check(everything.select(others)).held_out["kept"]
        assert kept < 0.9 * (SPLITS // 4)


class TestSpecialCases:
    @pytest.mark.parametrize("method", ["certified", "conformal"])
    def test_too_few_rows(self, method):
        needed = {"certified": 299, "conformal": 99}[method]
        sure = replace(population(needed), disagrees=torch.zeros(needed, 8, dtype=torch.bool))
        found = calibrate_agreement(sure, 0.01, method)
        assert found.reason is None and found.check(sure).held_out["depth"] == 1
        fewer = sure.select(torch.arange(needed - 1))
        with pytest.warns(UserWarning, match=f"at least {needed}"):
            found = calibrate_agreement(fewer, 0.01, method)
        assert str(needed) in found.reason and found.check(fewer).held_out["depth"] == 8

    @pytest.mark.parametrize("epsilon", [0.01, 0.05, 0.1, 0.2, 0.3])
    def test_too_few_rows_that_disagree(self, epsilon):
        """The released code's quantile is finite from as many rows on as the reason says."""
        needed = math.ceil(1 / epsilon - 1e-9)
        wrong = replace(population(needed), disagrees=torch.tensor([[True] * 7 + [False]] * needed))
        assert calibrate_agreement(wrong, epsilon, "conformal", published=True).reason is None
        fewer = wrong.select(torch.arange(needed - 1))
        with pytest.warns(UserWarning, match=rf"^Exits are off: {needed - 1} .* at least {needed}\."):
            calibrate_agreement(fewer, epsilon, "conformal", published=True)

    @pytest.mark.parametrize("method", ["certified", "conformal", "running"])
    def test_one_row_and_one_exit(self, method):
        alone = population(300, exits=1)
        assert calibrate_agreement(alone, 0.05, method).check(alone).held_out["agreement"] == 1
        one = population(1, seed=2)
        if method == "running":
            assert calibrate_agreement(one, 0.05, method).check(one).held_out["depth"] == 8
        else:
            with pytest.warns(UserWarning, match="too few"):
                calibrate_agreement(one, 0.05, method)

    @pytest.mark.parametrize("method", ["certified", "conformal", "running"])
    def test_constant_scores_leave_together(self, method):
        everything = population(500, seed=2)
        constant = replace(everything, scores=torch.full_like(everything.scores, 0.7))
        exits = calibrate_agreement(constant, 0.1, method).taken_exits(constant)
        assert set(exits.tolist()) == {7}
        easy = replace(constant, disagrees=torch.zeros_like(constant.disagrees))
        depth = calibrate_agreement(easy, 0.1, method).check(easy).held_out["depth"]
        # Strictly above its own score nobody leaves, as published.
        assert depth == (8 if method == "running" else 1)

    @pytest.mark.parametrize("method", ["certified", "conformal", "running"])
    def test_directions_are_one(self, method):
        sure, entropy = population(500, seed=4), population(500, seed=4, criterion="entropy")
        one = calibrate_agreement(sure, 0.2, method).check(sure).held_out
        other = calibrate_agreement(entropy, 0.2, method).check(entropy).held_out
        assert one == other and 1 < one["depth"] < 8

    def test_tokens_count_as_texts(self):
        everything = population(600, seed=4)
        groups = torch.arange(600) // 3
        found = calibrate_agreement(replace(everything, groups=groups), 0.2)
        assert found.rows == 200
        # The same tokens three times over certify nothing more than once.
        thrice = replace(everything.select(groups), groups=groups)
        once = calibrate_agreement(replace(everything.select(torch.arange(200)), groups=torch.arange(200)), 0.2)
        assert calibrate_agreement(thrice, 0.2).thresholds == once.thresholds
        assert calibrate_agreement(replace(thrice, groups=None), 0.2).thresholds != once.thresholds

    @pytest.mark.parametrize("epsilon", [0.0, 1.0, -0.1, 1.5, "0.1", True, math.nan])
    @pytest.mark.parametrize("method", ["certified", "conformal", "running"])
    def test_epsilon_is_a_share(self, epsilon, method):
        with pytest.raises(ValueError, match="`epsilon`="):
            calibrate_agreement(population(5), epsilon, method)

    def test_errors(self):
        with pytest.raises(ValueError, match="`method`='best' is unknown"):
            calibrate_agreement(population(5), 0.1, "best")
        with pytest.raises(ValueError, match="`delta`=0"):
            calibrate_agreement(population(5), 0.1, delta=0)
        with pytest.raises(ValueError, match="`coverage`='all' is unknown"):
            calibrate_agreement(population(5), 0.1, "running", coverage="all")
