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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from peft import LoraConfig, PeftConfig, PeftType, mixed_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from transformers import PreTrainedModel
from transformers.utils import logging

from transformers_cee.exits.configuration import DecoderExitConfigMixin, EncoderExitConfigMixin
from transformers_cee.families import MODELS
from transformers_cee.modeling.exits_loading import around_stock, blank_around, config_around
from transformers_cee.modeling.loading import EarlyExitLoadingMixin
from transformers_cee.training.parameters import EXIT_MODULES


logger = logging.get_logger(__name__)

# Key of the note in `auto_mapping`, which PEFT saves with an adapter and reads where no task is given only.
NOTE = "early_exit_config"
# Fields that say what weights there are.
_SHAPE = (
    "exit_layers", "exit_pooling", "exit_norm", "exit_head", "exit_head_rank", "policy_hidden_size",
    "policy_activation", "policy_inputs", "policy_condition", "policy_alphas",
)  # fmt: skip
_TASK = ("id2label", "label2id", "problem_type")
_ESTIMATORS, _DRAFTER = "exit_estimators", "drafter_layer"
# Fields of what an adapter does not hold.
_LEFT_BEHIND = {_ESTIMATORS, _DRAFTER}
_EXIT_FIELDS = {one.name for mixin in (EncoderExitConfigMixin, DecoderExitConfigMixin) for one in fields(mixin)}


def exit_lora_config(
    task_type: str | None = "CAUSAL_LM", modules_to_save: Sequence[str] | None = None, **kwargs: Any
) -> LoraConfig:
    """A [`~peft.LoraConfig`] whose adapter trains and saves norms, heads and policies of the exits in full, and with
    `"SEQ_CLS"` what they share of the stock head, with None the classifier of images.

    A LoRA on `k_proj` or `v_proj` also changes the keys and values that a token's exit state leaves at the layers it
    skips: both come from the same modules. What an adapter folder does not hold are estimators and the drafter: merge
    it first (`merge_and_unload`).

    Thresholds and the like are the active adapter's: they are saved with it, and `set_adapter` of the `PeftModel`
    brings those of the adapter that it activates. What learns a prompt, and X-LoRA, note no exits: load the model with
    its exits and then `PeftModel.from_pretrained(model, folder)`.

    Args:
        task_type (`str`, *optional*, defaults to `"CAUSAL_LM"`):
            `"SEQ_CLS"` for an encoder, None for a model of images, which PEFT has no task for.
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
    # PEFT saves classifiers of the tasks that it knows, but not what stands before them under another name.
    of_task = {"SEQ_CLS": ["pooler", "head"], None: ["classifier"]}.get(task_type, [])
    own = [*EXIT_MODULES, *of_task]
    more = [name for name in modules_to_save or () if name not in own]
    return LoraConfig(task_type=task_type, modules_to_save=[*own, *more], **kwargs)


class _Note(dict):
    """`auto_mapping` of an adapter in use; one that was read from a folder is a plain dict."""


class NotingConfigMixin:
    """Config of an adapter without a task: PEFT would save its own word for the class in the place of the note."""

    auto_mapping: Any

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        own: Any = super()
        if NOTE in (self.auto_mapping or {}):
            kwargs.pop("auto_mapping_dict", None)
        own.save_pretrained(*args, **kwargs)


class ExitTunerMixin:
    """A tuner of PEFT that notes the exits of a model in the adapter's config, and gives a stock model the exits that
    an adapter was trained with. To other models it is the tuner that it is mixed into.

    Raises:
        ValueError: an adapter with exits on a model that cannot have them, or that has others; the message names what
            to load the model with.
    """

    model: Any
    peft_config: dict[str, PeftConfig]
    active_adapters: list[str]

    def __init__(self, model: Any, config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        own: Any = super()
        adapter = config if isinstance(config, PeftConfig) else config[adapter_name]
        mapping = _mapping_of(adapter)
        if NOTE in mapping and not isinstance(model, EarlyExitLoadingMixin):
            if adapter is config:
                # Put into a model by transformers, without PEFT's wrapper: it stays the model that it is.
                _refuse(model, mapping)
            model = _with_exits(model, adapter)
        own.__init__(model, config, adapter_name, *args, **kwargs)

    def inject_adapter(self, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # Of adapters that are added later, too.
        own: Any = super()
        adapter = self.peft_config[adapter_name]
        mapping = _mapping_of(adapter)
        if isinstance(model, EarlyExitLoadingMixin):
            # The caller's config may be used for other models.
            self.peft_config[adapter_name] = adapter = copy.deepcopy(adapter)
            if adapter.task_type is None:
                adapter.__class__ = _noting(type(adapter))
            if NOTE not in mapping:
                mapping = _new_note(model)
            adapter.auto_mapping = _Note(mapping)
            _check_fields(model, mapping)
            if adapter_name in self.active_adapters:
                _take_fields(model, mapping)
            _say_what_is_missing(model, mapping)
        elif NOTE in mapping:
            _refuse(model, mapping)
        own.inject_adapter(model, adapter_name, *args, **kwargs)

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        own: Any = super()
        with self._activating():
            own.set_adapter(*args, **kwargs)

    def delete_adapter(self, *args: Any, **kwargs: Any) -> None:
        own: Any = super()
        with self._activating():
            own.delete_adapter(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        # Whoever saves adapters asks for weights first; thresholds may have been found since they were made.
        own: Any = super()
        self._note_exits()
        return own.state_dict(*args, **kwargs)

    @contextmanager
    def _activating(self) -> Iterator[None]:
        """What was found with an adapter stays with it; what was found with the next one comes back."""
        before = list(self.active_adapters)
        self._note_exits()
        yield
        active = list(self.active_adapters)
        if active != before and len(active) == 1 and isinstance(self.model, EarlyExitLoadingMixin):
            _take_fields(self.model, self.peft_config[active[0]].auto_mapping)

    def _note_exits(self) -> None:
        active = self.active_adapters
        if isinstance(self.model, EarlyExitLoadingMixin) and len(active) == 1 and active[0] in self.peft_config:
            self.peft_config[active[0]].auto_mapping = _new_note(self.model)


def register_lora() -> None:
    """Makes PEFT's tuners know of exits; again changes nothing."""
    for peft_type, tuner in list(PEFT_TYPE_TO_TUNER_MAPPING.items()):
        # X-LoRA is a model around a LoRA model; what learns prompts is no tuner.
        if issubclass(tuner, BaseTuner) and peft_type != PeftType.XLORA:
            PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = _knowing_exits(tuner)
    mixed_model.MixedModel = _knowing_exits(mixed_model.MixedModel)
    for kind in PEFT_TYPE_TO_CONFIG_MAPPING.values():
        # Pickles name them.
        _noting(kind)


def _knowing_exits(tuner: type) -> type:
    if issubclass(tuner, ExitTunerMixin):
        return tuner
    made = type(tuner.__name__, (ExitTunerMixin, tuner), {"__module__": __name__, "__doc__": tuner.__doc__})
    # Pickles name it.
    globals()[tuner.__name__] = made
    return made


def _noting(kind: Any) -> Any:
    name = f"Noting{kind.__name__}"
    if issubclass(kind, NotingConfigMixin):
        return kind
    if name not in globals():
        globals()[name] = type(name, (NotingConfigMixin, kind), {"__module__": __name__, "__doc__": kind.__doc__})
    return globals()[name]


def _mapping_of(adapter: PeftConfig) -> dict[str, Any]:
    """What is noted of an adapter. A new one with the config of another that is in use starts without."""
    used = isinstance(adapter.auto_mapping, _Note) and not adapter.inference_mode
    return {} if used else adapter.auto_mapping or {}


def _refuse(model: Any, mapping: dict[str, Any]) -> None:
    name = mapping.get("base_model_class")
    raise ValueError(
        f"The adapter was trained on a {name}, a model with exits, and cannot be put into a "
        f"{type(model).__name__}. Load it with `AutoPeftModelFor...` or `PeftModel.from_pretrained`, as the first "
        "adapter: they make the one of the other."
    )


def _new_note(model: Any) -> _Note:
    return _Note(
        {"base_model_class": type(model).__name__, "parent_library": "transformers_cee", NOTE: _note_of(model)}
    )


def _note_of(model: Any) -> dict[str, Any]:
    """Fields of a model's exits and of its task, for JSON."""
    values = model.config.to_dict()
    names = [name for name in (*_TASK, *_EXIT_FIELDS) if name in values]
    return copy.deepcopy({**{name: values[name] for name in sorted(names)}, "exit_layers": list(model.layer_numbers)})


def _check_fields(model: Any, mapping: dict[str, Any]) -> None:
    """Raises `ValueError` where a model has other exits than an adapter."""
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


def _take_fields(model: Any, mapping: dict[str, Any]) -> None:
    """Gives a model the thresholds and the like of an adapter."""
    note = mapping[NOTE]
    for name in (_EXIT_FIELDS & note.keys()) - _LEFT_BEHIND:
        setattr(model.config, name, copy.deepcopy(note[name]))
    model.config.check_exits()


def _say_what_is_missing(model: Any, mapping: dict[str, Any]) -> None:
    """Warns of estimators and a drafter, which are not among the weights of an adapter."""
    if mapping[NOTE].get(_DRAFTER) is not None and model.config.drafter_layer is None:
        logger.warning(
            "The adapter was saved beside a drafter, which it does not hold: set `drafter_layer` and train it anew "
            "(phase `drafter`), or let others draft."
        )
    lacks = [name for name in mapping[NOTE].get(_ESTIMATORS, ()) if name not in model.exit_estimators]
    if lacks:
        logger.warning(
            f"The adapter was saved beside the estimators {', '.join(map(repr, lacks))}, which it does not hold: fit "
            "them anew before you exit by these criteria (`fit_estimators`, `fit_token_hash`)."
        )


def _with_exits(stock: Any, adapter: PeftConfig) -> Any:
    """The model that an adapter was trained on, around the layers of a stock model. Of its own it holds the exits
    only, which the adapter brings."""
    mapping: dict[str, Any] = adapter.auto_mapping
    class_name = mapping.get("base_model_class")
    entry = next((one for one in MODELS.values() if one.model.rpartition(".")[2] == class_name), None)
    if entry is None or not isinstance(stock, PreTrainedModel) or stock.config.model_type != entry.stock:
        raise ValueError(
            f"The adapter was trained on a {class_name}, a model with exits, which a {type(stock).__name__} cannot "
            f"be made into; accepted are {class_name} and stock models of its architecture."
        )
    module, _, name = entry.model.rpartition(".")
    model_class = getattr(importlib.import_module(module), name)
    noted = {name: value for name, value in mapping[NOTE].items() if name not in _LEFT_BEHIND}
    model = blank_around(model_class, config_around(model_class, stock, noted), stock)
    saved = tuple(getattr(adapter, "modules_to_save", None) or ())
    new = [one for one in EXIT_MODULES if any(True for _ in getattr(model, one).parameters())]
    lacks = [one for one in new if not one.endswith(saved)]
    if lacks:
        raise ValueError(
            f"The adapter was trained on a {class_name} and holds no {', '.join(lacks)}, which a "
            f"{type(stock).__name__} lacks: load the model that it was trained on, exits included, and then "
            "`PeftModel.from_pretrained(model, ...)`; or train with `exit_lora_config`, which saves them."
        )
    for module in around_stock(model, stock):
        module.to_empty(device=stock.device).train(stock.training).apply(model._init_weights)
    return model


register_lora()


__all__ = ["exit_lora_config", "register_lora"]
