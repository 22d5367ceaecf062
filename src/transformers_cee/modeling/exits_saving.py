# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Saving of exits without their base, once it is known that the base is what it is said to be."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging
from transformers.utils.hub import cached_file, extract_commit_hash

from transformers_cee.files import write_text
from transformers_cee.modeling.exits_card import exits_card
from transformers_cee.modeling.exits_folder import (
    CARD,
    EXITS,
    HUB_ARGUMENTS,
    RECORD,
    belongs_to_exits,
    check_target,
    config_values,
    some,
    write_exits,
)
from transformers_cee.modeling.exits_loading import given_generation, module_at
from transformers_cee.modeling.fingerprints import saved_tensors


logger = logging.get_logger(__name__)


def save_exits(
    model: Any, folder: str | os.PathLike[str], base: Any = None, card_name: str | None = None, **kwargs: Any
) -> None:
    """Saves a model's exits, see `ExitSetsMixin.save_exits`.

    Args:
        card_name (`str`, *optional*, defaults to the folder): where the card says that they are loaded from.
    """
    unknown = set(kwargs) - set(HUB_ARGUMENTS)
    if unknown:
        raise TypeError(f"{some(unknown)} are unknown; accepted are {', '.join(HUB_ARGUMENTS)}.")
    check_target(folder)
    check_no_adapters(model)
    if len(model.layer_numbers) == 1:
        raise ValueError(
            f"`exit_layers`={model.config.exit_layers!r}: the model has no exit but the last one to save."
        )
    base = model.name_or_path if base is None else os.fspath(base)
    if not base:
        raise ValueError("`base`=None, and the model was not loaded from a checkpoint; accepted is its Hub name.")
    brought, commit = _compare_with_base(model, base, kwargs)
    record = {
        "base": base,
        "revision": commit or kwargs.get("revision"),
        "task_modules": sorted(brought),
        "generation": given_generation(model),
        "layers": list(model.layer_numbers),
    }
    write_exits(model, folder, record)
    card = Path(folder) / CARD
    if not card.exists():
        write_text(card, exits_card(model, record, card_name or os.fspath(folder)))


def check_no_adapters(model: nn.Module) -> None:
    """Raises `ValueError` where weights of adapters stand beside a model's own."""
    wrapped = [
        name for name in model.state_dict() if re.search(r"\.(base_layer|modules_to_save|original_module)\.", name)
    ]
    if wrapped:
        raise ValueError(
            f"The model has adapters ({wrapped[0]!r}), which belong to neither base nor exits: merge them first "
            "(`merge_and_unload`), which makes another base, or save the adapter, which holds the exits."
        )


def _compare_with_base(model: Any, base: str, kwargs: dict[str, Any]) -> tuple[set[str], str | None]:
    """Which modules of the task a base lacks or has otherwise, and its commit; raises `ValueError` where the layers
    are not those of the base."""
    tasks = {name for name in model.task_modules if module_at(model, name) is not None}
    values = config_values(base, kwargs)
    if values is None:
        logger.warning(
            f"The base {base} cannot be reached. Whether the model's layers are its is not known, and "
            f"{some(tasks)} {'is' if len(tasks) == 1 else 'are'} saved with the exits."
        )
        return {name for name in tasks if _holds(saved_tensors(model), name)}, None
    if RECORD in values:
        raise ValueError(f"`base`={base!r} is itself a folder with exits alone; accepted are whole models.")
    model_class = type(model)
    model_class.config_class.check_model_type(values.get("model_type"), base)
    mine = saved_tensors(model)
    reference, info = model_class.load_checkpoint(
        base, brings=FromElsewhere(tasks), config=copy.deepcopy(model.config), dtype=model.dtype, **kwargs
    )
    lacking = info["missing_keys"] | {name for name, *_ in info["mismatched_keys"]}
    theirs = reference.state_dict()
    differ = [
        name
        for name, value in mine.items()
        if not name.startswith(EXITS) and (name in lacking or not _equal(value, theirs.get(name)))
    ]
    brought = {task for task in tasks if _holds(differ, task)}
    changed = [name for name in differ if not belongs_to_exits(name, brought)]
    if changed:
        raise ValueError(
            f"{len(changed)} weights of the model's layers are not those of `base`={base!r} (revision "
            f"{kwargs.get('revision') or 'main'}), among them {some(changed)}: exits alone would not work on it. Name "
            "the checkpoint that they are of, train exits with `trainable='exits'`, or save the model whole with "
            "`save_pretrained`."
        )
    return brought, _commit_of(base, kwargs)


class FromElsewhere:
    """Names of all weights of exits, and of modules of the task."""

    def __init__(self, task_modules: Collection[str]) -> None:
        self.task_modules = task_modules

    def __contains__(self, name: object) -> bool:
        return belongs_to_exits(str(name), self.task_modules)


def _holds(names: Iterable[str], task: str) -> bool:
    return any(name.startswith(task + ".") for name in names)


def _equal(value: torch.Tensor, other: torch.Tensor | None) -> bool:
    if other is None or other.shape != value.shape:
        return False
    return torch.equal(value.detach().to("cpu"), other.to("cpu", value.dtype))


def _commit_of(base: str, kwargs: dict[str, Any]) -> str | None:
    if os.path.isdir(base):
        return None
    commit: str | None = extract_commit_hash(cached_file(base, "config.json", **kwargs), None)
    return commit


__all__ = ["FromElsewhere", "check_no_adapters", "save_exits"]
