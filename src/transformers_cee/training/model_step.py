# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Losses of the phases that train the model itself, of encoders and decoders: from model and batch to one mean."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerState

from transformers_cee.exits.deciding import ExitDecision, resolve_decision
from transformers_cee.exits.losses import resolve_problem_type
from transformers_cee.exits.policy import exit_log_distribution
from transformers_cee.exits.support import MASKED
from transformers_cee.exits.training_options import ExitTraining
from transformers_cee.modeling.roll_outs import draft_figures
from transformers_cee.training.heads_objectives import HeadsObjective, HeadsStep
from transformers_cee.training.items import items_of
from transformers_cee.training.objectives import closed_before, consistent_expected, consistent_sampled
from transformers_cee.training.parameters import active_module
from transformers_cee.training.training_args import ConsistentEETrainingArguments


# From the model, a batch and the state of the training: mean loss over the batch's items, and the model's output.
StepLoss = Callable[[nn.Module, dict[str, Any], TrainerState], tuple[Tensor, Any]]


@dataclass(frozen=True)
class RowJudge:
    """How a phase is judged that leaves exits as they are.

    Args:
        options ([`ExitTraining`]): given to the model's forward.
        output (`str`): the field of the model's output that says what came of it, (rows, …).
        figures (`Callable`): from that of all rows to figures by name.
        best_by (`str`): of these; the more the better.
    """

    options: ExitTraining
    output: str
    figures: Callable[[Tensor], dict[str, float]]
    best_by: str


@dataclass
class ModelPhase:
    """What a phase that trains the model itself changes.

    Args:
        loss (`StepLoss`): its loss.
        evaluation (`dict`): arguments of the model's forward while it evaluates.
        trainable (`str`): what learns, as in `freeze_for_model_step`.
        trains_policies (`bool`): do the policies learn, too?
        exit_loss (`Callable`): what evaluation reports of losses (rows or tokens, exits), if it has them.
        judge ([`RowJudge`], *optional*): takes the place of an evaluation of exits, which cannot change by the phase.
    """

    loss: StepLoss
    evaluation: dict[str, Any]
    trainable: str
    trains_policies: bool = False
    exit_loss: Callable[[Tensor], Tensor] = field(default=torch.mean)
    judge: RowJudge | None = None


# `compute_loss_func` of the caller: from outputs of one exit and labels to one number, or (rows,).
OwnLoss = Callable[..., Tensor]


def own_exit_losses(loss: OwnLoss, outputs: Any, labels: Tensor) -> Tensor:
    """Losses (rows, exits), or (1, exits) where the function gives means over rows, of an output with all exits.

    Raises:
        ValueError: the function gives another shape.
    """
    columns = []
    for logits in outputs.all_exit_logits.unbind(1):
        value = loss(type(outputs)(logits=logits), labels, num_items_in_batch=None)
        if not isinstance(value, Tensor) or tuple(value.shape) not in ((), (len(labels),)):
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"`compute_loss_func` gave {got}; accepted are one number, or one for each of {len(labels)} rows."
            )
        columns.append(value.reshape(-1))
    return torch.stack(columns, dim=1)


def heads_phase(
    args: ConsistentEETrainingArguments, exit_model: Any, stage: str, own_loss: OwnLoss | None = None
) -> ModelPhase:
    """Phase `heads`: the exits learn. Evaluation is at full depth and at all exits.

    Args:
        exit_model (`PreTrainedModel`): the early-exit model itself, without wrappers.
        stage (`str`): step of the objective, one of its `stages`.
        own_loss (`Callable`, *optional*): takes the place of the cross-entropy at each exit.
    """
    objective = args.make_heads_objective(stage)
    options = ExitTraining(
        gradient_equilibrium=objective.scales_gradients,
        output_policies=objective.trains_policies,
        token_loss=items_of(exit_model).token_loss(args),
    )

    def loss(model: nn.Module, inputs: dict[str, Any], state: TrainerState) -> tuple[Tensor, Any]:
        outputs = model(**inputs, output_all_exits=True, exit_training=options)
        if own_loss is not None:
            outputs.all_exit_losses = own_exit_losses(own_loss, outputs, inputs["labels"])
        return objective(_heads_step(objective, exit_model, outputs, inputs["labels"], state)), outputs

    return ModelPhase(
        loss,
        {"output_all_exits": True},
        objective.stages[stage] or args.trainable,
        objective.trains_policies,
        objective.summary,
    )


def _heads_step(
    objective: HeadsObjective, exit_model: Any, outputs: Any, labels: Tensor, state: TrainerState
) -> HeadsStep:
    """What the objective looks at."""
    step = HeadsStep(
        outputs.all_exit_losses,
        first_exit=exit_model.first_exit(),
        number=state.global_step,
        progress=state.global_step / max(1, state.max_steps),
        epoch=state.epoch or 0.0,
    )
    if objective.needs_logits:
        config = exit_model.config
        step.problem_type = resolve_problem_type(config.problem_type, config.num_labels, labels)
        step.logits, step.labels = outputs.all_exit_logits, labels
    if objective.trains_policies:
        step.log_distribution = _log_distribution(exit_model, outputs.all_policy_logits, outputs)
        step.may_exit = items_of(exit_model).may_exit(outputs)
    return step


def consistent_phase(
    args: ConsistentEETrainingArguments,
    exit_model: Any,
    problem_type: Callable[[], str],
    own_loss: OwnLoss | None = None,
) -> ModelPhase:
    """Model step of the phase `consistent`: the loss at the exits that the policies take.

    Args:
        exit_model (`PreTrainedModel`): the early-exit model itself, without wrappers.
        problem_type (`Callable`): tells what labels mean, once there is data.
        own_loss (`Callable`, *optional*): takes the place of the cross-entropy at each exit.
    """
    samples, sampled = args.consistent_samples, args.consistent_objective == "sampled"

    def loss(model: nn.Module, inputs: dict[str, Any], state: TrainerState) -> tuple[Tensor, Any]:
        drawn = items_of(exit_model).sampled_step(model, inputs, args) if sampled else None
        if drawn is not None:
            return drawn.loss, drawn
        outputs = model(**inputs, output_all_exits=True)
        if own_loss is not None:
            outputs.all_exit_losses = own_exit_losses(own_loss, outputs, inputs["labels"])
        distribution = log_distribution(exit_model, outputs, problem_type())
        if sampled:
            return consistent_sampled(outputs.all_exit_losses, distribution, samples), outputs
        return consistent_expected(outputs.all_exit_losses, distribution), outputs

    return ModelPhase(loss, {"exit_threshold": operating_point(exit_model)}, args.trainable)


def drafter_phase(args: ConsistentEETrainingArguments, exit_model: Any) -> ModelPhase:
    """Phase `drafter`: the drafter learns from what the model says of the text, see `modeling.roll_outs`.

    Raises:
        ValueError: the model has no drafter, or attention that takes no masks of its own.
    """
    if getattr(exit_model, "exit_drafter", None) is None:
        raise ValueError(
            f"`phases`={args.phases} has 'drafter', and the model has none: accepted are language models with "
            "`drafter_layer` in their config."
        )
    attention = exit_model.config._attn_implementation
    if attention not in MASKED:
        raise ValueError(
            f"`attn_implementation`={attention!r} has no masks for the phase drafter, in which tokens look at drafts "
            f"of their own; accepted are {', '.join(MASKED)}."
        )
    options = ExitTraining(roll_outs=args.drafter_roll_outs)

    def loss(model: nn.Module, inputs: dict[str, Any], state: TrainerState) -> tuple[Tensor, Any]:
        outputs = model(**inputs, exit_training=options)
        return outputs.loss, outputs

    judge = RowJudge(options, "judged_drafts", draft_figures, "tokens_per_pass")
    return ModelPhase(loss, {}, "drafter", judge=judge)


def operating_point(exit_model: Any) -> ExitDecision:
    """The decision at which phases that concern the policies are judged: those of the config. A config
    without a threshold, whose exits are off, would show nothing of them; then it is the policy at 0.5. A budget does
    not count, whose price was fitted before."""
    if exit_model.config.exit_threshold is None:
        return ExitDecision("policy", 0.5)
    return resolve_decision(exit_model.config, exit_model.config.exit_threshold)


@torch.no_grad()
def log_distribution(exit_model: Any, outputs: Any, problem_type: str) -> Tensor:
    """Log of the exit distribution (rows or tokens, exits) that the policies give for an output with all exits."""
    policies = active_module(exit_model.exit_policies)
    with torch.autocast(outputs.all_exit_states.device.type, enabled=False):
        states = outputs.all_exit_states.to(next(policies.parameters()).dtype)
        exit_logits = policies(states, exit_model.entries(outputs, None, problem_type).features)
        return _log_distribution(exit_model, exit_logits, outputs)


def _log_distribution(exit_model: Any, exit_logits: Tensor, outputs: Any) -> Tensor:
    """Log of the exit distribution (rows or tokens, exits) where some exits are closed and some tokens must stay."""
    distribution = exit_log_distribution(closed_before(exit_logits, exit_model.first_exit()))
    return items_of(exit_model).decided(distribution, outputs)


def with_gradient(loss: Tensor, model: nn.Module) -> Tensor:
    """The loss, tied to the parameters that train where it depends on none: all exits that were drawn are frozen."""
    if loss.requires_grad:
        return loss
    return loss + 0.0 * sum(parameter.sum() for parameter in model.parameters() if parameter.requires_grad)
