# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The choice of exits by cost: the subset of exits, and their threshold, with the least expected time of a batch under
a promise.

One half of the rows chooses the exits, the other half certifies their threshold, so that the choice does not spoil the
promise. All exits that are kept share one threshold, on which Learn-then-Test works, see `risk`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transformers_cee.calibration.cost_table import CostTable, check_batch
from transformers_cee.calibration.exit_subsets import SLACK, FoundExits, Limit, expected_seconds, find_exits
from transformers_cee.calibration.points import CalibratedPoint, calibrated_point, exits_off
from transformers_cee.calibration.risk import certified_threshold, check_losses, risk_p_values
from transformers_cee.calibration.scores import ExitScores, unit_weights
from transformers_cee.exits.criteria import CRITERIA
from transformers_cee.exits.deciding import ANY_OF_THEM
from transformers_cee.exits.numbers import plain, share


# Thresholds that are tried to choose exits; when there are more scores, evenly ranked ones.
MAX_THRESHOLDS = 1024

Rescore = Callable[[list[int]], ExitScores]


@dataclass
class ExitChoice:
    """Which exits to keep for batches of one size.

    Args:
        exit_layers (`list[int]`): layers (1-based) of the exits kept, as in a config; the last layer alone where
            exits are off.
        point (`CalibratedPoint`): of a model with these exits; its `reason` says why exits are off, if they are.
        batch_size, length (`int`, `float`): rows of a batch, and tokens of a row.
        seconds, full_seconds (`float`): expected time of one batch, with these exits and without.
        depth (`float`): mean exit layer.
        agreement (`float`): share of rows that are answered as at full depth.
        is_exact (`bool`): does no other subset, with one of the thresholds tried, take less on the rows that chose?
        needs_rescoring (`bool`): are the scores others once only these exits are asked? Then the point holds for
            walks that ask all exits, and `rescore` makes it one of the exits kept.

    Figures are those of the rows that certified.
    """

    exit_layers: list[int]
    point: CalibratedPoint
    batch_size: int
    length: float
    seconds: float
    full_seconds: float
    depth: float
    agreement: float
    is_exact: bool
    needs_rescoring: bool = False

    @property
    def thresholds(self) -> dict[int, float]:
        """Thresholds of the internal exits, by layer."""
        return dict(zip(self.exit_layers[:-1], self.point.thresholds[:-1], strict=True))

    @property
    def reason(self) -> str | None:
        """Why exits are off, if they are."""
        return self.point.reason

    def point_at(self, layers: Sequence[int]) -> CalibratedPoint:
        """The point of a model with more exits, of which those that were not kept are closed.

        Args:
            layers (sequence of `int`): layers (1-based, ascending) of the model's exits.

        Raises:
            ValueError: exits that lack one of those kept, or with another last layer.
        """
        layers = [int(layer) for layer in plain(layers)]
        if not {*self.exit_layers} <= {*layers} or layers != sorted({*layers}) or layers[-1] != self.exit_layers[-1]:
            raise ValueError(
                f"`layers`={layers} must be ascending, with {self.exit_layers} among them, the last alike."
            )
        off = CRITERIA[self.point.criterion].off
        last = self.point.thresholds[-1]
        return replace(self.point, thresholds=[*(self.thresholds.get(layer, off) for layer in layers[:-1]), last])


def choose_exits(
    scores: ExitScores,
    costs: CostTable,
    *,
    batch_size: int,
    length: float,
    epsilon: float | None = None,
    level: float | None = None,
    delta: float = 0.05,
    skipping: bool = True,
    rescore: Rescore | None = None,
    seed: int = 0,
) -> ExitChoice:
    """The subset of exits, and the threshold they share, with the least expected time of a batch under a promise.

    Args:
        scores (`ExitScores`): at all exits that may be kept, of rows that nothing else was fitted on.
        costs (`CostTable`): of the engine and machine that will serve.
        batch_size (`int`): rows of a batch.
        length (`float`): tokens of a row.
        epsilon (`float`, *optional*): promise an agreement with full depth of at least 1 − epsilon, in (0, 1).
        level (`float`, *optional*): promise a mean loss (`scores.losses`) of at most that, in (0, 1), instead.
        delta (`float`): probability with which the promise may fail, over the rows, in (0, 1).
        skipping (`bool`, *optional*, defaults to `True`):
            The promise also holds where only some of the exits kept are asked, as `plan_exits` does: a row counts with
            the worst of all the exits that would let it out.
        rescore (`Callable`, *optional*):
            Gives the scores of the same rows when only exits at some layers (1-based, the last one included) are
            asked, for criteria with memory.
        seed (`int`): of the halves, drawn among rows, or among groups of rows that depend on one another. The smaller
            half chooses where their number is odd.

    Returns:
        `ExitChoice`: with exits off, and the reason, when there are too few rows for the promise or no exit pays.

    Raises:
        ValueError: no promise or two of them, numbers out of range, costs without one of the exits, losses that are
            not known or not in [0, 1], or `rescore` that gives something else.
    """
    promise = _promise(scores, epsilon, level, delta, skipping)
    check_batch(batch_size, length)
    costs.check_layers(scores.layers.tolist())
    chooses = _Chooser(scores, costs, int(batch_size), float(length), promise)
    first, second = _halves(scores, seed)
    half = scores.select(first) if bool(first.any()) else None
    most = None if half is None else promise.most(half)
    if half is None or most is None:
        return chooses.off(second, promise.too_few(unit_weights(scores.groups, len(scores))[1]), warn=True)
    found = chooses.search(half, most)
    if not found.exits:
        return chooses.off(second, chooses.no_exit_pays(found), is_exact=found.is_exact)
    layers = scores.layers[torch.tensor([*found.exits, scores.num_exits - 1])].tolist()
    kept = _rescored(scores, layers, rescore)
    choice = chooses.certified(kept.select(second), found.is_exact, bool(scores.has_memory) and rescore is None)
    return chooses.off(second, choice, is_exact=found.is_exact) if isinstance(choice, str) else choice


@dataclass(frozen=True)
class _Promise:
    """What is promised: losses of at most a level in the mean, with a probability of 1 − delta."""

    kind: str
    levels: dict[str, Any]
    level: float
    delta: float
    p_value: str
    skipping: bool

    @property
    def method(self) -> str:
        return f"chosen_by_cost_{ANY_OF_THEM}" if self.skipping else "chosen_by_cost"

    def losses(self, scores: ExitScores) -> Tensor:
        return scores.disagrees.double() if self.kind == "agreement" else scores.losses

    def most(self, scores: ExitScores) -> float | None:
        """Largest sum of the units' losses that would still be certified; None when none would."""
        units = unit_weights(scores.groups, len(scores))[1]

        def passes(risk: float) -> bool:
            found = risk_p_values(torch.tensor([risk], dtype=torch.double), units, self.level, self.p_value)
            return float(found) <= self.delta

        if not passes(0.0):
            return None
        low, high = 0.0, self.level
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if passes(middle) else (low, middle)
        return low * units

    def threshold(self, scores: ExitScores) -> float | None:
        """The lowest threshold of these exits that is certified."""
        oriented, losses = scores.oriented, self.losses(scores)
        if self.skipping:
            oriented, losses = worst_of_any(oriented, losses)
        return certified_threshold(oriented, losses, self.level, self.delta, self.p_value, scores.groups)

    def too_few(self, units: int) -> str:
        what = f"an agreement of {1 - self.level:g}" if self.kind == "agreement" else f"a risk of {self.level:g}"
        needed = 2 * math.ceil(min(math.log(self.delta) / math.log1p(-self.level), 2.0**52) - 1e-9)
        return (
            f"{units} calibration rows, of which one half chooses the exits and the other certifies, are too few for "
            f"{what}; it takes at least {needed}."
        )


def _promise(scores: ExitScores, epsilon: float | None, level: float | None, delta: float, skipping: bool) -> _Promise:
    if (epsilon is None) == (level is None):
        raise ValueError(
            f"`epsilon`={epsilon!r} and `level`={level!r}: accepted is one of them, the promise of an agreement or of "
            f"a bound on the risk."
        )
    delta = share("delta", delta)
    if epsilon is not None:
        epsilon = share("epsilon", epsilon)
        p_value = "binomial" if scores.groups is None else "hoeffding_bentkus"
        return _Promise("agreement", {"epsilon": epsilon, "delta": delta}, epsilon, delta, p_value, skipping)
    level = share("level", level)
    check_losses(scores.losses, "hoeffding_bentkus", scores.groups)
    is_binary = scores.groups is None and bool(((scores.losses == 0) | (scores.losses == 1)).all())
    levels = {"level": level, "delta": delta, "risk": scores.risk}
    return _Promise("risk", levels, level, delta, "binomial" if is_binary else "hoeffding_bentkus", skipping)


@dataclass(frozen=True)
class _Chooser:
    """The steps of one choice."""

    scores: ExitScores
    costs: CostTable
    batch_size: int
    length: float
    promise: _Promise

    def search(self, half: ExitScores, most: float) -> FoundExits:
        oriented, losses = half.oriented.double(), self.promise.losses(half).double()
        # The worst of several exits is looked for where losses are 0 or 1; others choose by the walk itself.
        of_any = self.promise.skipping and bool(((losses == 0) | (losses == 1)).all())
        limit = Limit(losses.numpy(), unit_weights(half.groups, len(half))[0].numpy(), most, of_any)
        costs, layers = self.costs.at(self.batch_size, self.length), half.layers.tolist()
        seconds = expected_seconds(costs, layers, len(half))
        return find_exits(oriented.numpy(), _tried(oriented), seconds, limit)

    def certified(self, half: ExitScores, is_exact: bool, needs_rescoring: bool) -> ExitChoice | str:
        """The choice of the exits of these scores, or why exits are off."""
        promise, units = self.promise, unit_weights(half.groups, len(half))[1]
        threshold = promise.threshold(half)
        if threshold is None:
            full = half.mean(promise.losses(half)[:, -1])
            return f"{units} calibration rows do not certify the promise, not even at full depth ({full:.4f})."
        shared = [threshold] * (half.num_exits - 1)
        point = calibrated_point(half, shared, promise.kind, promise.levels, promise.method, units)
        choice = self._measured(half, point, is_exact, needs_rescoring)
        if choice.seconds >= choice.full_seconds * (1 - SLACK):
            return (
                f"exits at layers {choice.exit_layers[:-1]} take {choice.seconds:.3g} s with what is certified, full "
                f"depth takes {choice.full_seconds:.3g} s."
            )
        return choice

    def _measured(
        self, half: ExitScores, point: CalibratedPoint, is_exact: bool, needs_rescoring: bool = False
    ) -> ExitChoice:
        taken = point.taken_exits(half)
        layers, internal = half.layers.tolist(), range(half.num_exits - 1)
        seconds = expected_seconds(self.costs.at(self.batch_size, self.length), layers, len(half))
        come_past = [np.array(int((taken > index).sum())) for index in internal]
        return ExitChoice(
            layers,
            point,
            self.batch_size,
            self.length,
            seconds=float(seconds.of_exits(internal, come_past)),
            full_seconds=seconds.full,
            depth=float(half.layers[taken].double().mean()),
            agreement=half.mean(~half.disagrees.gather(1, taken.unsqueeze(1)).squeeze(1)),
            is_exact=is_exact,
            needs_rescoring=needs_rescoring,
        )

    def no_exit_pays(self, found: FoundExits) -> str:
        full = found.seconds
        if found.next_best == math.inf:
            return "no exit keeps the promise on the rows that choose."
        return (
            f"no exit pays at {self.batch_size} rows of length {self.length:g}: the best exits take "
            f"{found.next_best:.3g} s, full depth takes {full:.3g} s."
        )

    def off(self, second: Tensor, reason: str, is_exact: bool = True, warn: bool = False) -> ExitChoice:
        half = self.scores.at_layers(self.scores.layers[-1:].tolist()).select(second)
        units, promise = unit_weights(half.groups, len(half))[1], self.promise
        if warn:
            warnings.warn(f"Exits are off: {reason}", stacklevel=3)
        point = exits_off(half, promise.kind, promise.levels, promise.method, reason, units, warn=False)
        return self._measured(half, point, is_exact)


def worst_of_any(oriented: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and losses of a walk that loses, at each threshold, the most that a row can lose when only some of the
    exits are asked: the largest loss of all exits above the threshold and of the last one.

    Args:
        oriented (`Tensor` of shape `(rows, exits − 1)`): scores of which larger is surer.
        losses (`Tensor` of shape `(rows, exits)`).
    """
    ascending, order = oriented.sort(dim=1)
    by_score = torch.cat((losses[:, :-1].gather(1, order), losses[:, -1:]), dim=1)
    return ascending, by_score.flip(1).cummax(1).values.flip(1)


def _halves(scores: ExitScores, seed: int) -> tuple[Tensor, Tensor]:
    """Rows (rows,) that choose, and those that certify; groups stay together."""
    groups = torch.arange(len(scores)) if scores.groups is None else scores.groups.unique(return_inverse=True)[1]
    units = int(groups.max()) + 1
    drawn = torch.randperm(units, generator=torch.Generator().manual_seed(seed))
    first = (drawn < units // 2)[groups]
    return first, ~first


def _tried(oriented: Tensor) -> np.ndarray:
    """Thresholds (steps,) at which walks differ, or evenly ranked ones of them."""
    values = torch.cat((torch.tensor([-math.inf], dtype=oriented.dtype), oriented.flatten())).unique().numpy()
    places = np.linspace(0, len(values) - 1, min(len(values), MAX_THRESHOLDS)).round().astype(int)
    return values[places]


def _rescored(scores: ExitScores, layers: list[int], rescore: Rescore | None) -> ExitScores:
    """Scores of the exits kept alone."""
    if rescore is None:
        return scores.at_layers(layers)
    found = rescore(layers)
    if not isinstance(found, ExitScores):
        raise ValueError(f"`rescore` gave {type(found).__name__}; needed are `ExitScores`.")
    about = {"criterion": scores.criterion, "exits": layers, "rows": len(scores)}
    given = {"criterion": found.criterion, "exits": found.layers.tolist(), "rows": len(found)}
    if given != about:
        raise ValueError(f"`rescore` gave scores of {given}; needed are those of {about}.")
    return found


__all__ = ["ExitChoice", "choose_exits", "worst_of_any"]
