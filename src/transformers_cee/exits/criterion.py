# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What an exit criterion is: what it sees at an exit, what it must answer, and the registry of all of them.

Every criterion turns what is known at an exit into one score per row and compares it with that exit's threshold.
A criterion object belongs to one walk through the layers: what it remembers follows the rows through compaction.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
from transformers_cee.exits.registry import Registry


@dataclass
class ExitStep:
    """What is known about the remaining rows at one exit.

    Args:
        index (`int`): exit, counted from 0.
        state (`Tensor` of shape `(rows, hidden)`): pooled exit state.
        head (`Callable`): maps states (rows, hidden) to logits (rows, labels); called only when a criterion asks.
        rows (`LongTensor` of shape `(rows,)`, *optional*): their numbers in the batch that the walk began with.
        features (`Tensor` of shape `(rows, 5)`, *optional*):
            Confidence features, where they are known without logits; see `ExitHistory.features`.
        predicted (`LongTensor` of shape `(rows,)`, *optional*): predicted classes, where known without logits.
        score (`Tensor` of shape `(rows,)`, *optional*): the walk's criterion's, where the graph of a block gives it.
        logits_ (`Tensor` of shape `(rows, labels)`, *optional*): logits, where they are known without the head.
    """

    index: int
    state: Tensor
    head: Callable[[Tensor], Tensor]
    rows: Tensor | None = None
    features: Tensor | None = None
    predicted: Tensor | None = None
    score: Tensor | None = None
    logits_: Tensor | None = field(default=None, repr=False)

    @property
    def logits(self) -> Tensor:
        """Logits (rows, labels) of the exit head for all remaining rows, computed once."""
        if self.logits_ is None:
            self.logits_ = self.head(self.state)
        return self.logits_

    def logits_of(self, rows: Tensor) -> Tensor:
        """Logits of some rows only; cheaper while nobody has asked for all."""
        return self.head(self.state[rows]) if self.logits_ is None else self.logits_[rows]

    def confidence(self, problem_type: str) -> tuple[Tensor, ...]:
        """Maximum probability, margin and entropy over its maximum, each (rows,); see `confidence_scores`."""
        if self.features is not None:
            return self.features[:, 0], self.features[:, 1], self.features[:, 2]
        return confidence_scores(self.logits, problem_type)

    def predictions(self, problem_type: str) -> Tensor:
        """Predictions (rows, 1 or labels), see `predicted_classes`."""
        if self.predicted is not None:
            return self.predicted.unsqueeze(1)
        return predicted_classes(self.logits, problem_type)

    def history_features(self, history: ExitHistory, problem_type: str) -> Tensor:
        """Confidence features (rows, 5); `history` has seen the earlier exits and sees this one."""
        return history.features(self.logits, problem_type) if self.features is None else self.features


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
        attention_mask (`Tensor` of shape `(rows, time)`, *optional*): 1 at tokens, 0 at padding of `input_ids`.
        per_token (`bool`): does each token of `input_ids` leave on its own, as in a decoder?
        first_exit (`int`): exit (0-based) before which nothing leaves, as the walk has it.
        asks_all (`bool`): must every exit be asked, also where that costs more than it saves?
    """

    estimators: Mapping[str, nn.Module] = field(default_factory=dict)
    patience: int = 2
    tolerance: float = 0.5
    alpha: float | None = None
    input_ids: Tensor | None = None
    labels: Tensor | None = None
    attention_mask: Tensor | None = None
    per_token: bool = False
    first_exit: int = 0
    asks_all: bool = False


class ExitCriterion(ABC):
    """One rule. Subclasses give `name`, `score` and, where it differs, `passes`, `can_exit` and `check`.

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
    # What a score is made of: "logits" in full, or only the "confidence" or "predictions" that follow from them,
    # "state", "policy" (whatever the policies look at), "tokens" of the input, "labels".
    looks_at: ClassVar[frozenset[str]] = frozenset({"logits"})
    # Does the score depend on earlier exits? Otherwise exits at which nobody may leave need not be asked.
    has_memory: bool = False

    def __init__(
        self,
        thresholds: list[float],
        problem_type: str = "single_label_classification",
        policies: ExitPolicies | None = None,
        settings: CriterionSettings | None = None,
    ) -> None:
        if self.needs_classes and problem_type == "regression":
            # Made where it fails only: a criterion is built for every walk.
            accepted = sorted(name for name, cls in CRITERIA.items() if not cls.needs_classes)
            check_has_classes(problem_type, f"`exit_criterion`={self.name!r}", ", ".join(accepted))
        self.thresholds = thresholds
        self.problem_type = problem_type
        self.policies = policies
        self.settings = settings or CriterionSettings()

    @property
    def needs_logits(self) -> bool:
        """May the score ask for the logits of every row that comes to an exit? Rules that never do say so."""
        return bool(self.looks_at & {"logits", "confidence", "predictions"})

    @classmethod
    def check(cls, threshold: float) -> bool:
        """Is this an acceptable threshold?"""
        return 0.0 <= threshold <= 1.0

    @abstractmethod
    def score(self, step: ExitStep) -> Tensor:
        """Scores (rows,) at an internal exit; called once per exit, in order. They do not depend on thresholds."""

    @classmethod
    def passes(cls, scores: Tensor, threshold: float) -> Tensor:
        """Which rows (rows,) leave."""
        return scores > threshold if cls.higher_is_deeper else scores < threshold

    @classmethod
    def leaves_at_threshold(cls) -> bool:
        """Does a row leave whose score is the threshold itself?"""
        return bool(cls.passes(torch.tensor(0.5), 0.5))

    def can_exit(self, index: int) -> bool:
        """False where no row can leave whatever its score: the loop then needs no look at the scores."""
        threshold = self.thresholds[index]
        return threshold < self.off if self.higher_is_deeper else threshold > self.off

    @property
    def is_off(self) -> bool:
        """True when no row can leave at any internal exit."""
        return not any(self.can_exit(index) for index in range(len(self.thresholds) - 1))

    def select(self, kept: Tensor) -> None:  # noqa: B027
        """Keeps the memory of rows `kept` (remaining rows,). Nothing to do without memory."""


class FullDepth(ExitCriterion):
    """Stands for a criterion that nobody gave a threshold: nothing leaves, and nothing is asked that it would need,
    such as a fitted estimator or class probabilities. No entry of the registry.

    Args:
        name (`str`): of the criterion that it stands for.
        num_exits (`int`): number of exits, the last included.
    """

    looks_at = frozenset()

    def __init__(self, name: str, num_exits: int) -> None:
        super().__init__([CRITERIA[name].off] * num_exits)
        self.name = name  # type: ignore[misc]

    def score(self, step: ExitStep) -> Tensor:
        raise NotImplementedError("No exit is asked where all are off.")

    def can_exit(self, index: int) -> bool:
        return False


class LowerLeaves(ExitCriterion):
    """A rule whose rows leave where the score is below the threshold: 0 lets nobody out."""

    off = 0.0
    higher_is_deeper = False


class Streak(LowerLeaves):
    """A rule that lets a row leave once a signal has been below the threshold at `settings.patience` exits in a row.

    The score is the largest signal of the last `patience` exits, and 1 until there are as many: it is below the
    threshold exactly where a counter that starts anew at each larger signal comes to `patience`. Exits with thresholds
    of their own compare all of these signals with that of the exit where the row would leave.
    """

    has_memory = True
    # Exits (0-based) before the first signal.
    first_signal: ClassVar[int] = 0

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.recent: Tensor | None = None

    @abstractmethod
    def signal(self, step: ExitStep) -> Tensor | None:
        """The signal (rows,) at an exit, in [0, 1]; None before there is one."""

    def score(self, step: ExitStep) -> Tensor:
        signal, patience = self.signal(step), self.settings.patience
        if signal is None:
            return torch.ones(len(step.state), device=step.state.device)
        signal = signal.unsqueeze(1)
        recent = signal if self.recent is None else torch.cat((self.recent, signal), dim=1)
        self.recent = recent[:, -patience:]
        return recent[:, -patience:].amax(1) if recent.shape[1] >= patience else torch.ones_like(recent[:, 0])

    def can_exit(self, index: int) -> bool:
        return super().can_exit(index) and index + 1 >= self.first_signal + self.settings.patience

    def select(self, kept: Tensor) -> None:
        if self.recent is not None:
            self.recent = self.recent[kept]


CRITERIA: Registry[type[ExitCriterion]] = Registry("exit_criterion", "register_criterion", ExitCriterion)
register_criterion = CRITERIA.register
