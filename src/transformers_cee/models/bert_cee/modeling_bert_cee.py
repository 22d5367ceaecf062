# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""BERT with exits: `transformers`' own BERT stack, walked by the early-exit loop."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.bert.modeling_bert import BertModel, BertPreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from transformers_cee.exits.adapters import check_adapters
from transformers_cee.exits.arguments import check_arguments
from transformers_cee.exits.criteria import check_thresholds
from transformers_cee.exits.deciding import model_criterion, resolve_decision
from transformers_cee.exits.estimators import init_estimator, make_estimators, resize_estimators
from transformers_cee.exits.heads import ExitHeads, ExitNorms, first_token, mean_token
from transformers_cee.exits.losses import (
    OwnLoss,
    check_labels,
    check_labels_of_rows,
    check_training_without_labels,
    exit_losses,
    layer_weighted,
    resolve_problem_type,
    say_what_labels_train,
)
from transformers_cee.exits.outputs import ExitClassifierOutput
from transformers_cee.exits.policy import all_features, make_policies
from transformers_cee.exits.recording import Place, restore_attentions, restore_states, wants_states
from transformers_cee.exits.runner import ExitRun, RowBatch, run_all_exits, run_exits
from transformers_cee.exits.support import check_rows_can_leave
from transformers_cee.models.bert_cee.configuration_bert_cee import BertCeeConfig
from transformers_cee.models.loading import EarlyExitLoadingMixin, check_config_class


class BertForConsistentEE(EarlyExitLoadingMixin, OwnLoss, BertPreTrainedModel):
    """BERT for sequence classification and regression in which every input leaves at its own layer (ConsistentEE,
    Zeng et al., AAAI 2024).

    Loads from its own checkpoints and from any BERT checkpoint. A stock `BertForSequenceClassification` gives pooler
    and classifier to the last exit; internal exit heads and policies start at random and are trained with
    [`ConsistentEETrainer`].

    Args:
        config ([`BertCeeConfig`]): sizes of BERT and the fields of the exits.
    """

    config_class = BertCeeConfig
    config: BertCeeConfig
    task_modules: ClassVar[tuple[str, ...]] = ("classifier", "bert.pooler")
    # A whole row leaves at once.
    exits_per_token = False
    # Losses are divided by `num_items_in_batch`, which Trainer then gives instead of dividing by accumulation steps.
    accepts_loss_kwargs = True
    # How deep a batch goes depends on its data.
    _can_compile_fullgraph = False

    def __init__(self, config: BertCeeConfig) -> None:
        check_config_class(config, type(self))
        # Fields may have been set on a config that was checked before.
        config.check_exits()
        super().__init__(config)
        self.num_labels = config.num_labels
        self.layer_numbers = config.exit_layer_numbers
        dropout = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.bert = BertModel(config, add_pooling_layer=config.exit_pooling == "cls")
        self.exit_norms = ExitNorms(config.exit_norm, self.layer_numbers, config.hidden_size, config.layer_norm_eps)
        self.exit_heads = ExitHeads(self.layer_numbers[:-1], config.hidden_size, config.num_labels, dropout)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.exit_policies = make_policies(config, self.layer_numbers)
        self.exit_estimators = make_estimators(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_estimator(module)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As `PreTrainedModel.resize_token_embeddings`, tables of tokens included."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        resize_estimators(self)
        return embeddings

    def state(self, hidden_states: Tensor, padding_mask: Tensor | None, index: int) -> Tensor:
        """Exit state (rows, hidden) of exit `index` (0-based) from hidden states (rows, time, hidden)."""
        if self.config.exit_pooling == "mean":
            pooled = mean_token(hidden_states, padding_mask)
        else:
            pooled = self.bert.pooler(first_token(hidden_states, padding_mask).unsqueeze(1))
        return self.exit_norms(pooled, index)

    def logits(self, state: Tensor, index: int) -> Tensor:
        """Logits (rows, labels) of exit `index` from its state (rows, hidden)."""
        if index == len(self.layer_numbers) - 1:
            return self.classifier(self.dropout(state))
        return self.exit_heads(state, index)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        exit_threshold: float | list[float] | str | None = None,
        exit_criterion: str | None = None,
        exit_budget: float | None = None,
        output_all_exits: bool = False,
        gradient_equilibrium: bool = False,
        output_policies: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs,
    ) -> ExitClassifierOutput:
        """Classifies each row at the first exit where the criterion lets it go.

        Args:
            input_ids (`LongTensor` of shape `(batch, time)`): token ids; or give `inputs_embeds`.
            attention_mask (`Tensor` of shape `(batch, time)`, *optional*):
                0 at padding, on either side; anything else, of any dtype, at tokens.
            labels (`Tensor` of shape `(batch,)` or `(batch, num_labels)`, *optional*):
                Classes, indicators or values, by `config.problem_type`, which the first labels settle where it is
                None. The loss is that of the exits taken. In training mode, where no exit argument is given, no row
                leaves early and the loss is that of all exits (layer-weighted); without labels, `all_exit_logits` are
                returned there, and a loss on `logits` trains the last exit alone.
            exit_threshold (`float`, `list[float]` or `str`, *optional*, defaults to `config.exit_threshold`):
                A row leaves at the first exit whose policy probability is greater: 1.0 switches exits off, 0.0 lets
                all out at the first exit. Without one, of the call or the config, no row leaves early. A list holds
                one number per exit; a name stands for one of `config.exit_operating_points`.
            exit_criterion (`str`, *optional*, defaults to `config.exit_criterion`):
                `"policy"`, or a baseline such as `"max_probability"`, `"entropy"` or `"patience"`; see
                `transformers_cee.exits.criteria.CRITERIA`.
            exit_budget (`float`, *optional*):
                Wanted mean depth as a share of all layers, instead of a threshold; of policies conditioned on α.
            output_all_exits (`bool`, *optional*, defaults to `False`):
                Run to full depth and return every exit's logits and state.
            gradient_equilibrium (`bool`, *optional*, defaults to `False`):
                With all exits, every layer gets the mean of the gradients of the exits behind it; see
                `exits.runner.collect_states`.
            output_policies (`bool`, *optional*, defaults to `False`):
                With `output_all_exits`, also return what the policies make of every internal exit, with gradient.

            kwargs: `output_hidden_states` and `output_attentions` as in the stock model, see `ExitClassifierOutput`.
            num_items_in_batch (`int`, *optional*):
                Divides summed losses instead of the number of rows: all labels, of all micro-batches and processes.

        Raises:
            ValueError: no or both of `input_ids` and `inputs_embeds`, an empty batch, a mask or labels that do not
                fit, labels that Trainer took out, or a threshold that is out of range or of the wrong length. No
                layer has run by then.
        """
        problem_type = resolve_problem_type(self.config.problem_type, self.num_labels, labels)
        check_arguments(BertForConsistentEE.forward, self.config, kwargs)
        rows = _check_inputs(input_ids, inputs_embeds, attention_mask)
        if attention_mask is not None:
            # What is not 0 is a token, whatever its number.
            attention_mask = attention_mask != 0
        check_labels_of_rows(kwargs)
        # In training mode nothing leaves unless it is asked to: the config says how the model is used.
        asked = any(one is not None for one in (exit_threshold, exit_criterion, exit_budget))
        all_exits = output_all_exits or (self.training and not asked)
        output_all_exits = output_all_exits or (all_exits and labels is None)
        if self.training and not asked and labels is None:
            check_training_without_labels(num_items_in_batch)
        elif self.training and not output_all_exits and not asked:
            say_what_labels_train(self.config.exit_criterion)
        if labels is not None:
            check_labels(labels, rows, self.num_labels, problem_type)
            # As stock BERT does: what logits mean is saved with the model, for whoever has no labels.
            self.config.problem_type = problem_type
        decision = resolve_decision(self.config, exit_threshold, exit_criterion, exit_budget)
        if all_exits:
            # A criterion that has yet to be fitted, on all exits, is no reason to refuse them.
            check_thresholds(decision.criterion, decision.threshold, len(self.layer_numbers))
        else:
            criterion = model_criterion(self, decision, problem_type, input_ids, attention_mask)
            if not criterion.is_off:
                check_rows_can_leave(self.config, self.bert.encoder.layer)
        check_adapters(self, self.bert.encoder.layer, rows_leave=not all_exits and not criterion.is_off)
        batch = self._embed(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        layers = [_bind(layer, kwargs) for layer in self.bert.encoder.layer]
        places: list[Place] = []

        def walk() -> ExitRun:
            if all_exits:
                return run_all_exits(batch, layers, self, gradient_equilibrium)
            return run_exits(batch, layers, self, criterion, places=places)

        found = self._captured(walk, **wants_states(self.config, kwargs), return_dict=True)
        if not all_exits:
            for name, restore in (("hidden_states", restore_states), ("attentions", restore_attentions)):
                if name in found:
                    found[name] = restore(found[name], places, self.config.num_hidden_layers)
        run: ExitRun = found["run"]
        losses = None
        if all_exits and labels is not None:
            losses = exit_losses(run.all_logits, labels, problem_type)
        return ExitClassifierOutput(
            loss=self._loss(run, losses, labels, problem_type, num_items_in_batch),
            logits=run.logits,
            exit_layers=run.exit_layers,
            exit_probabilities=run.scores,
            all_exit_logits=run.all_logits if output_all_exits else None,
            all_exit_states=run.all_states if output_all_exits else None,
            all_exit_losses=losses if output_all_exits else None,
            all_policy_logits=self._policy_logits(run, problem_type) if output_all_exits and output_policies else None,
            hidden_states=found.get("hidden_states"),
            attentions=found.get("attentions"),
        )

    @capture_outputs
    def _captured(self, walk: Callable[[], ExitRun], **kwargs: Any) -> dict[str, Any]:
        """A walk's result as `run`, and what its layers gave that `kwargs` ask for."""
        return {"run": walk()}

    def _policy_logits(self, run: ExitRun, problem_type: str) -> Tensor:
        features = None
        if self.exit_policies.needs_logits:
            features = all_features(run.all_logits.detach(), problem_type)
        return self.exit_policies(run.all_states, features)

    def _embed(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> RowBatch:
        if position_ids is None and attention_mask is not None:
            # A left-padded row counts its positions from its own first token; right-padded rows keep 0, 1, 2, ….
            first = attention_mask.to(torch.int8).argmax(1, keepdim=True)
            columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
            position_ids = (columns - first).clamp_min(0)
        hidden_states = self.bert.embeddings(
            input_ids=input_ids,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
        )
        mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
        )
        # No mask for the layers means that nothing is padded: then pooling needs none either.
        return RowBatch(hidden_states, mask, None if mask is None else attention_mask)

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


def _bind(layer: nn.Module, kwargs: dict):
    return lambda batch: layer(batch.hidden_states, batch.attention_mask, **kwargs)


def _check_inputs(input_ids: Tensor | None, inputs_embeds: Tensor | None, attention_mask: Tensor | None) -> int:
    """Number of rows; raises `ValueError` on input that cannot be run."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
    shape = tuple((input_ids if inputs_embeds is None else inputs_embeds).shape[:2])
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"The input of shape {shape} is empty; (batch, time) with at least one row and token needed.")
    if attention_mask is not None and tuple(attention_mask.shape) != shape:
        raise ValueError(f"`attention_mask` of shape {tuple(attention_mask.shape)} must be (batch, time) = {shape}.")
    return shape[0]


__all__ = ["BertForConsistentEE"]
