# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What a model promises (budgets, operating points) is fitted on the engine that serves."""

from __future__ import annotations

import copy
from typing import Any

from accelerate import Accelerator
from transformers import DataCollatorWithPadding
from transformers.utils import logging

from transformers_cee.calibration.agreement import METHODS, calibrate_agreement
from transformers_cee.calibration.budget import calibrate_budget
from transformers_cee.calibration.points import CalibratedPoint
from transformers_cee.calibration.scores import score_store
from transformers_cee.evaluation.exit_budget import fit_exit_budgets
from transformers_cee.exits.deciding import criterion_settings
from transformers_cee.stores.filling import collect_exits
from transformers_cee.stores.store import ExitStore


logger = logging.get_logger(__name__)


def fit_promises(model: Any, store: ExitStore | None) -> None:
    """Fits the budgets and operating points of an exported model anew, on its own engine and precision; what cannot
    be fitted is dropped, with a message.

    Args:
        model ([`ExportedSequenceClassifier`]): its config is changed in place.
        store (`ExitStore`, *optional*): its exits on texts, see `exits_of`. Without any, all promises are dropped.
    """
    config = model.config
    points, budgets = config.exit_operating_points, config.exit_budgets
    config.exit_operating_points, config.exit_budgets = {}, []
    threshold, budget = config.exit_threshold, config.exit_budget
    if isinstance(threshold, str):
        config.exit_threshold = None
    config.exit_budget = None
    if store is None:
        _say_dropped([*points, *(["exit_budgets"] if budgets else [])], "there are no `calibration_texts`")
        return
    if budgets and model.exit_policies.is_conditioned:
        config.exit_budgets = fit_exit_budgets(model.exit_policies, store, min_exit_layer=config.min_exit_layer)
        config.exit_budget = budget if config.exit_budgets else None
    for name, values in points.items():
        point, reason = _refitted(model, store, values)
        if point is None:
            _say_dropped([name], reason)
        else:
            point.save_to(model, name)
    if isinstance(threshold, str) and threshold in config.exit_operating_points:
        config.exit_threshold = threshold


def exits_of(model: Any, rows: Any, processing_class: Any, batch_size: int = 32) -> ExitStore:
    """Exits of tokenised texts without labels."""
    config = copy.copy(model.config)
    problem = config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")
    return collect_exits(
        model,
        rows,
        DataCollatorWithPadding(processing_class),
        Accelerator(cpu=True),
        problem_type=problem,
        batch_size=batch_size,
        tolerance=config.exit_tolerance,
        needs_labels=False,
    )


def _refitted(model: Any, store: ExitStore, values: dict[str, Any]) -> tuple[CalibratedPoint | None, str]:
    """An operating point with the same promise, or why there is none."""
    if "promise" not in values:
        return None, "it holds thresholds without a promise, which were found on another engine or precision"
    old = CalibratedPoint.from_dict(values)
    settings = criterion_settings(model, old.alpha)
    try:
        scores = score_store(store, old.criterion, model, settings)
        if old.promise == "agreement":
            method = next((one for one in METHODS if old.method.startswith(one)), "certified")
            more = {"delta": old.levels["delta"]} if "delta" in old.levels else {}
            return calibrate_agreement(scores, old.levels["epsilon"], method, **more), ""
        if old.promise == "budget":
            # Without labels, an exit's risk is how often it says something else than the last one.
            risks = scores.disagrees.double().mean(0)
            levels = old.levels
            more = {"delta": levels["delta"]} if "delta" in levels else {}
            refine = old.method != "eero"
            point = calibrate_budget(
                scores, levels["budget"], levels["costs"], levels["unit"], refine, risks=risks, **more
            )
            return point, ""
    except ValueError as error:
        return None, str(error)
    return None, f"its promise is a bound on the {old.levels['risk']}, which takes labels to fit"


def _say_dropped(names: list[str], reason: str) -> None:
    if names:
        logger.warning(f"The exported model does without {', '.join(map(repr, names))}: {reason}.")
