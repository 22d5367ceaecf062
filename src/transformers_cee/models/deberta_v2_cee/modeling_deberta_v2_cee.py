# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""DeBERTa-v2 and DeBERTa-v3 with exits."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.models.deberta_v2.modeling_deberta_v2 import (
    ContextPooler,
    DebertaV2ForSequenceClassification,
    DebertaV2Model,
    DebertaV2PreTrainedModel,
)

from transformers_cee.exits.recording import wants_states
from transformers_cee.exits.row_batch import RowBatch
from transformers_cee.modeling.body import BodyWithoutExits
from transformers_cee.modeling.flops import ItemFlops, counted_flops
from transformers_cee.modeling.sequence_classification import EarlyExitSequenceClassifier
from transformers_cee.models.deberta_v2_cee.configuration_deberta_v2_cee import DebertaV2CeeConfig


class DebertaV2ForConsistentEE(EarlyExitSequenceClassifier, DebertaV2PreTrainedModel):
    """DeBERTa-v2 or v3 for sequence classification and regression in which every input leaves at its own layer
    (ConsistentEE, Zeng et al., AAAI 2024).

    Loads from its own checkpoints and from any DeBERTa-v2 or v3 checkpoint. A stock
    `DebertaV2ForSequenceClassification` gives pooler and classifier to the last exit; exits share the pooler.

    Args:
        config ([`DebertaV2CeeConfig`]): sizes of DeBERTa and the fields of the exits.
    """

    config_class = DebertaV2CeeConfig
    config: DebertaV2CeeConfig
    stock_class = DebertaV2ForSequenceClassification
    task_modules: ClassVar[tuple[str, ...]] = ("classifier", "pooler")

    def add_stock(self, config: DebertaV2CeeConfig) -> None:
        self.deberta = DebertaV2Model(config)
        if config.keeps_stock_pooling:
            self.pooler = ContextPooler(config)
        self.dropout = nn.Dropout(self.head_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def placed(self, given: dict[str, Tensor | None], attention_mask: Tensor | None) -> dict[str, Tensor | None]:
        # Embeddings are zero at padding.
        return {**super().placed(given, attention_mask), "mask": attention_mask}

    def masked(self, hidden_states: Tensor, attention_mask: Tensor | None, placed: Tensor | None = None) -> RowBatch:
        # Layers make their mask of that of the padding.
        return RowBatch(hidden_states, None, attention_mask, relative=self.deberta.encoder.get_rel_pos(hidden_states))

    def bind(self, index: int, layer: nn.Module, arguments: dict[str, Any]) -> Callable[[RowBatch], Any]:
        encoder, attentions = self.deberta.encoder, bool(wants_states(self.config, arguments)["output_attentions"])

        def run(batch: RowBatch) -> tuple[Tensor, Tensor | None]:
            before, mask = batch.hidden_states, batch.padding_mask
            mask = before.new_ones(before.shape[:2], dtype=torch.bool) if mask is None else mask
            after, weights = layer(
                before,
                encoder.get_attention_mask(mask),
                relative_pos=batch.relative,
                rel_embeddings=encoder.get_rel_embedding(),
                output_attentions=attentions,
            )
            if index == 0 and encoder.conv is not None:
                # It subtracts its mask, which truth values do not allow.
                after = encoder.conv(before, after, mask.to(torch.int))
            return after, weights

        return run

    def item_flops(self, length: int) -> ItemFlops:
        # Distances are projected and attended to, too, and the convolution goes with the first layer.
        hidden = torch.zeros(1, length, self.config.hidden_size, device=self.device, dtype=self.dtype)
        batch = RowBatch(hidden, relative=self.deberta.encoder.get_rel_pos(hidden))
        runs = [partial(self.bind(index, layer, {}), batch) for index, layer in enumerate(self.layers)]
        return replace(super().item_flops(length), layers=[counted_flops(run) for run in runs])

    def pool(self, state: Tensor) -> Tensor:
        return self.pooler(state.unsqueeze(1))


class DebertaV2CeeModel(BodyWithoutExits, DebertaV2Model):
    """The encoder of a [`DebertaV2ForConsistentEE`], without exits and heads."""

    config_class = DebertaV2CeeConfig
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [
        *BodyWithoutExits._keys_to_ignore_on_load_unexpected,
        *DebertaV2Model._keys_to_ignore_on_load_unexpected,
    ]


__all__ = ["DebertaV2CeeModel", "DebertaV2ForConsistentEE"]
