# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Exit policies: the networks that give `p_l = P(exit at l | reached l)`, what they see, and the exit distribution."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from transformers_cee.exits.by_layer import LayerModules, each_size


NUM_CONFIDENCE_FEATURES = 5
# Keeps float32 probabilities away from 0, so that a threshold of 0 lets everything out at the first exit.
_MAX_LOGIT = 30.0
# How close to 0 and 1 confidences are told apart.
_CLOSEST = 1e-5


def check_has_classes(
    problem_type: str, asked: str = "`policy_inputs` with confidence", accepted: str = "'state'"
) -> None:
    """Raises `ValueError` for a problem whose logits are no scores of classes.

    Args:
        problem_type (`str`): what logits mean.
        asked (`str`): the argument that needs classes, with its value.
        accepted (`str`): values of it that do not.
    """
    if problem_type == "regression":
        raise ValueError(f"{asked}: `problem_type`='regression' has no class probabilities; accepted are {accepted}.")


def class_probabilities(logits: Tensor, problem_type: str) -> Tensor:
    """Probabilities (…, classes) in float32, or (…, labels, 2) of no and yes with many labels.

    Raises:
        ValueError: regression, which has no class probabilities.
    """
    check_has_classes(problem_type)
    if problem_type == "multi_label_classification":
        positive = logits.float().sigmoid()
        return torch.stack((1 - positive, positive), dim=-1)
    return logits.float().softmax(-1)


def confidence_scores(logits: Tensor, problem_type: str) -> tuple[Tensor, Tensor, Tensor]:
    """Maximum probability, margin (top-1 minus top-2) and entropy over its maximum, each (rows,).

    With many labels each is a decision between yes and no, and the scores are means over labels.

    Raises:
        ValueError: regression, which has no class probabilities.
    """
    maximum, margin, entropy = _confidence_columns(logits, problem_type)
    return maximum.squeeze(-1), margin.squeeze(-1), entropy.squeeze(-1)


def _confidence_columns(logits: Tensor, problem_type: str) -> tuple[Tensor, Tensor, Tensor]:
    """`confidence_scores`, each (rows, 1)."""
    probabilities = class_probabilities(logits, problem_type)
    top = probabilities.topk(2, dim=-1).values
    maximum = top[..., :1]
    # Written out: exporters know no `entr`. A probability of 0 adds nothing.
    logs = probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
    entropy = (probabilities * logs).sum(-1, keepdim=True) / -math.log(probabilities.shape[-1])
    columns = (maximum, maximum - top[..., 1:], entropy)
    if problem_type == "multi_label_classification":
        return columns[0].mean(-2), columns[1].mean(-2), columns[2].mean(-2)
    return columns


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
        # Columns from the start, and one class as a column too: on single rows every call counts.
        maximum, margin, entropy = _confidence_columns(logits, problem_type)
        prediction = predicted_classes(logits, problem_type)
        if prediction.shape[1] > 1:
            prediction = prediction.unsqueeze(1)
        if self.margin is None or self.predictions is None:
            previous = agreement = torch.zeros_like(margin)
            self.predictions = prediction
        else:
            previous = self.margin
            same = self.predictions == prediction
            agreement = (same.all(-1) if same.dim() == 3 else same).float().mean(1, keepdim=True)
            self.predictions = torch.cat((self.predictions, prediction), dim=1)
        self.margin = margin
        return torch.cat((maximum, margin, entropy, previous, agreement), dim=-1)

    @classmethod
    def joined(cls, histories: Sequence["ExitHistory"]) -> "ExitHistory":
        """That of the rows of several ones, which have seen the same exits."""
        made = cls()
        margins = [one.margin for one in histories if one.margin is not None]
        predictions = [one.predictions for one in histories if one.predictions is not None]
        if margins:
            made.margin, made.predictions = torch.cat(margins), torch.cat(predictions)
        return made

    def of(self, rows: slice) -> "ExitHistory":
        """That of some rows."""
        part = ExitHistory()
        if self.margin is not None and self.predictions is not None:
            part.margin, part.predictions = self.margin[rows], self.predictions[rows]
        return part

    def select(self, kept: Tensor) -> None:
        """Keeps the rows of `kept` (remaining rows,)."""
        if self.margin is not None and self.predictions is not None:
            self.margin, self.predictions = self.margin[kept], self.predictions[kept]


class ExitPolicies(nn.Module):
    """One policy network per internal exit: Linear → activation → Linear (Zeng et al. 2024), without the sigmoid.

    Conditioned policies also see the price α of a layer, so that one set of networks serves any speed: α is drawn for
    each row while they train, and asked for in use.

    Args:
        layers (sequence of `int`): layers (1-based) of the internal exits.
        state_size (`int` or sequence of `int`): size of an exit state, or of each exit's; of wider states, as they are
            where exits differ, a network sees as many numbers as its own exit has.
        hidden_size (`int`): size of the hidden layer.
        activation (`str`): a name of `transformers.activations.ACT2FN`.
        inputs (`str`): `"state"`, `"confidence"`, `"log_confidence"` or `"both"`.
        condition (`str`): `"none"`, `"input"` (one more input) or `"film"` (scale and shift of the hidden units, Perez
            et al. 2018).
        alphas (pair of `float`): lowest and highest α that conditioned policies learn.
        default_alpha (`float`): α where none is given in use, clipped to `alphas`.
    """

    def __init__(
        self,
        layers: Sequence[int],
        state_size: int | Sequence[int],
        hidden_size: int,
        activation: str,
        inputs: str = "state",
        condition: str = "none",
        alphas: Sequence[float] = (0.0005, 0.5),
        default_alpha: float = 0.02,
    ) -> None:
        super().__init__()
        self.inputs, self.condition = inputs, condition
        self.alphas = (float(alphas[0]), float(alphas[1]))
        self.default_alpha = min(max(default_alpha, self.alphas[0]), self.alphas[1])
        self.state_sizes = each_size(state_size, layers)
        more = (inputs != "state") * NUM_CONFIDENCE_FEATURES + (condition == "input")
        self.networks = LayerModules(
            layers,
            lambda width: nn.Sequential(nn.Linear(width, hidden_size), ACT2FN[activation], nn.Linear(hidden_size, 1)),
            [self.sees_states * size + more for size in self.state_sizes],
        )
        self.films = LayerModules(layers if condition == "film" else (), lambda: nn.Linear(1, 2 * hidden_size))

    @property
    def sees_states(self) -> bool:
        return self.inputs in ("state", "both")

    @property
    def needs_logits(self) -> bool:
        return self.inputs != "state"

    @property
    def is_conditioned(self) -> bool:
        return self.condition != "none"

    def reset_parameters(self) -> None:
        """Draws all weights anew."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()

    def draw_alphas(self, rows: int, device: Any = None) -> Tensor:
        """α (rows,), evenly distributed over its orders of magnitude."""
        low, high = (math.log(alpha) for alpha in self.alphas)
        return torch.empty(rows, device=device).uniform_(low, high).exp()

    def _condition(self, state: Tensor, alpha: Tensor | float | None) -> Tensor:
        """log α, scaled to [−1, 1] over the range that is learned: (rows, 1), or (1, 1) of one price for all rows."""
        if alpha is None:
            alpha = self.draw_alphas(len(state), state.device) if self.training else self.default_alpha
        if isinstance(alpha, Tensor):
            return self._scaled(alpha.to(state.device).log()).to(state.dtype).view(-1, 1)
        return state.new_full((1, 1), self._scaled(math.log(alpha)))

    def _scaled(self, log_alpha: Any) -> Any:
        low, high = (math.log(bound) for bound in self.alphas)
        return (2 * log_alpha - low - high) / (high - low)

    def exit_logit(
        self,
        state: Tensor,
        features: Tensor | None,
        index: int,
        alpha: Tensor | float | None = None,
    ) -> Tensor:
        """Logit (rows,) in float32 of leaving at internal exit `index` (0-based).

        Args:
            alpha (`Tensor` of shape `(rows,)` or `float`, *optional*):
                Price of a layer, of conditioned policies. None draws one per row in training mode and stands for the
                default in evaluation mode.
        """
        parts = []
        if self.sees_states:
            size = self.state_sizes[index]
            parts.append(state if state.shape[-1] == size else state[..., :size])
        if features is not None:
            seen = log_odds(features) if self.inputs == "log_confidence" else features
            parts.append(seen.to(state.dtype))
        if self.condition == "input":
            parts.append(self._condition(state, alpha).expand(state.shape[0], 1))
        inputs = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        # Called one by one: a container costs as much as the layers themselves on a single row.
        widen, activation, narrow = self.networks[index]
        hidden = widen(inputs)
        if self.condition == "film":
            scale, shift = self.films[index](self._condition(state, alpha)).chunk(2, dim=-1)
            hidden = torch.addcmul(shift, hidden, 1 + scale)
        return narrow(activation(hidden)).squeeze(-1).float().clamp(-_MAX_LOGIT, _MAX_LOGIT)

    def forward(self, states: Tensor, features: Tensor | None = None, alpha: Tensor | float | None = None) -> Tensor:
        """Logits (rows, exits − 1) of leaving at every internal exit, as if all rows reached all of them.

        Args:
            states (`Tensor` of shape `(rows, exits, hidden)`): exit states; the last exit's are not used.
            features (`Tensor` of shape `(rows, exits − 1, 5)`, *optional*):
                From `all_features`, for confidence inputs.
            alpha (`Tensor` of shape `(rows,)` or `float`, *optional*): as in `exit_logit`; one draw for all exits.

        Raises:
            ValueError: the policies look at confidence and no features are given.
        """
        if self.needs_logits and features is None:
            raise ValueError(f"`policy_inputs`={self.inputs!r} needs `features`, see `all_features`; got None.")
        if alpha is None and self.is_conditioned and self.training:
            alpha = self.draw_alphas(len(states), states.device)
        seen = features if self.needs_logits else None
        columns = [
            self.exit_logit(states[:, index], None if seen is None else seen[:, index], index, alpha)
            for index in range(len(self.networks))
        ]
        return torch.stack(columns, dim=1) if columns else states.new_zeros(len(states), 0)


def log_odds(features: Tensor) -> Tensor:
    """Confidence features as log-odds, scaled to [−1, 1]: those near 0 and 1, where promises are decided, lie far
    apart."""
    kept = features.clamp(_CLOSEST, 1 - _CLOSEST)
    return (kept.log() - (1 - kept).log()) / -math.log(_CLOSEST)


def make_policies(config: Any, layers: Sequence[int]) -> ExitPolicies:
    """The policy networks that a config describes, for exits after `layers` (1-based), the last exit included."""
    return ExitPolicies(
        layers[:-1],
        config.state_sizes(layers[:-1]),
        config.policy_hidden_size,
        config.policy_activation,
        config.policy_inputs,
        config.policy_condition,
        config.policy_alphas,
        config.reward_alpha,
    )


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
