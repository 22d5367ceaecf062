# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Exit policies: the networks that give `p_l = P(exit at l | reached l)`, what they see, and the exit distribution."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN


NUM_CONFIDENCE_FEATURES = 5
# Keeps float32 probabilities away from 0, so that a threshold of 0 lets everything out at the first exit.
_MAX_LOGIT = 30.0


def check_has_classes(problem_type: str) -> None:
    """Raises `ValueError` for a problem whose logits are no scores of classes."""
    if problem_type == "regression":
        raise ValueError(
            "`problem_type`='regression' has no class probabilities: use `policy_inputs`='state' and the 'policy' "
            "criterion."
        )


def confidence_scores(logits: Tensor, problem_type: str) -> tuple[Tensor, Tensor, Tensor]:
    """Maximum probability, margin (top-1 minus top-2) and entropy over its maximum, each (rows,).

    With many labels each is a decision between yes and no, and the scores are means over labels.

    Raises:
        ValueError: regression, which has no class probabilities.
    """
    check_has_classes(problem_type)
    if problem_type == "multi_label_classification":
        positive = logits.float().sigmoid()
        probabilities = torch.stack((1 - positive, positive), dim=-1)
    else:
        probabilities = logits.float().softmax(-1)
    top = probabilities.topk(2, dim=-1).values
    entropy = torch.special.entr(probabilities).sum(-1) / math.log(probabilities.shape[-1])
    scores = (top[..., 0], top[..., 0] - top[..., 1], entropy)
    if problem_type == "multi_label_classification":
        return scores[0].mean(-1), scores[1].mean(-1), scores[2].mean(-1)
    return scores


def predicted_classes(logits: Tensor, problem_type: str) -> Tensor:
    """Predictions that two exits must share to agree: one class (rows, 1), or one indicator per label (rows, labels).

    Raises:
        ValueError: regression, which has no classes.
    """
    check_has_classes(problem_type)
    return logits > 0 if problem_type == "multi_label_classification" else logits.argmax(-1, keepdim=True)


class ExitHistory:
    """What the rows still in the batch have seen at earlier exits. Follows them through compaction."""

    def __init__(self) -> None:
        self.margin: Tensor | None = None
        self.predictions: Tensor | None = None

    def features(self, logits: Tensor, problem_type: str) -> Tensor:
        """Confidence features (rows, 5) at the next exit: maximum probability, margin, entropy, the previous exit's
        margin, and the share of earlier exits that predict the same (0 and 0 at the first exit)."""
        maximum, margin, entropy = confidence_scores(logits, problem_type)
        prediction = predicted_classes(logits, problem_type).unsqueeze(1)
        if self.margin is None or self.predictions is None:
            previous = agreement = torch.zeros_like(margin)
            self.predictions = prediction
        else:
            previous = self.margin
            agreement = (self.predictions == prediction).all(-1).float().mean(1)
            self.predictions = torch.cat((self.predictions, prediction), dim=1)
        self.margin = margin
        return torch.stack((maximum, margin, entropy, previous, agreement), dim=-1)

    def select(self, kept: Tensor) -> None:
        """Keeps the rows of `kept` (remaining rows,)."""
        if self.margin is not None and self.predictions is not None:
            self.margin, self.predictions = self.margin[kept], self.predictions[kept]


class ExitPolicies(nn.Module):
    """One policy network per internal exit: Linear → activation → Linear (Zeng et al. 2024), without the sigmoid.

    Args:
        inputs (`str`): `"state"`, `"confidence"` or `"both"`.
    """

    def __init__(
        self, num_internal_exits: int, state_size: int, hidden_size: int, activation: str, inputs: str = "state"
    ) -> None:
        super().__init__()
        self.inputs = inputs
        width = {"state": state_size, "confidence": NUM_CONFIDENCE_FEATURES}.get(
            inputs, state_size + NUM_CONFIDENCE_FEATURES
        )
        self.networks = nn.ModuleList(
            [
                nn.Sequential(nn.Linear(width, hidden_size), ACT2FN[activation], nn.Linear(hidden_size, 1))
                for _ in range(num_internal_exits)
            ]
        )

    @property
    def needs_logits(self) -> bool:
        return self.inputs != "state"

    def reset_parameters(self) -> None:
        """Draws all weights anew."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()

    def exit_logit(self, state: Tensor, features: Tensor | None, index: int) -> Tensor:
        """Logit (rows,) in float32 of leaving at internal exit `index` (0-based)."""
        parts = []
        if self.inputs != "confidence":
            parts.append(state)
        if features is not None:
            parts.append(features.to(state.dtype))
        inputs = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        # Called one by one: a container costs as much as the layers themselves on a single row.
        widen, activation, narrow = self.networks[index]
        return narrow(activation(widen(inputs))).squeeze(-1).float().clamp(-_MAX_LOGIT, _MAX_LOGIT)

    def forward(self, states: Tensor, features: Tensor | None = None) -> Tensor:
        """Logits (rows, exits − 1) of leaving at every internal exit, as if all rows reached all of them.

        Args:
            states (`Tensor` of shape `(rows, exits, hidden)`): exit states; the last exit's is not used.
            features (`Tensor` of shape `(rows, exits − 1, 5)`, *optional*):
                From `all_features`, for confidence inputs.

        Raises:
            ValueError: the policies look at confidence and no features are given.
        """
        if self.needs_logits and features is None:
            raise ValueError(f"`policy_inputs`={self.inputs!r} needs `features`, see `all_features`; got None.")
        seen = features if self.needs_logits else None
        columns = [
            self.exit_logit(states[:, index], None if seen is None else seen[:, index], index)
            for index in range(len(self.networks))
        ]
        return torch.stack(columns, dim=1) if columns else states.new_zeros(len(states), 0)


def all_features(logits: Tensor, problem_type: str = "single_label_classification") -> Tensor:
    """Confidence features (rows, exits − 1, 5) at every internal exit, as if all rows reached all of them.

    Args:
        logits (`Tensor` of shape `(rows, exits, labels)`): logits of all exit heads; the last exit's are not used.
        problem_type (`str`): what the logits mean.
    """
    history = ExitHistory()
    columns = [history.features(logits[:, index], problem_type) for index in range(logits.shape[1] - 1)]
    return torch.stack(columns, dim=1) if columns else logits.new_zeros(len(logits), 0, NUM_CONFIDENCE_FEATURES)


def exit_log_distribution(exit_logits: Tensor) -> Tensor:
    """Log of the exit distribution `π_l = p_l · Π_{j<l}(1 − p_j)`; the last exit takes the rest, so it sums to 1.

    Args:
        exit_logits (`Tensor` of shape `(rows, exits − 1)`): logits of `p_l` at the internal exits.

    Returns:
        `Tensor` of shape `(rows, exits)`.
    """
    stay = F.logsigmoid(-exit_logits).cumsum(-1)
    start = exit_logits.new_zeros(*exit_logits.shape[:-1], 1)
    reached = torch.cat((start, stay), dim=-1)
    leave = torch.cat((F.logsigmoid(exit_logits), start), dim=-1)
    return reached + leave
