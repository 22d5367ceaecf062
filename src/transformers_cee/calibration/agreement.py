# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Agreement with the full model: thresholds at which early answers are what full depth would have said."""

import math

import numpy as np
import torch
from torch import Tensor

from transformers_cee.calibration.points import CalibratedPoint, calibrated_point, exits_off
from transformers_cee.calibration.risk import certified_threshold
from transformers_cee.calibration.scores import ExitScores, unit_weights
from transformers_cee.exits.numbers import share


COVERAGES = ("max", "min")
METHODS = ("certified", "conformal", "running")


def running_agreement(oriented: Tensor, disagrees: Tensor, epsilon: float, coverage: str = "max") -> Tensor:
    """One threshold per internal exit from its running agreement (Valade, *Self-Supervised Early Exits*, arXiv
    2407.21082, second version).

    At each exit by itself, on all rows, from the surest on: `A_k` is the agreement among the k surest rows. The
    threshold is the score of the last k with `A_k ≥ 1 − epsilon`, or the highest score when there is none. Rows of
    equal score count together. This is an estimate without a guarantee: nothing accounts for the choice of k, nor for
    the rows that earlier exits have taken.

    Args:
        oriented (`Tensor` of shape `(rows, exits − 1)`): scores of which larger is surer.
        disagrees (`BoolTensor` of shape `(rows, exits)` or `(rows, exits − 1)`): other prediction than at full depth?
        epsilon (`float`): accepted disagreement, in (0, 1).
        coverage (`str`): `"max"` takes the largest such k, `"min"` the smallest.

    Returns:
        `Tensor` of shape `(exits − 1,)`: rows leave strictly above.
    """
    epsilon = share("epsilon", epsilon)
    if not isinstance(coverage, str) or coverage not in COVERAGES:
        raise ValueError(f"`coverage`={coverage!r} is unknown; accepted are {', '.join(COVERAGES)}.")
    rows, exits = oriented.shape
    ordered, order = oriented.sort(dim=0, descending=True)
    agreed = (~disagrees[:, :exits]).gather(0, order).cumsum(0)
    seen = torch.arange(1, rows + 1).unsqueeze(1)
    # A_k ≥ 1 − epsilon; a whole number of rows must not fail for a rounding.
    valid = agreed >= (1 - epsilon) * seen - 1e-9
    valid[:-1] &= ordered[:-1] != ordered[1:]
    places = torch.where(valid, seen, 0).amax(0) if coverage == "max" else torch.where(valid, seen, rows + 1).amin(0)
    places = torch.where(valid.any(0), places, 1)
    return ordered.gather(0, places.unsqueeze(0) - 1).squeeze(0)


def conformal_agreement(oriented: Tensor, disagrees: Tensor, epsilon: float, published: bool = False) -> float:
    """One threshold for all exits (CAT, Schuster, Fisch, Jaakkola, Barzilay, *Consistent Accelerated Inference via
    Confident Adaptive Transformers*, 2021).

    `M` of a row is its highest score at an exit that disagrees with full depth, −inf without such an exit. With the
    threshold at the ⌈(1 − epsilon)(n + 1)⌉-th smallest of n values of M and inf, a new row exchangeable with them has
    `M` at or below it, and leaves with full depth's prediction, with probability at least 1 − epsilon: over
    calibration rows and the new one together, not for each calibration.

    Args:
        oriented, disagrees, epsilon: as in `running_agreement`.
        published (`bool`): as the released code, take the quantile over rows with a disagreeing exit only, of which it
            promises 1 − epsilon, and numpy's "higher" quantile. Never bolder but for ties.

    Returns:
        `float`: rows leave strictly above.
    """
    epsilon = share("epsilon", epsilon)
    wrong = disagrees[:, : oriented.shape[1]]
    if oriented.shape[1] == 0:
        return math.inf
    highest = oriented.masked_fill(~wrong, -math.inf).amax(1)
    if published:
        highest = torch.cat((highest[wrong.any(1)], highest.new_full((1,), math.inf)))
        return float(np.quantile(highest.numpy(), 1 - epsilon, method="higher"))
    place = math.ceil((1 - epsilon) * (len(highest) + 1) - 1e-9)
    return float(highest.sort().values[place - 1]) if place <= len(highest) else math.inf


def calibrate_agreement(
    scores: ExitScores,
    epsilon: float,
    method: str = "certified",
    delta: float = 0.05,
    coverage: str = "max",
    published: bool = False,
) -> CalibratedPoint:
    """Thresholds for an agreement with full depth of at least 1 − epsilon.

    Args:
        scores (`ExitScores`): of rows that nothing else was fitted on. Labels are not needed.
        epsilon (`float`): accepted disagreement of the whole walk, in (0, 1).
        method (`str`, *optional*, defaults to `"certified"`):
            `"certified"`: with probability at least 1 − delta over calibration rows, by Learn-then-Test with an exact
            binomial test (Hoeffding-Bentkus for tokens of texts), see `risk.certified_threshold`; one threshold.
            `"conformal"`: in the mean over calibration rows, see `conformal_agreement`; one threshold. Tokens count as
            if they were independent.
            `"running"`: no guarantee, see `running_agreement`; one threshold per exit.
        delta (`float`): probability with which `"certified"` may fail, in (0, 1).
        coverage (`str`): of `"running"`.
        published (`bool`): of `"conformal"`.

    Returns:
        `CalibratedPoint`: with exits off, and the reason, when there are too few rows for the promise.

    Raises:
        ValueError: epsilon or delta outside of (0, 1), or an unknown method.
    """
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"`method`={method!r} is unknown; accepted are {', '.join(METHODS)}.")
    epsilon = share("epsilon", epsilon)
    levels = {"epsilon": epsilon}
    internal = scores.num_exits - 1
    if internal == 0:
        return calibrated_point(scores, [], "agreement", levels, method)
    if method == "running":
        found = running_agreement(scores.oriented, scores.disagrees, epsilon, coverage)
        return calibrated_point(scores, found, "agreement", levels, f"running_agreement_{coverage}_coverage")
    if method == "conformal":
        name = "conformal_published" if published else "conformal"
        shared: float | None = conformal_agreement(scores.oriented, scores.disagrees, epsilon, published)
        units = int(scores.disagrees.any(1).sum()) if published else len(scores)
        # The quantile of the released code wants one row more.
        wanted = 1 / epsilon - (0 if published else 1)
    else:
        name = "certified"
        levels["delta"] = delta = share("delta", delta)
        p_value = "binomial" if scores.groups is None else "hoeffding_bentkus"
        losses = scores.disagrees.double()
        shared = certified_threshold(scores.oriented, losses, epsilon, delta, p_value, scores.groups)
        units = unit_weights(scores.groups, len(scores))[1]
        wanted = math.log(delta) / math.log1p(-epsilon)
    if shared is None or shared == math.inf:
        rows = "calibration rows with an exit that disagrees" if published else "calibration rows"
        # An ε next to nothing takes more rows than there are numbers for.
        needed = math.ceil(min(wanted, 2.0**53) - 1e-9)
        reason = f"{units} {rows} are too few for an agreement of {1 - epsilon:g}; it takes at least {needed}."
        return exits_off(scores, "agreement", levels, name, reason, units)
    return calibrated_point(scores, [shared] * internal, "agreement", levels, name, units)
