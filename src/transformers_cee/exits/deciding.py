# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""From what a caller asks for (a threshold, the name of an operating point, a budget) to the criterion of one walk."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.utils import logging

from transformers_cee.exits.criteria import (
    CRITERIA,
    CriterionSettings,
    ExitCriterion,
    Thresholds,
    build_criterion,
    check_criterion,
)
from transformers_cee.exits.criterion import FullDepth
from transformers_cee.exits.numbers import number
from transformers_cee.exits.saved_points import check_fitted_on


logger = logging.get_logger(__name__)

# End of the name of a method whose promise holds whichever of the exits are asked.
ANY_OF_THEM = "any_of_them"
# Difference up to which two budgets are the same: people round.
BUDGET_RESOLUTION = 0.005


@dataclass(frozen=True)
class ExitDecision:
    """How a walk decides.

    Args:
        criterion (`str`): a name of the registry.
        threshold (`float` or `list[float]`): one number for all exits, or one per exit.
        alpha (`float`, *optional*): price of one layer that policies conditioned on it are asked for.
        is_asked (`bool`): did anybody give a threshold or a budget? If not, `threshold` is what switches the criterion
            off, and the walk goes to full depth whatever the criterion needs.
        asks_all (`bool`): was a promise made for walks that ask every exit?
        is_checked (`bool`): has the model been found fit to let rows leave? So the steps of a generation ask once.
    """

    criterion: str
    threshold: Thresholds
    alpha: float | None = None
    is_asked: bool = True
    asks_all: bool = False
    is_checked: bool = False


def resolve_decision(
    config: Any,
    exit_threshold: Thresholds | str | ExitDecision | None = None,
    exit_criterion: str | None = None,
    exit_budget: float | None = None,
) -> ExitDecision:
    """What a caller asks for, with the config's defaults. Exits are off until somebody gives a threshold or a budget:
    the caller, or the config for its own criterion.

    Args:
        config (`ExitConfigMixin`): fields of the exits.
        exit_threshold (`float`, `list[float]`, `str` or `ExitDecision`, *optional*):
            Number(s), or the name of one of `config.exit_operating_points`; the config's, if the criterion is the
            config's, too. What has been decided stays.
        exit_criterion (`str`, *optional*): name of an exit criterion; a named operating point brings its own.
        exit_budget (`float`, *optional*): wanted mean depth as a share of all layers, of policies conditioned on α.

    Raises:
        ValueError: an unknown name, a point that was fitted on another engine or precision than the model runs on, a
            criterion beside a name, a budget beside a threshold, or one that the model knows nothing of.
    """
    if isinstance(exit_threshold, ExitDecision):
        return exit_threshold
    if exit_criterion is not None:
        check_criterion(exit_criterion)
    if exit_threshold is None and exit_budget is None and exit_criterion in (None, "policy"):
        exit_budget = config.exit_budget
    if exit_budget is not None:
        if exit_threshold is not None or exit_criterion not in (None, "policy"):
            beside = {"exit_threshold": exit_threshold, "exit_criterion": exit_criterion}
            given = " and ".join(f"`{name}`={value!r}" for name, value in beside.items() if value is not None)
            raise ValueError(f"`exit_budget`={exit_budget} excludes {given}: give one of them.")
        alpha, limit = price_of_budget(config.exit_budgets, exit_budget)
        return ExitDecision("policy", limit, alpha)
    threshold, criterion = exit_threshold, config.exit_criterion if exit_criterion is None else exit_criterion
    if threshold is None and (exit_criterion is None or criterion == config.exit_criterion):
        threshold = config.exit_threshold
    if threshold is None:
        check_criterion(criterion)
        if exit_criterion is not None:
            logger.warning_once(f"`exit_criterion`={exit_criterion!r} without `exit_threshold`: exits stay off.")
        return ExitDecision(criterion, CRITERIA[criterion].off, is_asked=False)
    if not isinstance(threshold, str):
        return ExitDecision(criterion, threshold)
    point = config.exit_operating_points.get(threshold)
    if point is None:
        known = ", ".join(map(repr, sorted(config.exit_operating_points))) or "none yet"
        raise ValueError(
            f"`exit_threshold`={threshold!r} must be a number or a list of numbers, or the name of an operating point "
            f"of this model ({known})."
        )
    if exit_criterion not in (None, point["criterion"]):
        raise ValueError(
            f"`exit_threshold`={threshold!r} is an operating point of the criterion {point['criterion']!r}; got "
            f"`exit_criterion`={exit_criterion!r}."
        )
    check_fitted_on(threshold, point.get("fitted_on"), config)
    return ExitDecision(point["criterion"], point["thresholds"], point.get("alpha"), asks_all=_needs_all(point))


def _say_what_is_closed(decision: ExitDecision, first_exit: int) -> None:
    """Warns where `min_exit_layer` closes exits that a promise was made with."""
    off, thresholds = CRITERIA[decision.criterion].off, decision.threshold
    closed = thresholds[:first_exit] if isinstance(thresholds, Sequence) else [thresholds]
    if any(one != off for one in closed):
        logger.warning_once(
            "`min_exit_layer` closes exits at which the operating point lets rows leave: its promise is about other "
            "walks."
        )


def _needs_all(point: Mapping[str, Any]) -> bool:
    """Does an operating point's promise hold only where every exit is asked?"""
    return point.get("promise") is not None and not str(point.get("method")).endswith(ANY_OF_THEM)


def default_arguments(config: Any) -> dict[str, Any]:
    """Exit arguments of `forward` that ask in words for what the config says."""
    if config.exit_budget is not None:
        return {"exit_budget": config.exit_budget}
    if isinstance(config.exit_threshold, str):
        return {"exit_threshold": config.exit_threshold}
    decision = resolve_decision(config)
    if not decision.is_asked:
        # In words that need nothing fitted.
        return {"exit_criterion": "policy", "exit_threshold": CRITERIA["policy"].off}
    return {"exit_criterion": decision.criterion, "exit_threshold": decision.threshold}


def price_of_budget(points: Sequence[Sequence[float]], budget: float) -> tuple[float, float]:
    """α and threshold of a budget, between the points that were fitted on held-out data.

    Args:
        points (sequence of `[budget, α, threshold]`): by rising budget, as `config.exit_budgets`.
        budget (`float`): wanted mean depth as a share of all layers, in (0, 1]; 1 closes the exits.

    Raises:
        ValueError: no points, a budget out of range, or one below what the points reach.
    """
    if not points:
        raise ValueError(f"`exit_budget`={budget}: this model has no fitted budgets (`config.exit_budgets` is empty).")
    accepted = "a share of all layers, in (0, 1]"
    budget = number("exit_budget", budget, accepted)
    if not 0.0 < budget <= 1.0:
        raise ValueError(f"`exit_budget`={budget!r} must be {accepted}.")
    budgets = [point[0] for point in points]
    if budget < budgets[0] - BUDGET_RESOLUTION:
        raise ValueError(
            f"`exit_budget`={budget!r} is less than this model reaches: its fitted budgets (`config.exit_budgets`) "
            f"begin at {budgets[0]:.4g}. Accepted are shares of all layers from there to 1, which closes the exits."
        )
    if budget >= budgets[-1]:
        # As deep as was fitted; the whole depth closes the exits.
        return points[-1][1], 1.0 if budget == 1.0 else points[-1][2]
    right = bisect_left(budgets, budget)
    if right == 0:
        return points[0][1], points[0][2]
    (low, alpha, threshold), (high, next_alpha, next_threshold) = points[right - 1], points[right]
    share = (budget - low) / (high - low)
    # Prices are spread over orders of magnitude.
    return alpha ** (1 - share) * next_alpha**share, threshold + share * (next_threshold - threshold)


def criterion_settings(
    model: nn.Module, alpha: float | None = None, input_ids: Tensor | None = None, **more: Any
) -> CriterionSettings:
    """What criteria need of a model besides thresholds and logits; nothing leaves before its `min_exit_layer`."""
    config = model.config
    more.setdefault("first_exit", model.first_exit())
    return CriterionSettings(
        estimators=model.exit_estimators,
        patience=config.exit_patience,
        tolerance=config.exit_tolerance,
        alpha=alpha,
        input_ids=input_ids,
        per_token=model.item == "token",
        **more,
    )


def model_criterion(
    model: nn.Module,
    decision: ExitDecision,
    problem_type: str = "single_label_classification",
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    first_exit: int = 0,
) -> ExitCriterion:
    """A fresh criterion object of a model for one walk. Raises `ValueError` as `build_criterion`, unless nobody asked
    for exits."""
    if not decision.is_asked:
        return FullDepth(decision.criterion, len(model.layer_numbers))
    if decision.asks_all and first_exit:
        _say_what_is_closed(decision, first_exit)
    return build_criterion(
        decision.criterion,
        decision.threshold,
        len(model.layer_numbers),
        problem_type,
        model.exit_policies,
        criterion_settings(
            model,
            decision.alpha,
            input_ids,
            attention_mask=attention_mask,
            first_exit=first_exit,
            asks_all=decision.asks_all,
        ),
    )
