# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What one training item is, a row or a token, and all that training does differently because of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction

from transformers_cee.exits.deciding import default_arguments
from transformers_cee.exits.losses import resolve_problem_type
from transformers_cee.exits.token_targets import count_tokens
from transformers_cee.exits.training_options import ExitTraining
from transformers_cee.training.heads_objectives import HEADS_OBJECTIVES
from transformers_cee.training.objectives import staying_where_forced
from transformers_cee.training.token_evaluation import (
    KnownText,
    PlainTextLabels,
    aligned_prediction,
    token_prediction_step,
)


Collator = Callable[[list], Mapping[str, Any]]
Step = Callable[..., Any]


@dataclass
class ItemsFound:
    """What an evaluation found of its items.

    Args:
        exit_layers (`LongTensor` of shape `(items,)`): layer (1-based) at which each left; of tokens, those that may.
        predictions (`list`): predictions of each batch, as callers get them.
        losses (`Tensor` of shape `(items, exits)`, *optional*): loss at all exits, or (items, 1) at the one taken.
        known_text (`KnownText`, *optional*): all of what is known of tokens.
        figures (`dict[str, float]`): metrics that need no `compute_metrics`, by name.
    """

    exit_layers: Tensor
    predictions: list[Any]
    losses: Tensor | None = None
    known_text: KnownText | None = None
    figures: dict[str, float] = field(default_factory=dict)


class Rows:
    """One item is one row, with one label. [`Tokens`] says where that of a decoder is another matter."""

    # Means over the rows of a micro-batch: Trainer divides them by the number of micro-batches.
    counts_items = False
    # Is depth measured by the clock, too, and are exits compared with a run without them?
    is_timed, compares_with_full_depth = True, False
    # Do labels say which items there are?
    needs_labels = False

    def collator(self, collator: Collator) -> Collator:
        """The collator, whose batches have labels where the rows say enough."""
        return collator

    def counted_batches(self, batches: list[Any]) -> list[Any]:
        """Batches of an optimizer step, with the labels that `Trainer` is to count."""
        return batches

    def share(self, loss: Tensor, labels: Tensor, items: Tensor | int | None, processes: int) -> Tensor:
        """Share of a micro-batch in the loss of an optimizer step."""
        return loss

    def problem_type(self, config: Any, labels: Callable[[], Any]) -> str:
        """What labels mean; `labels` gives some, where only they can tell."""
        unknown = config.problem_type is None and config.num_labels > 1
        return resolve_problem_type(config.problem_type, config.num_labels, labels() if unknown else None)

    def new_modules(self, model: Any) -> tuple[str, ...]:
        """Names of the modules that start from scratch for the model's task, beside those of its exits."""
        return model.task_modules

    # Losses of the phases

    def token_loss(self, args: Any) -> Any:
        """Loss of a decoder's tokens in the phase `heads`."""
        return None

    def sampled_step(self, model: nn.Module, inputs: Mapping[str, Any], args: Any) -> Any:
        """Output with the loss at sampled exits, where these need passes of their own; None where one pass with all
        exits says all."""
        return None

    def may_exit(self, outputs: Any) -> Tensor | None:
        """Which items may leave early; None where all may."""
        return None

    def decided(self, log_distribution: Tensor, outputs: Any) -> Tensor:
        """Log of the exit distribution (items, exits), where some items must stay."""
        return log_distribution

    # Evaluation

    def exit_arguments(self, config: Any) -> dict[str, Any]:
        """Exit arguments of an evaluation that names none."""
        return {}

    def prediction_step(
        self,
        stock: Step,
        trainer: Any,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str],
    ) -> Any:
        """Loss, predictions and labels of a batch; `stock` is Trainer's own step. Predictions are logits, exit layers
        and, where the forward gives them, losses at all exits."""
        wanted = ("exit_layers", "all_exit_losses")
        return stock(model, inputs, prediction_loss_only, [key for key in ignore_keys if key not in wanted])

    def plain_prediction(self, prediction: EvalPrediction) -> EvalPrediction:
        """What `compute_metrics` gets: predictions without what is known of exits."""
        predictions = prediction.predictions
        # Batches are not joined with `eval_do_concat_batches=False`.
        logits = [batch[0] for batch in predictions] if isinstance(predictions, list) else predictions[0]
        return EvalPrediction(logits, prediction.label_ids, inputs=prediction.inputs, losses=prediction.losses)

    def found(self, output: EvalLoopOutput, full_depth: KnownText | None = None) -> ItemsFound:
        """What an evaluation of at least one row found.

        Args:
            full_depth (`KnownText`, *optional*): the same text without exits, of tokens.
        """
        logits, exit_layers, *losses = (list(column) for column in zip(*_batches(output.predictions), strict=True))
        return ItemsFound(_joined(exit_layers), logits, _joined(losses[0]) if losses else None)

    # What is refused

    def check_arguments(
        self, model: nn.Module, args: Any, preprocess: Callable | None, own_loss: Callable | None
    ) -> None:
        """Raises `ValueError` for arguments that a model with such items cannot be trained with."""
        if args.token_loss != "ce" or args.policy_max_tokens is not None:
            raise ValueError(
                f"`token_loss`={args.token_loss!r} and `policy_max_tokens`={args.policy_max_tokens} are for decoders; "
                f"{type(model).__name__} leaves row by row: accepted are 'ce' and None."
            )

    def check_heads_objective(self, name: str, config: Any) -> None:
        """Raises `ValueError` for an objective that a model with this config cannot be trained with."""
        regression = resolve_problem_type(config.problem_type, config.num_labels) == "regression"
        if HEADS_OBJECTIVES[name].needs_classes and regression:
            accepted = ", ".join(one for one, other in HEADS_OBJECTIVES.items() if not other.needs_classes)
            raise ValueError(
                f"`heads_objective`={name!r} needs class probabilities, which `problem_type`='regression' has not; "
                f"accepted are {accepted}."
            )

    def check_labels(self, labels: Iterable[Tensor], name: str, must_leave: bool = True) -> None:
        """Raises `ValueError` unless labels, a batch at a time, leave items to learn from.

        Args:
            name (`str`): the argument that the rows came in.
            must_leave (`bool`): does an item have to be one that may leave early?
        """


class Tokens(Rows):
    """One item is one counted token of a decoder's text: one whose next label is not −100."""

    # Losses are divided by the counted tokens of all micro-batches and processes.
    counts_items = True
    is_timed, compares_with_full_depth = False, True
    needs_labels = True

    def collator(self, collator: Collator) -> Collator:
        return PlainTextLabels(collator)

    def counted_batches(self, batches: list[Any]) -> list[Any]:
        # What counts is the label of the next position; whether Trainer itself knows that depends on its version.
        return [{"labels": batch["labels"][:, 1:]} for batch in batches]

    def share(self, loss: Tensor, labels: Tensor, items: Tensor | int | None, processes: int) -> Tensor:
        return loss if items is None else token_share(loss, labels, items, processes)

    def problem_type(self, config: Any, labels: Callable[[], Any]) -> str:
        # The next token is one class of the vocabulary.
        return "single_label_classification"

    def new_modules(self, model: Any) -> tuple[str, ...]:
        # The head comes with the language model.
        return ()

    def token_loss(self, args: Any) -> Any:
        return args.make_token_loss()

    def sampled_step(self, model: nn.Module, inputs: Mapping[str, Any], args: Any) -> Any:
        # What a token reads depends on where earlier ones left, so every sample is a pass of its own. All in one
        # batch, since DistributedDataParallel wants one forward pass per backward pass.
        samples = args.consistent_samples
        copies = {name: value.repeat(samples, *[1] * (value.dim() - 1)) for name, value in inputs.items()}
        return model(**copies, exit_training=ExitTraining(sample_exits=True, copy_states=args.consistent_copy_states))

    def may_exit(self, outputs: Any) -> Tensor | None:
        return outputs.may_exit

    def decided(self, log_distribution: Tensor, outputs: Any) -> Tensor:
        return staying_where_forced(log_distribution, outputs.may_exit)

    def exit_arguments(self, config: Any) -> dict[str, Any]:
        return default_arguments(config)

    def prediction_step(
        self,
        stock: Step,
        trainer: Any,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str],
    ) -> Any:
        """That of `token_prediction_step`."""
        with trainer.compute_loss_context_manager():
            return token_prediction_step(model, trainer._prepare_inputs(inputs))

    def plain_prediction(self, prediction: EvalPrediction) -> EvalPrediction:
        return aligned_prediction(prediction)

    def found(self, output: EvalLoopOutput, full_depth: KnownText | None = None) -> ItemsFound:
        batches = _batches(output.predictions)
        text = KnownText.from_arrays(batches, _batches(output.label_ids))
        tokens = [batch[1] for batch in batches]
        return ItemsFound(text.decided_layers, tokens, text.losses, text, text.figures(full_depth))

    def check_arguments(
        self, model: nn.Module, args: Any, preprocess: Callable | None, own_loss: Callable | None
    ) -> None:
        if preprocess is not None:
            raise ValueError("`preprocess_logits_for_metrics` is not supported: a decoder's logits are not collected.")
        if own_loss is not None:
            raise ValueError(
                "`compute_loss_func` is not supported: a decoder's logits are never held at once; use `token_loss`, "
                "which takes one of your own that `register_token_loss` has been told of."
            )

    def check_heads_objective(self, name: str, config: Any) -> None:
        if HEADS_OBJECTIVES[name].needs_logits:
            accepted = ", ".join(one for one, other in HEADS_OBJECTIVES.items() if not other.needs_logits)
            raise ValueError(
                f"`heads_objective`={name!r} needs the logits of all exits, which a decoder never holds at once; "
                f"accepted are {accepted}. `token_loss`='kl' brings each exit's distribution to the last one's."
            )

    def check_labels(self, labels: Iterable[Tensor], name: str, must_leave: bool = True) -> None:
        for some in labels:
            counted = some != -100
            # A token leaves as what was generated, and if one comes after it.
            found = counted[:, 1:-1] & counted[:, 2:] if must_leave else counted[:, 1:]
            if bool(found.any()):
                return
        if must_leave:
            raise ValueError(f"`{name}` has no token that may leave early: every answer is one token long.")
        raise ValueError(f"`{name}` has no token to predict: every label is -100, or rows have one token only.")


def token_share(loss: Tensor, labels: Tensor, items: Tensor | int, processes: int) -> Tensor:
    """Share of a micro-batch in the mean over all counted tokens of an optimizer step.

    Args:
        loss (`Tensor`): mean over the micro-batch's own counted tokens.
        labels (`LongTensor` of shape `(rows, time)`): its labels.
        items (`Tensor` or `int`): counted tokens of the step, in all micro-batches and processes.
        processes (`int`): processes over which gradients will be averaged.
    """
    tokens = count_tokens(labels).sum()
    share = loss * (tokens * processes / torch.as_tensor(items, device=loss.device).clamp_min(1))
    # The mean over no token is not a number.
    return torch.where(tokens > 0, share, torch.zeros_like(share))


def _batches(arrays: Any) -> list[Any]:
    """Arrays by batch, or all of them as one: batches are not joined with `eval_do_concat_batches=False`."""
    return arrays if isinstance(arrays, list) else [arrays]


def _joined(arrays: list[Any]) -> Tensor:
    return torch.cat([torch.as_tensor(one) for one in arrays])


# By what a model says one training item is.
ITEMS: dict[str, Rows] = {"row": Rows(), "token": Tokens()}


def items_of(model: Any) -> Rows:
    """What training does differently for the items of an early-exit model."""
    return ITEMS[model.item]
