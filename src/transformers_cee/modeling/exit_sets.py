# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Exits that are saved and loaded without their base, and several sets of them on one base."""

from __future__ import annotations

import copy
import importlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from transformers_cee.exits.fields import check_field, text
from transformers_cee.families import MODELS
from transformers_cee.modeling.exits_folder import (
    EXITS,
    HUB_ARGUMENTS,
    RECORD,
    ExitsFolder,
    config_values,
    read_exits,
    some,
)
from transformers_cee.modeling.exits_loading import (
    TASK_FIELDS,
    around_stock,
    blank_around,
    check_base_weights,
    check_stock,
    config_around,
    exit_fields,
    given_generation,
    module_at,
    put_at,
    take_fields,
)
from transformers_cee.modeling.exits_publishing import push_exits
from transformers_cee.modeling.exits_saving import check_no_adapters, save_exits
from transformers_cee.modeling.fingerprints import saved_tensors


DEFAULT = "default"


@dataclass
class ExitSet:
    """One set of exits of a model.

    Args:
        config (`PreTrainedConfig`): of the model with these exits.
        generation (`dict`): exit arguments of the generation config.
        modules (`dict[str, nn.Module]`): by name, what the set has of its own.
        task_modules (`set[str]`): modules of the task that the model has with these exits.
    """

    config: Any
    generation: dict[str, Any]
    modules: dict[str, nn.Module]
    task_modules: set[str]


@dataclass
class ExitSets:
    """Sets by name. That of the active one is what it was when it became active: the model has what it is now."""

    active: str = DEFAULT
    # Modules of the task that the active set brought; others are the base's.
    brought: set[str] = field(default_factory=set)
    sets: dict[str, ExitSet] = field(default_factory=dict)
    # Modules of the task that the base brought.
    base: dict[str, nn.Module] = field(default_factory=dict)


class ExitSetsMixin:
    """Saving, loading and switching the exits of a model without their base."""

    config: Any
    layer_numbers: list[int]

    @property
    def exits_names(self) -> list[str]:
        """Names of the sets of exits that the model has."""
        sets = _sets(self)
        return list(dict.fromkeys((*sets.sets, sets.active)))

    @property
    def active_exits(self) -> str:
        """Name of the set of exits that the model runs with."""
        return _sets(self).active

    def save_exits(
        self, save_directory: str | os.PathLike[str], base: str | os.PathLike[str] | None = None, **kwargs: Any
    ) -> None:
        """Saves the active exits alone: heads, norms, policies, estimators, thresholds, budgets and operating points.

        The folder names the base and holds a fingerprint of its weights. Modules of the task, such as a classifier,
        are saved along where the base has none or others. `AutoModelFor...from_pretrained(save_directory)` loads the
        base and the exits; [`load_exits`] and [`~EarlyExitModel.load_exits`] give the exits to a base that is loaded.

        Args:
            save_directory (`str` or `os.PathLike`): folder, made when missing.
            base (`str` or `os.PathLike`, *optional*, defaults to `model.name_or_path`):
                Hub name or folder of the checkpoint that the model's layers are of.
            kwargs: `revision` of the base (by default the commit that is found), `token`, `cache_dir`,
                `local_files_only` and the like.

        Raises:
            ValueError: the model's layers are not those of the base, or have adapters; no base is known; the folder
                holds something else. Where the base cannot be reached, modules of the task are saved along, with a
                warning.
        """
        save_exits(self, save_directory, base, **kwargs)

    def push_exits_to_hub(
        self,
        repo_id: str,
        base: str | None = None,
        *,
        revision: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload exits",
    ) -> Any:
        """Saves the active exits as `save_exits` does and publishes them, with a card where the repository has none.

        Args:
            repo_id (`str`): repository on the Hub, made when missing.
            base (`str`, *optional*, defaults to `model.name_or_path`): Hub name of the base.
            revision (`str`, *optional*): of the base.
            private (`bool`, *optional*): of a new repository.
            token (`str`, *optional*): of the Hub.
            commit_message (`str`, *optional*): of the commit.

        Raises:
            ValueError: as `save_exits`, and where the base is a folder of this machine.
        """
        return push_exits(self, repo_id, base, revision, private, token, commit_message)

    def load_exits(self, folder: str | os.PathLike[str], name: str = DEFAULT, **kwargs: Any) -> None:
        """Loads a set of exits that was trained on this model's base, and makes it the active one.

        Sets may have exits after other layers, other heads, thresholds and labels. One of the same name is replaced.
        Changing sets while another thread runs the model is not safe.

        Args:
            folder (`str` or `os.PathLike`): folder of `save_exits`, or its name on the Hub.
            name (`str`, *optional*, defaults to `"default"`): of the set, for `set_exits`.
            kwargs: `revision` of the exits, `token`, `cache_dir`, `local_files_only` and the like.

        Raises:
            ValueError: another base, other labels, missing or further weights, a damaged folder or a whole model. The
                model is what it was then.
        """
        _add_set(self, folder, name, kwargs)

    def set_exits(self, name: str) -> None:
        """Makes a set of exits the active one: its modules, and its fields of the config. Changing sets while another
        thread runs the model is not safe.

        Args:
            name (`str`): one of `exits_names`.

        Raises:
            ValueError: there is no such set.
        """
        if name not in self.exits_names:
            raise ValueError(f"`name`={name!r} is no set of exits; accepted are {some(self.exits_names)}.")
        sets = _sets(self)
        if name != sets.active:
            _check_can_switch(self)
            _keep_active(self)
            before = sets.active
            try:
                _activate(self, name)
            except Exception:
                _activate(self, before)
                raise


def load_exits(base: Any, folder: str | os.PathLike[str], name: str = DEFAULT, **kwargs: Any) -> Any:
    """A base with a set of exits.

    Args:
        base (`str`, `os.PathLike` or `PreTrainedModel`):
            Hub name or folder of the base, or a stock model or one with exits that is loaded. A stock model becomes a
            part of the result; one with exits is the result.
        folder (`str` or `os.PathLike`): folder of `save_exits`, or its name on the Hub.
        name (`str`, *optional*, defaults to `"default"`): of the set, for `set_exits`.
        kwargs: `revision` of the exits, `token`, `cache_dir`, `local_files_only` and the like; with the name of a
            base, also those of `from_pretrained`, such as `dtype` and `device_map`.

    Raises:
        ValueError: the exits were trained on another base, or with other labels; weights are missing or too many; the
            folder is damaged or a whole model.

    Example:

    ```python
    >>> from transformers import AutoModelForSequenceClassification
    >>> from transformers_cee import load_exits

    >>> stock = AutoModelForSequenceClassification.from_pretrained("org/bert-base-sst2")
    >>> model = load_exits(stock, "org/bert-base-sst2-exits")
    ```
    """
    if isinstance(base, ExitSetsMixin):
        base.load_exits(folder, name, **kwargs)
        return base
    hub = {one: kwargs[one] for one in HUB_ARGUMENTS if one in kwargs}
    model_class = _model_class(folder, hub)
    if isinstance(base, str | os.PathLike):
        model = model_class.from_exits_folder(folder, base=base, **kwargs)[0]
    else:
        check_stock(model_class, base, folder)
        model = _around(model_class, base, folder, kwargs)
    _sets(model).active = name
    return model


def _add_set(model: Any, source: Any, name: str, kwargs: dict[str, Any]) -> None:
    check_field("name", name, text)
    _check_can_switch(model)
    sets = _sets(model)
    folder, found = _read(type(model), source, kwargs)
    base = model.name_or_path or "the model"
    folder.check_sizes(found, model.config, base)
    if model.logits_module not in sets.brought:
        folder.check_labels(found, model.config, base, type(model))
    config = copy.deepcopy(model.config)
    for field_name in (*exit_fields(config), *TASK_FIELDS):
        setattr(config, field_name, copy.deepcopy(getattr(found, field_name)))
    tensors = model.state_dict(keep_vars=True)
    for task, module in sets.base.items():
        tensors |= {f"{task}.{own}": value for own, value in module.state_dict(keep_vars=True).items()}
    blank = _checked(folder, type(model), config, tensors, base, model)
    _keep_active(model)
    modules = {own: module for own, module in blank.named_children() if own.startswith(EXITS)}
    modules |= {task: module_at(blank, task) for task in folder.task_modules}
    for own, module in modules.items():
        _fill(module.to_empty(device=model.device), own, folder)
    tasks = {task for task in model.task_modules if module_at(blank, task) is not None}
    sets.sets[name] = ExitSet(config, folder.generation, modules, tasks)
    _activate(model, name)


def _around(model_class: Any, stock: Any, source: Any, kwargs: dict[str, Any]) -> Any:
    """A model with exits of a stock model and a folder."""
    folder, found = _read(model_class, source, kwargs)
    base = stock.name_or_path or "the model"
    folder.check_sizes(found, stock.config, base)
    folder.check_labels(found, stock.config, base, model_class)
    own = {one: getattr(found, one) for one in (*exit_fields(found), *TASK_FIELDS)}
    config = config_around(model_class, stock, own)
    bare = stock is stock.base_model
    prefix = model_class.base_model_prefix + "."
    tensors = {(prefix if bare else "") + one: value for one, value in stock.state_dict(keep_vars=True).items()}
    model = _checked(folder, model_class, config, tensors, base, stock)
    around_stock(model, stock, folder.task_modules)
    for one in (*(name for name, _ in model.named_children() if name.startswith(EXITS)), *folder.task_modules):
        _fill(module_at(model, one).to_empty(device=stock.device).train(stock.training), one, folder)
    model.tie_weights()
    left = [one for one, value in saved_tensors(model).items() if value.is_meta]
    if left:
        raise ValueError(f"{base} has no place for {some(left)} of a {model_class.__name__}: load it by its name.")
    take_fields(model, config, folder.generation)
    _sets(model).brought = set(folder.task_modules)
    return model


def _read(model_class: Any, source: Any, kwargs: dict[str, Any]) -> tuple[ExitsFolder, Any]:
    """A folder with exits and its config."""
    folder = read_exits(source, **kwargs)
    config = model_class.config_class.from_pretrained(source, **kwargs)
    delattr(config, RECORD)
    return folder, config


def _checked(
    folder: ExitsFolder, model_class: Any, config: Any, tensors: dict[str, torch.Tensor], base: Any, model: Any
) -> Any:
    """A model without weights of the exits that a folder holds, once these and those of the base are known to fit."""
    folder.check_config(config)
    blank = blank_around(model_class, config, model)
    folder.check_tensors(blank)
    wanted = {name for name in saved_tensors(blank) if name not in folder.tensors}
    lacking = wanted - tensors.keys()
    if lacking:
        raise ValueError(
            f"{base} lacks {some(lacking)} and {len(lacking) - 1} more weights that the exits of {folder.source} take "
            "from their base. Load the base with its head, or with these exits first, by `load_exits(base, folder)`."
        )
    unsaved = {name for name, _ in blank.named_buffers() if name.startswith(EXITS)} - folder.tensors.keys()
    if unsaved:
        raise ValueError(
            f"The exits of {folder.source} have buffers that are not saved, among them {some(unsaved)}: load them "
            "with their base, by `from_pretrained`."
        )
    check_base_weights(folder, {name: tensors[name] for name in wanted}, base, model)
    return blank


def _fill(module: nn.Module, own: str, folder: ExitsFolder) -> None:
    with torch.no_grad():
        for name, value in module.state_dict(keep_vars=True).items():
            value.copy_(folder.tensors[f"{own}.{name}"])


def _check_can_switch(model: Any) -> None:
    """Raises `ValueError` where the modules of a model cannot be put in and taken out."""
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        raise ValueError(
            "The model is spread over several devices (`hf_device_map`), and exits that are put into it later would "
            "not be: load it with `from_pretrained(folder, device_map=...)`."
        )
    check_no_adapters(model)


def _keep_active(model: Any) -> None:
    """Notes what the active set is now."""
    sets = _sets(model)
    tasks = {name for name in model.task_modules if module_at(model, name) is not None}
    for task in tasks - sets.brought:
        sets.base[task] = module_at(model, task)
    modules = {name: module for name, module in model.named_children() if name.startswith(EXITS)}
    modules |= {task: module_at(model, task) for task in sets.brought}
    sets.sets[sets.active] = ExitSet(copy.deepcopy(model.config), given_generation(model), modules, tasks)


def _activate(model: Any, name: str) -> None:
    sets = _sets(model)
    chosen = sets.sets[name]
    shared = {task: sets.base[task] for task in chosen.task_modules if task not in chosen.modules}
    for own, module in {**chosen.modules, **shared}.items():
        put_at(model, own, module.to(device=model.device, dtype=model.dtype).train(model.training))
    for task in set(model.task_modules) - chosen.task_modules:
        put_at(model, task, None)
    take_fields(model, chosen.config, chosen.generation)
    if getattr(chosen.config, "vocab_size", None) != getattr(model.config, "vocab_size", None):
        # As it was done for the set that was active then.
        model.resize_exits()
    sets.active, sets.brought = name, {task for task in model.task_modules if task in chosen.modules}


def _sets(model: Any) -> ExitSets:
    sets: ExitSets = model.__dict__.setdefault("_exit_sets", ExitSets())
    return sets


def note_brought(model: Any, task_modules: Iterable[str]) -> None:
    """Notes which modules of the task a model has from its exits and not from its base."""
    _sets(model).brought = set(task_modules)


def _model_class(folder: Any, kwargs: dict[str, Any]) -> Any:
    """The class that a folder's config is of."""
    values = config_values(folder, kwargs) or {}
    entry = MODELS.get(str(values.get("model_type")))
    if entry is None:
        read_exits(folder, **kwargs)
        raise ValueError(
            f"`model_type`={values.get('model_type')!r} of {folder} is unknown; accepted are {some(MODELS)}."
        )
    module, _, name = entry.model.rpartition(".")
    return getattr(importlib.import_module(module), name)


__all__ = ["ExitSetsMixin", "load_exits", "note_brought"]
