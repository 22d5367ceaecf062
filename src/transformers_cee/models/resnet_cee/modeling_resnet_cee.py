# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""ResNet with exits."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.resnet.modeling_resnet import (
    ResNetForImageClassification,
    ResNetModel,
    ResNetPreTrainedModel,
)

from transformers_cee.exits.row_batch import RowBatch
from transformers_cee.modeling.body import BodyWithoutExits
from transformers_cee.modeling.image_classification import StagedImageClassifier
from transformers_cee.models.resnet_cee.configuration_resnet_cee import ResNetCeeConfig


class ResNetForConsistentEE(StagedImageClassifier, ResNetPreTrainedModel):
    """ResNet for image classification in which every image leaves at its own block (ConsistentEE, Zeng et al., AAAI
    2024).

    Loads from its own checkpoints and from any ResNet checkpoint. Images are independent of each other in evaluation
    mode; in training mode batches are normalised, but where the norms are frozen.

    Args:
        config ([`ResNetCeeConfig`]): sizes of ResNet and the fields of the exits.
    """

    config_class = ResNetCeeConfig
    config: ResNetCeeConfig
    stock_class = ResNetForImageClassification
    norm_eps = 1e-5

    def add_stock(self, config: ResNetCeeConfig) -> None:
        self.resnet = ResNetModel(config)
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(config.hidden_sizes[-1], config.num_labels))

    def embed(self, pixel_values: Tensor, **given: Any) -> RowBatch:
        return RowBatch(self.resnet.embedder(pixel_values))

    def pool(self, hidden_states: Tensor, index: int) -> Tensor:
        return self.resnet.pooler(hidden_states).flatten(1)

    def classify(self, state: Tensor) -> Tensor:
        return self.classifier(state)

    def train(self, mode: bool = True) -> "ResNetForConsistentEE":
        super().train(mode)
        for module in self.modules():
            # Otherwise training the exits alone would change what the last one says.
            if isinstance(module, nn.BatchNorm2d) and not module.weight.requires_grad:
                module.eval()
        return self

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.LayerNorm):
            # Before 5.24 the stock model knows no such norm, which exits may have.
            PreTrainedModel._init_weights(self, module)
        super()._init_weights(module)


class ResNetCeeModel(BodyWithoutExits, ResNetModel):
    """The network of a [`ResNetForConsistentEE`], without exits and heads.

    Args:
        config ([`ResNetCeeConfig`]): sizes of ResNet.
    """

    config_class = ResNetCeeConfig
    config: ResNetCeeConfig


__all__ = ["ResNetCeeModel", "ResNetForConsistentEE"]
