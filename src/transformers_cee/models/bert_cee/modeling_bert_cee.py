# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""BERT with exits."""

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertForSequenceClassification, BertModel, BertPreTrainedModel

from transformers_cee.modeling.body import BodyWithoutExits
from transformers_cee.modeling.sequence_classification import EarlyExitSequenceClassifier
from transformers_cee.models.bert_cee.configuration_bert_cee import BertCeeConfig


class BertForConsistentEE(EarlyExitSequenceClassifier, BertPreTrainedModel):
    """BERT for sequence classification and regression in which every input leaves at its own layer (ConsistentEE,
    Zeng et al., AAAI 2024).

    Loads from its own checkpoints and from any BERT checkpoint. A stock `BertForSequenceClassification` gives pooler
    and classifier to the last exit; exits share the pooler.

    Args:
        config ([`BertCeeConfig`]): sizes of BERT and the fields of the exits.
    """

    config_class = BertCeeConfig
    config: BertCeeConfig
    stock_class = BertForSequenceClassification
    task_modules: ClassVar[tuple[str, ...]] = ("classifier", "bert.pooler")

    def add_stock(self, config: BertCeeConfig) -> None:
        self.bert = BertModel(config, add_pooling_layer=config.keeps_stock_pooling)
        self.dropout = nn.Dropout(self.head_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def pool(self, state: Tensor) -> Tensor:
        return self.bert.pooler(state.unsqueeze(1))


class BertCeeModel(BodyWithoutExits, BertModel):
    """The encoder of a [`BertForConsistentEE`], without exits and heads.

    Args:
        config ([`BertCeeConfig`]): there is a pooler unless `exit_pooling` is "mean".
    """

    config_class = BertCeeConfig
    config: BertCeeConfig

    def __init__(self, config: BertCeeConfig, **kwargs: Any) -> None:
        super().__init__(config, **{"add_pooling_layer": config.keeps_stock_pooling, **kwargs})


__all__ = ["BertCeeModel", "BertForConsistentEE"]
