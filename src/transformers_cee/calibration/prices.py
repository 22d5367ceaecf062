# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A promise along the scale on which a conditioned policy has learned: the price α of a layer, not the threshold of
one price.

At every price the policy weighs an early answer against the layers that it saves, and leaves where the answer is worth
it. A threshold that is swept at one price leaves that scale. Prices and the thresholds that go with them are a family
of walks from deep to shallow, which Learn-then-Test runs through (Angelopoulos et al. 2021); see `risk`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from transformers_cee.calibration.points import CalibratedPoint, exits_off
from transformers_cee.calibration.risk import fixed_sequence
from transformers_cee.calibration.scores import ExitScores, score_store, unit_weights
from transformers_cee.exits.criteria import CRITERIA
from transformers_cee.exits.deciding import criterion_settings
from transformers_cee.exits.numbers import share
from transformers_cee.stores.scoring import exits_taken
from transformers_cee.stores.store import ExitStore


METHOD = "certified_price"


def calibrate_price(
    store: ExitStore,
    model: nn.Module,
    epsilon: float,
    delta: float = 0.05,
    budgets: Sequence[Sequence[float]] | None = None,
    min_exit_layer: int | None = None,
) -> CalibratedPoint:
    """The shallowest budget of a conditioned policy whose agreement with full depth is at least 1 − epsilon, with
    probability at least 1 − delta over calibration rows.

    Budgets are tested from the deepest to the shallowest, and testing stops at the first that cannot be certified, by
    an exact binomial test (Hoeffding-Bentkus for tokens of texts).

    Args:
        store (`ExitStore`):
            Exits of rows that neither the model nor the budgets were fitted on. Labels are not needed.
        model (`nn.Module`): the early-exit model, whose policies are conditioned on α.
        epsilon (`float`): accepted disagreement of the whole walk, in (0, 1).
        delta (`float`): probability with which the promise may fail, in (0, 1).
        budgets (sequence of `[budget, α, threshold]`, *optional*): what is tested; `config.exit_budgets` by default.
        min_exit_layer (`int`, *optional*): first layer (1-based) to leave at, by default the model's.

    Returns:
        `CalibratedPoint`: a price, and a threshold for it; with exits off, and the reason, when not even full depth is
        certified.

    Raises:
        ValueError: epsilon or delta outside of (0, 1), policies that are not conditioned, or no budgets.
    """
    epsilon, delta = share("epsilon", epsilon), share("delta", delta)
    budgets = model.config.exit_budgets if budgets is None else budgets
    if not model.exit_policies.is_conditioned:
        raise ValueError("`model` has policies of one speed: `policy_condition` of its config is 'none'.")
    if not budgets:
        raise ValueError("`budgets` is empty: fit them first, see `fit_exit_budgets`, on other rows than these.")
    family = sorted(budgets, key=lambda one: -one[0])
    walks = [_walk(store, model, alpha, min_exit_layer) for alpha in dict.fromkeys(one[1] for one in family)]
    scores = {walk.alpha: walk for walk in walks}
    disagrees = walks[0].disagrees.double()
    losses = [disagrees[:, -1]]
    for _, alpha, threshold in family:
        taken = exits_taken("policy", threshold, scores[alpha].scores)
        losses.append(disagrees.gather(1, taken.unsqueeze(1)).squeeze(1))
    groups = walks[0].groups
    p_value = "binomial" if groups is None else "hoeffding_bentkus"
    certified = fixed_sequence(torch.stack(losses, dim=1), epsilon, delta, p_value, groups)
    units = unit_weights(groups, len(disagrees))[1]
    levels = {"epsilon": epsilon, "delta": delta}
    if certified < 2:
        return exits_off(walks[0], "agreement", levels, METHOD, _reason(certified, units, epsilon, delta), units)
    _, alpha, threshold = family[certified - 2]
    off = CRITERIA["policy"].off
    # Exits that were closed stay so wherever the point is used.
    closed = (scores[alpha].oriented == -math.inf).all(0).tolist()
    thresholds = [*(off if one else float(threshold) for one in closed), off]
    return CalibratedPoint("policy", thresholds, "agreement", levels, METHOD, units, alpha, fitted_on=walks[0].made_on)


def _walk(store: ExitStore, model: nn.Module, alpha: float, min_exit_layer: int | None) -> ExitScores:
    return score_store(store, "policy", model, criterion_settings(model, alpha), min_exit_layer=min_exit_layer)


def _reason(certified: int, units: int, epsilon: float, delta: float) -> str:
    if certified:
        return f"{units} calibration rows certify no budget of the policy at an agreement of {1 - epsilon:g}."
    needed = math.ceil(min(math.log(delta) / math.log1p(-epsilon), 2.0**53) - 1e-9)
    return f"{units} calibration rows are too few for an agreement of {1 - epsilon:g}; it takes at least {needed}."


__all__ = ["calibrate_price"]
