# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""ConvNeXt with exits."""

from typing import Any

from torch import Tensor, nn
from transformers.models.convnext.modeling_convnext import (
    ConvNextForImageClassification,
    ConvNextModel,
    ConvNextPreTrainedModel,
)

from transformers_cee.exits.row_batch import RowBatch
from transformers_cee.exits.runner import Layer
from transformers_cee.modeling.body import BodyWithoutExits
from transformers_cee.modeling.image_classification import StagedImageClassifier
from transformers_cee.models.convnext_cee.configuration_convnext_cee import ConvNextCeeConfig


class ConvNextForConsistentEE(StagedImageClassifier, ConvNextPreTrainedModel):
    """ConvNeXt for image classification in which every image leaves at its own block (ConsistentEE, Zeng et al., AAAI
    2024).

    Loads from its own checkpoints and from any ConvNeXt checkpoint. The final norm is the last exit's.

    Args:
        config ([`ConvNextCeeConfig`]): sizes of ConvNeXt and the fields of the exits.
    """

    config_class = ConvNextCeeConfig
    config: ConvNextCeeConfig
    stock_class = ConvNextForImageClassification

    def add_stock(self, config: ConvNextCeeConfig) -> None:
        self.convnext = ConvNextModel(config)
        self.classifier = nn.Linear(config.hidden_sizes[-1], config.num_labels)

    def embed(self, pixel_values: Tensor, **given: Any) -> RowBatch:
        return RowBatch(self.convnext.embeddings(pixel_values))

    def bind(self, index: int, layer: nn.Module, arguments: dict[str, Any]) -> Layer:
        stages = self.convnext.encoder.stages
        # Maps shrink before the first block of a stage.
        shrink = next((stage.downsampling_layer for stage in stages if stage.layers[0] is layer), ())

        def run(batch: RowBatch) -> Tensor:
            hidden_states = batch.hidden_states
            for one in shrink:
                hidden_states = one(hidden_states)
            return layer(hidden_states)

        return run

    def pool(self, hidden_states: Tensor, index: int) -> Tensor:
        state = hidden_states.mean((-2, -1))
        return self.convnext.layernorm(state) if index == self.last_exit else state

    def classify(self, state: Tensor) -> Tensor:
        return self.classifier(state)


class ConvNextCeeModel(BodyWithoutExits, ConvNextModel):
    """The network of a [`ConvNextForConsistentEE`], without exits and heads.

    Args:
        config ([`ConvNextCeeConfig`]): sizes of ConvNeXt.
    """

    config_class = ConvNextCeeConfig
    config: ConvNextCeeConfig


__all__ = ["ConvNextCeeModel", "ConvNextForConsistentEE"]
