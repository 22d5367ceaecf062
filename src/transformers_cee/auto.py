# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Everything that makes the Auto classes and `pipeline` of 🤗 Transformers, and PEFT, find this package.

The Auto classes live in modules that load torch, so `import transformers_cee` must not touch them. Registration
therefore waits, through one finder on `sys.meta_path`, until they are loaded by others. It also waits until no module
of these packages is half-way through its own import: `transformers.modeling_layers`, for one, loads the Auto classes
before it defines what our models import from it.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class ModelEntry:
    """One architecture: its classes, and which Auto classes give its model.

    Args:
        stock (`str`): model type of the architecture in transformers.
        config (`str`): full name of the config class.
        model (`str`): full name of the model class.
        auto_classes (`tuple[str, ...]`):
            Auto classes of transformers that load the model. `AutoModel` is among them: it would otherwise give a
            model without exits and drop their weights.
    """

    stock: str
    config: str
    model: str
    auto_classes: tuple[str, ...]


MODELS: dict[str, ModelEntry] = {
    "bert_cee": ModelEntry(
        stock="bert",
        config="transformers_cee.models.bert_cee.configuration_bert_cee.BertCeeConfig",
        model="transformers_cee.models.bert_cee.modeling_bert_cee.BertForConsistentEE",
        auto_classes=("AutoModel", "AutoModelForSequenceClassification"),
    ),
    "llama_cee": ModelEntry(
        stock="llama",
        config="transformers_cee.models.llama_cee.configuration_llama_cee.LlamaCeeConfig",
        model="transformers_cee.models.llama_cee.modeling_llama_cee.LlamaForConsistentEECausalLM",
        auto_classes=("AutoModel", "AutoModelForCausalLM"),
    ),
}

EARLY_EXIT_TEXT_CLASSIFICATION = "early-exit-text-classification"


def register() -> None:
    """Registers the models and pipelines of this package with transformers and PEFT, now or when these are loaded.

    Calling it again changes nothing. What is not loaded yet is not loaded by this call.

    Raises:
        ValueError: another package has registered a class of its own under one of our model types.
    """
    if _finder not in sys.meta_path and any(module not in sys.modules for module in _STEPS):
        sys.meta_path.insert(0, _finder)
    _register_loaded()
    if hasattr(sys.modules.get("peft"), "PeftModel"):
        # Whoever loads adapters has PEFT; without it, or before it, `transformers_cee.lora` registers itself.
        importlib.import_module("transformers_cee.lora")


def register_configs() -> None:
    """Registers the config of every entry of `MODELS` with `AutoConfig`.

    Raises:
        ValueError: a model type is taken by a class that is not ours.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

    for model_type, entry in MODELS.items():
        config_class = _load(entry.config)
        taken_by = CONFIG_MAPPING[model_type] if model_type in CONFIG_MAPPING else config_class
        if taken_by is not config_class:
            raise ValueError(
                f"The model type {model_type!r} belongs to {entry.config}, but {_full_name(taken_by)} is registered "
                "for it. Do not use the package of the latter together with transformers_cee."
            )
        AutoConfig.register(model_type, config_class)


def register_models() -> None:
    """Registers the model of every entry of `MODELS` with its Auto classes."""
    from transformers.models.auto import modeling_auto

    for entry in MODELS.values():
        for auto_class in entry.auto_classes:
            getattr(modeling_auto, auto_class).register(_load(entry.config), _load(entry.model))


def register_pipelines() -> None:
    """Registers the task `early-exit-text-classification` with `transformers.pipeline`."""
    from transformers import AutoModelForSequenceClassification
    from transformers.pipelines import PIPELINE_REGISTRY

    from transformers_cee.pipelines import EarlyExitTextClassificationPipeline

    if EARLY_EXIT_TEXT_CLASSIFICATION in PIPELINE_REGISTRY.supported_tasks:
        return
    PIPELINE_REGISTRY.register_pipeline(
        EARLY_EXIT_TEXT_CLASSIFICATION,
        pipeline_class=EarlyExitTextClassificationPipeline,
        pt_model=AutoModelForSequenceClassification,
        type="text",
    )
    # The mark makes `Pipeline.save_pretrained` copy this package's source files beside the model and name them in
    # config.json; loading would then ask for `trust_remote_code`, with the package installed.
    del EarlyExitTextClassificationPipeline._registered_impl  # type: ignore[attr-defined]


def register_peft() -> None:
    """Gives each model the default target modules of its stock architecture, for LoRA and PEFT's other methods."""
    from peft.utils import constants

    for name, targets in vars(constants).items():
        if name.endswith("_MAPPING") and isinstance(targets, dict):
            for model_type, entry in MODELS.items():
                if entry.stock in targets:
                    targets.setdefault(model_type, targets[entry.stock])


# What to do once a module has been loaded; configs come before the models that they belong to.
_STEPS: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": register_configs,
    "transformers.models.auto.modeling_auto": register_models,
    "transformers.pipelines": register_pipelines,
    "peft.utils.constants": register_peft,
}
_WATCHED = ("transformers.", "transformers_cee.", "peft.")


def _load(full_name: str) -> Any:
    module, _, name = full_name.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


class _RegisterAfterImport(MetaPathFinder):
    """Runs the registration steps when the outermost import of a module of the watched packages is done."""

    def __init__(self) -> None:
        self._imports = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if path is None or not fullname.startswith(_WATCHED):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            self._imports.depth = getattr(self._imports, "depth", 0) + 1
            try:
                execute(module)
            finally:
                self._imports.depth -= 1
            if self._imports.depth == 0:
                _register_loaded()

        # On the instance, so that the loader stays what it is for `inspect`, `importlib.resources` and others.
        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_finder = _RegisterAfterImport()
_lock = threading.RLock()
_done: set[str] = set()


def _register_loaded() -> None:
    """Runs every step whose module is loaded, once; takes the finder away after the last one."""
    with _lock:
        for module, step in _STEPS.items():
            if module in sys.modules and module not in _done:
                # Marked first: a step imports modules of its own and comes back here.
                _done.add(module)
                try:
                    step()
                except BaseException:
                    _done.discard(module)
                    raise
        if len(_done) == len(_STEPS) and _finder in sys.meta_path:
            sys.meta_path.remove(_finder)
