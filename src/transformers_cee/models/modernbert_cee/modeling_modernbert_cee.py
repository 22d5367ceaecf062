# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""ModernBERT with exits."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask, create_bidirectional_sliding_window_mask
from transformers.models.modernbert.modeling_modernbert import (
    ModernBertForSequenceClassification,
    ModernBertModel,
    ModernBertPredictionHead,
    ModernBertPreTrainedModel,
)

from transformers_cee.exits.heads import first_token, mean_token
from transformers_cee.exits.row_batch import SLIDING, RowBatch
from transformers_cee.modeling.body import BodyWithoutExits
from transformers_cee.modeling.sequence_classification import EarlyExitSequenceClassifier
from transformers_cee.models.modernbert_cee.configuration_modernbert_cee import ModernBertCeeConfig


# What each type of layer sees: the whole text, or the tokens within the window.
_MASKS = {"full_attention": create_bidirectional_mask, SLIDING: create_bidirectional_sliding_window_mask}


class ModernBertForConsistentEE(EarlyExitSequenceClassifier, ModernBertPreTrainedModel):
    """ModernBERT for sequence classification and regression in which every input leaves at its own layer
    (ConsistentEE, Zeng et al., AAAI 2024).

    Loads from its own checkpoints and from any ModernBERT checkpoint. The last exit pools by `classifier_pooling`, as
    the stock model does, and internal exits by `exit_pooling`; all of them behind the final norm.

    Args:
        config ([`ModernBertCeeConfig`]): sizes of ModernBERT and the fields of the exits.
    """

    config_class = ModernBertCeeConfig
    config: ModernBertCeeConfig
    stock_class = ModernBertForSequenceClassification
    task_modules: ClassVar[tuple[str, ...]] = ("classifier", "head")

    def add_stock(self, config: ModernBertCeeConfig) -> None:
        self.model = ModernBertModel(config)
        self.head = ModernBertPredictionHead(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.layers

    def positions(self, input_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor | None:
        # Only distances between positions count, wherever the padding stands.
        return None

    def embedded(self, **given: Tensor | None) -> Tensor:
        return self.model.embeddings(input_ids=given["input_ids"], inputs_embeds=given["inputs_embeds"])

    def masked(self, hidden_states: Tensor, attention_mask: Tensor | None, placed: Tensor | None = None) -> RowBatch:
        columns = torch.arange(hidden_states.shape[1], device=hidden_states.device).unsqueeze(0)
        positions = columns if placed is None else placed
        seen = {"config": self.config, "inputs_embeds": hidden_states, "attention_mask": attention_mask}
        masks = {name: make(**seen) for name, make in _MASKS.items()}
        rotary = {name: self.model.rotary_emb(hidden_states, positions, name) for name in set(self.config.layer_types)}
        padded = None if masks["full_attention"] is None else attention_mask
        return RowBatch(hidden_states, masks, padded, rotary=rotary)

    def finished(self, hidden_states: Tensor) -> Tensor:
        return self.model.final_norm(hidden_states)

    def pool(self, state: Tensor) -> Tensor:
        return self.head(state)

    def state(self, hidden_states: Tensor, padding_mask: Tensor | None, index: int) -> Tensor:
        if index != self.last_exit:
            return super().state(hidden_states, padding_mask, index)
        pooling = mean_token if self.config.classifier_pooling == "mean" else first_token
        return self.exit_norms(self.pool(pooling(self.finished(hidden_states), padding_mask)), index)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            # Before 5.24 the stock model draws its own classes alone, not the linear layers of exits.
            PreTrainedModel._init_weights(self, module)
        super()._init_weights(module)


class ModernBertCeeModel(BodyWithoutExits, ModernBertModel):
    """The encoder of a [`ModernBertForConsistentEE`], without exits and heads."""

    config_class = ModernBertCeeConfig


__all__ = ["ModernBertCeeModel", "ModernBertForConsistentEE"]
