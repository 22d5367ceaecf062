# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""One model, any speed: which price α of a layer gives which mean depth, for policies conditioned on α."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from transformers_cee.exits.criteria import CriterionSettings
from transformers_cee.exits.numbers import number
from transformers_cee.exits.policy import ExitPolicies
from transformers_cee.stores.scoring import exits_taken, score_exits
from transformers_cee.stores.store import ExitStore


# Two budgets closer than this, as a share of all layers, are one.
_RESOLUTION = 1e-3


def fit_exit_budgets(
    policies: ExitPolicies,
    store: ExitStore | Sequence[ExitStore],
    exit_threshold: float = 0.5,
    candidates: int = 64,
    min_exit_layer: int | None = None,
) -> list[list[float]]:
    """Mean depth of conditioned policies over their range of α, on held-out rows.

    Depth falls with α but for chance; of prices with the same depth the highest is kept, so that budgets rise as
    prices fall. Budgets deeper than what the lowest price gives come from higher thresholds at that price.

    Args:
        policies (`ExitPolicies`): conditioned policies.
        store (`ExitStore` or sequence of them): exits of held-out rows, or tokens, of one data set or of several;
            labels are not looked at. Only entries that may leave early count.
        exit_threshold (`float`): what the policies' probabilities are compared with.
        candidates (`int`): prices that are tried, evenly over their orders of magnitude, and thresholds.
        min_exit_layer (`int`, *optional*): first layer (1-based) to leave at, as in a decoder's config.

    Returns:
        `list[list[float]]`: budget (mean exit layer over number of layers), α and threshold, by rising budget; what
        `config.exit_budgets` holds. Empty where no entry may leave early.

    Raises:
        ValueError: policies that are not conditioned, or a threshold outside of [0, 1).
    """
    if not policies.is_conditioned:
        raise ValueError("`policies` have one speed: `policy_condition` of the config must be 'input' or 'film'.")
    exit_threshold = number("exit_threshold", exit_threshold)
    if not 0.0 <= exit_threshold < 1.0:
        raise ValueError(f"`exit_threshold`={exit_threshold} must lie in [0, 1).")
    stores = [store] if isinstance(store, ExitStore) else store
    stores = [one.select(entries) for one in stores if len(entries := one.deciding())]
    if not stores:
        return []
    layers = stores[0].layers
    low, high = policies.alphas
    settings = [
        (alpha, exit_threshold)
        for alpha in torch.linspace(math.log(high), math.log(low), candidates).exp().clamp(low, high).tolist()
    ]

    def scores_at(alpha: float) -> Tensor:
        asked = CriterionSettings(alpha=alpha)
        return torch.cat([score_exits("policy", one, policies, asked, min_exit_layer) for one in stores])

    deepest = scores_at(low)
    above = deepest[deepest > exit_threshold]
    if len(above):
        shares = torch.linspace(0, 1, candidates, dtype=torch.float64)
        settings += [(low, float(limit)) for limit in torch.quantile(above[:10_000_000].double(), shares)]
    points: list[list[float]] = []
    for alpha, limit in settings:
        found = deepest if alpha == low else scores_at(alpha)
        depth = layers[exits_taken("policy", limit, found)].double().mean()
        budget = float(depth / layers[-1])
        if not points or budget > points[-1][0] + _RESOLUTION:
            points.append([budget, alpha, limit])
    return points


def budgets_for_depths(budgets: Sequence[Sequence[float]], depths: Sequence[float], num_layers: int) -> list[float]:
    """The budget to ask for at each wanted mean depth. Where the policies do not get as low, it is the least that they
    reach.

    Args:
        budgets (sequence of `[budget, α, threshold]`): as `fit_exit_budgets` gives them.
        depths (sequence of `float`): wanted mean exit layers of the entries that may leave early, in 1..L.
        num_layers (`int`): number of layers L.
    """
    least = budgets[0][0] if budgets else 0.0
    return [max(least, min(1.0, depth / num_layers)) for depth in depths]


__all__ = ["budgets_for_depths", "fit_exit_budgets"]
