# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The search among subsets of exits: expected seconds of a batch, and loss of its rows, on held-out rows.

Rows of a batch are taken as drawn one by one from the held-out rows. Of B rows, then, Binomial(B, k/n) come past an
exit that k of n held-out rows come past, and the expectation of a sum over blocks and checks is the sum of theirs:

    Σ_i E[block from exit i to the next one, with the rows that are left] + E[check of these rows] + E[dropping]

and what asking any exit takes. Dropping rows costs what keeping the expected rows takes, times the probability that
some leave and some stay.

Who comes past an exit depends on all exits that were asked before. With few exits all subsets are looked at: the
held-out rows are counted by the set of exits at which they would leave, and sums over subsets of these sets (the zeta
transform) tell how many come past every subset of exits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.special import gammaln, xlog1py, xlogy

from transformers_cee.calibration.cost_table import BatchCosts


# Internal exits up to which all subsets are looked at.
MAX_EXACT_EXITS = 14
# Times and losses that differ by less are equal: sums in another order.
SLACK = 1e-9
# Thresholds from whose subsets a search within a limit starts.
_STARTS = 64
# Numbers at once in the largest arrays.
_CHUNK = 2**21


@dataclass(frozen=True)
class ExpectedSeconds:
    """Expected seconds of one batch by the number k of n held-out rows that come so far.

    Args:
        upto (array of shape `(exits + 1, n + 1)`): of all layers up to a place, were they run by so many rows: row 0
            of the array is the beginning, the others are the exits.
        reach (array of shape `(exits, n + 1)`): the same with the overhead of a block and the check at its end.
        keep (array of shape `(n + 1,)`): of keeping so many rows.
        nobody (array of shape `(n + 1,)`): probability that a batch holds none of such k rows.
        asking (`float`): of asking any exit.
    """

    upto: np.ndarray
    reach: np.ndarray
    keep: np.ndarray
    nobody: np.ndarray
    asking: float

    @property
    def rows(self) -> int:
        return len(self.keep) - 1

    @property
    def full(self) -> float:
        """Without any exit but the last one."""
        return float(self.reach[-1, -1])

    def dropping(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Of letting some rows out, so that `after` of the `before` held-out rows stay."""
        some_both = 1 - self.nobody[before - after] - self.nobody[after] + self.nobody[before]
        return self.keep[after] * np.maximum(some_both, 0.0)

    def of_exits(self, exits: Sequence[int], counts: Sequence[np.ndarray]) -> np.ndarray:
        """Of one subset.

        Args:
            exits (sequence of `int`): internal exits (0-based, ascending) that are asked.
            counts (sequence of arrays of one shape): for each of them, how many rows come past it.
        """
        if not exits:
            return np.array(self.full)
        left, seconds = np.full_like(counts[0], self.rows), self.asking
        for index, after in zip(exits, counts, strict=True):
            seconds = seconds + self.reach[index, left] + self.dropping(left, after) - self.upto[index + 1, after]
            left = after
        return seconds + self.reach[-1, left]


def expected_seconds(costs: BatchCosts, layers: Sequence[int], rows: int) -> ExpectedSeconds:
    """Expected seconds with exits at some layers (1-based, the last one included), for 0..rows held-out rows."""
    batch_size, shares = len(costs.block) - 1, np.arange(rows + 1) / rows
    columns = [
        costs.block,
        *(costs.layers[:, layer] for layer in (0, *layers)),
        *(costs.checks[one] for one in layers),
    ]
    expected = (_left_rows(batch_size, rows) @ np.stack(columns, axis=1)).T
    upto, checks = expected[1 : len(layers) + 2], expected[len(layers) + 2 :]
    keep = np.interp(batch_size * shares, np.arange(batch_size + 1), costs.compaction)
    return ExpectedSeconds(
        upto, expected[0] + upto[1:] + checks, keep, (1 - shares) ** batch_size, float(costs.walk[-1])
    )


# One per batch size that is served; of the largest batches it holds a few millions of numbers.
@lru_cache(maxsize=32)
def _left_rows(batch_size: int, rows: int) -> np.ndarray:
    """Probabilities (rows + 1, batch_size + 1) that so many rows of a batch are left, where k of so many held-out
    rows are."""
    shares, left = np.arange(rows + 1)[:, None] / rows, np.arange(batch_size + 1)
    ways = gammaln(batch_size + 1) - gammaln(left + 1) - gammaln(batch_size - left + 1)
    return np.exp(ways + xlogy(left, shares) + xlog1py(batch_size - left, -shares))


@dataclass(frozen=True)
class FoundExits:
    """What a search found.

    Args:
        exits (`list[int]`): internal exits (0-based, ascending) to ask; empty where none pays.
        threshold (`float`): rows leave strictly above it.
        seconds (`float`): expected, of one batch.
        is_exact (`bool`): does no other subset, with one of the thresholds tried, take less?
        next_best (`float`): least seconds of any subset that asks at least one exit, inf without one.
    """

    exits: list[int]
    threshold: float
    seconds: float
    is_exact: bool
    next_best: float


@dataclass(frozen=True)
class Limit:
    """What the rows may lose.

    Args:
        losses (array of shape `(rows, exits)`): not below 0.
        weights (array of shape `(rows,)`): of the rows in the sum.
        most (`float`): accepted sum of weighted losses.
        of_any (`bool`): count the largest loss of any exit that the row could take, were only some of the exits asked
            that are; of losses that are 0 or 1.
    """

    losses: np.ndarray
    weights: np.ndarray
    most: float
    of_any: bool = False

    def exceeded(self, sums: np.ndarray) -> np.ndarray:
        return sums > self.most + SLACK


def find_exits(
    scores: np.ndarray,
    thresholds: np.ndarray,
    seconds: ExpectedSeconds,
    limit: Limit | None = None,
    subsets: Sequence[Sequence[int]] | None = None,
) -> FoundExits:
    """The internal exits to ask, and the threshold they share, with the least expected time of a batch.

    Up to `MAX_EXACT_EXITS` internal exits, all subsets with all thresholds are looked at. With more of them, a good
    subset of each threshold is found by dynamic programming over the last exit that was asked. That is exact when
    nobody is less sure at a deeper exit and nothing is limited. Within a limit, subsets that differ from the best one
    by one exit are looked at, too, until none is better, and those of dynamic programming for some thresholds only.

    Args:
        scores (array of shape `(rows, exits − 1)`): oriented scores.
        thresholds (array of shape `(steps,)`): to try.
        seconds (`ExpectedSeconds`): of as many held-out rows.
        limit (`Limit`, *optional*): what the rows may lose.
        subsets (*optional*): internal exits (0-based, ascending) of the only subsets to look at.
    """
    internal = scores.shape[1]
    ordered = np.sort(thresholds)[::-1]
    if subsets is None and internal <= MAX_EXACT_EXITS:
        return _find_among_all(scores, ordered, seconds, limit)
    best = _Best(seconds.full)

    def look(tries: Iterable[Sequence[int]]) -> bool:
        """Is one of these subsets the best so far?"""
        seconds_before = best.seconds
        for subset in filter(len, tries):
            times = times_of_exits(scores, subset, ordered, seconds, limit)
            if best.look(times[:, None], ordered, np.array([len(subset)])):
                best.exits = list(subset)
        return best.seconds < seconds_before

    if subsets is not None:
        look(subsets)
        return FoundExits(best.exits, best.threshold, best.seconds, True, best.next_best)
    starts = ordered if limit is None else ordered[:: -(-len(ordered) // _STARTS)]
    found = {_by_last_exit(scores, threshold, seconds) for threshold in starts.tolist()}
    # From single exits on, then from what was found without the limit, if that is better.
    for tries in (_neighbours([], internal) if limit is not None else [], sorted(found)):
        is_better = look(tries)
        while is_better and limit is not None:
            is_better = look(_neighbours(best.exits, internal))
    is_exact = limit is None and bool((scores[:, 1:] >= scores[:, :-1]).all())
    return FoundExits(best.exits, best.threshold, best.seconds, is_exact, best.next_best)


def _neighbours(exits: Sequence[int], internal: int) -> list[tuple[int, ...]]:
    """Subsets with one exit more or less, or with one moved by a place."""
    asked = {*exits}
    moved = [asked - {index} | {index + step} for index in exits for step in (-1, 1) if 0 <= index + step < internal]
    changed = [asked ^ {index} for index in range(internal)]
    return [tuple(sorted(subset)) for subset in (*changed, *moved)]


def _find_among_all(
    scores: np.ndarray, thresholds: np.ndarray, seconds: ExpectedSeconds, limit: Limit | None
) -> FoundExits:
    best, internal = _Best(seconds.full), scores.shape[1]
    at_once = max(1, _CHUNK // max(len(scores), 2**internal))
    sizes = np.array([subset.bit_count() for subset in range(2**internal)])
    for chunk in np.split(thresholds, range(at_once, len(thresholds), at_once)):
        if best.look(times_of_subsets(scores, chunk, seconds, limit), chunk, sizes):
            best.exits = [index for index in range(internal) if best.subset >> index & 1]
    return FoundExits(best.exits, best.threshold, best.seconds, True, best.next_best)


def prefixes(internal: int) -> list[list[int]]:
    """Subsets that ask all exits up to one."""
    return [list(range(stop)) for stop in range(1, internal + 1)]


class _Best:
    """The best of what was looked at: the least time, then the fewest exits, then the highest threshold."""

    def __init__(self, full: float) -> None:
        self.seconds, self.next_best, self.threshold = full, math.inf, math.inf
        self.subset = 0
        self.exits: list[int] = []

    def look(self, times: np.ndarray, thresholds: np.ndarray, sizes: np.ndarray) -> bool:
        """Looks at times (steps, subsets), by falling threshold, of subsets with so many exits (subsets,); is one of
        them the best so far?"""
        asking = times[:, sizes > 0]
        self.next_best = min(self.next_best, float(asking.min(initial=math.inf)))
        least = float(times.min())
        if least >= self.seconds * (1 - SLACK):
            return False
        steps, subsets = (times <= least * (1 + SLACK)).nonzero()
        first = np.lexsort((steps, sizes[subsets]))[0]
        self.seconds, self.subset = float(times[steps[first], subsets[first]]), int(subsets[first])
        self.threshold = float(thresholds[steps[first]])
        return True


def times_of_exits(
    scores: np.ndarray, exits: Sequence[int], thresholds: np.ndarray, seconds: ExpectedSeconds, limit: Limit | None
) -> np.ndarray:
    """Expected seconds (steps,) when some internal exits (0-based, ascending) are asked; inf beyond the limit."""
    times = seconds.of_exits(exits, _come_past(scores, exits, thresholds))
    if limit is not None:
        times[limit.exceeded(_losses_of(scores, exits, thresholds, limit))] = math.inf
    return times


def times_of_subsets(
    scores: np.ndarray, thresholds: np.ndarray, seconds: ExpectedSeconds, limit: Limit | None
) -> np.ndarray:
    """The same (steps, subsets) for all subsets of the internal exits, as bits of a number."""
    patterns = leaving_patterns(scores, thresholds)
    times = _seconds_of_subsets(_sums_over_staying(patterns, scores.shape[1]), seconds)
    if limit is not None:
        times[limit.exceeded(_losses_of_subsets(patterns, limit))] = math.inf
    return times


def leaving_patterns(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Exits at which each row would leave, as bits of a number (steps, rows)."""
    patterns: np.ndarray = np.zeros((len(thresholds), len(scores)), dtype=np.int64)
    for index in range(scores.shape[1]):
        patterns |= (scores[:, index] > thresholds[:, None]).astype(np.int64) << index
    return patterns


def _sums_over_staying(patterns: np.ndarray, internal: int, weights: np.ndarray | None = None) -> np.ndarray:
    """For each subset of the internal exits, as bits of a number, the sum of the weights (steps, subsets) of the rows
    that leave at none of them; without weights their number."""
    steps, subsets = len(patterns), 2**internal
    places = (patterns + subsets * np.arange(steps)[:, None]).ravel()
    sums = np.bincount(places, None if weights is None else weights.ravel(), steps * subsets).reshape(steps, subsets)
    for index in range(internal):
        pairs = sums.reshape(steps, -1, 2, 2**index)
        pairs[:, :, 1] += pairs[:, :, 0]
    # Now each number has the sum over the parts of its bits; those that a subset lacks are its complement.
    return sums[:, ::-1]


def _losses_of_subsets(patterns: np.ndarray, limit: Limit) -> np.ndarray:
    """Sum of the losses (steps, subsets) of all rows, each at the first exit of the subset that lets it out."""
    losses = limit.losses * limit.weights[:, None]
    internal = losses.shape[1] - 1
    if limit.of_any:
        bad = (limit.losses[:, :-1] > 0) @ (1 << np.arange(internal))
        right = limit.weights * (1 - limit.losses[:, -1])
        kept = _sums_over_staying(patterns & bad, internal, np.broadcast_to(right, patterns.shape))
        return limit.weights.sum() - kept
    sums = np.zeros((len(patterns), 2**internal))
    for index in range(internal):
        before = 2**index
        # Rows that leave here have come past the exits before.
        leaving = (patterns >> index & 1) * losses[:, index]
        here = _sums_over_staying(patterns & (before - 1), index, leaving)
        sums[:, before : 2 * before] = sums[:, :before] + here
    if losses[:, -1].any():
        sums += _sums_over_staying(patterns, internal, np.broadcast_to(losses[:, -1], patterns.shape))
    return sums


def _seconds_of_subsets(survivors: np.ndarray, seconds: ExpectedSeconds) -> np.ndarray:
    """Expected seconds (steps, subsets) by the number of rows that come past all exits of each subset."""
    sums = np.zeros(survivors.shape)
    for index in range(len(seconds.reach) - 1):
        size = 2**index
        left, after = survivors[:, :size], survivors[:, size : 2 * size]
        sums[:, size : 2 * size] = (
            sums[:, :size]
            + seconds.reach[index, left]
            + seconds.dropping(left, after)
            - seconds.upto[index + 1, after]
        )
    sums[:, 1:] += seconds.asking
    return sums + seconds.reach[-1, survivors]


def _by_last_exit(scores: np.ndarray, threshold: float, seconds: ExpectedSeconds) -> tuple[int, ...]:
    """A good subset for one threshold, by dynamic programming: of all subsets with the same last exit, the best so far
    goes on. The best one, where they all leave the same rows."""
    rows, internal = scores.shape
    stays = scores <= threshold
    # Place 0 is the beginning, place i + 1 the internal exit i.
    here, left = np.ones((internal + 1, rows), dtype=bool), np.full(internal + 1, rows)
    # Whoever asks an exit has paid for asking at the first one.
    spent = np.zeros(internal + 1)
    subsets: list[tuple[int, ...]] = [()]
    for index in range(internal):
        before = left[: index + 1]
        after = (here[: index + 1] & stays[:, index]).sum(1)
        tries = spent[: index + 1] + seconds.reach[index, before] + seconds.dropping(before, after)
        tries -= seconds.upto[index + 1, after]
        tries[0] += seconds.asking
        best = int((tries + seconds.reach[-1, after]).argmin())
        spent[index + 1], left[index + 1] = tries[best], after[best]
        here[index + 1] = here[best] & stays[:, index]
        subsets.append((*subsets[best], index))
    return subsets[int((spent + seconds.reach[-1, left]).argmin())]


def _come_past(scores: np.ndarray, exits: Sequence[int], thresholds: np.ndarray) -> list[np.ndarray]:
    """For each of some exits that are asked, how many rows (steps,) come past it."""
    highest = np.maximum.accumulate(scores[:, list(exits)], axis=1)
    return [np.asarray(np.searchsorted(np.sort(column), thresholds, side="right")) for column in highest.T]


def _losses_of(scores: np.ndarray, exits: Sequence[int], thresholds: np.ndarray, limit: Limit) -> np.ndarray:
    """Sum of the losses (steps,) of all rows when some exits are asked."""

    def staying(highest: np.ndarray, loss: np.ndarray) -> np.ndarray:
        order = highest.argsort()
        sums = np.concatenate(([0.0], (loss * limit.weights)[order].cumsum()))
        return sums[np.searchsorted(highest[order], thresholds, side="right")]

    losses, columns = limit.losses, list(exits)
    if limit.of_any:
        bad = np.where(losses[:, columns] > 0, scores[:, columns], -math.inf).max(1)
        return limit.weights.sum() - staying(bad, 1 - losses[:, -1])
    highest, total = np.full(len(scores), -math.inf), np.zeros(len(thresholds))
    for index in columns:
        after = np.maximum(highest, scores[:, index])
        total += staying(highest, losses[:, index]) - staying(after, losses[:, index])
        highest = after
    return total + staying(highest, losses[:, -1])


__all__ = [
    "MAX_EXACT_EXITS",
    "SLACK",
    "ExpectedSeconds",
    "FoundExits",
    "Limit",
    "expected_seconds",
    "find_exits",
    "prefixes",
    "times_of_exits",
    "times_of_subsets",
]
