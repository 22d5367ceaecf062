# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""ELECTRA with exits."""

from torch import Tensor
from torch.nn.functional import gelu
from transformers.models.electra.modeling_electra import (
    ElectraClassificationHead,
    ElectraForSequenceClassification,
    ElectraModel,
    ElectraPreTrainedModel,
)

from transformers_cee.modeling.body import BodyWithoutExits
from transformers_cee.modeling.dense_head import DenseHeadClassifier
from transformers_cee.models.electra_cee.configuration_electra_cee import ElectraCeeConfig


class ElectraForConsistentEE(DenseHeadClassifier, ElectraPreTrainedModel):
    """ELECTRA for sequence classification and regression in which every input leaves at its own layer
    (ConsistentEE, Zeng et al., AAAI 2024).

    Loads from its own checkpoints and from any ELECTRA checkpoint. A stock `ElectraForSequenceClassification` gives
    its head to the last exit; exits share its dense layer.

    Args:
        config ([`ElectraCeeConfig`]): sizes of ELECTRA and the fields of the exits.
    """

    config_class = ElectraCeeConfig
    config: ElectraCeeConfig
    stock_class = ElectraForSequenceClassification

    @staticmethod
    def activation(state: Tensor) -> Tensor:
        return gelu(state)

    def add_stock(self, config: ElectraCeeConfig) -> None:
        self.electra = ElectraModel(config)
        self.classifier = ElectraClassificationHead(config)

    def embedded(self, **given: Tensor | None) -> Tensor:
        project = getattr(self.electra, "embeddings_project", None)
        embedded = super().embedded(**given)
        return embedded if project is None else project(embedded)


class ElectraCeeModel(BodyWithoutExits, ElectraModel):
    """The encoder of an [`ElectraForConsistentEE`], without exits and heads.

    Args:
        config ([`ElectraCeeConfig`]): sizes of ELECTRA; the fields of the exits have no effect.
    """

    config_class = ElectraCeeConfig
    config: ElectraCeeConfig


__all__ = ["ElectraCeeModel", "ElectraForConsistentEE"]
