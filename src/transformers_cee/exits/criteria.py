# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Exit criteria: the rules that decide exit or continue. The learned policy is one of them; those that need a fitted
estimator or something outside of the exits are in `learned_criteria`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from transformers_cee.exits.criterion import (
    CRITERIA,
    CriterionSettings,
    ExitCriterion,
    ExitStep,
    LowerLeaves,
    Streak,
    register_criterion,
)
from transformers_cee.exits.learned_criteria import (
    CalibratedProbability,
    Consistency,
    LearningToExit,
    Oracle,
    StateClassifier,
    StateSimilarity,
    TokenHash,
)
from transformers_cee.exits.numbers import number, plain
from transformers_cee.exits.policy import ExitHistory, ExitPolicies, check_has_classes, class_probabilities


Thresholds = float | Sequence[float]


@register_criterion
class Policy(ExitCriterion):
    """Learned exit policy: leave where `p_l > threshold` (ConsistentEE, Zeng et al. 2024)."""

    name = "policy"
    looks_at = frozenset({"policy"})

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if self.policies is None:
            raise ValueError(f"`exit_criterion`={self.name!r} needs `policies`.")
        if self.policies.needs_logits:
            check_has_classes(self.problem_type, f"`policy_inputs`={self.policies.inputs!r}", "'state'")
        self.networks: ExitPolicies = self.policies
        self.alpha: Tensor | float | None = self.settings.alpha
        self.has_memory = self.policies.needs_logits
        self.history = ExitHistory()

    @property
    def needs_logits(self) -> bool:
        return self.networks.needs_logits

    def score(self, step: ExitStep) -> Tensor:
        features = step.history_features(self.history, self.problem_type) if self.networks.needs_logits else None
        if self.alpha is None and self.networks.is_conditioned and self.networks.training:
            # One draw per row, which holds for all exits.
            self.alpha = self.networks.draw_alphas(len(step.state), step.state.device)
        return self.networks.exit_logit(step.state, features, step.index, self.alpha).sigmoid()

    def select(self, kept: Tensor) -> None:
        self.history.select(kept)
        if isinstance(self.alpha, Tensor):
            self.alpha = self.alpha[kept]


@register_criterion
class ExitCdf(Policy):
    """Leave where the exit distribution of the policies has given more than the threshold to the exits so far:
    `Σ_{j≤l} π_j = 1 − Π_{j≤l}(1 − p_j)` (Q-exit of PALBERT, Balagansky and Gavrilov 2022, with threshold 0.5). Exits
    at which nothing may leave yet are given nothing."""

    name = "exit_cdf"
    has_memory = True

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.has_memory = True
        # Π(1 − p_j), the probability of coming past the exits so far.
        self.stays: Tensor | None = None

    def score(self, step: ExitStep) -> Tensor:
        stays = 1 - super().score(step)
        if step.index < self.settings.first_exit:
            stays = torch.ones_like(stays)
        self.stays = stays if self.stays is None else self.stays * stays
        return 1 - self.stays

    def select(self, kept: Tensor) -> None:
        super().select(kept)
        if self.stays is not None:
            self.stays = self.stays[kept]


@register_criterion
class MaximumProbability(ExitCriterion):
    """Leave where the head's largest class probability exceeds the threshold."""

    name = "max_probability"
    needs_classes = True
    looks_at = frozenset({"confidence"})

    def score(self, step: ExitStep) -> Tensor:
        return step.confidence(self.problem_type)[0]


@register_criterion
class Margin(ExitCriterion):
    """Leave where the largest class probability exceeds the second largest by more than the threshold ("breaking
    ties"; Valade 2024 and EERO, Valade et al. 2025; softmax difference of CALM, Schuster et al. 2022)."""

    name = "margin"
    needs_classes = True
    looks_at = frozenset({"confidence"})

    def score(self, step: ExitStep) -> Tensor:
        return step.confidence(self.problem_type)[1]


@register_criterion
class Entropy(LowerLeaves):
    """Leave where the head's entropy, divided by its maximum log K, is below the threshold (DeeBERT, Xin et al. 2020,
    who compare the entropy in nats)."""

    name = "entropy"
    needs_classes = True
    looks_at = frozenset({"confidence"})

    def score(self, step: ExitStep) -> Tensor:
        return step.confidence(self.problem_type)[2]


@register_criterion
class Energy(LowerLeaves):
    """Leave where `1 / (1 + Σ_k exp z_k)` is below the threshold (COSEE, He et al. 2024, at temperature 1).

    With many labels each is a decision between the two classes of logits z/2 and −z/2, which give the label's
    probability, and the score is the mean over labels: at most 1/3 then.
    """

    name = "energy"
    needs_classes = True

    def score(self, step: ExitStep) -> Tensor:
        logits = step.logits.float()
        if self.problem_type == "multi_label_classification":
            pairs = torch.stack((logits / 2, -logits / 2), dim=-1)
            return (-pairs.logsumexp(-1)).sigmoid().mean(-1)
        return (-logits.logsumexp(-1)).sigmoid()


@register_criterion
class Patience(ExitCriterion):
    """Leave once as many exits in a row as the threshold says have repeated the previous exit's prediction (PABEE,
    Zhou et al. 2020). The threshold is that number; as many as there are exits switches exits off.

    In regression a prediction is repeated when it is less than `settings.tolerance` away, of every output.
    """

    name = "patience"
    looks_at = frozenset({"predictions"})
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
        is_regression = self.problem_type == "regression"
        prediction = step.logits.float() if is_regression else step.predictions(self.problem_type)
        if self.previous is None or self.streak is None:
            self.streak = torch.zeros(len(prediction), device=prediction.device)
        else:
            if is_regression:
                same = (prediction - self.previous).abs() < self.settings.tolerance
            else:
                same = prediction == self.previous
            self.streak = torch.where(same.all(-1), self.streak + 1, 0.0)
        self.previous = prediction
        return self.streak

    @classmethod
    def passes(cls, scores: Tensor, threshold: float) -> Tensor:
        return scores >= threshold

    def can_exit(self, index: int) -> bool:
        return index >= self.thresholds[index]

    def select(self, kept: Tensor) -> None:
        if self.previous is not None and self.streak is not None:
            self.previous, self.streak = self.previous[kept], self.streak[kept]


@register_criterion
class EntropyPatience(Streak):
    """Leave once the entropy, divided by its maximum log K, has been below the threshold at `settings.patience` exits
    in a row (PCEE-BERT, Zhang et al. 2022)."""

    name = "entropy_patience"
    needs_classes = True
    looks_at = frozenset({"confidence"})

    def signal(self, step: ExitStep) -> Tensor:
        return step.confidence(self.problem_type)[2]


@register_criterion
class DivergencePatience(Streak):
    """Leave once the Jensen–Shannon divergence of an exit's distribution and the previous exit's, divided by its
    maximum log 2, has been below the threshold at `settings.patience` exits in a row (F-PABEE, Gao et al. 2023). The
    first exit has no predecessor; with many labels it is the mean of the labels' divergences."""

    name = "divergence_patience"
    needs_classes = True
    first_signal = 1

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.previous: Tensor | None = None

    def signal(self, step: ExitStep) -> Tensor | None:
        now, before = class_probabilities(step.logits, self.problem_type), self.previous
        self.previous = now
        return None if before is None else _divergence(now, before)

    def select(self, kept: Tensor) -> None:
        super().select(kept)
        if self.previous is not None:
            self.previous = self.previous[kept]


def _divergence(first: Tensor, second: Tensor) -> Tensor:
    """Jensen–Shannon divergence over log 2, in [0, 1], of distributions (rows, …, classes); means over labels."""
    middle = (first + second) / 2
    entropy = torch.special.entr(torch.stack((middle, first, second))).sum(-1)
    divergence = ((entropy[0] - (entropy[1] + entropy[2]) / 2) / math.log(2)).clamp(0, 1)
    return divergence.flatten(1).mean(1) if divergence.dim() > 1 else divergence


def check_criterion(criterion: str) -> None:
    """Raises `ValueError` unless `criterion` is a name of the registry."""
    CRITERIA.find(criterion)


def check_thresholds(criterion: str, threshold: Thresholds, num_exits: int) -> list[float]:
    """One checked threshold per exit.

    Args:
        criterion (`str`): a name of the registry.
        threshold (`float` or sequence of `float`):
            One number for all exits or one per exit, the last included; arrays and scalars of numpy and torch, too.
        num_exits (`int`): number of exits, the last included.

    Raises:
        ValueError: unknown criterion, a list of the wrong length, or a threshold outside of the criterion's range.
    """
    cls = CRITERIA.find(criterion)
    given, accepted = plain(threshold), "a number or a list of numbers"
    if isinstance(given, list):
        if len(given) != num_exits:
            raise ValueError(
                f"`exit_threshold` has {len(given)} values; accepted: one number, or one per exit ({num_exits})."
            )
        try:
            thresholds = [number("exit_threshold", value) for value in given]
        except ValueError:
            raise ValueError(f"`exit_threshold`={given} must be {accepted}.") from None
    else:
        thresholds = [number("exit_threshold", given, accepted)] * num_exits
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


__all__ = [
    "CRITERIA",
    "CalibratedProbability",
    "Consistency",
    "CriterionSettings",
    "DivergencePatience",
    "Energy",
    "Entropy",
    "EntropyPatience",
    "ExitCdf",
    "ExitCriterion",
    "ExitStep",
    "LearningToExit",
    "Margin",
    "MaximumProbability",
    "Oracle",
    "Patience",
    "Policy",
    "StateClassifier",
    "StateSimilarity",
    "Thresholds",
    "TokenHash",
    "build_criterion",
    "check_criterion",
    "check_thresholds",
    "register_criterion",
]
