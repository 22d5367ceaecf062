# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Per-row losses, errors and predictions of exit heads, for classification of one or many labels and for regression.

Logits carry any leading dimensions: (rows, labels) of one exit or (rows, exits, labels) of all.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import logging


logger = logging.get_logger(__name__)

PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")


def resolve_problem_type(problem_type: str | None, num_labels: int, labels: Tensor | None = None) -> str:
    """The problem type as Transformers infers it: from the config, else from the number and dtype of the labels."""
    if problem_type is not None:
        if problem_type not in PROBLEM_TYPES:
            raise ValueError(f"`problem_type`={problem_type!r} is unknown; accepted are {', '.join(PROBLEM_TYPES)}.")
        return problem_type
    if num_labels == 1:
        return "regression"
    if labels is not None and (labels.is_floating_point() or (labels.dtype == torch.bool and labels.dim() == 2)):
        return "multi_label_classification"
    return "single_label_classification"


def check_labels(labels: Tensor, rows: int, num_labels: int, problem_type: str) -> None:
    """Raises `ValueError` when labels do not fit the problem: wrong shape, or classes outside of 0..num_labels−1."""
    if labels.shape[0] != rows:
        raise ValueError(f"`labels` has {labels.shape[0]} rows, the input has {rows}.")
    if problem_type == "single_label_classification":
        if labels.dim() != 1 or labels.is_floating_point():
            raise ValueError(
                f"`labels` of shape {tuple(labels.shape)} and dtype {labels.dtype} must be (rows,) of integers for "
                "single-label classification; set `config.problem_type` for another problem."
            )
        if bool(((labels < 0) | (labels >= num_labels)).any()):
            raise ValueError(f"`labels` must lie in 0..{num_labels - 1} (`num_labels`={num_labels}); got {labels}.")
    elif labels.numel() != rows * num_labels:
        raise ValueError(
            f"`labels` of shape {tuple(labels.shape)} must be ({rows}, {num_labels}) for "
            f"`problem_type`={problem_type!r}."
        )


def _match(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits in float32 and labels (rows, labels) broadcast to their shape."""
    logits = logits.float()
    labels = labels.reshape(len(labels), *(1,) * (logits.dim() - 2), logits.shape[-1])
    return logits, labels.to(logits.dtype).expand_as(logits)


def exit_losses(logits: Tensor, labels: Tensor, problem_type: str) -> Tensor:
    """Loss of each row at each exit: cross-entropy, binary cross-entropy (mean over labels) or squared error.

    Args:
        logits (`Tensor` of shape `(rows, [exits,] labels)`): logits of the exit heads.
        labels (`Tensor` of shape `(rows,)` or `(rows, labels)`): true classes, label indicators or values.
        problem_type (`str`): one of `PROBLEM_TYPES`.

    Returns:
        `Tensor` of shape `(rows[, exits])`, float32.
    """
    if problem_type == "single_label_classification":
        targets = labels.long().reshape(-1, *(1,) * (logits.dim() - 2)).expand(logits.shape[:-1])
        losses = F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="none")
        return losses.view(logits.shape[:-1])
    logits, labels = _match(logits, labels)
    if problem_type == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(-1)
    return F.mse_loss(logits, labels, reduction="none").mean(-1)


def exit_errors(logits: Tensor, labels: Tensor, problem_type: str) -> Tensor:
    """Error of each row at each exit: 0/1, share of wrong labels, or absolute difference. Shapes as `exit_losses`."""
    if problem_type == "single_label_classification":
        return (logits.argmax(-1) != labels.reshape(-1, *(1,) * (logits.dim() - 2))).float()
    logits, labels = _match(logits, labels)
    if problem_type == "multi_label_classification":
        return ((logits > 0) != (labels > 0.5)).float().mean(-1)
    return (logits - labels).abs().mean(-1)


def layer_weighted(losses: Tensor) -> Tensor:
    """Mean over rows of `Σ_i i·CE_i / Σ_i i`, i counting the exits from 1 (PABEE, Zhou et al. 2020; ConsistentEE's
    initialisation)."""
    weights = torch.arange(1, losses.shape[-1] + 1, device=losses.device, dtype=losses.dtype)
    return (losses * (weights / weights.sum())).sum(-1).mean()


class OwnLoss:
    """Mixin before a `PreTrainedModel` whose losses are those of its exits: another `loss_function` is refused.

    Raises:
        ValueError: `model.loss_function = …`.
    """

    @property
    def loss_function(self) -> Any:
        return super().loss_function  # type: ignore[misc]

    @loss_function.setter
    def loss_function(self, value: Any) -> None:
        raise ValueError(
            f"`loss_function`={value!r} would be given one exit's logits, and all exits learn. Make a loss of what "
            "`output_all_exits`=True returns (a language model takes `token_loss` with it), or call the model without "
            "`labels` and make one of its `logits`, which trains the last exit alone."
        )


def say_what_labels_train(criterion: str) -> None:
    """In training mode with labels and without a word about exits: says once that policies learn nothing, where it is
    them that decide. That is how trainers of others call a model."""
    if criterion == "policy" and torch.is_grad_enabled():
        logger.warning_once(
            "The loss of a model with exits trains all exit heads, and no exit policy: nothing says yet where to "
            "leave. `ConsistentEETrainer.train_policy()` trains the policies afterwards; other values of "
            "`exit_criterion`, such as 'max_probability', do without."
        )


def check_labels_of_rows(arguments: Mapping[str, Any]) -> None:
    """Raises `ValueError` for arguments of losses of tokens, where a row has labels and its tokens have none."""
    for name in ("shift_labels", "ignore_index"):
        if arguments.get(name) is not None:
            raise ValueError(f"`{name}` is for language models; a row is learnt by its `labels`, all of which count.")


def check_training_without_labels(num_items_in_batch: Any) -> None:
    """In training mode, without labels and without a word about exits: says once what a loss on `logits` trains.

    Raises:
        ValueError: labels were there and somebody took them, which Trainer does.
    """
    if num_items_in_batch is not None:
        raise ValueError(
            f"`labels` is None, but `num_items_in_batch`={num_items_in_batch} counts them: `label_smoothing_factor` "
            "and `compute_loss_func` of 🤗 Trainer take the labels away and make a loss of `logits`, which trains the "
            "last exit alone. Train without them, or override `compute_loss` of Trainer with a loss of what "
            "`output_all_exits`=True returns."
        )
    if torch.is_grad_enabled():
        logger.warning_once(
            "A model with exits is called in training mode without `labels`: it runs at full depth, and a loss on "
            "`logits` trains the last exit alone. With `labels`, or with a loss of what `output_all_exits`=True "
            "returns, all exits learn."
        )
