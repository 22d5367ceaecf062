# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""RoBERTa with exits."""

from typing import Any

from transformers.models.roberta.modeling_roberta import (
    RobertaClassificationHead,
    RobertaForSequenceClassification,
    RobertaModel,
    RobertaPreTrainedModel,
)

from transformers_cee.modeling.body import BodyWithoutExits
from transformers_cee.modeling.dense_head import TokensCountedClassifier
from transformers_cee.models.roberta_cee.configuration_roberta_cee import RobertaCeeConfig


class RobertaForConsistentEE(TokensCountedClassifier, RobertaPreTrainedModel):
    """RoBERTa for sequence classification and regression in which every input leaves at its own layer
    (ConsistentEE, Zeng et al., AAAI 2024).

    Loads from its own checkpoints and from any RoBERTa checkpoint. A stock `RobertaForSequenceClassification` gives
    its head to the last exit; exits share its dense layer.

    Args:
        config ([`RobertaCeeConfig`]): sizes of RoBERTa and the fields of the exits.
    """

    config_class = RobertaCeeConfig
    config: RobertaCeeConfig
    stock_class = RobertaForSequenceClassification

    def add_stock(self, config: RobertaCeeConfig) -> None:
        self.roberta = RobertaModel(config, add_pooling_layer=False)
        self.classifier = RobertaClassificationHead(config)


class RobertaCeeModel(BodyWithoutExits, RobertaModel):
    """The encoder of a [`RobertaForConsistentEE`], without exits and heads.

    Args:
        config ([`RobertaCeeConfig`]): sizes of RoBERTa; the fields of the exits have no effect.
    """

    config_class = RobertaCeeConfig
    config: RobertaCeeConfig

    def __init__(self, config: RobertaCeeConfig, **kwargs: Any) -> None:
        super().__init__(config, **{"add_pooling_layer": False, **kwargs})


__all__ = ["RobertaCeeModel", "RobertaForConsistentEE"]
