# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What trainers accept when they are made: arguments, and models with exits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from transformers_cee.exits.configuration import ExitConfigMixin
from transformers_cee.training.items import items_of
from transformers_cee.training.parameters import bare_model
from transformers_cee.training.training_args import ConsistentEETrainingArguments


def checked_arguments(args: Any, kwargs: Mapping[str, Any]) -> ConsistentEETrainingArguments:
    """The arguments; raises `ValueError` for those of Trainer that early exits do not support."""
    if not isinstance(args, ConsistentEETrainingArguments):
        raise ValueError(f"`args` of type {type(args).__name__} must be ConsistentEETrainingArguments.")
    if any(kwargs.get("optimizers") or ()):
        raise ValueError(
            "`optimizers` is not supported: every phase makes its own; use `args.optim` or `optimizer_cls_and_kwargs`."
        )
    fixed = {"lr", "params"} & {*(kwargs.get("optimizer_cls_and_kwargs") or (None, {}))[1]}
    if fixed:
        raise ValueError(
            f"`optimizer_cls_and_kwargs` sets {sorted(fixed)}, which every phase has of its own; use `learning_rate`, "
            "`exit_learning_rate` and `policy_learning_rate` of `args`."
        )
    if args.label_names not in (None, ["labels"]):
        raise ValueError(
            f"`label_names`={args.label_names!r} must be ['labels'] or None: losses of exits are of those."
        )
    if args.prediction_loss_only or args.batch_eval_metrics:
        raise ValueError("`prediction_loss_only` and `batch_eval_metrics` are not supported: exit layers are needed.")
    return args


def check_model(
    model: nn.Module,
    args: ConsistentEETrainingArguments,
    preprocess: Callable | None = None,
    own_loss: Callable | None = None,
) -> None:
    """Raises `ValueError` for a model without exits, or one that the arguments do not fit.

    Args:
        preprocess (`Callable`, *optional*): `preprocess_logits_for_metrics`.
        own_loss (`Callable`, *optional*): `compute_loss_func`.
    """
    exit_model = bare_model(model)
    if not isinstance(getattr(exit_model, "config", None), ExitConfigMixin):
        raise ValueError(
            f"`model` of type {type(model).__name__} has no exits; give a model such as BertForConsistentEE."
        )
    items = items_of(exit_model)
    items.check_heads_objective(args.heads_objective, exit_model.config)
    items.check_arguments(exit_model, args, preprocess, own_loss)
