# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""MPNet with exits."""

from typing import Any

from torch import Tensor, nn
from transformers.models.mpnet.modeling_mpnet import (
    MPNetClassificationHead,
    MPNetForSequenceClassification,
    MPNetModel,
    MPNetPreTrainedModel,
)

from transformers_cee.exits.recording import wants_states
from transformers_cee.exits.row_batch import RowBatch
from transformers_cee.modeling.body import BodyWithoutExits
from transformers_cee.modeling.dense_head import TokensCountedClassifier
from transformers_cee.models.mpnet_cee.configuration_mpnet_cee import MPNetCeeConfig


class MPNetForConsistentEE(TokensCountedClassifier, MPNetPreTrainedModel):
    """MPNet for sequence classification and regression in which every input leaves at its own layer
    (ConsistentEE, Zeng et al., AAAI 2024).

    Loads from its own checkpoints and from any MPNet checkpoint. A stock `MPNetForSequenceClassification` gives its
    head to the last exit; exits share its dense layer. It knows no token types: those that are given have no effect.

    Args:
        config ([`MPNetCeeConfig`]): sizes of MPNet and the fields of the exits.
    """

    config_class = MPNetCeeConfig
    config: MPNetCeeConfig
    stock_class = MPNetForSequenceClassification

    def add_stock(self, config: MPNetCeeConfig) -> None:
        self.mpnet = MPNetModel(config, add_pooling_layer=False)
        self.classifier = MPNetClassificationHead(config)

    def embedded(self, token_type_ids: Tensor | None = None, **given: Tensor | None) -> Tensor:
        return super().embedded(**given)

    def masked(self, hidden_states: Tensor, attention_mask: Tensor | None, placed: Tensor | None = None) -> RowBatch:
        batch = super().masked(hidden_states, attention_mask)
        # The same for all rows: distances of columns.
        batch.relative = self.mpnet.encoder.compute_position_bias(hidden_states[:1])
        return batch

    def bind(self, index: int, layer: nn.Module, arguments: dict[str, Any]) -> Any:
        asked = {**arguments, **wants_states(self.config, arguments)}
        return lambda batch: layer(batch.hidden_states, batch.attention_mask, batch.relative, **asked)


class MPNetCeeModel(BodyWithoutExits, MPNetModel):
    """The encoder of an [`MPNetForConsistentEE`], without exits and heads.

    Args:
        config ([`MPNetCeeConfig`]): sizes of MPNet; the fields of the exits have no effect.
    """

    config_class = MPNetCeeConfig
    config: MPNetCeeConfig

    def __init__(self, config: MPNetCeeConfig, **kwargs: Any) -> None:
        super().__init__(config, **{"add_pooling_layer": False, **kwargs})


__all__ = ["MPNetCeeModel", "MPNetForConsistentEE"]
