# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The table of model families: names only, nothing is imported for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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

    @property
    def class_name(self) -> str:
        """Name of the model class."""
        return self.model.rpartition(".")[2]


MODELS: dict[str, ModelEntry] = {
    "bert_cee": ModelEntry(
        stock="bert",
        config="transformers_cee.models.bert_cee.configuration_bert_cee.BertCeeConfig",
        model="transformers_cee.models.bert_cee.modeling_bert_cee.BertForConsistentEE",
        auto_classes=("AutoModelForSequenceClassification",),
        base="transformers_cee.models.bert_cee.modeling_bert_cee.BertCeeModel",
    ),
    "llama_cee": ModelEntry(
        stock="llama",
        config="transformers_cee.models.llama_cee.configuration_llama_cee.LlamaCeeConfig",
        model="transformers_cee.models.llama_cee.modeling_llama_cee.LlamaForConsistentEECausalLM",
        auto_classes=("AutoModelForCausalLM",),
        base="transformers_cee.models.llama_cee.modeling_llama_cee.LlamaCeeModel",
    ),
}


def family_of(model_type: str | None, auto_class: str, source: Any = None) -> str:
    """Our model type for checkpoints of a model type, the stock one or our own.

    Args:
        model_type (`str`, *optional*): `model_type` of a checkpoint's config; None where it has none.
        auto_class (`str`): the Auto class of transformers for the task, such as `"AutoModelForCausalLM"`.
        source (*optional*): where the checkpoint was found, for the message.

    Raises:
        ValueError: no family gives exits to such checkpoints for this task; the message lists those that are accepted.
    """
    for own, entry in MODELS.items():
        if model_type in (own, entry.stock) and auto_class in entry.auto_classes:
            return own
    accepted = {own: entry for own, entry in MODELS.items() if auto_class in entry.auto_classes}
    listed = ", ".join(f"{entry.stock!r} and {own!r} ({entry.class_name})" for own, entry in accepted.items())
    hint = ""
    for own, entry in MODELS.items():
        if model_type in (own, entry.stock):
            hint = f" For {model_type!r} there is {entry.class_name} ({', '.join(entry.auto_classes)})."
    found = "" if source is None else f" of {source}"
    raise ValueError(
        f"`model_type`={model_type!r}{found} has no model with exits for `{auto_class}`; accepted are {listed}.{hint}"
    )
