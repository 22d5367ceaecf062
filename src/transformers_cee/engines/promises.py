# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What a model promises (budgets, operating points) is fitted on the engine that serves."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DataCollatorWithPadding
from transformers.utils import logging

from transformers_cee.calibration.agreement import METHODS, calibrate_agreement
from transformers_cee.calibration.budget import calibrate_budget, with_rejection
from transformers_cee.calibration.points import CalibratedPoint
from transformers_cee.calibration.prices import METHOD as PRICE
from transformers_cee.calibration.prices import calibrate_price
from transformers_cee.calibration.risk import P_VALUES, calibrate_risk
from transformers_cee.calibration.scores import RISKS, ExitScores, score_store
from transformers_cee.engines.graphs import problem_type
from transformers_cee.evaluation.exit_budget import fit_exit_budgets
from transformers_cee.exits.deciding import criterion_settings, price_of_budget
from transformers_cee.stores.filling import OneProcess, collect_exits
from transformers_cee.stores.store import ExitStore


logger = logging.get_logger(__name__)

# Costs that are the same on every engine; others were measured.
COUNTED = ("layers", "flops")


@dataclass
class Promises:
    """What the config of a model promises, and asks for by default.

    Args:
        points (`dict[str, dict]`): operating points by name.
        budgets (`list`): fitted budgets.
        threshold (`str`, *optional*): name of the point that is the default.
        budget (`float`, *optional*): the budget that is the default.
    """

    points: dict[str, dict[str, Any]]
    budgets: list[list[float]]
    threshold: str | None
    budget: float | None


def take_promises(config: Any) -> Promises:
    """Takes out of a config what was fitted on another engine or precision than it is going to be used on."""
    threshold = config.exit_threshold if isinstance(config.exit_threshold, str) else None
    taken = Promises(config.exit_operating_points, config.exit_budgets, threshold, config.exit_budget)
    config.exit_operating_points, config.exit_budgets, config.exit_budget = {}, [], None
    if threshold is not None:
        config.exit_threshold = None
    return taken


def fit_promises(model: Any, promises: Promises, store: ExitStore | None) -> None:
    """Fits budgets and operating points anew on the engine and precision of an exported model; what cannot be fitted
    is dropped, with a message.

    Args:
        model ([`ExportedSequenceClassifier`]): its config is changed in place.
        promises (`Promises`): of the model that it was exported from.
        store (`ExitStore`, *optional*): its exits on texts, see `exits_of`. Without any, all promises are dropped.
    """
    config, points, budgets = model.config, promises.points, promises.budgets
    if store is None:
        _say_dropped([*points, *(["exit_budgets"] if budgets else [])], "there are no `calibration_texts`")
        return
    if budgets and model.exit_policies.is_conditioned:
        config.exit_budgets = fit_exit_budgets(model.exit_policies, store, min_exit_layer=config.min_exit_layer)
        config.exit_budget = _reached(config, promises.budget)
    for name, values in points.items():
        try:
            with warnings.catch_warnings():
                # Said once, with the name of the point.
                warnings.filterwarnings("ignore", "Exits are off")
                point = _refitted(model, store, values, budgets)
        except ValueError as error:
            _say_dropped([name], str(error).removesuffix("."))
            continue
        # A budget of all layers is no promise that failed.
        if point.reason is not None and point.promise != "budget":
            warnings.warn(f"Exits are off at {name!r}: {point.reason}", stacklevel=3)
        point.save_to(model, name)
    if promises.threshold in config.exit_operating_points:
        config.exit_threshold = promises.threshold


def _reached(config: Any, budget: float | None) -> float | None:
    """A default budget, where the engine reaches it."""
    try:
        if budget is not None:
            price_of_budget(config.exit_budgets, budget)
        return budget
    except ValueError as error:
        _say_dropped(["exit_budget"], str(error).removesuffix("."))
        return None


def exits_of(model: Any, rows: Any, processing_class: Any, batch_size: int = 32) -> ExitStore:
    """Exits of tokenised texts, with `labels` or without."""
    return collect_exits(
        model,
        rows,
        DataCollatorWithPadding(processing_class),
        OneProcess(torch.device("cpu")),
        problem_type=problem_type(model.config),
        batch_size=batch_size,
        tolerance=model.config.exit_tolerance,
        needs_labels="labels" in rows.column_names,
    )


def _refitted(model: Any, store: ExitStore, values: dict[str, Any], budgets: list[list[float]]) -> CalibratedPoint:
    """An operating point with the same promise; raises `ValueError` that says why there is none.

    Args:
        budgets (`list`): of the model that was exported; those that were fitted on these texts certify nothing there.
    """
    if "promise" not in values:
        raise ValueError("it holds thresholds without a promise, which were found on another engine or precision")
    old = CalibratedPoint.from_dict(values)
    if old.method == PRICE:
        return calibrate_price(store, model, old.levels["epsilon"], old.levels["delta"], budgets)
    risk = old.levels.get("risk", "error")
    if risk not in RISKS:
        raise ValueError(f"its promise is a bound on the risk {risk!r}, which `export` knows nothing of")
    if old.promise == "risk" and not store.has_labels:
        raise ValueError(f"its promise is a bound on the {risk}, which takes labels: give `calibration_labels`, too")
    scores = score_store(store, old.criterion, model, criterion_settings(model, old.alpha), risk)
    return {"agreement": _agreement, "budget": _budget, "risk": _risk}[old.promise](old, scores)


def _agreement(old: CalibratedPoint, scores: ExitScores) -> CalibratedPoint:
    method = next((one for one in METHODS if old.method.startswith(one)), "certified")
    more = {"delta": old.levels["delta"]} if "delta" in old.levels else {}
    return calibrate_agreement(
        scores,
        old.levels["epsilon"],
        method,
        coverage="min" if "_min_" in old.method else "max",
        published=old.method.endswith("_published"),
        **more,
    )


def _budget(old: CalibratedPoint, scores: ExitScores) -> CalibratedPoint:
    levels = old.levels
    unit = levels.get("unit", "layers")
    if unit.lower() not in COUNTED:
        raise ValueError(f"its costs, in {unit}, were measured on another engine or precision")
    # An exit's risk is how often it says something else than the last one, which takes no labels.
    risks = scores.disagrees.double().mean(0)
    more = {"delta": levels["delta"]} if "delta" in levels else {}
    found = calibrate_budget(
        scores, levels["budget"], levels["costs"], unit, old.method != "eero", risks=risks, **more
    )
    return with_rejection(found, scores, levels["reject_rate"]) if "reject_rate" in levels else found


def _risk(old: CalibratedPoint, scores: ExitScores) -> CalibratedPoint:
    named = old.method.removeprefix("learn_then_test_")
    p_value = named if named in P_VALUES else P_VALUES[0]
    return calibrate_risk(scores, old.levels["level"], old.levels.get("delta", 0.05), p_value)


def _say_dropped(names: list[str], reason: str) -> None:
    if names:
        logger.warning(f"The exported model does without {', '.join(map(repr, names))}: {reason}.")
