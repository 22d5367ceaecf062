# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A base and its exits into one model: from names, or around a model that is loaded already."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from transformers_cee.exits.configuration import ExitConfigMixin
from transformers_cee.generation.mixin import EXIT_ARGUMENTS
from transformers_cee.modeling.exits_folder import (
    EXITS,
    HUB_ARGUMENTS,
    RECORD,
    ExitsFolder,
    blank_model,
    read_exits,
)
from transformers_cee.modeling.fingerprints import saved_tensors


TASK_FIELDS = ("id2label", "label2id", "problem_type")


def load_from_folder(
    model_class: Any,
    load: Callable[..., tuple[Any, dict[str, Any]]],
    source: Any,
    config: Any,
    base: Any,
    kwargs: dict[str, Any],
) -> tuple[Any, dict[str, Any], ExitsFolder]:
    """Loads the base that a folder with exits names, and gives it the exits.

    Args:
        model_class (`type`): class of the model.
        load (`Callable`): loads a checkpoint; `brings` are the names of weights that come from elsewhere.
        source (`str` or `os.PathLike`): the folder with exits, or its name on the Hub.
        config (`PreTrainedConfig`, *optional*): as of the folder.
        base (`str` or `os.PathLike`, *optional*): loaded instead of the one that the folder names.
        kwargs (`dict`): of `from_pretrained`; those of the Hub concern the folder.

    Raises:
        ValueError: the folder is damaged, or the base is not the one that the exits were trained on.
    """
    hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
    # Of the folder's repository.
    kwargs.pop("_commit_hash", None)
    folder = read_exits(source, getattr(config, RECORD, None), **hub)
    if config is None:
        # What is of loading and of the config stays both.
        kept: dict[str, Any] = {name: kwargs[name] for name in ("dtype", "torch_dtype") if name in kwargs}
        config, kwargs = model_class.config_class.from_pretrained(
            source, return_unused_kwargs=True, **hub, **{name: kwargs[name] for name in kwargs.keys() - kept.keys()}
        )
        kwargs |= kept
    else:
        config = copy.deepcopy(config)
    vars(config).pop(RECORD, None)
    folder.check_config(config)
    blank = blank_model(model_class, config)
    folder.check_tensors(blank)
    named = base is None or os.fspath(base) == folder.base
    base = folder.base if base is None else base
    at = {name: value for name, value in hub.items() if name not in ("revision", "subfolder")}
    if named and folder.revision is not None:
        at["revision"] = folder.revision
    _check_base_config(folder, model_class, config, base, at)
    # Otherwise older releases look for the base's files under the commit of the folder.
    config._commit_hash = None
    wanted = copy.deepcopy(config)
    model, info = load(base, brings=frozenset(folder.tensors), config=config, **at, **kwargs)
    rest = {name: value for name, value in saved_tensors(model).items() if name not in folder.tensors}
    check_base_weights(folder, rest, base, model)
    folder.fill(model)
    take_fields(model, wanted, folder.generation)
    return model, info, folder


def _check_base_config(folder: ExitsFolder, model_class: Any, config: Any, base: Any, at: Mapping[str, Any]) -> None:
    """Raises `ValueError` where a base is of another architecture, or has other sizes or labels."""
    try:
        found = model_class.config_class.from_pretrained(base, **at)
    except OSError as error:
        raise ValueError(
            f"{folder.source} holds the exits of {base}, which cannot be loaded ({str(error)[:300]}). Where it lies "
            "elsewhere, load both by `load_exits(base, folder)`."
        ) from error
    if hasattr(found, RECORD):
        raise ValueError(f"The base {base} is itself a folder with exits alone; accepted are whole models.")
    folder.check_sizes(config, found, base, cut=True)
    folder.check_labels(config, found, base, model_class)


def check_base_weights(folder: ExitsFolder, tensors: Mapping[str, Tensor], base: Any, model: Any) -> None:
    """Raises `ValueError` unless what exits take from their base is what they were trained on.

    Args:
        tensors (mapping of `str` to `Tensor`): what the exits take.
        model (`PreTrainedModel`): the model that has it.
    """
    if getattr(model, "hf_quantizer", None) is None:
        folder.check_base(tensors, base)
    else:
        folder.say_unknown(base, "its weights are quantized")


def config_around(model_class: Any, stock: Any, own: Mapping[str, Any]) -> Any:
    """Config of a model with exits around the layers of a stock model.

    Args:
        own (mapping): fields of the exits and of the task.
    """
    left_out = ("model_type", "architectures", "transformers_version", "dtype")
    values = {name: value for name, value in stock.config.to_dict().items() if name not in left_out}
    return model_class.config_class(**{**values, **own})


def blank_around(model_class: Any, config: Any, stock: Any) -> Any:
    """A model without weights that runs as a stock model does."""
    return blank_model(model_class, config, attn_implementation=stock.config._attn_implementation, dtype=stock.dtype)


def around_stock(model: Any, stock: Any, brought: Collection[str] = ()) -> list[nn.Module]:
    """Makes a model without weights one with exits around the layers of a stock model.

    Args:
        model (`PreTrainedModel`): from `blank_around`.
        stock (`PreTrainedModel`): becomes a part of it; a pooler that the model does not use is taken away.
        brought (collection of `str`): modules of the task that are not to be the stock model's.

    Returns:
        `list[nn.Module]`: what is still without weights: the exits, and modules of the task.
    """
    prefix = model.base_model_prefix
    new = [module for name, module in model.named_children() if name.startswith(EXITS)]
    own = {name: module_at(model, name) for name in model.task_modules}
    bare = stock is stock.base_model
    theirs = {name: module_at(stock, name.removeprefix(prefix + ".") if bare else name) for name in own}
    setattr(model, prefix, stock.base_model)
    for name, module in own.items():
        fits = name not in brought and None not in (module, theirs[name]) and _shapes(module) == _shapes(theirs[name])
        put_at(model, name, theirs[name] if fits else module)
        new += [] if fits or module is None else [module]
    model.train(stock.training)
    if stock.can_generate():
        model.generation_config = stock.generation_config
    # Where an adapter folder says that it belongs.
    model.name_or_path = model.config.name_or_path = stock.config.name_or_path
    return new


def check_stock(model_class: Any, stock: Any, source: Any) -> None:
    """Raises `ValueError` unless a model of ours can be made of a stock model.

    Args:
        model_class (`type`): class of the model.
        stock: the model in question.
        source: what says that it should be one.
    """
    accepted = [kind for one in model_class.config_class.__mro__ if (kind := vars(one).get("model_type"))]
    if isinstance(stock, PreTrainedModel) and stock.config.model_type == accepted[-1]:
        return
    raise ValueError(
        f"{source} holds exits of a {model_class.__name__}, which a {type(stock).__name__} cannot be made into; "
        f"accepted are {model_class.__name__} and stock models of the type {accepted[-1]!r}."
    )


def take_fields(model: Any, config: Any, generation: Mapping[str, Any]) -> None:
    """Gives a model what another config says of its exits and labels.

    Args:
        generation (mapping): exit arguments of the generation config.
    """
    for name in (*exit_fields(config), *TASK_FIELDS):
        if hasattr(config, name):
            setattr(model.config, name, copy.deepcopy(getattr(config, name)))
    model.config.check_exits()
    model.num_labels, model.layer_numbers = model.config.num_labels, model.config.exit_layer_numbers
    if model.can_generate():
        for name in EXIT_ARGUMENTS:
            if name in generation or hasattr(model.generation_config, name):
                setattr(model.generation_config, name, copy.deepcopy(generation.get(name)))


def given_generation(model: Any) -> dict[str, Any]:
    """Exit arguments of a model's generation config."""
    own = model.generation_config if model.can_generate() else None
    found = {name: getattr(own, name, None) for name in EXIT_ARGUMENTS}
    return {name: copy.deepcopy(value) for name, value in found.items() if value is not None}


def exit_fields(config: Any) -> list[str]:
    """Names of a config's fields that are of exits."""
    mixins = [
        one
        for one in type(config).__mro__
        if issubclass(one, ExitConfigMixin) and not issubclass(one, PreTrainedConfig)
    ]
    return list(dict.fromkeys(one.name for mixin in mixins for one in fields(mixin)))


def module_at(model: nn.Module, name: str) -> Any:
    """The module of a dotted name, None where there is none."""
    found: Any = model
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def put_at(model: nn.Module, name: str, module: nn.Module | None) -> None:
    """Puts a module under a dotted name, or None where nothing is to be."""
    parent, _, own = name.rpartition(".")
    holder = module_at(model, parent) if parent else model
    if module is not None or getattr(holder, own, None) is not None:
        setattr(holder, own, module)


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


__all__ = [
    "TASK_FIELDS",
    "around_stock",
    "blank_around",
    "check_base_weights",
    "check_stock",
    "config_around",
    "exit_fields",
    "given_generation",
    "load_from_folder",
    "module_at",
    "put_at",
    "take_fields",
]
