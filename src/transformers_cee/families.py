# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The table of model families: names only, nothing is imported for it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelEntry:
    """One architecture: its classes, and which Auto classes give its model.

    Args:
        stock (`str`): model type of the architecture in transformers.
        config (`str`): full name of the config class.
        model (`str`): full name of the model class.
        auto_classes (`tuple[str, ...]`):
            Auto classes of transformers that load the model, beside `AutoModel`.
        base (`str`): full name of the model without exits and heads.
    """

    stock: str
    config: str
    model: str
    auto_classes: tuple[str, ...]
    base: str

    @property
    def package(self) -> str:
        """Full name of the family's package."""
        return self.config.rpartition(".")[0].rpartition(".")[0]


MODELS: dict[str, ModelEntry] = {
    "bert_cee": ModelEntry(
        stock="bert",
        config="transformers_cee.models.bert_cee.configuration_bert_cee.BertCeeConfig",
        model="transformers_cee.models.bert_cee.modeling_bert_cee.BertForConsistentEE",
        auto_classes=("AutoModelForSequenceClassification",),
        base="transformers_cee.models.bert_cee.encoder_bert_cee.BertCeeModel",
    ),
    "llama_cee": ModelEntry(
        stock="llama",
        config="transformers_cee.models.llama_cee.configuration_llama_cee.LlamaCeeConfig",
        model="transformers_cee.models.llama_cee.modeling_llama_cee.LlamaForConsistentEECausalLM",
        auto_classes=("AutoModelForCausalLM",),
        base="transformers_cee.models.llama_cee.decoder_llama_cee.LlamaCeeModel",
    ),
}
