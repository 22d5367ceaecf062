# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""EERO and its refinement against loops, its rates against scipy, and budgets over many splits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from populations import halves, population, slow_exit
from scipy.optimize import brentq

from transformers_cee.calibration.budget import (
    calibrate_budget,
    conditional_thresholds,
    eero_rates,
    eero_thresholds,
    with_rejection,
)
from transformers_cee.calibration.scores import ExitScores, leave_at


SPLITS = 80
BUDGETS = (2.0, 3.0, 4.5, 6.0, 7.0)


def slow_rates(risks: list[float], costs: list[float], mu: float, beta: float) -> list[float]:
    prior = [1 / cost for cost in costs]
    weights = [one * math.exp(-(risk + mu * cost) / beta) for one, risk, cost in zip(prior, risks, costs, strict=True)]
    return [weight / sum(weights) for weight in weights]


def slow_eero_walk(rows: list[list[float]], rates: list[float], fitted: list[list[float]]) -> list[int]:
    """Algorithm 1 with counted distribution functions."""
    exits = []
    for scores in rows:
        taken = len(scores)
        for index, score in enumerate(scores):
            share = sum(row[index] <= score for row in fitted) / len(fitted)
            accepted = sum(rates[: index + 1]) + rates[index] / math.sqrt(len(fitted))
            if share >= 1 - accepted - 1e-9:
                taken = index
                break
        exits.append(taken)
    return exits


def slow_conditional(rows: list[list[float]], rates: list[float]) -> list[float]:
    thresholds, remaining = [], list(rows)
    for index in range(len(rates) - 1):
        stay = math.floor(len(rows) * (1 - sum(rates[: index + 1])) + 1e-9)
        stay = max(stay, 0)
        ordered = sorted(row[index] for row in remaining)
        if stay >= len(ordered):
            thresholds.append(math.inf)
            continue
        thresholds.append(max((score for score in ordered if score < ordered[stay]), default=-math.inf))
        remaining = [row for row in remaining if row[index] <= thresholds[-1]]
    return thresholds


positive = st.floats(0.05, 5.0)
shares = st.floats(0.0, 1.0)


class TestRates:
    @given(st.lists(st.tuples(shares, positive), min_size=2, max_size=6), st.floats(0.02, 0.98), st.booleans())
    def test_against_a_root_finder(self, exits, place, fill):
        risks, costs = [risk for risk, _ in exits], []
        for _, step in exits:
            costs.append(step + (costs[-1] if costs else 0.0))
        budget = costs[0] + place * (costs[-1] - costs[0])
        found = eero_rates(risks, costs, budget, beta=0.5, fill=fill)

        def left(mu: float) -> float:
            rates = slow_rates(risks, costs, mu, 0.5)
            return budget - sum(rate * cost for rate, cost in zip(rates, costs, strict=True))

        if left(0.0) >= 0 and not fill:
            mu = 0.0
        else:
            low, high = -1.0, 1.0
            while left(low) > 0:
                low *= 2
            while left(high) < 0:
                high *= 2
            mu = brentq(left, low, high, xtol=1e-13)
        assert found.tolist() == pytest.approx(slow_rates(risks, costs, mu, 0.5), abs=1e-6)
        mean = float(found @ torch.tensor(costs, dtype=torch.double))
        assert mean <= budget * (1 + 1e-9)
        if fill:
            assert mean == pytest.approx(budget)

    def test_one_auxiliary_exit(self):
        # Proposition C.1.
        assert float(eero_rates([0.4, 0.1], [1.0, 4.0], 3.0)[0]) == pytest.approx((3 - 4) / (1 - 4))

    @given(st.floats(0.01, 0.99), st.floats(0.0, 0.3))
    def test_margin(self, place, margin):
        costs = torch.arange(1, 9).double()
        budget = 1 + 7 * place
        rates = eero_rates([0.1] * 8, costs, budget, fill=True, margin=margin)
        mean = float(rates @ costs)
        spread = math.sqrt(
            sum(rate * (cost - mean) ** 2 for rate, cost in zip(rates.tolist(), costs.tolist(), strict=True))
        )
        assert mean + margin * spread == pytest.approx(budget, rel=1e-6)

    @pytest.mark.parametrize("fill", [False, True])
    def test_ends(self, fill):
        assert eero_rates([0.4, 0.1], [1.0, 4.0], 1.0, fill=fill).tolist() == [1.0, 0.0]
        assert eero_rates([0.4], [1.0], 2.0, fill=fill).tolist() == [1.0]
        assert float(eero_rates([0.4, 0.1], [1.0, 4.0], 9.0, fill=fill)[0]) == pytest.approx(
            0.0 if fill else slow_rates([0.4, 0.1], [1.0, 4.0], 0.0, 0.04)[0]
        )

    def test_errors(self):
        for costs in ([1.0, 1.0], [2.0, 1.0], [0.0, 1.0], [1.0, math.inf], [1.0, math.nan]):
            with pytest.raises(ValueError, match="`costs`="):
                eero_rates([0.4, 0.1], costs, 3.0)
        for risks in ([0.4], [0.4, math.nan], [0.4, 0.2, 0.1], [math.inf, 0.1]):
            with pytest.raises(ValueError, match=r"`risks`=.* must be 2 finite numbers"):
                eero_rates(risks, [1.0, 4.0], 3.0)
        for beta in (math.nan, math.inf, -1.0):
            with pytest.raises(ValueError, match="`beta`="):
                eero_rates([0.4, 0.1], [1.0, 4.0], 2.0, beta=beta)
        with pytest.raises(ValueError, match="must be a number of at least 1,"):
            eero_rates([0.4, 0.1], [1.0, 4.0], 0.5)
        with pytest.raises(ValueError, match="`beta`=0"):
            eero_rates([0.4, 0.1], [1.0, 4.0], 2.0, beta=0)
        with pytest.raises(ValueError, match="`margin`=-1"):
            eero_rates([0.4, 0.1], [1.0, 4.0], 2.0, margin=-1)


@st.composite
def walks(draw):
    rows, exits = draw(st.integers(1, 15)), draw(st.integers(1, 4))
    value = st.integers(0, 6).map(lambda step: step / 8)
    scores = [[draw(value) for _ in range(exits)] for _ in range(rows)]
    parts = [draw(st.integers(0, 6)) for _ in range(exits + 1)]
    total = sum(parts) or 1
    rates = [part / total for part in parts] if sum(parts) else [*[0.0] * exits, 1.0]
    return scores, rates


class TestThresholds:
    @given(walks(), walks())
    def test_eero_leaves_as_algorithm_1(self, case, other):
        scores, rates = case
        rows = [*scores, *([row[:1] * len(scores[0]) for row in other[0]])]
        found = eero_thresholds(torch.tensor(scores), torch.tensor(rates, dtype=torch.double), noise=0.0)
        assert leave_at(torch.tensor(rows), found).tolist() == slow_eero_walk(rows, rates, scores)

    def test_noise_breaks_ties(self):
        scores = torch.full((1000, 2), 0.5)
        rates = torch.tensor([0.3, 0.3, 0.4]).double()
        whole = leave_at(scores, eero_thresholds(scores, rates, noise=0.0))
        assert set(whole.tolist()) == {0}
        noise = 1e-5 * torch.rand(1000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.double)
        thresholds = eero_thresholds(scores, rates, seed=0)
        left = leave_at(scores + noise.float(), thresholds).bincount(minlength=3)
        assert 0.28 < float(left[0]) / 1000 < 0.4
        assert not torch.equal(thresholds, eero_thresholds(scores, rates, seed=1))

    @given(walks())
    def test_conditional(self, case):
        scores, rates = case
        found = conditional_thresholds(torch.tensor(scores), torch.tensor(rates, dtype=torch.double))
        assert found.tolist() == slow_conditional(scores, rates)
        exits = leave_at(torch.tensor(scores), found)
        for index in range(len(rates) - 1):
            behind = int((exits > index).sum())
            assert behind <= len(scores) * (1 - sum(rates[: index + 1])) + 1e-6

    def test_conditional_rates_are_met_without_ties(self):
        scores = torch.rand(1000, 3, generator=torch.Generator().manual_seed(0))
        exits = leave_at(
            scores, conditional_thresholds(scores, torch.tensor([0.2, 0.1, 0.4, 0.3], dtype=torch.double))
        )
        assert exits.bincount().tolist() == [200, 100, 400, 300]


class TestOverSplits:
    @pytest.mark.parametrize("correlation,refine", [(0.0, False), (0.5, False), (0.3, True), (1.0, True)])
    def test_budget_holds(self, correlation, refine):
        everything = population(1200, correlation=correlation, seed=3)
        used = {budget: [] for budget in BUDGETS}
        for split in range(SPLITS):
            rows, others = (everything.select(rows) for rows in halves(1200, split))
            for budget, values in used.items():
                values.append(calibrate_budget(rows, budget, refine=refine).check(others).held_out["used_budget"])
        for values in used.values():
            assert sum(share <= 1 for share in values) / SPLITS >= 0.95
            assert not refine or sum(values) / SPLITS >= 0.9

    def test_one_quantile_per_exit_uses_less_when_exits_rank_differently(self):
        everything = population(2000, correlation=0.0, seed=3)
        published = calibrate_budget(everything, 4.5, refine=False).check(everything)
        refined = calibrate_budget(everything, 4.5).check(everything)
        assert published.held_out["used_budget"] < 0.8 < 0.9 < refined.held_out["used_budget"]

    def test_a_batch_of_one_needs_more_room(self):
        everything = population(2000, seed=3)
        means = [
            calibrate_budget(everything, 4.5, batch_rows=rows).check(everything).held_out["mean_cost"]
            for rows in (20, 2000, 10**9)
        ]
        assert means == sorted(means) and means[0] < means[1] < means[2] < 4.5


class TestSpecialCases:
    @pytest.mark.parametrize("refine", [False, True])
    def test_ends(self, refine):
        everything = population(50)
        with pytest.raises(ValueError, match="must be a number of at least 1,"):
            calibrate_budget(everything, 0.5, refine=refine)
        assert calibrate_budget(everything, 1.0, refine=refine).check(everything).held_out["depth"] == 1
        for budget in (8, 20.0):
            found = calibrate_budget(everything, budget, refine=refine)
            assert found.thresholds == [1.0] * 8 and "covers full depth" in found.reason
        alone = population(50, exits=1)
        assert calibrate_budget(alone, 1.0, refine=refine).check(alone).held_out["kept"]

    @pytest.mark.parametrize("refine", [False, True])
    @pytest.mark.parametrize("rows", [1, 2, 3])
    def test_few_rows(self, rows, refine):
        few = population(rows)
        assert calibrate_budget(few, 4.0, refine=refine).check(few).held_out["kept"]

    @pytest.mark.parametrize("refine", [False, True])
    def test_constant_scores_keep_the_budget(self, refine):
        everything = population(200)
        constant = replace(everything, scores=torch.full_like(everything.scores, 0.7))
        assert calibrate_budget(constant, 4.0, refine=refine).check(constant).held_out["kept"]

    def test_a_criterion_that_never_lets_out_at_the_first_exit(self):
        generator = torch.Generator().manual_seed(0)
        streak = torch.randint(0, 4, (400, 7), generator=generator).float()
        streak[:, 0] = 0
        everything = population(400)
        patience = ExitScores("patience", streak, everything.layers, everything.disagrees, everything.losses)
        least = 0.0
        for row in streak.tolist():
            least += (slow_exit(row, [0.5] * 7) + 1) / 400
        with pytest.raises(ValueError, match="the least mean cost of 'patience'"):
            calibrate_budget(patience, least - 0.01)
        with pytest.raises(ValueError, match="for these rows and this `delta`"):
            calibrate_budget(patience, least + 0.01)
        for budget in (2.45, 2.5, 2.6, 3.0, 4.0, 6.0):
            figures = calibrate_budget(patience, budget).check(patience).held_out
            assert figures["kept"] and figures["used_budget"] > 0.85

    def test_costs(self):
        everything = population(500)
        costs = [3.0 * layer + 2 for layer in range(1, 9)]
        found = calibrate_budget(everything, 15.0, costs, unit="ms").check(everything)
        assert found.levels["unit"] == "ms" and found.levels["costs"] == costs
        assert found.held_out["mean_cost"] == pytest.approx(3 * found.held_out["depth"] + 2)
        same = calibrate_budget(everything, 150.0, [10 * cost for cost in costs])
        assert same.thresholds == found.thresholds
        with pytest.raises(ValueError, match="must be 8 increasing"):
            calibrate_budget(everything, 15.0, costs[:-1])

    def test_labels_are_not_needed_with_risks(self):
        everything = population(500)
        risks = everything.losses.double().mean(0)
        blind = replace(everything, losses=torch.full_like(everything.losses, math.nan))
        found = calibrate_budget(blind, 4.0, risks=risks)
        assert found.thresholds == calibrate_budget(everything, 4.0).thresholds
        assert found.check(blind).held_out["kept"] and "risk" not in found.held_out
        with pytest.raises(ValueError, match="`risks` must be given"):
            calibrate_budget(blind, 4.0)

    def test_errors(self):
        for budget in ("4", "half", None, True, math.nan):
            with pytest.raises(ValueError, match="`budget`="):
                calibrate_budget(population(5), budget)
        with pytest.raises(ValueError, match="`batch_rows`=0"):
            calibrate_budget(population(5), 4.0, batch_rows=0)
        with pytest.raises(ValueError, match="`delta`=1"):
            calibrate_budget(population(5), 4.0, delta=1)


class TestRejection:
    @pytest.mark.parametrize("criterion", ["max_probability", "entropy"])
    @pytest.mark.parametrize("rate", [0.001, 0.1, 0.9])
    def test_rejects_the_least_sure(self, criterion, rate):
        everything = population(500, criterion=criterion)
        found = calibrate_budget(everything, 5.0)
        rejecting = with_rejection(found, everything, rate)
        assert rejecting.thresholds[:-1] == found.thresholds[:-1]
        assert not bool(found.rejected(everything).any())
        sign = 1 if criterion == "max_probability" else -1
        last = sorted(
            (sign * score, row)
            for row, (score, taken) in enumerate(
                zip(everything.last_scores.tolist(), found.taken_exits(everything).tolist(), strict=True)
            )
            if taken == 7
        )
        expected = {row for _, row in last[: math.floor(rate * 500)]}
        assert set(rejecting.rejected(everything).nonzero().flatten().tolist()) == expected
        figures = rejecting.check(everything).held_out
        assert figures["rejected"] == len(expected) / 500
        kept = [row for row in range(500) if row not in expected]
        losses = everything.losses[torch.arange(500), found.taken_exits(everything)]
        assert figures["risk_answered"] == pytest.approx(float(losses[kept].mean()))
        assert 0 <= len(expected) <= len(last) and (rate != 0.9 or len(expected) == len(last) > 0)

    def test_errors(self):
        everything = population(50)
        found = calibrate_budget(everything, 5.0)
        with pytest.raises(ValueError, match="`rate`=1"):
            with_rejection(found, everything, 1)
        without = replace(everything, last_scores=None)
        with pytest.raises(ValueError, match="last_scores` is None"):
            with_rejection(found, without, 0.1)
        with pytest.raises(ValueError, match="last_scores` is None"):
            with_rejection(found, everything, 0.1).rejected(without)
