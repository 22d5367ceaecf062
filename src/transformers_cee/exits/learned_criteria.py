# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Exit criteria that need more than an exit's own head: an estimator fitted on stored exits, the previous exit's
state, the input's tokens, or the labels."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from transformers_cee.exits.criterion import ExitCriterion, ExitStep, LowerLeaves, register_criterion
from transformers_cee.exits.losses import exit_errors
from transformers_cee.exits.policy import ExitHistory, confidence_scores


class _Fitted(ExitCriterion):
    """A rule with an estimator of the same name."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if self.name not in self.settings.estimators:
            fitted = ", ".join(sorted(self.settings.estimators)) or "none"
            raise ValueError(
                f"`exit_criterion`={self.name!r} needs its fitted estimator; this model has {fitted}. See "
                "`transformers_cee.training.estimators`."
            )
        self.estimator: Any = self.settings.estimators[self.name]


@register_criterion
class LearningToExit(_Fitted, LowerLeaves):
    """Leave where one linear layer, shared by all exits, expects an error below the threshold: `sigmoid(w·h + b)` of
    the exit state h (BERxiT, Xin et al. 2021)."""

    name = "learning_to_exit"
    looks_at = frozenset({"state"})

    def score(self, step: ExitStep) -> Tensor:
        return self.estimator(step.state).sigmoid()


@register_criterion
class CalibratedProbability(_Fitted):
    """Leave where the largest class probability exceeds the threshold, after each exit's logits were divided by the
    exit's own temperature (Schwartz et al. 2020, "The Right Tool for the Job")."""

    name = "calibrated_probability"
    needs_classes = True

    def score(self, step: ExitStep) -> Tensor:
        scaled = self.estimator(step.logits, step.index)
        return confidence_scores(scaled, self.problem_type)[0]


@register_criterion
class Consistency(_Fitted):
    """Leave where a meta classifier gives more than the threshold to "this exit predicts what the last one will",
    from the exit's prediction, its confidence, its agreement with earlier exits and its state (CAT, Schuster et al.
    2021)."""

    name = "consistency"
    needs_classes = True
    has_memory = True
    looks_at = frozenset({"state", "confidence", "predictions"})

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.history = ExitHistory()

    def score(self, step: ExitStep) -> Tensor:
        features = step.history_features(self.history, self.problem_type)
        predictions = step.predictions(self.problem_type)
        return self.estimator(step.state, features, predictions, step.index).sigmoid()

    def select(self, kept: Tensor) -> None:
        self.history.select(kept)


@register_criterion
class StateClassifier(_Fitted):
    """Leave where a linear layer of the exit gives more than the threshold to "this exit predicts what the last one
    will", from the exit state alone (CALM's meta classifier, Schuster et al. 2022)."""

    name = "state_classifier"
    looks_at = frozenset({"state"})

    def score(self, step: ExitStep) -> Tensor:
        return self.estimator(step.state, step.index).sigmoid()


@register_criterion
class StateSimilarity(ExitCriterion):
    """Leave where the cosine of the exit state and the previous exit's exceeds the threshold; below 0 it counts as 0,
    and so does the first exit, which has no predecessor (CALM's state saturation, Schuster et al. 2022)."""

    name = "state_similarity"
    has_memory = True
    looks_at = frozenset({"state"})

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.previous: Tensor | None = None

    def score(self, step: ExitStep) -> Tensor:
        state, before = step.state.float(), self.previous
        self.previous = state
        if before is None:
            return torch.zeros(len(state), device=state.device)
        return F.cosine_similarity(state, before, dim=-1).clamp(0, 1)

    def can_exit(self, index: int) -> bool:
        return index > 0 and super().can_exit(index)

    def select(self, kept: Tensor) -> None:
        if self.previous is not None:
            self.previous = self.previous[kept]


@register_criterion
class TokenHash(_Fitted):
    """Leave at the exit that a fixed table gives to the token, frequent tokens first (HashEE, Sun et al. 2022).

    In HashEE tokens leave one by one and their states are copied to deeper layers. So they do in a decoder, where a
    token's own id decides. In an encoder one state decides for the whole row, which leaves at once: at the mean of its
    tokens' exits, rounded up, padding left out.

    With N exits, the score is 1 from that exit on and 1/N less for each exit before. So thresholds just below 1 follow
    the table, and each 1/N less lets everything out one exit earlier.
    """

    name = "token_hash"
    looks_at = frozenset({"tokens"})

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        ids, mask = self.settings.input_ids, self.settings.attention_mask
        if ids is None:
            raise ValueError(
                "`exit_criterion`='token_hash' looks at `input_ids`; got None. Give them instead of `inputs_embeds`."
            )
        exits = self.estimator(ids)
        if self.settings.per_token:
            self.planned = exits.flatten()
            return
        real = torch.ones_like(exits) if mask is None else (mask != 0).to(exits.dtype)
        total, count = (exits * real).sum(1), real.sum(1).clamp_min(1)
        self.planned = (total + count - 1) // count

    def score(self, step: ExitStep) -> Tensor:
        planned = self.planned if step.rows is None else self.planned[step.rows]
        return (1 - (planned - step.index).float() / len(self.thresholds)).clamp(0, 1)


@register_criterion
class Oracle(ExitCriterion):
    """Leave at the first exit that is right; rows that no exit gets right go to the end. It needs the true labels: a
    bound for evaluation, and no method. In regression an exit is right when its error is at most
    `settings.tolerance`; with many labels, when all are right."""

    name = "oracle"
    looks_at = frozenset({"logits", "labels"})

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if self.settings.labels is None:
            raise ValueError(
                "`exit_criterion`='oracle' needs the true labels (`CriterionSettings.labels`); got None. It is meant "
                "for evaluation with `score_exits` or `build_criterion` only."
            )
        self.labels = self.settings.labels

    def score(self, step: ExitStep) -> Tensor:
        labels = self.labels if step.rows is None else self.labels[step.rows]
        error = exit_errors(step.logits, labels, self.problem_type)
        return (error <= (self.settings.tolerance if self.problem_type == "regression" else 0.0)).float()
