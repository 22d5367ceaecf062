# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A budget: thresholds that keep the mean cost of a row within it.

EERO: Valade, Hebiri, Gay, *EERO: Early Exit with Reject Option for Efficient Classification with limited budget*, UAI
2025, PMLR 286:4290-4308. Numbers of equations and statements are those of the paper. An exit is reached with a rate,
chosen by exponential weights, and its threshold is the quantile of unlabelled scores that gives the rate.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy.special import softmax
from scipy.stats import norm
from torch import Tensor

from transformers_cee.calibration.points import CalibratedPoint, calibrated_point, exits_off
from transformers_cee.calibration.scores import ExitScores, just_below, leave_at, orient, own_thresholds
from transformers_cee.exits.numbers import number, numbers, share


def eero_rates(
    risks: Sequence[float] | Tensor,
    costs: Sequence[float] | Tensor,
    budget: float,
    beta: float = 0.04,
    fill: bool = False,
    margin: float = 0.0,
) -> Tensor:
    """Share of rows that shall leave at each exit, by exponential weights (proposition 3.8).

    `ε_l ∝ π_l exp(−(R_l + μ B_l)/β)` with the prior `π_l ∝ 1/B_l`; μ ≥ 0 is the smallest at which `Σ ε_l B_l` is
    within the budget, found by bisection.

    Args:
        risks (`Tensor` of shape `(exits,)`): risk `R_l` of each exit's head on labelled rows.
        costs (`Tensor` of shape `(exits,)`): cost `B_l` of one row that leaves there, increasing.
        budget (`float`): accepted mean cost of a row, at least that of the first exit.
        beta (`float`): temperature; the paper's experiments have 0.04.
        fill (`bool`): let μ be negative, so that the whole budget is used up to the cost of full depth.
        margin (`float`): keep that many standard deviations of a row's cost below the budget.

    Returns:
        `Tensor` of shape `(exits,)`, float64: sums to 1.

    Raises:
        ValueError: costs that do not increase, risks that are not one number per exit, or a budget below the first
            cost.
    """
    costs = check_costs(costs, len(costs))
    risks = torch.tensor(numbers("risks", risks), dtype=torch.double)
    if risks.shape != costs.shape or not bool(risks.isfinite().all()):
        raise ValueError(f"`risks`={risks.tolist()} must be {len(costs)} finite numbers, one per exit.")
    beta, margin = number("beta", beta), number("margin", margin)
    if not 0 < beta < math.inf:
        raise ValueError(f"`beta`={beta} must be a positive number.")
    if margin < 0:
        raise ValueError(f"`margin`={margin} must not be negative.")
    budget = _budget(budget, float(costs[0]), "the cost of the first exit")
    if len(costs) == 1 or budget <= float(costs[0]) or (fill and margin == 0 and budget >= float(costs[-1])):
        rates = torch.zeros(len(costs), dtype=torch.double)
        rates[-1 if budget > float(costs[0]) else 0] = 1.0
        return rates
    scaled, limit = (costs / costs[-1]).numpy(), budget / float(costs[-1])
    start = -np.log(scaled) - risks.numpy() / beta

    def rates_at(mu: float) -> np.ndarray:
        return softmax(start - mu / beta * scaled)

    def fits(mu: float) -> bool:
        rates = rates_at(mu)
        mean = rates @ scaled
        return mean + margin * math.sqrt(rates @ (scaled - mean) ** 2) <= limit

    with np.errstate(over="ignore", invalid="ignore"):
        rates = rates_at(0.0 if not fill and fits(0.0) else _smallest(fits))
    if not np.isfinite(rates).all():
        raise ValueError(f"`beta`={beta} and `risks`={risks.tolist()} are too far apart to weigh the exits by.")
    return torch.from_numpy(rates)


def _smallest(fits: Callable[[float], bool]) -> float:
    """By bisection, the smallest number that fits, when all larger ones do."""
    low, high = -1.0, 1.0
    while fits(low) and low > -1e9:
        low *= 2
    while not fits(high) and high < 1e300:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def eero_thresholds(oriented: Tensor, rates: Tensor, noise: float = 1e-5, seed: int = 0) -> Tensor:
    """Quantiles of all rows' scores at every internal exit (algorithm 1 with equations 8 and 9).

    Leave at the first exit with `F_l(s_l) ≥ 1 − (Σ_{j≤l} ε_j + C/√N)`, with `F_l` the empirical distribution function
    of all N rows at that exit and `C = ε_l`.

    Args:
        oriented (`Tensor` of shape `(rows, exits − 1)`): scores of which larger is surer; labels are not needed.
        rates (`Tensor` of shape `(exits,)`): see `eero_rates`.
        noise (`float`): upper end of the uniform noise that breaks ties between scores. Whoever compares with these
            thresholds must add it, too; a model does not, so that `calibrate_budget` works without.
        seed (`int`): of the noise.

    Returns:
        `Tensor` of shape `(exits − 1,)`: rows leave strictly above.
    """
    rows, internal = oriented.shape
    if noise:
        drawn = torch.rand(oriented.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
        oriented = oriented + (noise * drawn).to(oriented.dtype)
    accepted = rates.cumsum(0)[:internal] + rates[:internal] / math.sqrt(rows)
    # F(s) ≥ k/N is s ≥ the k-th smallest.
    places = torch.ceil(rows * (1 - accepted) - 1e-9).long()
    lowest = oriented.sort(0).values.gather(0, (places.clamp(1, rows) - 1).unsqueeze(0)).squeeze(0)
    return torch.where(places < 1, -math.inf, just_below(lowest))


def conditional_thresholds(oriented: Tensor, rates: Tensor) -> Tensor:
    """Quantiles at every internal exit of the scores of those rows that have reached it.

    `eero_thresholds` takes the same rows for every exit. When scores of different exits do not rank rows alike, more
    rows leave early than the rates say and a part of the budget is not used. Here the rows that stay at each exit are
    counted: behind exit l there are at most `N (1 − Σ_{j≤l} ε_j)`. Rows of equal score leave together.

    Args:
        oriented, rates: as in `eero_thresholds`.

    Returns:
        `Tensor` of shape `(exits − 1,)`: rows leave strictly above.
    """
    rows, internal = oriented.shape
    stay = torch.floor(rows * (1 - rates.cumsum(0)) + 1e-9).clamp_min(0).long()
    thresholds = torch.full((internal,), math.inf, dtype=oriented.dtype)
    for index in range(internal):
        ordered = oriented[:, index].sort().values
        staying = int(stay[index])
        if staying >= len(ordered):
            continue
        # The threshold is the highest score below the lowest that must leave.
        below = ordered[ordered < ordered[staying]]
        thresholds[index] = below[-1] if len(below) else -math.inf
        oriented = oriented[~(oriented[:, index] > thresholds[index])]
    return thresholds


def calibrate_budget(
    scores: ExitScores,
    budget: float,
    costs: Sequence[float] | Tensor | None = None,
    unit: str = "layers",
    refine: bool = True,
    beta: float = 0.04,
    delta: float = 0.02,
    batch_rows: int | None = None,
    risks: Sequence[float] | Tensor | None = None,
) -> CalibratedPoint:
    """Thresholds that keep the mean cost of a row within a budget.

    Args:
        scores (`ExitScores`): of rows that need no labels when `risks` are given.
        budget (`float`): accepted mean cost of a row, in the unit of the costs. From the cost of full depth on, exits
            are off.
        costs (sequence of `float`, *optional*): cost of one row that leaves at each exit, increasing: layers by
            default, or FLOPs, or measured milliseconds.
        unit (`str`): what costs are counted in; for the record.
        refine (`bool`):
            With `False`, EERO as published: its correction of order 1/√N, thresholds from all rows. With `True`,
            thresholds from the rows that reach each exit, rates that fill the budget, and a margin: the mean cost of
            `batch_rows` new rows exceeds the budget with probability of about delta (normal approximation of the
            difference between two means).
        beta (`float`): temperature of the rates, see `eero_rates`.
        delta (`float`): of the margin, in (0, 1).
        batch_rows (`int`, *optional*): rows whose mean cost is promised; as many as the calibration rows by default.
        risks (sequence of `float`, *optional*): risk of each exit's head, from rows with labels; the mean of
            `scores.losses` by default.

    Raises:
        ValueError: costs that do not increase, risks that are missing or do not fit, or a budget below what the
            criterion can reach: the cost of the first exit, or more if there are rows that it never lets out there.
    """
    prices = check_costs(scores.layers if costs is None else costs, scores.num_exits)
    if batch_rows is not None and not number("batch_rows", batch_rows) >= 1:
        raise ValueError(f"`batch_rows`={batch_rows} must be at least 1.")
    oriented = scores.oriented
    boldest = leave_at(oriented, [-math.inf] * (scores.num_exits - 1))
    budget = _budget(
        budget, float(prices[boldest].mean()), f"the least mean cost of {scores.criterion!r} on these rows"
    )
    levels = {"budget": budget, "unit": unit, "costs": prices.tolist()}
    method = "eero_refined" if refine else "eero"
    if refine:
        levels["delta"] = delta = share("delta", delta)
    if budget >= float(prices[-1]):
        reason = f"the budget of {budget:g} {unit} covers full depth ({float(prices[-1]):g})."
        return exits_off(scores, "budget", levels, method, reason, warn=False)
    if risks is None:
        means = scores.losses.double().mean(0)
        if not bool(means.isfinite().all()):
            raise ValueError("`risks` must be given where `scores.losses` are unknown: the risk of each exit's head.")
        risks = means
    if refine:
        spread = math.sqrt(1 / len(scores) + 1 / (batch_rows or len(scores)))
        margin = max(0.0, float(norm.ppf(1 - delta))) * spread
        found = _within_budget(oriented, risks, prices, budget, beta, margin)
        return calibrated_point(scores, found, "budget", levels, method)
    rates = eero_rates(risks, prices, budget, beta)
    return calibrated_point(scores, eero_thresholds(oriented, rates, noise=0.0), "budget", levels, method)


def _within_budget(
    oriented: Tensor, risks: Sequence[float] | Tensor, costs: Tensor, budget: float, beta: float, margin: float
) -> Tensor:
    """Conditional thresholds (exits − 1,) whose walk on these rows keeps the margin.

    It does at once, unless there are rows that the criterion never lets out early; then the rates aim lower.
    """

    def thresholds_for(target: float) -> tuple[Tensor, float]:
        found = conditional_thresholds(oriented, eero_rates(risks, costs, target, beta, fill=True, margin=margin))
        spent = costs[leave_at(oriented, found)]
        return found, float(spent.mean() + margin * spent.std(correction=0))

    found, needed = thresholds_for(budget)
    slack = 1e-9 * budget
    if needed <= budget + slack:
        return found
    low, high = float(costs[0]), budget
    found, needed = thresholds_for(low)
    if needed > budget + slack:
        raise ValueError(f"`budget`={budget} must be at least {needed:g} for these rows and this `delta`.")
    for _ in range(20):
        target = (low + high) / 2
        tried, needed = thresholds_for(target)
        if needed <= budget + slack:
            low, found = target, tried
        else:
            high = target
    return found


def with_rejection(point: CalibratedPoint, scores: ExitScores, rate: float) -> CalibratedPoint:
    """The same point with a threshold at the last exit, below which a row is not answered (EERO's reject rule).

    Args:
        point (`CalibratedPoint`): a calibration.
        scores (`ExitScores`): of calibration rows, with `last_scores`.
        rate (`float`): share of all rows to reject at most, in (0, 1): of those that come to the last exit, the ones
            with the lowest scores. When fewer come, all of them.

    Returns:
        `CalibratedPoint`: of which `rejected` tells the rows; figures of an earlier `check` are dropped.

    Raises:
        ValueError: a rate outside of (0, 1), or scores without `last_scores` or of another criterion.
    """
    levels = {**point.levels, "reject_rate": share("rate", rate)}
    if scores.last_scores is None:
        raise ValueError("`scores.last_scores` is None; rejection compares scores at the last exit.")
    rate = levels["reject_rate"]
    reached = replace(point, thresholds=[*point.thresholds], levels=levels, held_out=None)
    last = orient(scores.criterion, scores.last_scores)[point.taken_exits(scores) == scores.num_exits - 1]
    ordered = last.sort().values
    rejected = math.floor(rate * len(scores) + 1e-9)
    limit = just_below(ordered[rejected]) if rejected < len(ordered) else torch.tensor(math.inf)
    reached.thresholds[-1] = own_thresholds(scores.criterion, limit.view(1), ordered.unsqueeze(1))[0]
    return reached


def check_costs(costs: Sequence[float] | Tensor, exits: int) -> Tensor:
    """Costs (exits,) in float64; raises `ValueError` unless they are positive and increasing, one per exit."""
    values = torch.tensor(numbers("costs", costs), dtype=torch.double)
    good = values.shape == (exits,) and bool(values.isfinite().all()) and bool((values[1:] > values[:-1]).all())
    if not good or float(values[0]) <= 0:
        raise ValueError(f"`costs`={values.tolist()} must be {exits} increasing positive numbers, one per exit.")
    return values


def _budget(budget: Any, least: float, what: str) -> float:
    accepted = f"a number of at least {least:g}, {what}"
    found = number("budget", budget, accepted)
    if not found >= least - 1e-9 * least:
        raise ValueError(f"`budget`={budget!r} must be {accepted}.")
    return found
