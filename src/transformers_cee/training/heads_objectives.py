# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What the phase `heads` minimises. An objective is an object of one run, some of them with a memory."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from transformers_cee.exits.losses import exit_errors, layer_weighted
from transformers_cee.training.heads_objective import (
    HEADS_OBJECTIVES,
    HeadsObjective,
    HeadsStep,
    make_heads_objective,
    register_heads_objective,
)


@register_heads_objective
@dataclass
class LayerWeighted(HeadsObjective):
    """`Σ_i i·CE_i / Σ_i i`, i from 1 (PABEE, Zhou et al. 2020; ConsistentEE's initialisation)."""

    name = "layer_weighted"

    def summary(self, losses: Tensor) -> Tensor:
        return layer_weighted(losses)


@register_heads_objective
@dataclass
class Uniform(HeadsObjective):
    """Mean over rows and exits."""

    name = "uniform"


@register_heads_objective
@dataclass
class Last(HeadsObjective):
    """The last exit's loss: ordinary fine-tuning."""

    name = "last"
    last_exit_alone = True

    def summary(self, losses: Tensor) -> Tensor:
        return losses[:, -1].mean()


@register_heads_objective
@dataclass
class TwoStage(HeadsObjective):
    """First the model with the last exit's loss; then, everything else frozen, the internal exits with the sum of
    theirs (DeeBERT, Xin et al. 2020).

    Dropout stays on in the second stage, as in the authors' code: it changes no weight that is frozen, and the exits
    learn from states that are not always the same.
    """

    name = "two_stage"
    last_exit_alone = True
    stages: ClassVar[dict[str, str | None]] = {"heads-backbone": "last_exit", "heads": "internal_exits"}

    def __call__(self, step: HeadsStep) -> Tensor:
        return step.losses[:, -1].mean() if self.stage == "heads-backbone" else step.losses[:, :-1].sum(1).mean()

    def summary(self, losses: Tensor) -> Tensor:
        return losses[:, -1].mean() if self.stage == "heads-backbone" else losses[:, :-1].mean()


@register_heads_objective
@dataclass
class Alternate(HeadsObjective):
    """In turn, by optimizer steps: the last exit's loss in steps 0, 2, …, the sum over all exits in steps 1, 3, …
    (BERxiT, Xin et al. 2021)."""

    name = "alternate"
    last_exit_alone = True

    def __call__(self, step: HeadsStep) -> Tensor:
        return step.losses[:, -1].mean() if step.number % 2 == 0 else step.losses.sum(1).mean()


@register_heads_objective
@dataclass
class GradientEquilibrium(HeadsObjective):
    """Sum over exits, with the gradients that come back to the layers balanced (Li et al. 2019; ElasticBERT, Liu et
    al. 2022); see `exits.runner.collect_states`. Each head gets the whole gradient of its own loss."""

    name = "gradient_equilibrium"
    scales_gradients = True

    def __call__(self, step: HeadsStep) -> Tensor:
        return step.losses.sum(1).mean()


@register_heads_objective
@dataclass
class CoSEE(HeadsObjective):
    """Losses weighted by how near an exit is to where the row would leave (COSEE, He et al. 2024).

    Thresholds of the signal, an exit's entropy over its maximum, are drawn uniformly for each optimizer step from the
    range that internal exits showed in the epoch before, [0, 1] in the first. With m* the first internal exit whose
    signal is below the threshold, or else the last exit, the loss is the mean over thresholds and rows of
    `Σ_m softmax_m(−β_t·|m − m*|)·CE_m`, where `β_t` grows linearly from 0 to β over the run. To it comes `separation`
    times the mean over internal exits of `max(0, mean signal of right rows − mean signal of wrong rows + margin)`,
    0 where a batch has only one kind.

    The range is that of one process and is not part of a checkpoint: a resumed run draws from [0, 1] until the epoch
    in which it was stopped is over.

    Args:
        samples (`int`): thresholds per step.
        beta (`float`): β, sharpness of the weights at the end.
        separation (`float`): weight of the second term (the paper's α).
        margin (`float`): margin of the second term.

    Raises:
        ValueError: no thresholds, or a negative number.
    """

    name = "cosee"
    samples: int = 5
    beta: float = 10.0
    separation: float = 0.1
    margin: float = 0.3
    _range: tuple[Any, Any] = field(default=(0.0, 1.0), init=False, repr=False)
    _seen: tuple[Any, Any] | None = field(default=None, init=False, repr=False)
    _epoch: int | None = field(default=None, init=False, repr=False)
    _drawn: tuple[int, Tensor] | None = field(default=None, init=False, repr=False)
    needs_logits = True
    needs_classes = True
    needs_rows = True

    def __post_init__(self) -> None:
        if not isinstance(self.samples, int) or self.samples < 1:
            raise ValueError(f"`samples`={self.samples!r} must be a whole number of at least 1.")
        _check_not_negative(self, "beta", "separation", "margin")

    def __call__(self, step: HeadsStep) -> Tensor:
        assert step.logits is not None and step.labels is not None
        signal = normalised_entropy(step.logits[:, :-1], step.problem_type)
        thresholds = self._thresholds(step, signal.detach())
        weights = self.weights(signal.detach(), thresholds, self.beta * step.progress)
        right = exit_errors(step.logits[:, :-1], step.labels, step.problem_type) == 0
        return (weights * step.losses).sum(1).mean() + self.separation * self._separation(signal, right)

    @staticmethod
    def weights(signal: Tensor, thresholds: Tensor, beta: float) -> Tensor:
        """Weights (rows, exits) of the losses, mean over thresholds, from the signal (rows, exits − 1) and thresholds
        (samples,)."""
        leaves = signal < thresholds.view(-1, 1, 1)
        # The first exit that lets the row go; the last one lets all.
        leaves = F.pad(leaves.to(torch.int8), (0, 1), value=1)
        taken = leaves.argmax(-1, keepdim=True)
        distance = (torch.arange(leaves.shape[-1], device=signal.device) - taken).abs()
        return (-beta * distance.to(signal.dtype)).softmax(-1).mean(0)

    def _thresholds(self, step: HeadsStep, signal: Tensor) -> Tensor:
        """Thresholds (samples,) of this optimizer step; takes note of the signal's range."""
        epoch = int(step.epoch)
        if self._epoch is not None and epoch != self._epoch and self._seen is not None:
            self._range, self._seen = self._seen, None
        self._epoch = epoch
        if self._drawn is None or self._drawn[0] != step.number:
            low, high = self._range
            self._drawn = (step.number, low + (high - low) * torch.rand(self.samples).to(signal))
        if signal.numel():
            low, high = signal.aminmax()
            before = self._seen or (low, high)
            self._seen = (torch.minimum(low, before[0]), torch.maximum(high, before[1]))
        return self._drawn[1]

    def _separation(self, signal: Tensor, right: Tensor) -> Tensor:
        """Mean over internal exits of how much the signals of right and wrong rows, (rows, exits − 1), overlap."""
        count, rows = right.sum(0), len(right)
        of_right = (signal * right).sum(0) / count.clamp_min(1)
        of_wrong = (signal * ~right).sum(0) / (rows - count).clamp_min(1)
        overlap = (of_right - of_wrong + self.margin).clamp_min(0)
        both = (count > 0) & (count < rows)
        return (overlap * both).sum() / max(1, signal.shape[1])


@register_heads_objective
@dataclass
class Variational(HeadsObjective):
    """Expected loss under the policies' exit distribution, held near a prior: `Σ_i π_i·CE_i + β·KL(prior ‖ π)`
    (PALBERT, Balagansky and Gavrilov 2022, after PonderNet, Banino et al. 2021). Policies learn beside the model.

    The prior is the geometric distribution `λ(1 − λ)^i` over the exits that are open, divided by its sum. The
    direction of the divergence is that of the authors' code. Rows without a choice add nothing to it.

    Args:
        beta (`float`): β, weight of the divergence.
        prior_rate (`float`): λ in (0, 1).

    Raises:
        ValueError: a number out of its range.
    """

    name = "variational"
    beta: float = 0.5
    prior_rate: float = 0.1
    trains_policies = True
    needs_rows = True

    def __post_init__(self) -> None:
        _check_not_negative(self, "beta")
        if not 0 < self.prior_rate < 1:
            raise ValueError(f"`prior_rate`={self.prior_rate} must lie in (0, 1).")

    def __call__(self, step: HeadsStep) -> Tensor:
        assert step.log_distribution is not None
        expected = (step.log_distribution.exp() * step.losses).sum(1)
        # The logarithms themselves: (1 − λ)^i of a deep model is small.
        steps = torch.arange(step.losses.shape[1] - step.first_exit, device=expected.device)
        prior = (steps.to(step.losses) * math.log(1 - self.prior_rate)).log_softmax(0)
        divergence = (prior.exp() * (prior - step.log_distribution[:, step.first_exit :])).sum(1)
        if step.may_exit is not None:
            divergence = torch.where(step.may_exit, divergence, 0.0)
        return (expected + self.beta * divergence).mean()


@register_heads_objective
@dataclass
class SelfDistillation(HeadsObjective):
    """The last exit's loss, and the mean over internal exits of `(1 − w)·CE + w·T²·KL(last ‖ exit)` at temperature T;
    the last exit's distribution is held fixed. With many labels the divergence is a mean over labels; in regression
    it is the squared difference to the last exit's output. After Hinton et al. 2015; FastBERT, Liu et al. 2020.

    Args:
        weight (`float`): w in [0, 1].
        temperature (`float`): T.

    Raises:
        ValueError: a number out of its range.
    """

    name = "self_distillation"
    weight: float = 0.5
    temperature: float = 2.0
    needs_logits = True

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ValueError(f"`weight`={self.weight} must lie in [0, 1].")
        if self.temperature <= 0:
            raise ValueError(f"`temperature`={self.temperature} must be positive.")

    def __call__(self, step: HeadsStep) -> Tensor:
        assert step.logits is not None
        distances = self.distances(step.logits[:, :-1], step.logits[:, -1:].detach(), step.problem_type)
        internal = (1 - self.weight) * step.losses[:, :-1] + self.weight * distances
        # A model may have no internal exit.
        return (step.losses[:, -1] + internal.sum(1) / max(1, internal.shape[1])).mean()

    def distances(self, logits: Tensor, last: Tensor, problem_type: str) -> Tensor:
        """Distance (rows, exits − 1) of internal exits' logits (rows, exits − 1, labels) from the last exit's
        (rows, 1, labels)."""
        if problem_type == "regression":
            return (logits.float() - last.float()).square().mean(-1)
        ours, wanted = (_log_probabilities(one / self.temperature, problem_type) for one in (logits, last))
        return self.temperature**2 * (wanted.exp() * (wanted - ours)).sum(-1).mean(-1)


def normalised_entropy(logits: Tensor, problem_type: str) -> Tensor:
    """Entropy over its maximum, with a gradient that is finite everywhere; a mean over labels where there are many.

    Args:
        logits (`Tensor` of shape `(…, labels)`): logits of the heads.
        problem_type (`str`): of classification.

    Returns:
        `Tensor` of shape `(…)` in [0, 1], float32.
    """
    log_probabilities = _log_probabilities(logits, problem_type)
    entropy = -(log_probabilities.exp() * log_probabilities).sum(-1)
    return entropy.mean(-1) / math.log(log_probabilities.shape[-1])


def _log_probabilities(logits: Tensor, problem_type: str) -> Tensor:
    """Log probabilities (…, decisions, classes): one decision between all classes, or no and yes for every label."""
    logits = logits.float()
    if problem_type == "multi_label_classification":
        return torch.stack((F.logsigmoid(-logits), F.logsigmoid(logits)), dim=-1)
    return logits.log_softmax(-1).unsqueeze(-2)


def _check_not_negative(objective: HeadsObjective, *names: str) -> None:
    for name in names:
        if getattr(objective, name) < 0:
            raise ValueError(f"`{name}`={getattr(objective, name)} must not be negative.")


__all__ = [
    "HEADS_OBJECTIVES",
    "Alternate",
    "CoSEE",
    "GradientEquilibrium",
    "HeadsObjective",
    "HeadsStep",
    "Last",
    "LayerWeighted",
    "SelfDistillation",
    "TwoStage",
    "Uniform",
    "Variational",
    "make_heads_objective",
    "normalised_entropy",
    "register_heads_objective",
]
