# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The timer on a clock that variants move: nothing here takes time, or depends on any."""

from __future__ import annotations

import json
import math
import statistics

import pytest

from transformers_cee.evaluation import timing
from transformers_cee.evaluation.timing import Derived, Figure, Prepared, Reported, Timer


class Machine:
    """A clock, and variants that last as long as they are told, one duration per run, the last one for ever."""

    def __init__(self) -> None:
        self.now, self.ran = 0.0, []

    def clock(self) -> float:
        return self.now

    def variant(self, name, *durations):
        left = list(durations)

        def run():
            self.ran.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run

    def time(self, variants, *args, rounds=3, attempts=3, warm_up=False, **options):
        timer = Timer(rounds=rounds, attempts=attempts, clock=self.clock)
        return timer.time(variants, *args, warm_up=warm_up, **options)


@pytest.fixture
def machine():
    return Machine()


def slow_quartile(values, share):
    """Linear between the two values around it."""
    values, at = sorted(values), share * (len(values) - 1)
    low = values[math.floor(at)]
    return low + (values[math.ceil(at)] - low) * (at - math.floor(at))


@pytest.mark.parametrize("values", [[2.0, 2.1, 1.9], [1.0, 1.05, 1.1, 1.02, 9.0], [3.0] * 7, [4.0, 1.0, 3.0, 2.0]])
def test_medians_and_spreads(values):
    figure = Figure.of(values)
    assert figure.median == statistics.median(values)
    wanted = (slow_quartile(values, 0.75) - slow_quartile(values, 0.25)) / statistics.median(values)
    assert figure.spread == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("figure", "is_noise"),
    [
        (Figure(2.0, 0.15), False),
        (Figure(2.0, 0.151), True),
        (Figure(2.19, 0.0, allowed=2.0), False),
        (Figure(2.21, 0.0, allowed=2.0), True),
        (Figure.of([1.0, 1.0, 0.0]), True),
        (Figure.of([1.0, 1.0, -1.0]), True),
        (Figure.of([1.0, 1.0, math.nan]), True),
    ],
)
def test_noise_is_no_value(figure, is_noise):
    assert figure.is_noise is is_noise
    assert (figure.value is None) is is_noise
    assert figure.reported == (figure.value, figure.spread, figure.median if is_noise else None)
    assert (figure.reported.text() == "noise") is is_noise
    found = json.loads(json.dumps(figure.to_dict(), allow_nan=False))
    assert found["value"] == figure.value
    assert ("noisy_value" in found) is is_noise
    assert found.get("noisy_value") == figure.reported.noisy_value


def test_another_unit():
    assert Figure(2.0, 0.1, 4.0).times(1000) == Figure(2000.0, 0.1, 4000.0)
    assert Figure(0.25, 0.1).inverse() == Figure(4.0, 0.1)


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        (Reported(1.618, 0.04), "1.62x ± 0.03"),
        (Reported(1.618), "1.62x"),
        (Reported(None, 0.3, 6.1), "noise"),
        (Reported(None, None, 0.0), "noise"),
        (Reported(), "-"),
    ],
)
def test_what_tables_show(figure, text):
    assert figure.text() == text
    assert Reported(20.0, 0.1).text("", 1) == "20.0 ± 1.0"


def test_ratios_are_those_within_rounds(machine):
    """A machine that slows down from round to round: seconds are noise, the ratio is not."""
    found = machine.time(
        {"full": machine.variant("full", 10.0, 20.0, 40.0), "early": machine.variant("early", 5.0, 10.0, 20.0)}, "full"
    )
    assert found.speedups == {"full": {"early": Figure(2.0, 0.0)}}
    assert found.attempts == 1 and found.rounds == 3
    assert found.seconds["full"].reported == (None, 0.75, 20.0)
    # The median of ratios, not the ratio of medians.
    found = machine.time(
        {"full": machine.variant("full", 1.0, 1.02, 1.1), "early": machine.variant("early", 1.0, 1.0, 1.1)}, "full"
    )
    assert found.speedups["full"]["early"].median == 1.0


def test_several_baselines(machine):
    variants = {name: machine.variant(name, cost) for name, cost in (("a", 6.0), ("b", 3.0), ("c", 1.0))}
    found = machine.time(variants, ["a", "b"])
    medians = {
        baseline: {name: one.median for name, one in figures.items()} for baseline, figures in found.speedups.items()
    }
    assert medians == {"a": {"b": 2.0, "c": 6.0}, "b": {"a": 0.5, "c": 3.0}}
    assert {name: one.value for name, one in found.seconds.items()} == {"a": 6.0, "b": 3.0, "c": 1.0}


def test_who_comes_first_changes(machine):
    machine.time({name: machine.variant(name, 1.0) for name in "abc"}, rounds=4, warm_up=True)
    assert machine.ran == [*"abc", *"abc", *"bca", *"cab", *"abc"]


def test_parts_run_in_turn_and_are_summed(machine):
    variants = {
        name: [machine.variant(f"{name}{part}", cost + part) for part in range(2)]
        for name, cost in (("a", 1.0), ("b", 4.0))
    }
    found = machine.time(variants, "b", warm_up=True)
    assert machine.ran[:2] == ["a0", "b0"]
    assert machine.ran[2:] == ["a0", "b0", "b1", "a1", "b0", "a0", "a1", "b1", "a0", "b0", "b1", "a1"]
    assert found.seconds["a"].value == 3.0 and found.seconds["b"].value == 9.0
    assert found.speedups["b"]["a"].value == 3.0


def test_short_parts_run_several_at_a_time(machine):
    """What a variant leaves in the processor's caches is there for its next part."""
    variants = {"a": [machine.variant("a", 0.05)] * 3, "b": [machine.variant("b", 0.3)] * 2}
    found = machine.time(variants, "b")
    assert machine.ran[:5] == ["a", "a", "b", "b", "a"]
    assert found.seconds["a"].median == pytest.approx(0.15) and found.seconds["b"].median == pytest.approx(0.6)


def test_preparations_take_no_time(machine):
    made = []

    def prepare():
        machine.now += 100.0
        made.append(len(made))
        return made[-1]

    def run(number):
        assert number == made[-1]
        machine.now += 2.0

    assert machine.time({"a": Prepared(prepare, run)}, warm_up=True).seconds["a"] == Figure(2.0, 0.0)
    assert made == [0, 1, 2, 3]


def test_noise_is_measured_again_with_its_baseline_alone(machine):
    found = machine.time(
        {
            "full": machine.variant("full", 8.0),
            "restless": machine.variant("restless", 1.0, 4.0, 8.0, 4.0),
            "calm": machine.variant("calm", 2.0),
        },
        "full",
    )
    assert found.attempts == 2
    assert [machine.ran.count(name) for name in ("full", "restless", "calm")] == [6, 6, 3]
    assert found.speedups["full"] == {"restless": Figure(2.0, 0.0), "calm": Figure(4.0, 0.0)}
    assert found.seconds["restless"].value == 4.0


def test_more_speed_than_was_saved_is_measured_again(machine):
    """A baseline that met another load for a whole attempt."""
    variants = {"full": machine.variant("full", 60.0, 60.0, 60.0, 12.0), "early": machine.variant("early", 10.0)}
    found = machine.time(variants, "full", allowed={"full": {"early": 1.25}})
    assert found.attempts == 2
    assert found.speedups["full"]["early"] == Figure(1.2, 0.0, 1.25)


@pytest.mark.parametrize("attempts", [1, 2])
def test_what_stays_noise_is_none(machine, attempts):
    variants = {"full": machine.variant("full", 61.0), "early": machine.variant("early", 10.0)}
    found = machine.time(variants, "full", allowed={"full": {"early": 1.13}}, attempts=attempts)
    assert found.attempts == attempts
    assert machine.ran.count("full") == 3 * attempts
    (figure,) = json.loads(json.dumps(found.to_dict(), allow_nan=False))["speedups"]["full"].values()
    assert figure == {"value": None, "spread": 0.0, "allowed": 1.13, "noisy_value": 6.1}


def test_seconds_are_measured_again_where_nothing_else_is_asked_for(machine):
    variants = {"a": machine.variant("a", 1.0), "b": machine.variant("b", 1.0, 2.0, 4.0, 3.0)}
    found = machine.time(variants)
    assert found.seconds == {"a": Figure(1.0, 0.0), "b": Figure(3.0, 0.0)}
    assert [machine.ran.count(name) for name in "ab"] == [3, 6]


def test_derived_figures(machine):
    """Of the seconds of one round; noise among them sends all variants again."""
    variants = {"whole": machine.variant("whole", 5.0), "first": machine.variant("first", 5.0, 1.0, 2.0, 1.0)}
    derived = {
        "later": Derived(lambda seconds: 8 / (seconds["whole"] - seconds["first"])),
        "share": Derived(lambda seconds: seconds["first"] / seconds["whole"], allowed=0.5),
    }
    found = machine.time(variants, derived=derived)
    assert found.attempts == 2 and machine.ran.count("whole") == 6
    assert found.derived == {"later": Figure(2.0, 0.0), "share": Figure(0.2, 0.0, 0.5)}


def test_derived_figures_are_those_of_one_attempt(machine):
    """Two of three figures are noise in the first attempt, and two others in the second; in the third none is."""
    variants = {
        "a": machine.variant("a", *[4.0] * 3, *[1.0, 2.0, 4.0], 8.0),
        "b": machine.variant("b", *[1.0, 2.0, 4.0], 2.0),
    }
    derived = {
        "a": Derived(lambda seconds: seconds["a"]),
        "b": Derived(lambda seconds: seconds["b"]),
        "ratio": Derived(lambda seconds: seconds["a"] / seconds["b"], allowed=5.0),
    }
    found = machine.time(variants, derived=derived).derived
    assert found == {"a": Figure(8.0, 0.0), "b": Figure(2.0, 0.0), "ratio": Figure(4.0, 0.0, 5.0)}
    again = Machine()
    variants = {
        "a": again.variant("a", *[4.0] * 3, *[1.0, 2.0, 4.0], 8.0),
        "b": again.variant("b", *[1.0, 2.0, 4.0], 2.0),
    }
    found = again.time(variants, derived=derived, attempts=2).derived
    assert found["a"] == Figure(4.0, 0.0) and found["b"].median == 2.0 and found["b"].is_noise


def test_by_default_time_is_the_performance_counter(monkeypatch, machine):
    monkeypatch.setattr(timing, "perf_counter", machine.clock)
    assert Timer().time({"a": machine.variant("a", 0.5)}).seconds["a"] == Figure(0.5, 0.0)


def test_progress_and_environment(machine):
    seen = []

    def progress(rounds):
        for number in rounds:
            seen.append(number)
            yield number

    found = machine.time({"a": machine.variant("a", 1.0)}, progress=progress)
    assert seen == [0, 1, 2]
    assert found.to_dict()["environment"]["device"] == "cpu"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Timer(rounds=2), "`rounds`=2 must be at least 3"),
        (lambda: Timer(attempts=0), "`attempts`=0"),
        (lambda: Timer().time({}), r"`variants` \(\[\]\)"),
        (lambda: Timer().time({"a": []}), r"without one: \['a'\]"),
        (lambda: Timer().time({"a": list}, "b"), r"`baselines` names \['b'\]; accepted are 'a'"),
        (lambda: Timer().time({"a": list}, "a", allowed={"a": {"b": 1.0}}), r"`allowed` names \['b'\]"),
        (lambda: Timer().time({"a": list}, allowed={"a": {}}), r"`allowed` names \['a'\]; accepted are none"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
