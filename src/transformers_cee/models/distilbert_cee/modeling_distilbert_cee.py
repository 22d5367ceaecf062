# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""DistilBERT with exits."""

from typing import ClassVar

from torch import Tensor, nn
from transformers.models.distilbert.modeling_distilbert import (
    DistilBertForSequenceClassification,
    DistilBertModel,
    DistilBertPreTrainedModel,
)

from transformers_cee.modeling.body import BodyWithoutExits
from transformers_cee.modeling.sequence_classification import EarlyExitSequenceClassifier
from transformers_cee.models.distilbert_cee.configuration_distilbert_cee import DistilBertCeeConfig


class DistilBertForConsistentEE(EarlyExitSequenceClassifier, DistilBertPreTrainedModel):
    """DistilBERT for sequence classification and regression in which every input leaves at its own layer
    (ConsistentEE, Zeng et al., AAAI 2024).

    Loads from its own checkpoints and from any DistilBERT checkpoint. A stock `DistilBertForSequenceClassification`
    gives `pre_classifier` and `classifier` to the last exit; exits share the former. It knows no token types: those
    that are given have no effect, as in the stock model.

    Args:
        config ([`DistilBertCeeConfig`]): sizes of DistilBERT and the fields of the exits.
    """

    config_class = DistilBertCeeConfig
    config: DistilBertCeeConfig
    stock_class = DistilBertForSequenceClassification
    task_modules: ClassVar[tuple[str, ...]] = ("pre_classifier", "classifier")
    # Written down in the stock model.
    norm_eps = 1e-12

    def add_stock(self, config: DistilBertCeeConfig) -> None:
        self.distilbert = DistilBertModel(config)
        if config.keeps_stock_pooling:
            self.pre_classifier = nn.Linear(config.dim, config.dim)
        self.classifier = nn.Linear(config.dim, config.num_labels)
        self.dropout = nn.Dropout(config.seq_classif_dropout)

    @staticmethod
    def head_dropout(config: DistilBertCeeConfig) -> float:
        return config.seq_classif_dropout

    @property
    def layers(self) -> nn.ModuleList:
        return self.distilbert.transformer.layer

    def embedded(self, token_type_ids: Tensor | None = None, **given: Tensor | None) -> Tensor:
        return super().embedded(**given)

    def pool(self, state: Tensor) -> Tensor:
        return self.pre_classifier(state).relu()


class DistilBertCeeModel(BodyWithoutExits, DistilBertModel):
    """The encoder of a [`DistilBertForConsistentEE`], without exits and heads.

    Args:
        config ([`DistilBertCeeConfig`]): sizes of DistilBERT; the fields of the exits have no effect.
    """

    config_class = DistilBertCeeConfig
    config: DistilBertCeeConfig


__all__ = ["DistilBertCeeModel", "DistilBertForConsistentEE"]
