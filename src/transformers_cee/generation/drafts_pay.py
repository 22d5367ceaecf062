# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""When drafting pays: what drafts cost and bring, as measured beforehand and as passes turn out."""

from __future__ import annotations

from collections.abc import Sequence


class DraftsPay:
    """When a draft goes on: while the chance that it is accepted in full exceeds what it costs.

    With R tokens for each decode step's worth of time so far, one more draft costs R·(c_d + c_v) tokens: what the time
    to draft it and to verify one more token per row would give otherwise. It gains a token with the product of the
    chances of all drafts up to it, in the rows that it reaches; all rows bear its costs. A first draft also costs what
    a pass over several tokens does. Where no number of drafts pays, or asking the drafter has cost more than it
    brought, it is asked now and then, ever more rarely: a trial that reaches many rows costs as many steps and tells
    more. What passes really take corrects the costs.

    Args:
        draft_cost, verify_cost (`float`): c_d and c_v, in decode steps at full depth.
        start_cost (`float`, *optional*, defaults to 0): of a pass with drafts, beyond them.
        rows (`int`, *optional*, defaults to 1): of the batch.
    """

    # A chance is the mean of what was seen, the last drafts weighing most, and of as many as this many tries before.
    _PRIOR, _TRIES, _FORGET = 0.5, 2.0, 0.97
    # Passes without drafts after the first trial that reached one row in vain, and at most; trials double them.
    _PATIENCE, _MOST_PATIENCE, _MOST_DOUBLED = 8, 1024, 10
    # So many drafts had their turn before what they brought counts; and drafts of a trial, one more where a pass with
    # drafts costs more than each of them does.
    _SEEN, _TRIAL = 4, 2
    # Tokens that a trial must bring beyond what it costs for another one at once.
    _CLEAR = 0.5
    # Of costs, how many steps' worth of passes they weigh as much as; and how far one pass is believed, since a busy
    # machine may hold it up.
    _BELIEVED, _MOST_TIMES, _MOST_MORE = 1.0, 3.0, 0.3

    def __init__(self, draft_cost: float, verify_cost: float, start_cost: float = 0.0, rows: int = 1) -> None:
        self.draft_cost, self.verify_cost, self.start, self.rows = draft_cost, verify_cost, start_cost, rows
        self.tried, self.held = self._TRIES, self._PRIOR * self._TRIES
        self.tokens, self.time = 1.0, 1.0
        self.expected = self.taken = self._BELIEVED
        # Tokens that asking brought, less what it cost, and how many drafts had their turn.
        self.gain, self.seen = 0.0, 0
        self.waits, self.vain = 0, 0

    @property
    def chance(self) -> float:
        """Of a draft to be accepted when all before it are."""
        return self.held / self.tried

    @property
    def rate(self) -> float:
        """R."""
        return self.tokens / self.time

    def least(self, count: int) -> float:
        """Chance from which one more draft pays, behind `count` others."""
        steps = self.spent(1, 1) - (self.start if count else 0.0)
        return self.rate * steps * self.taken / self.expected

    def rests(self) -> bool:
        """Does this pass go without the drafter?"""
        if self.waits == 0:
            return False
        self.waits -= 1
        self._went_without()
        return True

    def most(self, reach: Sequence[float]) -> int:
        """Drafts that pay where each has the same chance.

        Args:
            reach (sequence of `float`): share of the growing rows that a first, second, … draft would reach.
        """
        # Nothing would be learned from drafts that do not pay even where all of them hold.
        if self._best(reach, 1.0) == 0:
            self._went_without()
            return 0
        best = self._best(reach, self.chance)
        if best == 0 or (self.seen >= self._SEEN and self.gain <= 0):
            # To see whether that has changed.
            reached = max(1, round(reach[0] * self.rows))
            self.waits = min(self._MOST_PATIENCE, self._PATIENCE * reached * 2**self.vain)
            self.vain = min(self._MOST_DOUBLED, self.vain + 1)
            trial = self._TRIAL + (self.start > self.draft_cost + self.verify_cost)
            return max(best, min(len(reach), trial))
        self.vain = 0
        return best

    def _best(self, reach: Sequence[float], chance: float) -> int:
        """The number of drafts with the highest gain; 0 where none has any."""
        best, most, gain, product = 0, 0.0, 0.0, 1.0
        for count, share in enumerate(reach):
            product *= chance
            gain += share * product - self.least(count)
            if gain > most:
                best, most = count + 1, gain
        return best

    def spent(self, drafts: int, runs: float) -> float:
        """Decode steps that so many drafts and runs of the drafter cost, as measured beforehand."""
        return self.draft_cost * runs + self.verify_cost * drafts + (self.start if drafts else 0.0)

    def note(
        self,
        drafts: int,
        runs: float,
        tried: int = 0,
        held: int = 0,
        tokens: float = 1.0,
        taken: float | None = None,
    ) -> None:
        """What came of asking.

        Args:
            drafts (`int`): columns of drafts.
            runs (`float`): how often the drafter ran.
            tried, held (`int`): drafts whose turn came, over all rows, and those of them that were accepted.
            tokens (`float`): mean tokens that a row got.
            taken (`float`, *optional*): decode steps that the pass took beyond one, where that is known.
        """
        spent = expected = self.spent(drafts, runs)
        if taken is not None:
            spent = min(taken, self._MOST_TIMES * expected + self._MOST_MORE)
        self.expected = self._FORGET * self.expected + expected
        self.taken = self._FORGET * self.taken + spent
        won = tokens - 1 - self.rate * spent
        self.gain, self.seen = self._FORGET * self.gain + won, self.seen + max(1, tried)
        if won > self._CLEAR:
            self.waits = 0
        self.tried, self.held = self._FORGET * self.tried + tried, self._FORGET * self.held + held
        self._went(tokens, 1 + spent)

    def _went_without(self) -> None:
        """A pass gave each row a token in a step."""
        self._went(1.0, 1.0)

    def _went(self, tokens: float, steps: float) -> None:
        self.tokens = self._FORGET * self.tokens + tokens
        self.time = self._FORGET * self.time + steps


class PassTimes:
    """Seconds of passes over one token of each row, by which those of others are told in decode steps."""

    _KEPT = 0.8

    def __init__(self) -> None:
        self.one: float | None = None

    def note(self, seconds: float) -> None:
        """A pass without drafts took so long."""
        self.one = seconds if self.one is None else self._KEPT * self.one + (1 - self._KEPT) * seconds

    def beyond_one(self, seconds: float) -> float | None:
        """Decode steps of a pass beyond one; None where there was no pass without drafts yet."""
        return max(0.0, seconds / self.one - 1) if self.one else None


__all__ = ["DraftsPay", "PassTimes"]
