# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Exit criteria: the rules that decide exit or continue, in one registry. The learned policy is one of them.

Every criterion turns what is known at an exit into one score per row and compares it with that exit's threshold.
A criterion object belongs to one walk through the layers: what it remembers follows the rows through compaction.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import ClassVar

import torch
from torch import Tensor, nn

from transformers_cee.exits.policy import (
    ExitHistory,
    ExitPolicies,
    check_has_classes,
    confidence_scores,
    predicted_classes,
)


Thresholds = float | Sequence[float]


@dataclass
class ExitStep:
    """What is known about the remaining rows at one exit.

    Args:
        index (`int`): exit, counted from 0.
        state (`Tensor` of shape `(rows, hidden)`): pooled exit state.
        head (`Callable`): maps states (rows, hidden) to logits (rows, labels); called only when a criterion asks.
        rows (`LongTensor` of shape `(rows,)`, *optional*): their numbers in the batch that the walk began with.
    """

    index: int
    state: Tensor
    head: Callable[[Tensor], Tensor]
    rows: Tensor | None = None
    _logits: Tensor | None = field(default=None, repr=False)

    @property
    def logits(self) -> Tensor:
        """Logits (rows, labels) of the exit head for all remaining rows, computed once."""
        if self._logits is None:
            self._logits = self.head(self.state)
        return self._logits

    def logits_of(self, rows: Tensor) -> Tensor:
        """Logits of some rows only; cheaper while nobody has asked for all."""
        return self.head(self.state[rows]) if self._logits is None else self._logits[rows]


@dataclass(frozen=True)
class CriterionSettings:
    """What some criteria need besides a threshold and logits.

    Args:
        estimators (`Mapping[str, nn.Module]`): fitted estimators of the model, by the name of their criterion.
        patience (`int`): exits in a row that must agree, of criteria whose threshold is something else.
        tolerance (`float`): difference up to which two predictions of a regression count as the same.
        alpha (`float`, *optional*): price of one layer that conditioned policies are asked for.
        input_ids (`LongTensor` of shape `(rows, time)`, *optional*): tokens of the batch that the walk begins with.
        labels (`Tensor` of shape `(rows,)` or `(rows, labels)`, *optional*): true labels, for the oracle.
    """

    estimators: Mapping[str, nn.Module] = field(default_factory=dict)
    patience: int = 2
    tolerance: float = 0.5
    alpha: float | None = None
    input_ids: Tensor | None = None
    labels: Tensor | None = None


class ExitCriterion(ABC):
    """One rule. Subclasses give `name`, `score` and, where it differs, `passes` and `check`.

    Args:
        thresholds (`list[float]`): one per exit.
        problem_type (`str`): what the logits mean.
        policies (`ExitPolicies`, *optional*): the model's policy networks, for criteria that use them.
        settings (`CriterionSettings`, *optional*): whatever else some criteria need.
    """

    name: ClassVar[str]
    accepted: ClassVar[str] = "numbers in [0, 1]"
    # A threshold that lets nobody out.
    off: ClassVar[float] = 1.0
    # Does a larger threshold send rows deeper? Calibration needs the direction.
    higher_is_deeper: ClassVar[bool] = True
    # Does the score need class probabilities, which regression has not?
    needs_classes: ClassVar[bool] = False
    # Does the score depend on earlier exits? Otherwise exits at which nobody may leave need not be asked.
    has_memory: bool = False

    def __init__(
        self,
        thresholds: list[float],
        problem_type: str = "single_label_classification",
        policies: ExitPolicies | None = None,
        settings: CriterionSettings | None = None,
    ) -> None:
        if self.needs_classes:
            check_has_classes(problem_type)
        self.thresholds = thresholds
        self.problem_type = problem_type
        self.policies = policies
        self.settings = settings or CriterionSettings()

    @property
    def needs_logits(self) -> bool:
        """May the score ask for the logits of every row that comes to an exit? Rules that never do say so."""
        return True

    @classmethod
    def check(cls, threshold: float) -> bool:
        """Is this an acceptable threshold?"""
        return 0.0 <= threshold <= 1.0

    @abstractmethod
    def score(self, step: ExitStep) -> Tensor:
        """Scores (rows,) at an internal exit; called once per exit, in order."""

    @staticmethod
    def passes(scores: Tensor, threshold: float) -> Tensor:
        """Which rows (rows,) leave."""
        return scores > threshold

    def can_exit(self, index: int) -> bool:
        """False where no row can leave whatever its score: the loop then needs no look at the scores."""
        return self.thresholds[index] < 1.0

    @property
    def is_off(self) -> bool:
        """True when no row can leave at any internal exit."""
        return not any(self.can_exit(index) for index in range(len(self.thresholds) - 1))

    def select(self, kept: Tensor) -> None:  # noqa: B027
        """Keeps the memory of rows `kept` (remaining rows,). Nothing to do without memory."""


CRITERIA: dict[str, type[ExitCriterion]] = {}


def register_criterion(cls: type[ExitCriterion]) -> type[ExitCriterion]:
    """Adds a criterion class to the registry under its `name`."""
    CRITERIA[cls.name] = cls
    return cls


@register_criterion
class Policy(ExitCriterion):
    """Learned exit policy: leave where `p_l > threshold` (ConsistentEE, Zeng et al. 2024)."""

    name = "policy"

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if self.policies is None:
            raise ValueError("`exit_criterion`='policy' needs `policies`.")
        if self.policies.needs_logits:
            check_has_classes(self.problem_type)
        self.networks: ExitPolicies = self.policies
        self.has_memory = self.policies.needs_logits
        self.history = ExitHistory()

    @property
    def needs_logits(self) -> bool:
        return self.networks.needs_logits

    def score(self, step: ExitStep) -> Tensor:
        features = self.history.features(step.logits, self.problem_type) if self.networks.needs_logits else None
        return self.networks.exit_logit(step.state, features, step.index).sigmoid()

    def select(self, kept: Tensor) -> None:
        self.history.select(kept)


@register_criterion
class MaximumProbability(ExitCriterion):
    """Leave where the head's largest class probability exceeds the threshold."""

    name = "max_probability"
    needs_classes = True

    def score(self, step: ExitStep) -> Tensor:
        return confidence_scores(step.logits, self.problem_type)[0]


@register_criterion
class Margin(ExitCriterion):
    """Leave where the largest class probability exceeds the second largest by more than the threshold ("breaking
    ties"; Valade 2024 and EERO, Valade et al. 2025; softmax difference of CALM, Schuster et al. 2022)."""

    name = "margin"
    needs_classes = True

    def score(self, step: ExitStep) -> Tensor:
        return confidence_scores(step.logits, self.problem_type)[1]


@register_criterion
class Entropy(ExitCriterion):
    """Leave where the head's entropy, divided by its maximum log K, is below the threshold (DeeBERT, Xin et al. 2020,
    who compare the entropy in nats)."""

    name = "entropy"
    needs_classes = True
    off = 0.0
    higher_is_deeper = False

    def score(self, step: ExitStep) -> Tensor:
        return confidence_scores(step.logits, self.problem_type)[2]

    @staticmethod
    def passes(scores: Tensor, threshold: float) -> Tensor:
        return scores < threshold

    def can_exit(self, index: int) -> bool:
        return self.thresholds[index] > 0.0


@register_criterion
class Patience(ExitCriterion):
    """Leave once as many exits in a row as the threshold says have repeated the previous exit's prediction (PABEE,
    Zhou et al. 2020). The threshold is that number; as many as there are exits switches exits off."""

    name = "patience"
    needs_classes = True
    has_memory = True
    accepted = "numbers of at least 1"
    off = math.inf

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.previous: Tensor | None = None
        self.streak: Tensor | None = None

    @classmethod
    def check(cls, threshold: float) -> bool:
        return threshold >= 1.0

    def score(self, step: ExitStep) -> Tensor:
        prediction = predicted_classes(step.logits, self.problem_type)
        if self.previous is None:
            self.streak = torch.zeros(len(prediction), device=prediction.device)
        else:
            self.streak = torch.where((prediction == self.previous).all(-1), self.streak + 1, 0.0)
        self.previous = prediction
        return self.streak

    @staticmethod
    def passes(scores: Tensor, threshold: float) -> Tensor:
        return scores >= threshold

    def can_exit(self, index: int) -> bool:
        return index >= self.thresholds[index]

    def select(self, kept: Tensor) -> None:
        if self.previous is not None:
            self.previous, self.streak = self.previous[kept], self.streak[kept]


def check_thresholds(criterion: str, threshold: Thresholds, num_exits: int) -> list[float]:
    """One checked threshold per exit.

    Args:
        criterion (`str`): a name of the registry.
        threshold (`float` or sequence of `float`): one number for all exits or one per exit, the last included.
        num_exits (`int`): number of exits, the last included.

    Raises:
        ValueError: unknown criterion, a list of the wrong length, or a threshold outside of the criterion's range.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"`exit_criterion`={criterion!r} is unknown; accepted are {', '.join(sorted(CRITERIA))}.")
    if isinstance(threshold, Sequence | Tensor) and not isinstance(threshold, str):
        thresholds = [float(value) for value in threshold]
        if len(thresholds) != num_exits:
            raise ValueError(
                f"`exit_threshold` has {len(thresholds)} values; accepted: one number, or one per exit ({num_exits})."
            )
    elif isinstance(threshold, Real) and not isinstance(threshold, bool):
        thresholds = [float(threshold)] * num_exits
    else:
        raise ValueError(f"`exit_threshold`={threshold!r} must be a number or a list of numbers.")
    cls = CRITERIA[criterion]
    if not all(cls.check(value) for value in thresholds):
        raise ValueError(f"`exit_threshold`={threshold} for the criterion {criterion!r} must be {cls.accepted}.")
    return thresholds


def build_criterion(
    criterion: str,
    threshold: Thresholds,
    num_exits: int,
    problem_type: str,
    policies: ExitPolicies | None = None,
    settings: CriterionSettings | None = None,
) -> ExitCriterion:
    """A fresh criterion object for one walk through the layers. Errors as `check_thresholds`."""
    thresholds = check_thresholds(criterion, threshold, num_exits)
    return CRITERIA[criterion](thresholds, problem_type, policies, settings)
