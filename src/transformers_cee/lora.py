# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""LoRA adapters that carry exits with them.

An adapter folder of PEFT names the model that it was trained on by folder or Hub name, and its class by its task: a
stock BERT or LLaMA, where the exits were new. So what exits there are is noted in the adapter's config, and whoever
loads it gets them, or an error.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from peft import LoraConfig, LoraModel, PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from transformers import PreTrainedModel

from transformers_cee.exits.configuration import DecoderExitConfigMixin, EncoderExitConfigMixin
from transformers_cee.families import MODELS
from transformers_cee.models.loading import EarlyExitLoadingMixin
from transformers_cee.training.parameters import EXIT_MODULES


# Key of the note in `auto_mapping`, which PEFT saves with an adapter and reads where no task is given only.
NOTE = "early_exit_config"
# Fields that say what weights there are.
_SHAPE = (
    "exit_layers", "exit_pooling", "exit_norm", "exit_head", "exit_head_rank", "policy_hidden_size",
    "policy_activation", "policy_inputs", "policy_condition", "policy_alphas",
)  # fmt: skip
_TASK = ("id2label", "label2id", "problem_type")
_EXIT_FIELDS = {one.name for mixin in (EncoderExitConfigMixin, DecoderExitConfigMixin) for one in fields(mixin)}


def exit_lora_config(
    task_type: str = "CAUSAL_LM", modules_to_save: Sequence[str] | None = None, **kwargs: Any
) -> LoraConfig:
    """A [`~peft.LoraConfig`] whose adapter trains and saves norms, heads and policies of the exits in full, and with
    `"SEQ_CLS"` the pooler that they share.

    A LoRA on `k_proj` or `v_proj` also changes the keys and values that a token's exit state leaves at the layers it
    skips: both come from the same modules. What an adapter folder does not hold are estimators: merge it first
    (`merge_and_unload`).

    Args:
        task_type (`str`, *optional*, defaults to `"CAUSAL_LM"`): `"SEQ_CLS"` for an encoder.
        modules_to_save (`list[str]`, *optional*): further modules to train and save in full.
        kwargs: arguments of `LoraConfig`; target modules default to PEFT's own for the stock architecture.

    Example:

    ```python
    >>> from peft import get_peft_model
    >>> from transformers_cee import LlamaForConsistentEECausalLM, exit_lora_config

    >>> model = LlamaForConsistentEECausalLM.from_pretrained("org/llama")
    >>> model = get_peft_model(model, exit_lora_config(r=16, target_modules=["q_proj", "k_proj", "v_proj"]))
    ```
    """
    own = [*EXIT_MODULES, *(["pooler"] if task_type == "SEQ_CLS" else [])]
    more = [name for name in modules_to_save or () if name not in own]
    return LoraConfig(task_type=task_type, modules_to_save=[*own, *more], **kwargs)


class ExitLoraModel(LoraModel):
    """`LoraModel` that notes the exits of a model in the adapter's config, and gives a stock model the exits that an
    adapter was trained with. Other models are to it what they are to `LoraModel`.

    Raises:
        ValueError: an adapter with exits on a model that cannot have them, or that has others; the message names what
            to load the model with.
    """

    def __init__(self, model: Any, config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        adapter = config if isinstance(config, PeftConfig) else config[adapter_name]
        if NOTE in (adapter.auto_mapping or {}) and not isinstance(model, EarlyExitLoadingMixin):
            if adapter is config:
                # Put into a model by transformers, without PEFT's wrapper: it stays the model that it is.
                name = adapter.auto_mapping.get("base_model_class")
                raise ValueError(
                    f"The adapter was trained on a {name}, a model with exits, and cannot be put into a "
                    f"{type(model).__name__}. Load it with `AutoPeftModelFor...` or "
                    "`PeftModel.from_pretrained`, which make the one of the other."
                )
            model = _with_exits(model, adapter.auto_mapping)
        super().__init__(model, config, adapter_name, *args, **kwargs)
        self._note_exits()

    def inject_adapter(self, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # Of adapters that are added later, too.
        mapping = self.peft_config[adapter_name].auto_mapping or {}
        if NOTE in mapping and isinstance(model, EarlyExitLoadingMixin):
            _take_fields(model, mapping)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        # Whoever saves adapters asks for weights first; thresholds may have been found since they were made.
        self._note_exits()
        return super().state_dict(*args, **kwargs)

    def _note_exits(self) -> None:
        model = self.model
        if isinstance(model, EarlyExitLoadingMixin):
            for adapter in self.peft_config.values():
                adapter.auto_mapping = {
                    "base_model_class": type(model).__name__,
                    "parent_library": "transformers_cee",
                    NOTE: _note_of(model),
                }


def register_lora() -> None:
    """Makes PEFT use `ExitLoraModel` for LoRA; again changes nothing."""
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = ExitLoraModel


def _note_of(model: Any) -> dict[str, Any]:
    """Fields of a model's exits and of its task, for JSON. Estimators are not among the weights of an adapter."""
    values = model.config.to_dict()
    names = [name for name in (*_TASK, *_EXIT_FIELDS) if name in values and name != "exit_estimators"]
    return copy.deepcopy({**{name: values[name] for name in sorted(names)}, "exit_layers": list(model.layer_numbers)})


def _take_fields(model: Any, mapping: dict[str, Any]) -> None:
    """Gives a model the thresholds and the like of an adapter. Raises `ValueError` where it has other exits."""
    own, note = _note_of(model), mapping[NOTE]
    differ = {name: note[name] for name in _SHAPE if name in note and own.get(name) != note[name]}
    if len(note.get("id2label") or ()) != len(own.get("id2label") or ()):
        differ["num_labels"] = len(note.get("id2label") or ())
    if differ:
        wanted = ", ".join(f"{name}={value!r}" for name, value in differ.items())
        raise ValueError(
            f"The adapter was trained on a {mapping.get('base_model_class')} with other exits or labels than this "
            f"{type(model).__name__}: load the model with `from_pretrained(..., {wanted})`."
        )
    for name in _EXIT_FIELDS & note.keys():
        setattr(model.config, name, note[name])
    model.config.check_exits()


def _with_exits(stock: Any, mapping: dict[str, Any]) -> Any:
    """The model that an adapter was trained on, around the layers of a stock model."""
    class_name = mapping.get("base_model_class")
    entry = next((one for one in MODELS.values() if one.model.rpartition(".")[2] == class_name), None)
    if entry is None or not isinstance(stock, PreTrainedModel) or stock.config.model_type != entry.stock:
        raise ValueError(
            f"The adapter was trained on a {class_name}, a model with exits, which a {type(stock).__name__} cannot "
            f"be made into; accepted are {class_name} and stock models of its architecture."
        )
    module, _, name = entry.model.rpartition(".")
    model_class = getattr(importlib.import_module(module), name)
    left_out = ("model_type", "architectures", "transformers_version", "dtype")
    values = {name: value for name, value in stock.config.to_dict().items() if name not in left_out}
    config = model_class.config_class(**{**values, **mapping[NOTE]})
    model = model_class._from_config(config, attn_implementation=stock.config._attn_implementation)
    model.to(device=stock.device, dtype=stock.dtype).train(stock.training)
    body = getattr(stock, stock.base_model_prefix)
    if getattr(getattr(model, model.base_model_prefix), "pooler", None) is None and hasattr(body, "pooler"):
        body.pooler = None
    setattr(model, model.base_model_prefix, body)
    for name in ("classifier", "lm_head"):
        theirs, ours = getattr(stock, name, None), getattr(model, name, None)
        if theirs is not None and ours is not None and theirs.weight.shape == ours.weight.shape:
            setattr(model, name, theirs)
    if stock.can_generate():
        model.generation_config = stock.generation_config
    # Where an adapter folder says that it belongs.
    model.name_or_path = model.config.name_or_path = stock.config.name_or_path
    return model


register_lora()


__all__ = ["exit_lora_config", "register_lora"]
