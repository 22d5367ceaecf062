# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What classifiers of texts and of images share: heads, losses, and the walks to all exits and to each row's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from transformers_cee.exits.criteria import ExitCriterion, check_thresholds
from transformers_cee.exits.deciding import ExitDecision, model_criterion, resolve_decision
from transformers_cee.exits.entries import ExitEntries, row_entries
from transformers_cee.exits.heads import ExitHeads, ExitNorms
from transformers_cee.exits.losses import (
    check_labels,
    check_labels_of_rows,
    check_training_without_labels,
    exit_losses,
    layer_weighted,
    resolve_problem_type,
    say_what_labels_train,
)
from transformers_cee.exits.outputs import ExitClassifierOutput
from transformers_cee.exits.policy import all_features
from transformers_cee.exits.recording import Place, restore_attentions, restore_states
from transformers_cee.exits.row_batch import RowBatch
from transformers_cee.exits.runner import Block, ExitRun, Layer, run_all_exits, run_exits
from transformers_cee.exits.training_options import ExitTraining
from transformers_cee.modeling.base import EarlyExitModel


# A walk over the layers: the batch, and what the caller hands on to them.
Walk = Callable[[RowBatch, dict[str, Any]], dict[str, Any]]


@dataclass
class Stack:
    """What a walk runs.

    Args:
        layers (sequence of callables): layers, or blocks of layers, in order.
        ends (sequence of `int`, *optional*): layer (1-based) behind which each block ends; None of single layers.
    """

    layers: Sequence[Layer | Block]
    ends: Sequence[int] | None = None


@dataclass
class Asked:
    """What a call of `forward` asks of the exits. Fields are its arguments of these names.

    Args:
        rows (`int`): of the batch.
        input_ids, attention_mask (*optional*): of the batch, for criteria that look at them.
    """

    rows: int
    labels: Tensor | None = None
    exit_threshold: float | list[float] | str | None = None
    exit_criterion: str | None = None
    exit_budget: float | None = None
    min_exit_layer: int | None = None
    output_all_exits: bool = False
    exit_training: ExitTraining | None = None
    num_items_in_batch: Tensor | int | None = None
    input_ids: Tensor | None = None
    attention_mask: Tensor | None = None


class EarlyExitClassifier(EarlyExitModel):
    """A classifier whose inputs leave as a whole, each at its own layer (ConsistentEE, Zeng et al., AAAI 2024).

    Internal exits are linear heads on the state that the stock model's own head makes before its last linear layer.
    Exit heads and policies start at random and are trained with [`ConsistentEETrainer`].

    Beside what every model with exits says, subclasses say how hidden states become an exit state (`state`) and what
    the stock head makes of it (`classify`), and hand what `forward` got to `classified`.
    """

    item = "row"
    # Losses are divided by `num_items_in_batch`, which Trainer then gives instead of dividing by accumulation steps.
    accepts_loss_kwargs = True
    # How deep a batch goes depends on its data.
    _can_compile_fullgraph: ClassVar[bool] = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels

    def add_heads(self, config: Any) -> None:
        sizes = config.state_sizes(self.layer_numbers)
        self.exit_norms = ExitNorms(config.exit_norm, self.layer_numbers, sizes, self.norm_eps)
        self.exit_heads = ExitHeads(self.layer_numbers[:-1], sizes[:-1], config.num_labels, self.head_dropout(config))

    # What a family or a kind of input says

    @staticmethod
    def head_dropout(config: Any) -> float:
        """Share of a state that heads drop in training."""
        given: float | None = getattr(config, "classifier_dropout", getattr(config, "cls_dropout", None))
        return config.hidden_dropout_prob if given is None else given

    @property
    def norm_eps(self) -> float:
        """Of the exits' norms."""
        config = self.config
        return config.norm_eps if hasattr(config, "norm_eps") else config.layer_norm_eps

    def state(self, hidden_states: Tensor, padding_mask: Tensor | None, index: int) -> Tensor:
        """Exit state (rows, hidden) of exit `index` (0-based) from hidden states (rows, …) behind its layer."""
        raise NotImplementedError

    def classify(self, state: Tensor) -> Tensor:
        """Logits (rows, labels) of the last exit from its state (rows, hidden): the last layer of the stock head."""
        raise NotImplementedError

    def bind(self, index: int, layer: nn.Module, arguments: dict[str, Any]) -> Layer:
        """The layer `index` (0-based) as a function of the batch; `arguments` are those that the caller hands on."""
        raise NotImplementedError

    def stack(
        self, batch: RowBatch, arguments: dict[str, Any], criterion: ExitCriterion | None = None, first_exit: int = 0
    ) -> Stack:
        """What a walk of a batch runs.

        Args:
            batch (`RowBatch`): the embedded batch.
            arguments (`dict`): those that the caller hands on to the layers.
            criterion (`ExitCriterion`, *optional*): of a walk in which rows leave; None of a walk to all exits.
            first_exit (`int`): exit (0-based) before which no row leaves.
        """
        return Stack([self.bind(index, layer, arguments) for index, layer in enumerate(self.layers)])

    def logits(self, state: Tensor, index: int) -> Tensor:
        """Logits (rows, labels) of exit `index` from its state (rows, hidden)."""
        return self.classify(state) if index == self.last_exit else self.exit_heads(state, index)

    # What leaves

    def count_items(self, labels: Tensor) -> Tensor:
        return torch.ones(len(labels), dtype=torch.long, device=labels.device)

    def entries(self, output: ExitClassifierOutput, labels: Tensor | None, problem_type: str) -> ExitEntries:
        return row_entries(output, labels, problem_type, self.exit_policies.needs_logits)

    def step_inputs(self, batch: dict[str, Tensor]) -> Callable[[], dict[str, Any]]:
        return lambda: batch

    # One call of the model

    def classified(
        self, asked: Asked, embed: Callable[[], RowBatch], arguments: dict[str, Any]
    ) -> ExitClassifierOutput:
        """What `forward` returns, once the input has been checked.

        Args:
            asked (`Asked`): what the call asks of the exits.
            embed (`Callable`): makes the embedded batch; called when all that could stop the walk has been checked.
            arguments (`dict`): what the caller hands on to the layers.

        Raises:
            ValueError: labels that do not fit or that Trainer took out, or a threshold that is out of range or of the
                wrong length.
        """
        labels = asked.labels
        problem_type = resolve_problem_type(self.config.problem_type, self.num_labels, labels)
        check_labels_of_rows(arguments)
        # In training mode nothing leaves unless it is asked to: the config says how the model is used.
        leaves = any(one is not None for one in (asked.exit_threshold, asked.exit_criterion, asked.exit_budget))
        all_exits = asked.output_all_exits or (self.training and not leaves)
        output_all_exits = asked.output_all_exits or (all_exits and labels is None)
        if self.training and not leaves and labels is None:
            check_training_without_labels(asked.num_items_in_batch)
        elif self.training and not output_all_exits and not leaves:
            say_what_labels_train(self.config.exit_criterion)
        if labels is not None:
            check_labels(labels, asked.rows, self.num_labels, problem_type)
            # As the stock model does: what logits mean is saved with it, for whoever has no labels.
            self.config.problem_type = problem_type
        options = asked.exit_training or ExitTraining()
        if all_exits:
            walk = self._to_all_exits(asked, options)
        else:
            walk = self._leaving(asked, problem_type)
        found = walk(embed(), arguments)
        run: ExitRun = found["run"]
        losses = None
        if all_exits and labels is not None:
            losses = exit_losses(run.all_logits, labels, problem_type)
        output = ExitClassifierOutput(
            loss=self._loss(run, losses, labels, problem_type, asked.num_items_in_batch),
            logits=run.logits,
            exit_layers=run.exit_layers,
            exit_probabilities=run.scores,
            hidden_states=found.get("hidden_states"),
            attentions=found.get("attentions"),
        )
        if output_all_exits:
            output.all_exit_logits, output.all_exit_states = run.all_logits, run.all_states
            output.all_exit_losses = losses
            if options.output_policies:
                output.all_policy_logits = self._policy_logits(run, problem_type)
        return output

    def _decision(self, asked: Asked) -> ExitDecision:
        return resolve_decision(self.config, asked.exit_threshold, asked.exit_criterion, asked.exit_budget)

    def _to_all_exits(self, asked: Asked, options: ExitTraining) -> Walk:
        """The walk to all exits; all that could stop it has been checked."""
        decision = self._decision(asked)
        self.first_exit(asked.min_exit_layer)
        # A criterion that has yet to be fitted, on all exits, is no reason to refuse them.
        check_thresholds(decision.criterion, decision.threshold, len(self.layer_numbers))
        self.check_walk(rows_leave=False)

        def walk(batch: RowBatch, arguments: dict[str, Any]) -> dict[str, Any]:
            stack = self.stack(batch, arguments)
            return self.walked(
                lambda layers: run_all_exits(batch, layers, self, options.gradient_equilibrium, stack.ends),
                stack.layers,
                arguments,
            )

        return walk

    def _leaving(self, asked: Asked, problem_type: str) -> Walk:
        """The walk in which rows leave; all that could stop it has been checked."""
        first_exit = self.first_exit(asked.min_exit_layer)
        criterion = model_criterion(
            self, self._decision(asked), problem_type, asked.input_ids, asked.attention_mask, first_exit
        )
        self.check_walk(rows_leave=not criterion.is_off)
        places: list[Place] = []

        def walk(batch: RowBatch, arguments: dict[str, Any]) -> dict[str, Any]:
            stack = self.stack(batch, arguments, criterion, first_exit)
            found = self.walked(
                lambda layers: run_exits(batch, layers, self, criterion, first_exit, places=places, ends=stack.ends),
                stack.layers,
                arguments,
            )
            for name, restore in (("hidden_states", restore_states), ("attentions", restore_attentions)):
                if name in found:
                    found[name] = restore(found[name], places, self.config.num_hidden_layers)
            return found

        return walk

    def _policy_logits(self, run: ExitRun, problem_type: str) -> Tensor:
        features = None
        if self.exit_policies.needs_logits:
            assert run.all_logits is not None
            features = all_features(run.all_logits.detach(), problem_type)
        return self.exit_policies(run.all_states, features)

    def _loss(
        self, run: ExitRun, losses: Tensor | None, labels: Tensor | None, problem_type: str, items: Tensor | int | None
    ) -> Tensor | None:
        if labels is None:
            return None
        if not self.training or losses is None:
            losses = exit_losses(run.logits, labels, problem_type).unsqueeze(1)
        if items is None:
            return layer_weighted(losses)
        # A row of many labels counts as many items.
        return layer_weighted(losses.sum(0, keepdim=True)) * (labels.numel() // len(losses)) / items


__all__ = ["Asked", "EarlyExitClassifier", "Stack"]
