# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The one timer: named variants run in turn, and what comes of it says how far it can be trusted.

Every comparison of times goes through [`Timer`]. Its variants alternate in one process, so that whatever slows the
machine down slows all of them, and ratios are taken within a round, where it has slowed both sides. Short runs have
their turn several at a time: models that run one text each throw each other's weights out of the processor's caches,
which no model does to itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch

from transformers_cee.evaluation.environment import timing_environment


# Interquartile range over the median, above which a figure is noise.
MOST_SPREAD = 0.15
# Share by which a speed-up may exceed what the work that it saves allows: less work also fits better into caches.
TOLERANCE = 0.1
# Quartiles of fewer rounds say nothing.
FEWEST_ROUNDS = 3
# Seconds of a variant's turn at least, where it has parts left.
TURN = 0.1


def synchronize(device: torch.device) -> None:
    """Waits until a device has done what it was asked for; a CPU has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@dataclass(frozen=True)
class Prepared:
    """A run with a preparation that takes no part in its time: `run(prepare())`, of which `run` is timed.

    Args:
        prepare (`Callable[[], Any]`): makes what a single run needs, and uses up, such as a cache.
        run (`Callable[[Any], Any]`): what is timed.
    """

    prepare: Callable[[], Any]
    run: Callable[[Any], Any]


Run = Callable[[], Any] | Prepared
# One run, or its parts, whose times are summed.
Variant = Run | Sequence[Run]


@dataclass(frozen=True)
class Derived:
    """A figure made of the times of several variants.

    Args:
        of (`Callable[[Mapping[str, float]], float]`): from the seconds of one round, by variant.
        allowed (`float`): the largest value that can be true, see [`Figure`].
    """

    of: Callable[[Mapping[str, float]], float]
    allowed: float = math.inf


class Reported(NamedTuple):
    """What results and tables tell of a figure of time.

    Args:
        value (`float`, *optional*): None where nothing was timed, and where what was measured is noise.
        spread (`float`, *optional*): see [`Figure`]; None in results that were written without it.
        noisy_value (`float`, *optional*): what was measured where that is noise: kept for the record, shown nowhere.
    """

    value: float | None = None
    spread: float | None = None
    noisy_value: float | None = None

    def text(self, unit: str = "x", digits: int = 2) -> str:
        """As tables show it, such as `1.62x ± 0.03`, with half of the interquartile range; `noise` of noise, and `-`
        of nothing.

        Args:
            unit: behind the value.
            digits: behind the point.
        """
        if self.value is None:
            return "-" if self.noisy_value is None else "noise"
        text = f"{self.value:.{digits}f}{unit}"
        return text if self.spread is None else f"{text} ± {self.value * self.spread / 2:.{digits}f}"


@dataclass(frozen=True)
class Figure:
    """A figure of time over rounds.

    It is noise, and must not be shown, where the spread is above 15 %, where a round gave no positive number, or where
    it is more than `allowed` by more than 10 %: times so far beyond what was saved are those of another load.

    Args:
        median (`float`): over rounds.
        spread (`float`):
            Interquartile range of the rounds over their median, linear between rounds. With five rounds that is the
            range of the middle three: one slow round does not show, two do.
        allowed (`float`): the largest value that can be true; infinite where nobody knows one.
    """

    median: float
    spread: float
    allowed: float = math.inf

    @classmethod
    def of(cls, rounds: Sequence[float], allowed: float = math.inf) -> Figure:
        """The figure of one value per round."""
        values = np.nan_to_num(np.asarray(rounds, dtype=float), posinf=0.0, neginf=0.0)
        low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
        return cls(float(median), float((high - low) / median) if (values > 0).all() else math.inf, allowed)

    @property
    def is_noise(self) -> bool:
        return not (self.spread <= MOST_SPREAD and self.median <= self.allowed * (1 + TOLERANCE))

    @property
    def value(self) -> float | None:
        """The median; None where it is noise."""
        return None if self.is_noise else self.median

    @property
    def reported(self) -> Reported:
        """What results and tables tell of it."""
        return Reported(self.value, self.spread, self.median if self.is_noise else None)

    def times(self, factor: float) -> Figure:
        """The same in another unit."""
        return Figure(self.median * factor, self.spread, self.allowed * factor)

    def inverse(self) -> Figure:
        """How often in a unit of time, of a time. The spread stays, as it does for small ones."""
        return Figure(1 / self.median if self.median else math.inf, self.spread)

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for JSON: `value`, None where it is noise; `spread`; `allowed`, None without a limit; and of
        noise `noisy_value`."""
        found: dict[str, Any] = {"value": self.value}
        for name in ("spread", "allowed"):
            found[name] = number if math.isfinite(number := getattr(self, name)) else None
        return found | ({"noisy_value": self.median} if self.is_noise else {})


@dataclass
class Timings:
    """What a timer found.

    Args:
        seconds (`dict[str, Figure]`): of one round, by variant.
        speedups (`dict[str, dict[str, Figure]]`):
            By baseline and variant, how many times faster the variant is: the median of the ratios within rounds.
        derived (`dict[str, Figure]`):
            The other figures that were asked for, by name, all of the attempt with the least noise among them.
        rounds (`int`): of each attempt.
        attempts (`int`): how often it was measured. A figure that was noise is that of a later attempt.
        environment (`dict`): what it was measured with, see `timing_environment`.
    """

    rounds: int
    environment: dict[str, Any]
    attempts: int = 0
    seconds: dict[str, Figure] = field(default_factory=dict)
    speedups: dict[str, dict[str, Figure]] = field(default_factory=dict)
    derived: dict[str, Figure] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for JSON."""

        def plain(figures: Mapping[str, Figure]) -> dict[str, Any]:
            return {name: figure.to_dict() for name, figure in figures.items()}

        return {
            "seconds": plain(self.seconds),
            "speedups": {baseline: plain(figures) for baseline, figures in self.speedups.items()},
            "derived": plain(self.derived),
            "rounds": self.rounds,
            "attempts": self.attempts,
            "environment": self.environment,
        }


@dataclass(frozen=True)
class Timer:
    """Runs variants in turn and takes their times.

    Every variant runs once in a round. Its parts run in turns of a tenth of a second or of one part, whichever is
    longer; who comes first changes from turn to turn and from round to round. What comes out as noise is measured
    again, with its baseline, in as many rounds.

    Args:
        rounds (`int`): at least 3.
        attempts (`int`): how often a figure is measured at most.
        clock (`Callable[[], float]`, *optional*): gives seconds; the performance counter by default.
    """

    rounds: int = 5
    attempts: int = 3
    clock: Callable[[], float] | None = None

    def __post_init__(self) -> None:
        if self.rounds < FEWEST_ROUNDS or self.attempts < 1:
            raise ValueError(
                f"`rounds`={self.rounds} must be at least {FEWEST_ROUNDS}, `attempts`={self.attempts} at least 1."
            )

    def time(
        self,
        variants: Mapping[str, Variant],
        baselines: str | Sequence[str] = (),
        *,
        allowed: Mapping[str, Mapping[str, float]] | None = None,
        derived: Mapping[str, Derived] | None = None,
        device: torch.device | str = "cpu",
        warm_up: bool = True,
        progress: Callable[[Any], Any] = iter,
    ) -> Timings:
        """Times variants.

        Args:
            variants: what is timed, by name: callables without arguments, see also [`Prepared`], or lists of them,
                whose times are summed.
            baselines: variants that all others are compared with.
            allowed: by baseline and variant, the largest speed-up that can be true; see `Figure`. Variants that are
                not named have no limit.
            derived: further figures by name.
            device: synchronised around every run.
            warm_up: run the first part of every variant once before; not needed where that has just been done.
            progress: wraps the rounds, for a progress bar.

        Raises:
            ValueError: no variants, one without a run, a baseline that is no variant, or a limit of no baseline's.
        """
        baselines = [baselines] if isinstance(baselines, str) else list(baselines)
        parts = {name: _parts(variant) for name, variant in variants.items()}
        _check(parts, baselines, allowed or {})
        where = torch.device(device)
        found = Timings(self.rounds, timing_environment(where))
        asked = _Asked(baselines, allowed or {}, derived or {}, list(parts))
        for runs in parts.values() if warm_up else ():
            self._seconds(runs[0], where)
        again = list(parts)
        while again and found.attempts < self.attempts:
            found.attempts += 1
            asked.judge(self._rounds({name: parts[name] for name in again}, where, progress), found)
            again = asked.spoilt(found)
        return found

    def _rounds(
        self, parts: Mapping[str, Sequence[Prepared]], device: torch.device, progress: Callable[[Any], Any]
    ) -> dict[str, list[float]]:
        """Seconds of every round, by variant."""
        seconds = {name: [0.0] * self.rounds for name in parts}
        for number in progress(range(self.rounds)):
            left, turns = {name: list(reversed(runs)) for name, runs in parts.items()}, count()
            while any(left.values()):
                for name in _rotated(list(parts), number + next(turns)):
                    taken = 0.0
                    while left[name] and taken < TURN:
                        taken += self._seconds(left[name].pop(), device)
                    seconds[name][number] += taken
        return seconds

    def _seconds(self, run: Prepared, device: torch.device) -> float:
        clock, made = self.clock or perf_counter, run.prepare()
        synchronize(device)
        start = clock()
        run.run(made)
        synchronize(device)
        return clock() - start


@dataclass(frozen=True)
class _Asked:
    """Which figures are wanted of which variants."""

    baselines: Sequence[str]
    allowed: Mapping[str, Mapping[str, float]]
    derived: Mapping[str, Derived]
    variants: Sequence[str]

    def judge(self, seconds: Mapping[str, Sequence[float]], found: Timings) -> None:
        """Puts figures of the rounds in the place of none, and of noise."""
        for name, rounds in seconds.items():
            _put(found.seconds, name, Figure.of(rounds))
        for baseline in self.baselines:
            limits, speedups = self.allowed.get(baseline, {}), found.speedups.setdefault(baseline, {})
            for name in seconds if baseline in seconds else ():
                if name != baseline:
                    ratios = [_over(*pair) for pair in zip(seconds[baseline], seconds[name], strict=True)]
                    _put(speedups, name, Figure.of(ratios, limits.get(name, math.inf)))
        if len(seconds) == len(self.variants):
            derived = {
                name: Figure.of([_value(one, each) for each in _by_round(seconds)], one.allowed)
                for name, one in self.derived.items()
            }
            # They belong together: a speed-up is that of the speeds beside it.
            if not found.derived or _noisy(derived) < _noisy(found.derived):
                found.derived = derived

    def spoilt(self, found: Timings) -> list[str]:
        """Variants that are to be measured again. Seconds count where nothing else was asked for: two that drift
        together still have a ratio."""
        if _noisy(found.derived):
            return list(self.variants)
        if self.baselines or self.derived:
            noisy = {
                one
                for baseline, figures in found.speedups.items()
                for name, figure in figures.items()
                if figure.is_noise
                for one in (baseline, name)
            }
        else:
            noisy = {name for name, figure in found.seconds.items() if figure.is_noise}
        return [name for name in self.variants if name in noisy]


def _noisy(figures: Mapping[str, Figure]) -> int:
    return sum(figure.is_noise for figure in figures.values())


def _put(figures: dict[str, Figure], name: str, figure: Figure) -> None:
    if name not in figures or figures[name].is_noise:
        figures[name] = figure


def _over(time: float, other: float) -> float:
    return time / other if other > 0 else math.nan


def _value(one: Derived, seconds: Mapping[str, float]) -> float:
    try:
        return one.of(seconds)
    except ZeroDivisionError:
        return math.nan


def _by_round(seconds: Mapping[str, Sequence[float]]) -> Iterator[dict[str, float]]:
    for values in zip(*seconds.values(), strict=True):
        yield dict(zip(seconds, values, strict=True))


def _rotated(names: list[str], turn: int) -> list[str]:
    turn %= len(names)
    return names[turn:] + names[:turn]


def _parts(variant: Variant) -> list[Prepared]:
    runs = list(variant) if isinstance(variant, Sequence) else [variant]
    return [run if isinstance(run, Prepared) else _plain(run) for run in runs]


def _plain(run: Callable[[], Any]) -> Prepared:
    return Prepared(lambda: None, lambda _: run())


def _check(
    parts: Mapping[str, Sequence[Prepared]], baselines: Sequence[str], allowed: Mapping[str, Mapping[str, float]]
) -> None:
    empty = [name for name, runs in parts.items() if not runs]
    if not parts or empty:
        raise ValueError(f"`variants` ({list(parts)}) must be at least one, each with a run; without one: {empty}.")
    for argument, named, accepted in (
        ("baselines", baselines, [*parts]),
        ("allowed", [*allowed], [*baselines]),
        ("allowed", [name for names in allowed.values() for name in names], [*parts]),
    ):
        wrong = [name for name in named if name not in accepted]
        if wrong:
            raise ValueError(f"`{argument}` names {wrong}; accepted are {', '.join(map(repr, accepted)) or 'none'}.")


__all__ = ["Derived", "Figure", "Prepared", "Reported", "Run", "Timer", "Timings", "Variant", "synchronize"]
