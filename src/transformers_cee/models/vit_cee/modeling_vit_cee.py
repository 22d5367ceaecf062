# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""ViT with exits."""

from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.vit.modeling_vit import ViTForImageClassification, ViTModel, ViTPreTrainedModel

from transformers_cee.exits.heads import first_token, mean_token
from transformers_cee.exits.row_batch import RowBatch
from transformers_cee.exits.runner import Layer
from transformers_cee.modeling.body import BodyWithoutExits
from transformers_cee.modeling.flops import ItemFlops, layer_flops
from transformers_cee.modeling.image_classification import EarlyExitImageClassifier
from transformers_cee.models.vit_cee.configuration_vit_cee import ViTCeeConfig


class ViTForConsistentEE(EarlyExitImageClassifier, ViTPreTrainedModel):
    """ViT for image classification in which every image leaves at its own layer (ConsistentEE, Zeng et al., AAAI
    2024).

    Loads from its own checkpoints and from any ViT checkpoint. Exits share the final norm, in front of the pooling.

    Args:
        config ([`ViTCeeConfig`]): sizes of ViT and the fields of the exits.
    """

    config_class = ViTCeeConfig
    config: ViTCeeConfig
    stock_class = ViTForImageClassification
    task_modules: ClassVar[tuple[str, ...]] = ("classifier",)
    embed_arguments = ("interpolate_pos_encoding",)

    def add_stock(self, config: ViTCeeConfig) -> None:
        self.vit = ViTModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    @property
    def layers(self) -> nn.ModuleList:
        # Before transformers 5.24 they are in an encoder.
        return self.vit.layers if hasattr(self.vit, "layers") else self.vit.encoder.layer

    def bind(self, index: int, layer: nn.Module, arguments: dict[str, Any]) -> Layer:
        return lambda batch: layer(batch.hidden_states, **arguments)

    def embed(self, pixel_values: Tensor, **given: Any) -> RowBatch:
        embeddings = self.vit.embeddings
        pixels = pixel_values.to(embeddings.patch_embeddings.projection.weight.dtype)
        return RowBatch(embeddings(pixels, **given))

    def state(self, hidden_states: Tensor, padding_mask: Tensor | None, index: int) -> Tensor:
        if self.config.averages_tokens(index == self.last_exit):
            pooled = mean_token(self.vit.layernorm(hidden_states), None)
        else:
            pooled = self.vit.layernorm(first_token(hidden_states, None))
        return self.exit_norms(pooled, index)

    def classify(self, state: Tensor) -> Tensor:
        return self.classifier(state)

    def item_flops(self, length: int) -> ItemFlops:
        height, width = self.vit.embeddings.patch_embeddings.patch_size
        tokens = 1 + (length // height) * (length // width)
        # torch does not count every kind of attention.
        layers = [layer_flops(layer, self.config, tokens, tokens) for layer in self.layers]
        return replace(super().item_flops(length), layers=layers)


class ViTCeeModel(BodyWithoutExits, ViTModel):
    """The encoder of a [`ViTForConsistentEE`], without exits and heads.

    Args:
        config ([`ViTCeeConfig`]): sizes of ViT.
    """

    config_class = ViTCeeConfig
    config: ViTCeeConfig

    def __init__(self, config: ViTCeeConfig, **kwargs: Any) -> None:
        super().__init__(config, **{"add_pooling_layer": False, **kwargs})


# Since 5.24 weights have other names in a model than in its files, which transformers knows of its own classes.
if _renamed := get_checkpoint_conversion_mapping("ViTModel"):
    register_checkpoint_conversion_mapping("ViTCeeModel", _renamed, overwrite=True)


__all__ = ["ViTCeeModel", "ViTForConsistentEE"]
