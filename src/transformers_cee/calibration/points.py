# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What calibration gives: an operating point, the promise it was chosen for, and what became of it on other rows."""

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from transformers_cee.calibration.scores import ExitScores, own_thresholds
from transformers_cee.exits.criteria import CRITERIA, check_thresholds
from transformers_cee.exits.saved_points import check_fitted_on, check_point
from transformers_cee.stores.scoring import exits_taken


@dataclass
class CalibratedPoint:
    """An operating point (a criterion and its thresholds) that was chosen for a promise. A model keeps such points by
    name in `config.exit_operating_points`; what was measured at a point is an [`OperatingPoint`] of `evaluation`.

    Args:
        criterion (`str`): exit criterion.
        thresholds (`list[float]`):
            One per exit. The last one has no effect on the walk; where rows may be rejected, it is the score that a
            row needs at the last exit to be answered.
        promise (`str`): `"agreement"`, `"budget"` or `"risk"`.
        levels (`dict`):
            What is promised. Agreement: `epsilon`; budget: `budget`, `costs` of one row that leaves at each exit, and
            their `unit`; risk: `level` and the `risk` it bounds. Beside them `delta`, the probability with which
            calibration may fail, and `reject_rate`.
        method (`str`): how the thresholds were found.
        rows (`int`): rows, tokens or, where a certificate counts them, texts that they were found on.
        alpha (`float`, *optional*): price of one layer that the policies are asked for.
        reason (`str`, *optional*): why the exits are off, if they are.
        held_out (`dict`, *optional*): figures of `check`; None until it was called.
        fitted_on (`str`, *optional*):
            Engine and precision of the model that gave the scores, such as `"openvino int8"`; None of a model in
            torch. A model on anything else refuses the point: its exits say other things.

    Raises:
        ValueError: a field that is not of its kind, levels that the promise lacks, or thresholds that the criterion
            does not accept; the message names the field.
    """

    criterion: str
    thresholds: list[float]
    promise: str
    levels: dict[str, Any]
    method: str
    rows: int
    alpha: float | None = None
    reason: str | None = None
    held_out: dict[str, Any] | None = field(default=None)
    fitted_on: str | None = None

    def __post_init__(self) -> None:
        check_point(vars(self), [one.name for one in fields(self)], "CalibratedPoint")
        self.thresholds = check_thresholds(self.criterion, self.thresholds, len(self.thresholds))

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for JSON; what is None is left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "CalibratedPoint":
        """Back from `to_dict`.

        Raises:
            ValueError: fields that are missing, unknown or not of their kind.
        """
        if not isinstance(values, dict):
            raise ValueError(f"`values` of type {type(values).__name__} must be a dictionary, as `to_dict` gives it.")
        names = {one.name for one in fields(cls)}
        needed = names - {"alpha", "reason", "held_out", "fitted_on"}
        if not needed <= set(values) <= names:
            raise ValueError(
                f"`values` has the fields {sorted(map(str, values))}; needed {sorted(needed)}, known {sorted(names)}."
            )
        return cls(**values)

    def rejected(self, scores: ExitScores) -> Tensor:
        """Which rows (rows,) come to the last exit and are not answered there; none unless calibrated to reject.

        Raises:
            ValueError: scores of another criterion, or without scores at the last exit where they are needed.
        """
        exits = self.taken_exits(scores)
        if "reject_rate" not in self.levels:
            return torch.zeros(len(scores), dtype=torch.bool)
        if scores.last_scores is None:
            raise ValueError("`scores.last_scores` is None; the scores at the last exit say which rows are rejected.")
        passes = CRITERIA[self.criterion].passes(scores.last_scores, self.thresholds[-1])
        return (exits == scores.num_exits - 1) & ~passes

    def check(self, scores: ExitScores) -> "CalibratedPoint":
        """Walks other rows than those of the calibration and keeps the figures in `held_out`: `rows`, `depth` (mean
        exit layer), `agreement` with the last exit, `risk` (mean loss, if labels are known), of a budget `mean_cost`
        and `used_budget` (its share of the budget), with rejection `rejected` (a share) and `risk_answered`, and
        `kept`: did the promise hold on these rows?

        Raises:
            ValueError: scores of another criterion or α, of other exits, or with another risk than the promised one.
        """
        exits = self.taken_exits(scores)
        if self.promise == "risk" and scores.risk != self.levels["risk"]:
            raise ValueError(f"`scores.risk`={scores.risk!r} must be {self.levels['risk']!r}, which was promised.")
        if self.promise == "risk" and bool(scores.losses.isnan().any()):
            raise ValueError("`scores.losses` holds NaN: a risk can be checked on rows with labels only.")
        taken = exits.unsqueeze(1)
        losses = scores.losses.gather(1, taken).squeeze(1)
        figures: dict[str, Any] = {
            "rows": len(scores),
            "depth": float(scores.layers[exits].double().mean()),
            "agreement": scores.mean(~scores.disagrees.gather(1, taken).squeeze(1)),
        }
        has_losses = not bool(losses.isnan().any())
        if has_losses:
            figures["risk"] = scores.mean(losses)
        if self.promise == "budget":
            costs = torch.tensor(self.levels["costs"], dtype=torch.double)
            figures["mean_cost"] = float(costs[exits].mean())
            figures["used_budget"] = figures["mean_cost"] / self.levels["budget"]
        if "reject_rate" in self.levels:
            rejected = self.rejected(scores)
            figures["rejected"] = float(rejected.double().mean())
            if has_losses:
                answered = losses[~rejected].double()
                figures["risk_answered"] = float(answered.mean()) if len(answered) else 0.0
        # Sums of the same numbers in another order may differ in the last digit.
        slack = 1e-12
        figures["kept"] = {
            "agreement": lambda: figures["agreement"] >= 1 - self.levels["epsilon"] - slack,
            "budget": lambda: figures["used_budget"] <= 1 + slack,
            "risk": lambda: figures["risk"] <= self.levels["level"] + slack,
        }[self.promise]()
        self.held_out = figures
        return self

    def taken_exits(self, scores: ExitScores) -> Tensor:
        """Exit (0-based, (rows,)) at which each row leaves.

        Raises:
            ValueError: scores of another criterion or α, or of other exits.
        """
        if scores.criterion != self.criterion or scores.num_exits != len(self.thresholds):
            raise ValueError(
                f"`scores` of {scores.criterion!r} at {scores.num_exits} exits do not belong to thresholds of "
                f"{self.criterion!r} at {len(self.thresholds)}."
            )
        if scores.alpha != self.alpha:
            raise ValueError(f"`scores.alpha`={scores.alpha} must be {self.alpha}, which the thresholds are for.")
        return exits_taken(self.criterion, self.thresholds, scores.scores)

    def save_to(self, model: Any, name: str) -> None:
        """Makes this an operating point of a model, to be asked for as `exit_threshold=name` and kept by
        `save_pretrained`.

        Args:
            model (`PreTrainedModel` or its config): changed in place; an operating point of that name is replaced.
            name (`str`): name of the operating point.

        Raises:
            ValueError: no name, a model with another number of exits, or one on another engine or precision than the
                thresholds were fitted on.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"`name`={name!r} must be a text of at least one character.")
        config = getattr(model, "config", model)
        if len(config.exit_layer_numbers) != len(self.thresholds):
            raise ValueError(
                f"`model` has {len(config.exit_layer_numbers)} exits, the thresholds are for {len(self.thresholds)}."
            )
        check_fitted_on(name, self.fitted_on, config)
        config.exit_operating_points = {**config.exit_operating_points, name: self.to_dict()}


def calibrated_point(
    scores: ExitScores,
    thresholds: Sequence[float] | Tensor,
    promise: str,
    levels: dict[str, Any],
    method: str,
    rows: int | None = None,
) -> CalibratedPoint:
    """The result of a calibration from thresholds (exits − 1,) for oriented scores."""
    off = CRITERIA[scores.criterion].off
    own = [*own_thresholds(scores.criterion, thresholds, scores.oriented), off]
    return CalibratedPoint(
        scores.criterion, own, promise, levels, method, rows or len(scores), scores.alpha, fitted_on=scores.made_on
    )


def exits_off(
    scores: ExitScores,
    promise: str,
    levels: dict[str, Any],
    method: str,
    reason: str,
    rows: int | None = None,
    warn: bool = True,
) -> CalibratedPoint:
    """The result of a calibration that found nothing better than full depth, and why; with a warning."""
    if warn:
        warnings.warn(f"Exits are off: {reason}", stacklevel=3)
    thresholds = [CRITERIA[scores.criterion].off] * scores.num_exits
    count = rows or len(scores)
    return CalibratedPoint(
        scores.criterion, thresholds, promise, levels, method, count, scores.alpha, reason, fitted_on=scores.made_on
    )
