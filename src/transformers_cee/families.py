# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The table of model families: names only, nothing is imported for it. `register_model` adds to it from outside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


_TASKS = {
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageClassification": "image-classification",
}


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
        lora_targets (`tuple[str, ...]`, *optional*):
            Modules that LoRA changes by default, where PEFT knows none for the stock architecture.
    """

    stock: str
    config: str
    model: str
    auto_classes: tuple[str, ...]
    base: str
    lora_targets: tuple[str, ...] = ()

    @property
    def classes(self) -> tuple[str, str, str]:
        """Full names of the config, of the model and of the model without exits."""
        return self.config, self.model, self.base

    @property
    def task(self) -> str | None:
        """The task as the Hub names it, where the first of the Auto classes tells."""
        return _TASKS.get(self.auto_classes[0])

    @property
    def class_name(self) -> str:
        """Name of the model class."""
        return self.model.rpartition(".")[2]


def _row(stock: str, prefix: str, suffix: str, auto_class: str, **more: Any) -> tuple[str, ModelEntry]:
    """A family of this package, whose names follow from that of the stock architecture and its classes' prefix."""
    model_type = f"{stock.replace('-', '_')}_cee"
    folder = f"transformers_cee.models.{model_type}"
    modeling = f"{folder}.modeling_{model_type}"
    entry = ModelEntry(
        stock=stock,
        config=f"{folder}.configuration_{model_type}.{prefix}CeeConfig",
        model=f"{modeling}.{prefix}{suffix}",
        auto_classes=(auto_class,),
        base=f"{modeling}.{prefix}CeeModel",
        **more,
    )
    return model_type, entry


def _encoder(stock: str, prefix: str, **more: Any) -> tuple[str, ModelEntry]:
    return _row(stock, prefix, "ForConsistentEE", "AutoModelForSequenceClassification", **more)


def _decoder(stock: str, prefix: str, **more: Any) -> tuple[str, ModelEntry]:
    return _row(stock, prefix, "ForConsistentEECausalLM", "AutoModelForCausalLM", **more)


def _images(stock: str, prefix: str, **more: Any) -> tuple[str, ModelEntry]:
    return _row(stock, prefix, "ForConsistentEE", "AutoModelForImageClassification", **more)


# Stock model type and prefix of the stock classes; in alphabetical order.
MODELS: dict[str, ModelEntry] = dict(
    (
        _encoder("bert", "Bert"),
        _images("convnext", "ConvNext", lora_targets=("pwconv1", "pwconv2")),
        _encoder("deberta-v2", "DebertaV2"),
        _encoder("distilbert", "DistilBert", lora_targets=("q_lin", "v_lin")),
        _encoder("electra", "Electra"),
        _decoder("llama", "Llama"),
        _decoder("mistral", "Mistral"),
        _encoder("modernbert", "ModernBert", lora_targets=("Wqkv",)),
        _encoder("mpnet", "MPNet", lora_targets=("q", "v")),
        _decoder("olmo2", "Olmo2", lora_targets=("q_proj", "v_proj")),
        _decoder("phi3", "Phi3", lora_targets=("qkv_proj",)),
        _decoder("qwen2", "Qwen2"),
        _decoder("qwen3", "Qwen3"),
        _images("resnet", "ResNet", lora_targets=("convolution",)),
        _encoder("roberta", "Roberta"),
        _decoder("smollm3", "SmolLM3", lora_targets=("q_proj", "v_proj")),
        # The latter two before transformers 5.24.
        _images("vit", "ViT", lora_targets=("q_proj", "v_proj", "query", "value")),
        _encoder("xlm-roberta", "XLMRoberta"),
    )
)


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
    found = "" if source is None else f" of {source}"
    raise ValueError(
        f"`model_type`={model_type!r}{found} has no model with exits for `{auto_class}`; accepted are {listed}."
        + class_hint(model_type)
    )


def class_hint(model_type: Any) -> str:
    """A sentence, with a blank in front, that names the class for checkpoints of a model type, stock or our own; empty
    where there is none."""
    for own, entry in MODELS.items():
        if model_type in (own, entry.stock):
            return f" For {model_type!r} there is {entry.class_name} ({', '.join(entry.auto_classes)})."
    return ""
