# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Everything that makes the Auto classes and `pipeline` of 🤗 Transformers, and PEFT, find this package.

Importing the package registers the configs with `AutoConfig` and the exits with PEFT, and costs what importing the
Auto classes and PEFT costs. Whoever loads or makes a model makes its config first: the first config of a family
registers the family's model with its Auto classes, and with it the pipeline task and PEFT's defaults. Nothing here
reaches into the imports of others, and no lock is held while a module is imported: threads may register the same
twice, which changes nothing.
"""

from __future__ import annotations

from typing import Any

from transformers_cee.exits.fields import shown
from transformers_cee.families import MODELS, ModelEntry, family_of
from transformers_cee.lazy import named


EARLY_EXIT_TEXT_CLASSIFICATION = "early-exit-text-classification"
# What the config of a family derives from.
_CONFIG_KINDS = (
    "transformers_cee.modeling.remote_code.RemoteCodeConfigMixin",
    "transformers_cee.exits.configuration.ExitConfigMixin",
)


def register_configs() -> None:
    """Registers the config of every entry of `MODELS` with `AutoConfig`.

    Raises:
        ValueError: a model type is taken by a class that is not ours.
    """
    for model_type, entry in MODELS.items():
        _register_config(model_type, entry)


def _register_config(model_type: str, entry: ModelEntry) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

    config_class = named(entry.config)
    taken_by = CONFIG_MAPPING[model_type] if model_type in CONFIG_MAPPING else config_class
    if taken_by is not config_class:
        raise ValueError(
            f"The model type {model_type!r} belongs to {entry.config}, but {_full_name(taken_by)} is registered "
            "for it. Do not use the package of the latter together with transformers_cee."
        )
    AutoConfig.register(model_type, config_class)


def register_model(model_type: str, entry: ModelEntry) -> None:
    """Adds a family of your own to the table, with all that a family of this package gets: its config is registered
    with `AutoConfig` at once, its model with the first config that is made, and saved folders load with
    `trust_remote_code=True` where the module of the classes can be imported.

    Call it behind the definition of the classes, in their module: whoever imports these has registered them. The same
    entry, given again, changes nothing.

    Args:
        model_type (`str`): that of the config class.
        entry ([`ModelEntry`]): the classes by their full names.

    Raises:
        TypeError: no `ModelEntry`, or a config class without exits.
        ValueError: a model type that is taken; an unknown Auto class; classes that no other module can import; a
            config class of another model type.
    """
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if not isinstance(entry, ModelEntry):
        raise TypeError(f"`entry` must be a ModelEntry; got {shown(entry)}.")
    if MODELS.get(model_type) == entry:
        return
    taken_by = MODELS[model_type].config if model_type in MODELS else None
    if taken_by is None and model_type in CONFIG_MAPPING and _full_name(CONFIG_MAPPING[model_type]) != entry.config:
        taken_by = _full_name(CONFIG_MAPPING[model_type])
    if taken_by is not None:
        raise ValueError(f"`model_type`={model_type!r} is taken by {taken_by}; give {entry.config} another one.")
    unknown = [name for name in entry.auto_classes if not hasattr(modeling_auto, name)]
    if unknown or not entry.auto_classes:
        raise ValueError(
            f"`auto_classes`={entry.auto_classes!r} must name Auto classes of transformers, such as "
            "'AutoModelForSequenceClassification'."
        )
    if any(name.partition(".")[0] in ("", "__main__") or "." not in name for name in entry.classes):
        raise ValueError(f"`entry` names {', '.join(entry.classes)}; accepted are full names in modules to import.")
    _check_config(model_type, entry)
    MODELS[model_type] = entry
    _register_config(model_type, entry)


def _check_config(model_type: str, entry: ModelEntry) -> None:
    kinds = [named(name) for name in _CONFIG_KINDS]
    config_class = named(entry.config)
    lacking = [kind.__name__ for kind in kinds if not issubclass(config_class, kind)]
    if lacking:
        raise TypeError(f"{entry.config} must derive from {' and '.join(lacking)}.")
    if config_class.model_type != model_type:
        raise ValueError(
            f"`model_type`={model_type!r} is not that of {entry.config}, which is {config_class.model_type!r}."
        )


def register_family(model_type: str) -> None:
    """Registers what belongs to a family's model, once: the model with its Auto classes, the pipeline task, PEFT's
    defaults. The first config of the family calls it.

    Raises:
        ValueError: a model type without a family.
    """
    if model_type in _registered:
        return
    if model_type not in MODELS:
        raise ValueError(
            f"`model_type`={model_type!r} is in no table of families; `register_model` adds one. There are "
            f"{', '.join(map(repr, MODELS))}."
        )
    register_models(model_type)
    register_pipelines()
    register_peft()
    # Last: until all is done, other threads do it themselves.
    _registered.add(model_type)


def model_class_of(checkpoint: str, auto_class: str, **hub_arguments: Any) -> Any:
    """The model class that gives a checkpoint exits, or has given it some; its `config_class` is that of the config.

    Args:
        checkpoint (`str`): folder or Hub name, with or without exits.
        auto_class (`str`): the Auto class of transformers for the task, such as `"AutoModelForCausalLM"`.
        hub_arguments: of `from_pretrained`, such as `revision`, `cache_dir` and `gguf_file`.

    Raises:
        OSError: there is no such checkpoint.
        ValueError: a model type that has no model with exits for this task.
    """
    from transformers import PreTrainedConfig

    values, _ = PreTrainedConfig.get_config_dict(checkpoint, **hub_arguments)
    return named(MODELS[family_of(values.get("model_type"), auto_class, checkpoint)].model)


def has_exits(checkpoint: str, **hub_arguments: Any) -> bool:
    """Was a checkpoint saved with exits? Arguments and errors of `model_class_of`."""
    from transformers import PreTrainedConfig

    values, _ = PreTrainedConfig.get_config_dict(checkpoint, **hub_arguments)
    return values.get("model_type") in MODELS


def register_models(model_type: str) -> None:
    """Registers the model of an entry of `MODELS` with its Auto classes."""
    from transformers.models.auto import modeling_auto

    entry = MODELS[model_type]
    config, model = named(entry.config), named(entry.model)
    for auto_class in entry.auto_classes:
        getattr(modeling_auto, auto_class).register(config, model)
    modeling_auto.AutoModel.register(config, _of_auto_model(named(entry.base), model))


def _of_auto_model(base: Any, model: Any) -> type:
    """What `AutoModel` is given. Its `from_pretrained` loads a checkpoint whole, exits and heads included, unless it
    was saved without; its `from_config`, by which stock heads make their body, makes the model without them."""

    class OfAutoModel(base):
        @classmethod
        def from_pretrained(cls, *args: Any, config: Any = None, **kwargs: Any) -> Any:
            saved = getattr(config, "architectures", None) or ()
            return (base if base.__name__ in saved else model).from_pretrained(*args, config=config, **kwargs)

        @classmethod
        def _from_config(cls, *args: Any, **kwargs: Any) -> Any:
            return base._from_config(*args, **kwargs)

    return OfAutoModel


def register_pipelines() -> None:
    """Registers the task `early-exit-text-classification` with `transformers.pipeline`, and for the stock tasks of
    these models pipelines that know of exits."""
    from transformers import AutoModelForSequenceClassification
    from transformers.pipelines import PIPELINE_REGISTRY

    from transformers_cee.pipelines import (
        EarlyExitTextClassificationPipeline,
        ExitFeatureExtractionPipeline,
        ExitImageClassificationPipeline,
        ExitImageFeatureExtractionPipeline,
        ExitTextClassificationPipeline,
        ExitZeroShotClassificationPipeline,
    )

    # Not by `register_pipeline`, which also marks the class: `Pipeline.save_pretrained` would then copy this package's
    # source files beside the model and name them in config.json, and loading would ask for `trust_remote_code`.
    PIPELINE_REGISTRY.supported_tasks.setdefault(
        EARLY_EXIT_TEXT_CLASSIFICATION,
        {
            "impl": EarlyExitTextClassificationPipeline,
            "pt": (AutoModelForSequenceClassification,),
            "type": "text",
        },
    )
    for name, own in (
        ("feature-extraction", ExitFeatureExtractionPipeline),
        ("image-classification", ExitImageClassificationPipeline),
        ("image-feature-extraction", ExitImageFeatureExtractionPipeline),
        ("text-classification", ExitTextClassificationPipeline),
        ("zero-shot-classification", ExitZeroShotClassificationPipeline),
    ):
        task = PIPELINE_REGISTRY.supported_tasks[name]
        # Older releases hold the class, newer ones its name. Models without exits get the stock pipeline from ours.
        if task["impl"] in (own.stock, _full_name(own.stock)):
            task["impl"] = own


def register_peft() -> None:
    """Gives each model the default target modules of its stock architecture, for LoRA and PEFT's other methods."""
    try:
        from peft.utils import constants
    except ImportError:
        return
    lora = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    for name, targets in vars(constants).items():
        if name.endswith("_MAPPING") and isinstance(targets, dict):
            for model_type, entry in MODELS.items():
                if entry.stock in targets:
                    targets.setdefault(model_type, targets[entry.stock])
                elif targets is lora and entry.lora_targets:
                    targets.setdefault(model_type, list(entry.lora_targets))


_registered: set[str] = set()


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
