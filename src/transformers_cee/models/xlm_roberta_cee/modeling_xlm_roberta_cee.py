# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""XLM-RoBERTa with exits."""

from typing import Any

from transformers.models.xlm_roberta.modeling_xlm_roberta import (
    XLMRobertaClassificationHead,
    XLMRobertaForSequenceClassification,
    XLMRobertaModel,
    XLMRobertaPreTrainedModel,
)

from transformers_cee.modeling.body import BodyWithoutExits
from transformers_cee.modeling.dense_head import TokensCountedClassifier
from transformers_cee.models.xlm_roberta_cee.configuration_xlm_roberta_cee import XLMRobertaCeeConfig


class XLMRobertaForConsistentEE(TokensCountedClassifier, XLMRobertaPreTrainedModel):
    """XLM-RoBERTa for sequence classification and regression in which every input leaves at its own layer
    (ConsistentEE, Zeng et al., AAAI 2024).

    Loads from its own checkpoints and from any XLM-RoBERTa checkpoint. A stock `XLMRobertaForSequenceClassification`
    gives its head to the last exit; exits share its dense layer.

    Args:
        config ([`XLMRobertaCeeConfig`]): sizes of XLM-RoBERTa and the fields of the exits.
    """

    config_class = XLMRobertaCeeConfig
    config: XLMRobertaCeeConfig
    stock_class = XLMRobertaForSequenceClassification

    def add_stock(self, config: XLMRobertaCeeConfig) -> None:
        self.roberta = XLMRobertaModel(config, add_pooling_layer=False)
        self.classifier = XLMRobertaClassificationHead(config)


class XLMRobertaCeeModel(BodyWithoutExits, XLMRobertaModel):
    """The encoder of an [`XLMRobertaForConsistentEE`], without exits and heads.

    Args:
        config ([`XLMRobertaCeeConfig`]): sizes of XLM-RoBERTa; the fields of the exits have no effect.
    """

    config_class = XLMRobertaCeeConfig
    config: XLMRobertaCeeConfig

    def __init__(self, config: XLMRobertaCeeConfig, **kwargs: Any) -> None:
        super().__init__(config, **{"add_pooling_layer": False, **kwargs})


__all__ = ["XLMRobertaCeeModel", "XLMRobertaForConsistentEE"]
