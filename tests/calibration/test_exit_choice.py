# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The choice of exits by cost: the halves, the certificate, what is said where exits are off, and how often a promise
is kept."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from cost_tables import cost_table, measured_batch
from hypothesis import given
from hypothesis import strategies as st
from populations import population
from scipy.stats import binom
from slow_batches import all_subsets, slow_loss

from transformers_cee import CalibratedPoint, choose_exits
from transformers_cee.calibration import exit_choice, exit_subsets
from transformers_cee.calibration.exit_choice import worst_of_any
from transformers_cee.calibration.exit_subsets import expected_seconds
from transformers_cee.calibration.scores import ExitScores


SPLITS = 60
TABLE = cost_table(check=0.25)


def flipping(rows, seed=0):
    """Rows that are sure and agree from some exit on, but for a few that disagree once more behind it."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(rows, 4, generator=generator)
    known, exits = torch.randint(0, 5, (rows, 1), generator=generator), torch.arange(5)
    again = (torch.rand(rows, 1, generator=generator) < 0.25) & (known + 1 == exits)
    disagrees = torch.where(exits < known, torch.rand(rows, 5, generator=generator) < 0.6, again)
    disagrees[:, -1] = False
    scores = torch.where(exits[:-1] < known, drawn / 2, 0.5 + drawn / 2)
    return ExitScores("margin", scores, torch.tensor([1, 3, 5, 6, 8]), disagrees, disagrees.float())


def choose(scores, costs=TABLE, **options):
    return choose_exits(scores, costs, **{"batch_size": 4, "length": 2, "epsilon": 0.2, **options})


def halves_of(scores, seed=0):
    """The rows that choose and those that certify, as they are documented."""
    drawn = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed))
    first = drawn < len(scores) // 2
    return scores.select(first), scores.select(~first)


def certified(half, exits, epsilon, delta, of_any):
    """The lowest certified threshold by a loop over all thresholds from infinity down."""
    rows, wrong, found = half.oriented.tolist(), half.disagrees.int().tolist(), None
    for threshold in sorted({row[index] for row in rows for index in exits} | {-math.inf}, reverse=True):
        errors = sum(slow_loss(rows, wrong, exits, threshold, of_any))
        if binom.cdf(errors, len(rows), epsilon) > delta:
            break
        found = threshold
    return found


def seconds_of(half, costs, exits, threshold, batch_size=4, length=2):
    """Expected seconds of one subset on these rows; `test_exit_subsets` compares them with all batches."""
    highest = torch.full((len(half),), -math.inf)
    counts = []
    for index in exits:
        highest = torch.maximum(highest, half.oriented[:, index])
        counts.append(np.array(int((highest <= threshold).sum())))
    return float(
        expected_seconds(costs.at(batch_size, length), half.layers.tolist(), len(half)).of_exits(exits, counts)
    )


class TestAgainstLoops:
    @pytest.mark.parametrize("skipping", [True, False])
    @pytest.mark.parametrize("seed", range(2))
    def test_subset_threshold_and_figures(self, skipping, seed):
        scores = flipping(120, seed)
        first, second = halves_of(scores, seed)
        rows, wrong, best = first.oriented.tolist(), first.disagrees.int().tolist(), (math.inf, ())
        passes = (binom.cdf(range(len(rows) + 1), len(rows), 0.2) <= 0.05).tolist()
        for exits in all_subsets(4):
            for threshold in {-math.inf, *first.oriented.flatten().tolist()} if exits else {math.inf}:
                if not exits or passes[sum(slow_loss(rows, wrong, exits, threshold, skipping))]:
                    best = min(best, (seconds_of(first, TABLE, exits, threshold), exits))
        found = choose(scores, seed=seed, skipping=skipping)
        exits = best[1]
        assert len(exits) > 1 and found.exit_layers == scores.layers[[*exits, 4]].tolist() and found.is_exact
        threshold = certified(second, exits, 0.2, 0.05, skipping)
        assert found.point.thresholds == [pytest.approx(threshold)] * len(exits) + [1.0]
        assert list(found.thresholds) == found.exit_layers[:-1]
        assert found.seconds == pytest.approx(seconds_of(second, TABLE, exits, threshold))
        assert found.full_seconds == pytest.approx(TABLE.cost(4, 2, 0, 8) + 0.5) and found.seconds < found.full_seconds
        figures = found.point_at(scores.layers).check(second).held_out
        assert (found.depth, found.agreement) == (figures["depth"], figures["agreement"])

    @given(st.data())
    def test_worst_of_any_exit(self, data):
        score = st.sampled_from([-math.inf, 0.0, 0.25, 0.5])
        rows = data.draw(st.lists(st.lists(score, min_size=3, max_size=3), min_size=1, max_size=4))
        loss = st.sampled_from([0.0, 0.25, 1.0])
        losses = [data.draw(st.lists(loss, min_size=4, max_size=4)) for _ in rows]
        ascending, worst = worst_of_any(torch.tensor(rows), torch.tensor(losses))
        for threshold in (-math.inf, 0.0, 0.25, 0.5):
            expected = slow_loss(rows, losses, range(3), threshold, of_any=True)
            assert slow_loss(ascending.tolist(), worst.tolist(), range(3), threshold, of_any=False) == expected


class TestPromises:
    @pytest.mark.parametrize("options", [{"epsilon": 0.2}, {"epsilon": None, "level": 0.2}])
    def test_they_are_kept_however_many_exits_are_asked(self, options):
        everything = flipping(4000, seed=3)
        kept = paid = 0
        for split in range(SPLITS):
            drawn = torch.randperm(4000, generator=torch.Generator().manual_seed(split))[:400]
            found = choose(everything.select(drawn), delta=0.1, seed=split, **options)
            point = found.point_at([1, 3, 5, 6, 8])
            paid += found.reason is None
            walks = []
            for asked in all_subsets(4):
                limits = [one if index in asked else 1.0 for index, one in enumerate(point.thresholds[:-1])]
                some = replace(point, thresholds=[*limits, 1.0])
                walks.append(some.check(everything).held_out["kept"])
            kept += all(walks)
        # The population is all rows: at most a tenth may fail, and a little chance.
        assert kept / SPLITS >= 0.9 - 2 * math.sqrt(0.09 / SPLITS) and paid > 0.9 * SPLITS

    def test_risk(self):
        scores = population(600)
        found = choose(scores, epsilon=None, level=0.35)
        assert found.point.promise == "risk" and found.point.levels == {"level": 0.35, "delta": 0.05, "risk": "error"}
        assert found.point_at(range(1, 9)).check(scores).held_out["kept"]
        half = replace(scores, losses=scores.losses / 2)
        assert choose(half, epsilon=None, level=0.35).depth < found.depth

    def test_labels_are_not_needed_for_an_agreement(self):
        scores = population(300)
        unknown = replace(scores, losses=torch.full_like(scores.losses, math.nan))
        assert choose(unknown) == choose(scores) and len(choose(scores).exit_layers) > 1
        with pytest.raises(ValueError, match="NaN stands for rows without labels"):
            choose(unknown, epsilon=None, level=0.3)

    def test_texts_stay_together_and_count_once(self):
        scores = population(600)
        scores = replace(scores, groups=torch.arange(600) // 2 * 7)
        for seed in range(3):
            first, second = (set(half.tolist()) for half in _groups_of_halves(scores, seed))
            assert not first & second and len(first) == len(second) == 150
        found = choose(scores, epsilon=0.3)
        assert found.point.rows == 150 and len(found.exit_layers) > 1

    def test_policies_keep_their_price(self):
        assert choose(replace(population(300), alpha=0.25)).point.alpha == 0.25


def _groups_of_halves(scores, seed):
    return [scores.groups[rows] for rows in exit_choice._halves(scores, seed)]


class TestOff:
    def test_too_few_rows(self):
        # 59 rows of which none disagrees certify 95 %, 58 do not.
        agreeing = replace(population(118), disagrees=torch.zeros(118, 8, dtype=torch.bool))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert choose(agreeing, epsilon=0.05).reason is None
        with pytest.warns(UserWarning, match="Exits are off: 117 calibration rows") as caught:
            found = choose(agreeing.select(torch.arange(117)), epsilon=0.05)
        assert caught[0].filename == __file__
        assert "it takes at least 118" in found.reason and found.exit_layers == [8] and found.thresholds == {}
        assert (found.seconds, found.depth, found.agreement) == (found.full_seconds, 8.0, 1.0)
        assert found.point_at(range(1, 9)).taken_exits(agreeing).unique().tolist() == [7]
        with pytest.warns(UserWarning, match="1 calibration rows"):
            choose(agreeing.select(torch.arange(1)), epsilon=0.05)

    def test_nothing_pays(self):
        found = choose(population(300), cost_table(check=50.0))
        assert found.exit_layers == [8] and found.point.thresholds == [1.0] and found.is_exact
        assert found.reason.startswith("no exit pays at 4 rows of length 2: the best exits take ")
        assert "full depth takes 94.5 s" in found.reason

    def test_no_promise_can_be_kept(self):
        wrong = population(400)
        wrong = replace(wrong, losses=torch.ones_like(wrong.losses))
        found = choose(wrong, epsilon=None, level=0.3)
        assert found.reason == "no exit keeps the promise on the rows that choose." and found.exit_layers == [8]

    def test_what_is_certified_may_not_pay(self):
        scores = population(400)
        first, _ = exit_choice._halves(scores, 0)
        disagrees = scores.disagrees.clone()
        disagrees[first], disagrees[~first, :-1] = False, True
        found = choose(replace(scores, disagrees=disagrees), cost_table(check=2.0), epsilon=0.05)
        assert found.exit_layers == [8] and "with what is certified, full depth takes" in found.reason
        losses = torch.where(first, 0.0, 1.0).unsqueeze(1).expand(400, 8)
        found = choose(replace(scores, losses=losses), epsilon=None, level=0.3)
        assert "200 calibration rows do not certify the promise, not even at full depth (1.0000)" in found.reason

    def test_one_exit(self):
        found = choose(population(300, 1), cost_table([measured_batch(1, 2, layers=1)]))
        assert found.exit_layers == [1] and found.reason


class TestMemory:
    def scores(self):
        scores = population(400)
        streaks = (scores.scores > 0.6).float().cumsum(1)
        return replace(scores, criterion="patience", scores=streaks, has_memory=None)

    def test_it_says_that_scores_are_others(self):
        scores = self.scores()
        found = choose(scores)
        assert found.needs_rescoring and len(found.exit_layers) > 1 and found.point.criterion == "patience"
        assert not choose(population(400)).needs_rescoring
        # All exits asked, those that were not kept closed: then the promise is kept.
        assert found.point_at(range(1, 9)).check(scores).held_out["kept"]

    def test_exits_kept_are_scored_again(self):
        scores, asked = self.scores(), []

        def rescore(layers):
            asked.append(layers)
            kept = scores.at_layers(layers)
            steps = scores.scores.diff(dim=1, prepend=torch.zeros(400, 1))
            return replace(kept, scores=steps[:, [layer - 1 for layer in layers[:-1]]].cumsum(1))

        found = choose(scores, rescore=rescore)
        assert not found.needs_rescoring and asked == [found.exit_layers] == [choose(scores).exit_layers]
        rescored = rescore(found.exit_layers)
        _, second = exit_choice._halves(scores, 0)
        assert found.agreement == found.point.check(rescored.select(second)).held_out["agreement"] >= 0.8
        assert found.depth == found.point.held_out["depth"]

    @pytest.mark.parametrize("wrong", ["rows", "exits", "criterion", "kind"])
    def test_other_scores_are_refused(self, wrong):
        scores = self.scores()

        def rescore(layers):
            kept = scores.at_layers(layers)
            return {
                "rows": kept.select(torch.arange(200)),
                "exits": scores,
                "criterion": replace(kept, criterion="margin"),
                "kind": kept.scores,
            }[wrong]

        with pytest.raises(ValueError, match="`rescore` gave"):
            choose(scores, rescore=rescore)


class TestResult:
    def test_point_of_a_model_with_more_exits(self):
        found = choose(population(300))
        wide = found.point_at(range(1, 9))
        assert {layer: wide.thresholds[layer - 1] for layer in found.exit_layers[:-1]} == found.thresholds
        closed = [limit for layer, limit in enumerate(wide.thresholds[:-1], 1) if layer not in found.thresholds]
        assert closed == [1.0] * (8 - len(found.exit_layers))
        assert found.point_at(found.exit_layers) == found.point
        assert CalibratedPoint.from_dict(found.point.to_dict()) == found.point
        for layers in (range(1, 8), [8], [8, *range(1, 8)], [*range(1, 9), 9]):
            with pytest.raises(ValueError, match="`layers`="):
                found.point_at(layers)

    def test_larger_batches_keep_fewer_exits(self):
        # A check costs a batch what it costs a row; eight rows take as long as one.
        flat = cost_table([measured_batch(1, 1, check=2.0), replace(measured_batch(1, 1, check=2.0), batch_size=8)])
        scores = population(600, correlation=0.9)
        single, batch = (choose(scores, flat, batch_size=size, length=1) for size in (1, 8))
        assert len(single.exit_layers) > 1 and batch.exit_layers == [8] and batch.reason.startswith("no exit pays")

    def test_many_exits(self, monkeypatch):
        exact = choose(population(400))
        monkeypatch.setattr(exit_subsets, "MAX_EXACT_EXITS", 2)
        found = choose(population(400))
        assert exact.is_exact and not found.is_exact and found.seconds < found.full_seconds
        assert found.point_at(range(1, 9)).check(population(400)).held_out["kept"]

    def test_few_thresholds_are_tried_where_there_are_many(self, monkeypatch):
        oriented = population(100).oriented.double()
        every = exit_choice._tried(oriented)
        assert len(every) == len(oriented.unique()) + 1 and every[0] == -math.inf
        monkeypatch.setattr(exit_choice, "MAX_THRESHOLDS", 10)
        few = exit_choice._tried(oriented)
        assert len(few) == 10 and {*few} < {*every} and (few[0], few[-1]) == (every[0], every[-1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epsilon": None}, "accepted is one of them"),
        ({"level": 0.1}, "accepted is one of them"),
        ({"epsilon": 1.0}, "`epsilon`=1.0"),
        ({"epsilon": None, "level": 0}, "`level`=0"),
        ({"delta": 2}, "`delta`=2"),
        ({"batch_size": 0}, "`batch_size`=0"),
        ({"length": -1}, "`length`=-1"),
        ({"costs": cost_table(exits=(2, 8))}, r"`costs` has checks at layers \[2, 8\]"),
        ({"costs": cost_table(layers=9)}, "`costs` has checks"),
    ],
)
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        choose(population(50), **change)
