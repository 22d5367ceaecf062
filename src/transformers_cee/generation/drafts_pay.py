# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""When drafting pays: what drafts cost and bring, as measured beforehand and as passes turn out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import torch
from torch import Tensor


class Chances:
    """Chances of drafts to be accepted when all before them are, by kind.

    Whether a first draft is accepted can be told without verifying it: what a drafter would have said is a lesson for
    nothing.

    Args:
        kinds (sequence of `float`): the chance of each kind, as long as little was seen of it.
        before (`float`): a kind counts as if it was seen so often before.
    """

    # What is seen weighs less with every further one.
    _FORGET = 0.98

    def __init__(self, kinds: Sequence[float], before: float) -> None:
        # On the host, whatever the default device is.
        self.tried = torch.full((len(kinds),), before, dtype=torch.float, device="cpu")
        self.held = self.tried * torch.tensor(kinds, dtype=torch.float, device="cpu")

    @property
    def mean(self) -> float:
        """Chance of a draft of whatever kind."""
        return float(self.held.sum() / self.tried.sum())

    @property
    def highest(self) -> float:
        """Chance of a draft of the best kind."""
        return float((self.held / self.tried).max())

    def of(self, kinds: Tensor) -> Tensor:
        """Chances of drafts of such kinds, in the same shape."""
        return (self.held / self.tried).to(kinds.device)[kinds]

    def note(self, kinds: Tensor, held: Tensor) -> None:
        """Drafts of such kinds (drafts,) were accepted (drafts,) or not, or would have been with such a chance."""
        kinds, count = kinds.cpu(), len(self.tried)
        tried = torch.bincount(kinds, minlength=count)
        kept = self._FORGET**tried
        self.tried = kept * self.tried + tried
        self.held = kept * self.held + torch.bincount(kinds, held.cpu().float(), count)


class Pace:
    """What all drafters of a call share: R, by how many tokens the rows that are furthest behind grow in each decode
    step's worth of time, which costs are weighed with; and all of them, since they share what drafts may cost it."""

    _FORGET = 0.97

    def __init__(self) -> None:
        self.tokens, self.time, self.passes = 1.0, 1.0, 0
        self.drafters: list[DraftsPay] = []

    @property
    def rate(self) -> float:
        return self.tokens / self.time

    def note(self, tokens: float, steps: float) -> None:
        """A pass that took so many decode steps gave the rows furthest behind so many tokens."""
        self.tokens = self._FORGET * self.tokens + tokens
        self.time = self._FORGET * self.time + steps
        self.passes += 1


class DraftsPay:
    """When a draft goes on: while the tokens that drafts are expected to bring exceed what they cost.

    One more draft costs R·(c_d + c_v) tokens: what the time to draft it and to verify one more token per row would
    give otherwise. It brings a token with the product of the chances of all drafts up to it; in a batch those of the
    rows that are furthest behind count, since it ends with the last one. A first draft also costs what a pass over
    several tokens does. A drafter may draft as long as it has not cost more tokens than it brought. Beyond that all
    drafters of a call have one purse, some tokens in advance and a small share of all passes: what one has lost the
    others do not have, but for a share of their own. One that is not trusted gets nothing in advance. What passes
    really take corrects the costs.

    Args:
        draft_cost, verify_cost (`float`): c_d and c_v, in decode steps at full depth.
        start_cost (`float`, *optional*, defaults to 0): of a pass with drafts, beyond them.
        pace (`Pace`, *optional*): of the call; one of its own by default.
    """

    # Tokens that all drafters of a call may cost it, and how many more with each pass; and how many of those that one
    # brought are not forgotten, so that it ends soon where it brings no more.
    _TRUST, _ALLOWANCE, _REMEMBERED, _FORGET = 0.8, 0.01, 3.0, 0.97
    # Of costs, how many steps' worth of passes they weigh as much as; and how far one pass is believed, since a busy
    # machine may hold it up.
    _BELIEVED, _LEAST_TIMES, _MOST_TIMES, _MOST_MORE = 1.0, 0.5, 3.0, 0.3

    def __init__(
        self,
        draft_cost: float,
        verify_cost: float,
        start_cost: float = 0.0,
        pace: Pace | None = None,
    ) -> None:
        self.draft_cost, self.verify_cost, self.start, self.pace = draft_cost, verify_cost, start_cost, pace or Pace()
        self.expected = self.taken = self._BELIEVED
        self.pace.drafters.append(self)
        self.balance = 0.0
        # May it cost something before it has brought anything?
        self.trusted = True

    def rests(self) -> bool:
        """Does this pass go without the drafter?"""
        allowed = self._TRUST + self._ALLOWANCE * self.pace.passes
        # One costly pass of another does not shut it out.
        share = allowed / len(self.pace.drafters)
        others = sum(min(share, max(0.0, -one.balance)) for one in self.pace.drafters if one is not self)
        if not self.trusted:
            allowed -= self._TRUST
        return self.balance <= 0 and self.balance - others + allowed < 0

    def hopes(self, judged: Tensor, left: int) -> bool:
        """Is asking expected to bring more than a run of the drafter costs, where drafts are as they were before?

        Args:
            judged (`LongTensor` of shape `(2, kinds)`): how many drafts of each kind there were, and how many stood.
            left (`int`): drafts at most.
        """
        tried, stood = judged.cpu().double()
        price, count = self.pace.rate * self.correction, torch.arange(1, left + 1, device="cpu")
        brings = (stood / tried.clamp_min(1)).unsqueeze(1) * (stood.sum() / tried.sum()) ** (count - 1)
        costs = price * (self.start + self.verify_cost * count + self.draft_cost * (count - 1))
        gains = (brings.cumsum(1) - costs).amax(1).clamp_min(0)
        return bool(tried @ gains > price * self.draft_cost * tried.sum())

    def most(self, shares: Sequence[float], before: int = 0, runs: int = 0) -> int:
        """How many further drafts are expected to bring the most beyond their costs; 0 where none bring more.

        Args:
            shares (sequence of `float`):
                Tokens that a row, of those furthest behind, is expected to get by the first, second, … of them.
            before (`int`): drafts that there are already.
            runs (`int`): how many of them the drafter has already run for.
        """
        best, most, gain = 0, 0.0, 0.0
        price = self.pace.rate * self.correction
        for count, share in enumerate(shares):
            steps = self.verify_cost + (0.0 if count < runs else self.draft_cost)
            gain += share - price * (steps + (0.0 if before or count else self.start))
            if gain > most:
                best, most = count + 1, gain
        return best

    def gains(self, shares: Sequence[float]) -> list[float]:
        """What further tokens to verify bring beyond their costs, up to the first that does not pay.

        Args:
            shares (sequence of `float`): tokens that a row, of those furthest behind, is expected to get by each.
        """
        price = self.pace.rate * self.correction * self.verify_cost
        return [share - price for share in takewhile(lambda share: share > price, shares)]

    def goes_on(
        self, share: float, usual: float, left: int, before: int = 0, runs: int = 0, beside: float = 0.0
    ) -> bool:
        """Do further drafts pay, where only the next one has been run for, or none of them?

        Args:
            share (`float`): tokens that a row is expected to get by the last draft that has been run for.
            usual (`float`): chance of each one behind it.
            left (`int`): how many further ones there may be.
            before (`int`): drafts that there are already.
            runs (`int`): 1 where the next one has been run for.
            beside (`float`): tokens that the next one brings beside itself, beyond their costs.
        """
        shares = [share * usual ** (count + 1 - runs) for count in range(left)]
        shares[:1] = [one + beside for one in shares[:1]]
        return self.most(shares, before, runs) > 0

    @property
    def correction(self) -> float:
        """By how much passes have taken more than what was measured beforehand says."""
        return max(self._LEAST_TIMES, self.taken / self.expected)

    def spent(self, drafts: int, runs: float) -> float:
        """Decode steps that so many drafts and runs of the drafter cost, as measured beforehand."""
        return self.draft_cost * runs + self.verify_cost * drafts + (self.start if drafts else 0.0)

    def note(self, drafts: int, runs: float, tokens: float = 1.0, taken: float | None = None) -> None:
        """What came of asking.

        Args:
            drafts (`int`): columns of drafts.
            runs (`float`): how often the drafter ran.
            tokens (`float`): by which the rows furthest behind have grown.
            taken (`float`, *optional*): decode steps that the pass took beyond one, where that is known.
        """
        spent = expected = self.spent(drafts, runs)
        if taken is not None:
            spent = min(taken, self._MOST_TIMES * expected + self._MOST_MORE)
        self.expected = self._FORGET * self.expected + expected
        self.taken = self._FORGET * self.taken + spent
        # One pass may have been held up: costs as corrected by all of them.
        cost = expected * self.correction
        self.balance = min(self._REMEMBERED, self.balance + tokens - 1 - self.pace.rate * cost)
        self.pace.note(tokens, 1 + cost)


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
        return seconds / self.one - 1 if self.one else None


__all__ = ["Chances", "DraftsPay", "Pace", "PassTimes"]
