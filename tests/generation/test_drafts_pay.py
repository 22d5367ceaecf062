# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""When drafting pays, on costs and chances that are made up."""

from __future__ import annotations

import random
import statistics

import pytest
import torch

from transformers_cee.generation.drafting import JumpDrafts
from transformers_cee.generation.drafts_pay import Chances, DraftsPay, Pace, PassTimes


class TestChances:
    def test_beside_a_slow_count(self):
        chances, draw = Chances([0.2, 0.5, 0.8], 6.0), random.Random(0)
        tried, held = [6.0] * 3, [1.2, 3.0, 4.8]
        for _ in range(50):
            drafts = [(draw.randrange(3), draw.random() < 0.4) for _ in range(draw.randrange(4))]
            for kind in range(3):
                one = [hit for other, hit in drafts if other == kind]
                tried[kind] = 0.98 ** len(one) * tried[kind] + len(one)
                held[kind] = 0.98 ** len(one) * held[kind] + sum(one)
            kinds, hits = zip(*drafts, strict=True) if drafts else ((), ())
            chances.note(torch.tensor(kinds, dtype=torch.long), torch.tensor(hits, dtype=torch.bool))
        wanted = torch.tensor(held) / torch.tensor(tried)
        kinds = torch.tensor([[0, 2], [1, 1]])
        torch.testing.assert_close(chances.of(kinds), wanted[kinds])
        assert chances.mean == pytest.approx(sum(held) / sum(tried))

    def test_before_anything_was_seen(self):
        assert Chances([0.1, 0.7], 6.0).of(torch.tensor([1, 0])).tolist() == pytest.approx([0.7, 0.1])

    def test_the_more_is_known_the_less_a_lesson_weighs(self):
        found = []
        for before in (6.0, 60.0):
            chances = Chances([0.5], before)
            chances.note(torch.tensor([0, 0]), torch.tensor([True, True]))
            found.append(float(chances.of(torch.tensor([0]))))
        assert 1.0 > found[0] > found[1] + 0.1 > 0.6


class TestMost:
    def test_a_draft_ends_where_it_stops_to_pay(self):
        pays = DraftsPay(0.1, 0.1)
        # Chances of 0.7, 0.49, 0.343, 0.24, 0.168 against 0.2 tokens.
        shares = [0.7**count for count in range(1, 9)]
        assert pays.most(shares) == 4 and pays.most(shares[:3]) == 3 and pays.most([]) == 0

    def test_a_draft_is_worth_what_it_brings_the_rows_that_it_reaches(self):
        pays = DraftsPay(0.1, 0.1)
        assert pays.most([0.7, 0.49, 0.25 * 0.343]) == 2 and pays.most([0.35, 0.245, 0.17]) == 2
        assert pays.most([0.1] * 8) == 0

    def test_what_a_pass_over_several_tokens_costs_is_borne_by_the_first(self):
        pays = DraftsPay(0.1, 0.1, 0.4)
        # 0.6 + 0.36 − 0.4 − 2 · 0.2 against 0.6: two drafts pay, one does not.
        assert pays.most([0.6]) == 0 and pays.most([0.6, 0.36, 0.216]) == 3
        assert pays.most([0.25], before=1) == 1 and pays.most([0.15], before=1) == 0

    def test_a_draft_may_pay_by_those_behind_it(self):
        pays = DraftsPay(0.1, 0.1, 0.4)
        # Alone it brings 0.4 against 0.6, and with all that may follow 0.4 / (1 − 0.8) against 0.4 + 0.2 for each.
        assert not pays.goes_on(0.4, 0.8, 1, runs=1) and pays.goes_on(0.4, 0.8, 8, runs=1)
        assert pays.goes_on(0.5, 0.8, 8) == pays.goes_on(0.4, 0.8, 8) and not pays.goes_on(0.1, 0.8, 8, before=1)
        assert not pays.goes_on(1.0, 0.9, 0)

    def test_what_a_draft_brings_beside_itself_comes_once(self):
        pays = DraftsPay(0.1, 0.05, 0.5)
        assert not pays.goes_on(0.2, 0.9, 8, runs=1, beside=0.3) and pays.goes_on(0.2, 0.9, 8, runs=1, beside=0.4)
        assert not pays.goes_on(0.2, 0.9, 0, runs=1, beside=9.0)

    def test_a_run_that_is_done_costs_nothing_more(self):
        pays = DraftsPay(0.3, 0.1)
        assert pays.most([0.2]) == 0 and pays.most([0.2], runs=1) == 1 and pays.most([0.2, 0.2], runs=1) == 1

    def test_the_faster_the_texts_grow_the_more_a_draft_must_promise(self):
        pays = DraftsPay(0.1, 0.1)
        assert pays.most([0.4]) == 1
        for _ in range(200):
            pays.note(4, 4, 5.0)
        assert pays.pace.rate == pytest.approx(5 / 1.8, rel=1e-2)
        assert pays.most([0.54]) == 0 and pays.most([0.57]) == 1

    def test_all_drafters_of_a_call_have_one_pace(self):
        pace = Pace()
        one, other = DraftsPay(0.1, 0.1, pace=pace), DraftsPay(0.1, 0.1, pace=pace)
        for _ in range(200):
            one.note(4, 4, 5.0)
        assert other.most([0.54]) == 0


def test_other_choices_pay_as_long_as_each_brings_more_than_it_costs():
    pays = DraftsPay(0.3, 0.05, 0.4)
    assert pays.gains([0.2, 0.1, 0.04, 0.3]) == pytest.approx([0.15, 0.05])
    assert pays.gains([]) == pays.gains([0.05]) == []
    # Where tokens come fast, time is worth more of them.
    pays.pace.note(9.0, 1.0)
    assert pays.gains([0.3, 0.2]) == pytest.approx([0.3 - 0.05 * pays.pace.rate])


class TestHopes:
    @pytest.mark.parametrize("costs", [(0.05, 0.1, 0.1), (0.05, 0.02, 0.7), (0.3, 0.1, 0.0)])
    @pytest.mark.parametrize("chances", [[0.1, 0.5], [0.2, 0.9], [0.05, 0.15], [0.7, 0.99]])
    @pytest.mark.parametrize("left", [1, 4])
    def test_beside_all_that_may_come_of_asking(self, costs, chances, left):
        """One kind after the other: the best number of drafts, whose first run is paid whatever it says."""
        draft, verify, start = costs
        pays = DraftsPay(*costs)
        for _ in range(30):
            pays.note(1, 1, 1.5)
        stood = [round(300 * chances[0]), round(100 * chances[1])]
        price, brings = pays.pace.rate * pays.correction, 0.0
        for chance, share in zip(chances, (0.75, 0.25), strict=True):
            best = gain = 0.0
            for count in range(left):
                gain += chance * (sum(stood) / 400) ** count - price * (verify + (draft if count else start))
                best = max(best, gain)
            brings += share * best
        # A kind of which there was no draft says nothing.
        judged = torch.tensor([[300, 0, 100], [stood[0], 0, stood[1]]])
        assert pays.hopes(judged, left) == (brings > price * draft)

    def test_who_is_not_expected_to_bring_anything_is_hardly_asked(self):
        lost = {}
        for trusted in (False, True):
            pays, lost[trusted] = DraftsPay(0.05, 0.1, 0.1), 0.0
            pays.trusted = trusted
            for _ in range(64):
                if pays.rests():
                    pays.pace.note(1.0, 1.0)
                else:
                    lost[trusted] += 0.05
                    pays.note(0, 1)
        assert lost[False] <= 0.01 * 64 + 0.05 and lost[True] > 0.8

    def test_a_text_may_say_otherwise(self):
        chances, pays, asked = Chances([0.0], 15.0), DraftsPay(0.05, 0.1, 0.1), []
        pays.trusted = False
        for _ in range(300):
            asked.append(not pays.rests())
            if not asked[-1]:
                pays.pace.note(1.0, 1.0)
                continue
            chances.note(torch.tensor([0]), torch.tensor([True]))
            # Nothing is proposed before it is expected to pay.
            pays.note(*((2, 2, 3.0) if pays.goes_on(chances.mean, chances.mean, 8, runs=1) else (0, 1)))
        assert sum(asked[:10]) < 4 and all(asked[-100:])


class TestRests:
    @pytest.mark.parametrize("cost", [0.05, 0.3])
    def test_what_brings_nothing_costs_a_small_share(self, cost):
        pays, lost = DraftsPay(cost, 0.1), 0.0
        for number in range(1, 2001):
            if pays.rests():
                pays.pace.note(1.0, 1.0)
            else:
                lost += cost * pays.pace.rate
                pays.note(0, 1)
            # A little at once, a hundredth of all passes, and one time too many.
            assert lost <= 0.8 + 0.01 * number + cost + 1e-6
        assert lost > 10

    def test_asking_goes_on_once_drafts_hold(self):
        pays, asked = DraftsPay(0.1, 0.1), []
        for number in range(400):
            asked.append(not pays.rests())
            if asked[-1]:
                pays.note(2, 2, 3.0 if number > 50 else 1.0)
            else:
                pays.pace.note(1.0, 1.0)
        assert sum(asked[:50]) < 8 and all(asked[-300:])

    def test_what_it_brought_long_ago_is_forgotten(self):
        pays = DraftsPay(0.1, 0.1)
        for _ in range(100):
            pays.note(2, 2, 3.0)
        vain = 0
        while not pays.rests():
            pays.note(2, 2)
            vain += 1
        assert vain < 12

    def test_drafters_share_what_they_may_cost(self):
        pace, lost = Pace(), 0
        both = [DraftsPay(0.0, 0.04, pace=pace) for _ in range(2)]
        while not all(one.rests() for one in both):
            for one in both:
                if not one.rests():
                    one.note(1, 0)
                    lost += 1
        alone = DraftsPay(0.0, 0.04)
        while not alone.rests():
            alone.note(1, 0)
        # Both together lose what one may, and a pass more.
        both_lost = -sum(one.balance for one in both)
        assert 0.8 < -alone.balance < both_lost + 0.1 < 0.2 - alone.balance and lost > 20

    @pytest.mark.parametrize("passes", [0, 40])
    def test_a_costly_pass_of_another_does_not_shut_out(self, passes):
        """Whether the other brought much before it or nothing at all."""
        pace = Pace()
        other, one = (DraftsPay(0.05, 0.2, 0.2, pace=pace) for _ in range(2))
        for _ in range(passes):
            other.note(10, 0, 11.0)
        for _ in range(3):
            other.note(10, 0)
        assert other.balance < -1.0 and other.rests() and not one.rests()

    def test_who_has_brought_something_may_spend_it(self):
        pace = Pace()
        others, one = [DraftsPay(0.05, 0.2, 0.2, pace=pace) for _ in range(3)], DraftsPay(0.0, 0.1, pace=pace)
        for other in others:
            other.note(10, 0)
        one.note(1, 0, 1.5)
        assert 0 < one.balance < 0.5 and sum(other.balance for other in others) < -2 and not one.rests()

    def test_what_passes_take_corrects_the_costs(self):
        """Drafts that pay by their costs stop where passes take much longer, and none does where they are cheap."""
        asked = {0.1: 0, 2.0: 0}
        for taken in asked:
            pays = DraftsPay(0.05, 0.05)
            for _ in range(500):
                if not pays.rests() and pays.most([0.5]):
                    asked[taken] += 1
                    pays.note(1, 1, 1.4, taken)
        assert asked[0.1] == 500 and asked[2.0] < 60

    def test_one_pass_that_was_held_up_is_not_believed(self):
        pays = DraftsPay(0.1, 0.1)
        pays.note(1, 1, 1.5, taken=50.0)
        assert pays.correction < 2
        for _ in range(100):
            pays.note(1, 1, 1.5, taken=0.2)
        assert pays.correction == pytest.approx(1.0, rel=0.1)


def test_steps_beyond_one():
    times = PassTimes()
    assert times.beyond_one(3.0) is None
    times.note(2.0)
    assert times.beyond_one(3.0) == 0.5 and times.beyond_one(1.0) == -0.5
    times.note(1.0)
    assert times.one == pytest.approx(1.8)


def answer(rows, costs, chance_of, sure, passes, draw):
    """Speed of an answer: a drafter as sure as `sure` says is right with the chance that `chance_of` gives."""
    pays, chances = DraftsPay(*costs), Chances(JumpDrafts.kinds, JumpDrafts.known)
    tokens = time = 0.0
    for _ in range(passes):
        drafted, product, sureness = 0, [1.0] * rows, []
        mean, asks = chances.mean, pays.most([1.0] * 8) > 0 and not pays.rests()
        while asks and drafted < 8:
            if sureness and not pays.goes_on(sum(product) / rows, mean, 8 - drafted, drafted):
                break
            sureness.append(torch.tensor([sure(draw) for _ in range(rows)]))
            found = chances.of((sureness[-1] * 10).long().clamp_max(9)).tolist()
            product[:] = [before * now for before, now in zip(product, found, strict=True)]
            if not pays.goes_on(sum(product) / rows, mean, 8 - drafted, drafted, runs=1):
                break
            drafted += 1
        right = [[draw.random() < chance_of(float(one)) for one in column] for column in sureness]
        held = 0
        for row in range(rows):
            count = 0
            while count < drafted and right[count][row]:
                count += 1
            held += count
        got, spent = 1 + held / rows, pays.spent(drafted, len(sureness))
        tokens, time = tokens + got, time + 1 + spent
        if sureness:
            chances.note((sureness[0] * 10).long().clamp_max(9), torch.tensor(right[0]))
            pays.note(drafted, len(sureness), got, spent)
        else:
            pays.pace.note(1.0, 1.0)
    return tokens / time


# One row whose second token costs little or much, and batches.
COSTS = {(1, "packed"): (0.065, 0.09, 0.15), (1, "plain"): (0.065, 0.02, 0.69), (8, ""): (0.15, 0.25, 0.1)}


@pytest.mark.parametrize(("rows", "kernels"), list(COSTS))
@pytest.mark.parametrize("sure", [(1, 6), (2, 2)], ids=["modest", "sure of itself"])
def test_drafts_that_never_hold_cost_little(rows, kernels, sure):
    """Over answers of 64 tokens; the longer they are, the less."""
    draw = random.Random(0)
    speeds = [
        answer(rows, COSTS[rows, kernels], lambda one: 0.02, lambda draw: draw.betavariate(*sure), 64, draw)
        for _ in range(12)
    ]
    assert statistics.mean(speeds) > 0.96


def test_drafts_that_hold_half_of_the_time_pay():
    draw = random.Random(0)
    speeds = [
        answer(1, COSTS[1, "packed"], lambda one: one, lambda draw: draw.betavariate(0.8, 1.0), 256, draw)
        for _ in range(12)
    ]
    assert statistics.mean(speeds) > 1.12
