# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What is refused before any work starts: whatever would stop a phase after others have taken their time."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import EarlyStoppingCallback, Trainer
from transformers.utils import logging

from transformers_cee.exits.policy import check_has_classes
from transformers_cee.training.heads_objectives import HEADS_OBJECTIVES
from transformers_cee.training.labels import check_label_column, check_labelled
from transformers_cee.training.model_phase import ModelPhaseTrainer
from transformers_cee.training.model_step import drafter_phase, operating_point
from transformers_cee.training.parameters import active_module, freeze_for_model_step, keeping_requires_grad
from transformers_cee.training.policy_phase import check_policies_learn
from transformers_cee.training.rehearsal import first_batch, rehearse_evaluation, take_rows
from transformers_cee.training.rewards import check_reward


logger = logging.get_logger(__name__)

# Phases in which the model itself learns, and in which the policies do.
MODEL_PHASES = {"heads", "consistent"}
# Phases that 🤗 Trainer's own loop runs, on the rows of the data sets.
BATCH_PHASES = {*MODEL_PHASES, "drafter"}
POLICY_PHASES = {"policy", "consistent"}
# Rows whose labels are looked at together.
ROWS = 64
# What people override of 🤗 Trainer and the trainer of a run is asked for itself; trainers of phases evaluate by it.
OF_THE_RUN = {
    "__init__",
    "add_callback",
    "call_model_init",
    "create_model_card",
    "evaluate",
    "get_test_dataloader",
    "hyperparameter_search",
    "init_hf_repo",
    "log_metrics",
    "metrics_format",
    "pop_callback",
    "predict",
    "push_to_hub",
    "remove_callback",
    "save_metrics",
    "save_state",
    "train",
}


def check_hooks(run: type, phase: type) -> None:
    """Raises `ValueError` for a trainer of all phases that overrides a method of 🤗 Trainer which its phases would
    not ask it for.

    Args:
        run (`type`): a [`ConsistentEETrainer`].
        phase (`type`): its `phase_trainer`; whoever has one of their own knows of this.

    Raises:
        TypeError: `phase_trainer` is something else than a class derived from `ModelPhaseTrainer`.
    """
    if not (isinstance(phase, type) and issubclass(phase, ModelPhaseTrainer)):
        raise TypeError(f"`phase_trainer`={phase!r} must be a class derived from ModelPhaseTrainer.")
    own = [
        name
        for one in run.__mro__
        if one.__module__.split(".")[0] not in ("transformers", "transformers_cee")
        for name in vars(one)
        if name not in OF_THE_RUN and callable(vars(Trainer).get(name))
    ]
    if own and phase.__module__.startswith("transformers_cee."):
        raise ValueError(
            f"`{run.__name__}.{own[0]}` would not be asked while phases train the model, which have trainers of their "
            f"own. Override it in a subclass of `{phase.__name__}`, and name that as `phase_trainer` of "
            f"`{run.__name__}`."
        )


def check_phases(trainer: Any, some: Collection[str] | None = None) -> None:
    """Raises `ValueError` or `TypeError` for whatever would stop one of some phases; nothing has been done by then.

    A few rows of every data set are run, without gradient and without telling callbacks, since only that shows what
    collators, labels and `compute_metrics` make of them.

    Args:
        trainer ([`ConsistentEETrainer`]): the trainer as it would run.
        some (collection of `str`, *optional*): phases to come, of `PHASES`; by default the whole run.
    """
    phases = {*(trainer.args.phases if some is None else some)}
    # A run ends with the budgets, whatever its phases are.
    fits_budgets = trainer._has_conditioned_policies and bool(some is None or POLICY_PHASES & phases)
    trainer.args.check_phases()
    trainer._place_model()
    _check_train_rows(trainer, phases)
    _check_evaluation(trainer, phases, fits_budgets)
    model_phases = trainer._model_phases(phases)
    for phase in model_phases:
        with keeping_requires_grad(trainer.model):
            freeze_for_model_step(trainer.model, phase.trainable, phase.trains_policies)
    _check_exits(trainer, phases)
    _check_stopping(trainer, phases)
    _check_first_rows(trainer, phases)
    judged = _judges(trainer) and phases != {"hardness"}
    if judged and not trainer._splits_model:
        wanted = trainer.args.metric_for_best_model if model_phases else None
        # Policies are judged where the model step of `consistent` is.
        rehearse_evaluation(trainer, model_phases or [trainer._consistent_phase()], wanted)
    elif judged or fits_budgets:
        for rows in evaluation_sets(trainer).values():
            first_batch(trainer, rows, needs_labels=judged or trainer.items.needs_labels)


def check_rows(rows: Any, name: str) -> None:
    """Raises `ValueError` unless there is a data set with rows, which can be had by number."""
    if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
        raise ValueError(
            f"`{name}` of type {type(rows).__name__} must have a length and rows by number: phases come back to the "
            "same rows."
        )
    if len(rows) == 0:
        raise ValueError(f"`{name}` is empty; at least one row is needed.")


def _check_train_rows(trainer: Any, phases: set[str]) -> None:
    args, rows = trainer.args, trainer.train_dataset
    check_rows(rows, "train_dataset")
    for name, some in zip(("heads", "policies"), trainer._split(), strict=True):
        if len(some) == 0:
            raise ValueError(f"`policy_holdout`={args.policy_holdout} leaves no row of {len(rows)} for the {name}.")
    learnt, batch = len(trainer._split()[0]), args.train_batch_size * args.world_size
    if args.dataloader_drop_last and phases & BATCH_PHASES and learnt < batch:
        raise ValueError(
            f"`dataloader_drop_last`=True leaves no batch: {learnt} rows do not fill one of {batch}. Accepted are "
            "False, or a smaller `per_device_train_batch_size`."
        )
    check_label_column(rows, "train_dataset")


def evaluation_sets(trainer: Any) -> dict[str, Any]:
    """The evaluation sets by name, one of its own as ""; none where there is none."""
    sets = trainer.eval_dataset
    if sets is None:
        return {}
    return dict(sets) if isinstance(sets, dict) else {"": sets}


def _judges(trainer: Any) -> bool:
    """Is anything evaluated while phases learn?"""
    return trainer.args.eval_strategy != "no" or (trainer.args.eval_on_start and trainer.eval_dataset is not None)


def _check_evaluation(trainer: Any, phases: set[str], fits_budgets: bool) -> None:
    """Rows of the evaluation sets, and what the policies can be judged by."""
    args = trainer.args
    judges = _judges(trainer)
    stores = fits_budgets or (judges and POLICY_PHASES & phases)
    for name, rows in evaluation_sets(trainer).items():
        named = f"eval_dataset[{name!r}]" if name else "eval_dataset"
        if stores:
            check_rows(rows, named)
        if judges and phases != {"hardness"} and hasattr(rows, "__len__"):
            if len(rows) == 0:
                raise ValueError(f"`{named}` is empty; at least one row is needed, or `eval_strategy`='no'.")
            batch = args.eval_batch_size * args.world_size
            if args.dataloader_drop_last and phases & BATCH_PHASES and len(rows) < batch:
                raise ValueError(
                    f"`dataloader_drop_last`=True leaves no batch of `{named}`: {len(rows)} rows do not fill one of "
                    f"{batch}. Accepted are False, or a smaller `per_device_eval_batch_size`."
                )
        check_label_column(rows, named)
        if stores:
            learnt = judges and args.eval_strategy != "no" and POLICY_PHASES & phases
            labels = _labels(trainer, rows, torch.arange(len(rows)))
            trainer.items.check_labels(labels, named, must_leave=bool(learnt))
    if judges and phases & POLICY_PHASES and trainer.compute_metrics is not None and args.include_for_metrics:
        raise ValueError(
            f"`include_for_metrics`={args.include_for_metrics} is not supported with `eval_strategy`="
            f"'{args.eval_strategy}': policies are judged on stored exits, of which logits and labels alone are "
            "known; accepted is []."
        )


def _check_exits(trainer: Any, phases: set[str]) -> None:
    """Whether the model's exits, and its policies, can do what the phases want of them."""
    model, args = trainer._exit_model, trainer.args
    policies = active_module(model.exit_policies)
    # Arguments may have been changed since there was a model.
    trainer.items.check_heads_objective(args.heads_objective, model.config)
    trained_beside = "heads" in phases and HEADS_OBJECTIVES[args.heads_objective].trains_policies
    if "drafter" in phases:
        drafter_phase(args, model)
        if trainer.model is not model:
            raise ValueError(
                f"`phases`={args.phases} has 'drafter', and `model` has adapters around it, whose folders hold no "
                "drafter: let it learn before they are added, or after they are merged."
            )
    if phases & POLICY_PHASES:
        if model.first_exit() == model.last_exit:
            raise ValueError(
                f"`exit_layers`={model.config.exit_layers} and `min_exit_layer`={model.config.min_exit_layer} leave "
                "the last layer as the only exit: there is nothing to decide."
            )
        check_policies_learn(policies)
        check_reward(args.reward, model.layer_numbers, model.config.num_hidden_layers, policies.is_conditioned)
        operating_point(model)
    own = [weight for part in (model.exit_heads, model.exit_norms) for weight in active_module(part).parameters()]
    if "heads" in phases and trainer.model is not model and own and not any(one.requires_grad for one in own):
        logger.warning(
            "Adapters learn in the phase 'heads', and heads and norms of the internal exits do not: `modules_to_save` "
            "does not name them, as `exit_lora_config` does."
        )
    if policies.needs_logits and (trained_beside or phases - {"heads"}):
        check_has_classes(
            trainer._problem_type(), f"`policy_inputs`={model.config.policy_inputs!r} looks at confidence", "'state'"
        )


def _check_stopping(trainer: Any, phases: set[str]) -> None:
    stops = any(isinstance(callback, EarlyStoppingCallback) for callback in trainer.callback_handler.callbacks)
    if not stops or phases == {"hardness"}:
        return
    if trainer.args.eval_strategy == "no":
        raise ValueError("`EarlyStoppingCallback` needs evaluations: `eval_strategy`='no' must be 'steps' or 'epoch'.")
    if phases & BATCH_PHASES and trainer.args.metric_for_best_model is None:
        raise ValueError("`EarlyStoppingCallback` needs `metric_for_best_model`, which is None.")


def _check_first_rows(trainer: Any, phases: set[str]) -> None:
    """Runs the first training rows; where policies learn, looks for an item that may leave."""
    heads, policies = trainer._split()
    if phases & MODEL_PHASES:
        objective = HEADS_OBJECTIVES[trainer.args.heads_objective]
        per_row = "consistent" in phases or ("heads" in phases and objective.needs_rows)
        first_batch(trainer, trainer.train_dataset, heads, per_row)
    if phases - {"heads"}:
        first_batch(trainer, trainer.train_dataset, policies)
    if phases & POLICY_PHASES:
        trainer.items.check_labels(_labels(trainer, trainer.train_dataset, policies), "train_dataset")


def _labels(trainer: Any, dataset: Any, rows: Tensor) -> Iterator[Tensor]:
    """Labels of some rows, a few rows at a time, for as long as more are asked for."""
    for some in rows.split(ROWS):
        yield check_labelled(take_rows(trainer, dataset, some.tolist()))["labels"]
