# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A bound on a risk, by Learn-then-Test.

Angelopoulos, Bates, Candès, Jordan, Lei, *Learn then Test: Calibrating Predictive Algorithms to Achieve Risk Control*,
2021; applied to early exits by CALM, Schuster et al. 2022. Thresholds are tested from safe to bold, each against the
hypothesis that its risk exceeds the level, and testing stops at the first that cannot be rejected. The chance that a
bad threshold passes is at most δ, whatever the number of tests.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.special import rel_entr
from scipy.stats import binom
from torch import Tensor

from transformers_cee.calibration.points import CalibratedPoint, calibrated_point, exits_off
from transformers_cee.calibration.scores import ExitScores, unit_weights
from transformers_cee.exits.criteria import CRITERIA, check_thresholds
from transformers_cee.exits.numbers import numbers, share
from transformers_cee.stores.scoring import exits_taken


P_VALUES = ("hoeffding_bentkus", "hoeffding", "binomial")


def risk_p_values(risks: Tensor, rows: int, level: float, p_value: str = "hoeffding_bentkus") -> Tensor:
    """P-values of "the true risk exceeds the level".

    Args:
        risks (`Tensor` of shape `(steps,)`): mean of `rows` independent losses in [0, 1].
        rows (`int`): how many.
        level (`float`): bound on the risk, in (0, 1).
        p_value (`str`):
            `"hoeffding_bentkus"`, `min(exp(−n·KL(min(R, level) ‖ level)), e·P(Bin(n, level) ≤ ⌈nR⌉))` (Bates et al.
            2021); `"hoeffding"`, `exp(−2n·max(0, level − R)²)`; `"binomial"`, `P(Bin(n, level) ≤ nR)`, exact for
            losses of 0 and 1 and for them only.

    Returns:
        `Tensor` of shape `(steps,)`, float64.
    """
    _check_p_value(p_value)
    distinct, where = np.unique(risks.double().numpy(), return_inverse=True)
    if p_value == "hoeffding":
        values = np.exp(-2 * rows * np.maximum(0.0, level - distinct) ** 2)
    else:
        # Means times rows are whole numbers but for the last digits.
        counts = np.ceil(distinct * rows - 1e-9 * max(1, rows))
        values = binom.cdf(counts, rows, level)
        if p_value == "hoeffding_bentkus":
            capped = np.minimum(distinct, level)
            divergence = rel_entr(capped, level) + rel_entr(1 - capped, 1 - level)
            values = np.minimum(np.exp(-rows * divergence), math.e * values)
    return torch.from_numpy(np.minimum(values, 1.0)[where.reshape(-1)])


def fixed_sequence(
    losses: Tensor,
    level: float,
    delta: float,
    p_value: str = "hoeffding_bentkus",
    groups: Tensor | None = None,
) -> int:
    """How many settings, from the first on, have a risk of at most the level, with probability at least 1 − delta.

    For losses that exist only after a setting was executed, such as 1 − ROUGE-L of texts generated at each of several
    thresholds.

    Args:
        losses (`Tensor` of shape `(rows, steps)`): losses in [0, 1] of each row at each setting, safest first. The
            settings must not have been chosen on these rows.
        level, delta (`float`): bound on the risk, and the probability to fail, both in (0, 1).
        p_value (`str`): see `risk_p_values`.
        groups (`LongTensor` of shape `(rows,)`, *optional*): rows that depend on one another.

    Raises:
        ValueError: a level outside of (0, 1), losses or groups of another shape, or losses that the p-value is not
            valid for.
    """
    if losses.dim() != 2:
        raise ValueError(f"`losses` of shape {tuple(losses.shape)} must be (rows, steps).")
    check_losses(losses, p_value, groups)
    weights, units = unit_weights(groups, len(losses))
    risks = (losses.double() * weights.unsqueeze(1)).sum(0) / units
    passed = risk_p_values(risks, units, share("level", level), p_value) <= share("delta", delta)
    return int(passed.int().cumprod(0).sum())


def certified_threshold(
    oriented: Tensor,
    losses: Tensor,
    level: float,
    delta: float,
    p_value: str = "hoeffding_bentkus",
    groups: Tensor | None = None,
) -> float | None:
    """The lowest threshold, the same at all exits, of which the risk of the whole walk is certified.

    Every threshold from infinity downwards is tested: between two neighbouring scores the walk stays the same, so that
    there are finitely many tests, and none of them depends on a choice of grid.

    Args:
        oriented (`Tensor` of shape `(rows, exits − 1)`): scores of which larger is surer.
        losses (`Tensor` of shape `(rows, exits)`): losses in [0, 1].
        level, delta, p_value, groups: as in `fixed_sequence`.

    Returns:
        `float` or None: rows leave strictly above it; None when not even full depth passes.
    """
    check_losses(losses, p_value, groups)
    level, delta = share("level", level), share("delta", delta)
    weights, units = unit_weights(groups, len(losses))
    scores, changes = _walk_changes(oriented, losses)
    changes = changes * weights.unsqueeze(1)
    moves = scores > -math.inf
    values, order = scores[moves].sort(descending=True)
    start = (losses[:, -1].double() * weights).sum()
    sums = torch.cat((start.view(1), start + changes[moves][order].cumsum(0)))
    # Step k: all rows with one of the k highest scores leave there. Equal scores leave together.
    ends = torch.cat((values[:-1] != values[1:], torch.ones(min(len(values), 1), dtype=torch.bool)))
    steps = torch.cat((torch.zeros(1, dtype=torch.long), ends.nonzero().squeeze(1) + 1))
    passed = risk_p_values(sums[steps].clamp_min(0) / units, units, level, p_value) <= delta
    certified = int(passed.int().cumprod(0).sum())
    if certified == 0:
        return None
    step = int(steps[certified - 1])
    return float(values[step]) if step < len(values) else -math.inf


def _walk_changes(oriented: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
    """Where the loss of a row's walk changes as one threshold falls: scores (rows, exits − 1), −inf where nothing
    changes, and the change once the threshold is below that score.

    A row leaves at the first exit above the threshold, so that only scores above all earlier ones matter.
    """
    earlier = torch.full_like(oriented, -math.inf)
    earlier[:, 1:] = oriented.cummax(1).values[:, :-1]
    record = oriented > earlier
    losses = losses.double()
    changes = torch.zeros_like(oriented, dtype=torch.double)
    deeper = losses[:, -1]
    for index in reversed(range(oriented.shape[1])):
        changes[:, index] = losses[:, index] - deeper
        deeper = torch.where(record[:, index], losses[:, index], deeper)
    return oriented.masked_fill(~record, -math.inf), changes


def calibrate_risk(
    scores: ExitScores,
    level: float,
    delta: float = 0.05,
    p_value: str = "hoeffding_bentkus",
    grid: Sequence[float] | None = None,
) -> CalibratedPoint:
    """Lowest threshold whose risk is at most `level`, with probability at least 1 − delta over calibration rows.

    Args:
        scores (`ExitScores`): of rows that nothing else was fitted on; their `losses` are the risk.
        level (`float`): bound on the mean loss, in (0, 1).
        delta (`float`): probability with which the bound may fail, in (0, 1).
        p_value (`str`): `"hoeffding_bentkus"`, `"hoeffding"`, or `"binomial"` for losses of 0 and 1.
        grid (sequence of `float`, *optional*): the criterion's thresholds to test, safest first; all by default.

    Returns:
        `CalibratedPoint`: with exits off, and the reason, when not even the safest threshold passes.

    Raises:
        ValueError: a level or delta outside of (0, 1), losses outside of what the p-value accepts, or a bad grid.
    """
    level, delta = share("level", level), share("delta", delta)
    levels = {"level": level, "delta": delta, "risk": scores.risk}
    method = f"learn_then_test_{p_value}"
    units = unit_weights(scores.groups, len(scores))[1]
    if grid is None:
        found = certified_threshold(scores.oriented, scores.losses, level, delta, p_value, scores.groups)
        if found is not None:
            return calibrated_point(scores, [found] * (scores.num_exits - 1), "risk", levels, method, units)
    else:
        count = _certified_in_grid(scores, grid, level, delta, p_value)
        if count:
            own = check_thresholds(scores.criterion, float(grid[count - 1]), scores.num_exits)
            # Exits that were closed stay so wherever the point is used.
            closed = (scores.oriented == -math.inf).all(0).tolist()
            off = CRITERIA[scores.criterion].off
            own = [off if one else value for one, value in zip([*closed, False], own, strict=True)]
            return CalibratedPoint(
                scores.criterion, own, "risk", levels, method, units, scores.alpha, fitted_on=scores.made_on
            )
    full = scores.mean(scores.losses[:, -1])
    reason = (
        f"{units} calibration rows do not certify the risk {scores.risk!r} at {level} with probability {1 - delta:g}, "
        f"not even at {'full depth' if grid is None else 'the safest threshold'} (full depth: {full:.4f})."
    )
    return exits_off(scores, "risk", levels, method, reason, units)


def _certified_in_grid(scores: ExitScores, grid: Sequence[float], level: float, delta: float, p_value: str) -> int:
    grid = numbers("grid", grid)
    if not grid:
        raise ValueError("`grid` is empty; it needs at least one threshold.")
    exits = [exits_taken(scores.criterion, threshold, scores.scores) for threshold in grid]
    depths = [float(scores.layers[taken].double().mean()) for taken in exits]
    if any(later > earlier for earlier, later in itertools.pairwise(depths)):
        raise ValueError(f"`grid`={grid} must go from safe to bold thresholds of {scores.criterion!r}.")
    losses = scores.losses.gather(1, torch.stack(exits, dim=1))
    return fixed_sequence(losses, level, delta, p_value, scores.groups)


def check_losses(losses: Tensor, p_value: str, groups: Tensor | None = None) -> None:
    """Raises `ValueError` unless the p-value is valid for these losses."""
    _check_p_value(p_value)
    if len(losses) == 0:
        raise ValueError("`losses` has no rows; at least one is needed.")
    if groups is not None and tuple(groups.shape) != (len(losses),):
        raise ValueError(f"`groups` of shape {tuple(groups.shape)} must be ({len(losses)},), one per row of `losses`.")
    if not bool(((losses >= 0) & (losses <= 1)).all()):
        unknown = "; NaN stands for rows without labels" if bool(losses.isnan().any()) else ""
        raise ValueError(f"`losses` lie in {float(losses.min())}..{float(losses.max())}; accepted are 0..1{unknown}.")
    if p_value == "binomial" and (groups is not None or not bool(((losses == 0) | (losses == 1)).all())):
        raise ValueError("`p_value`='binomial' accepts losses of 0 and 1 of independent rows; use another one.")


def _check_p_value(p_value: str) -> None:
    if not isinstance(p_value, str) or p_value not in P_VALUES:
        raise ValueError(f"`p_value`={p_value!r} is unknown; accepted are {', '.join(P_VALUES)}.")
