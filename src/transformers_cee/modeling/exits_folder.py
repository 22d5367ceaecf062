# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Folders with exits and without the base that they were trained on.

`config.json` is that of the whole model, so that the Auto classes find its class, and says under `exits_of` which base
the exits belong to: name, revision, and a fingerprint of all weights that the folder leaves to it. The exits are in
`exits.safetensors`, and with them those modules of the task that the base lacks or has otherwise.
"""

from __future__ import annotations

import copy
import hashlib
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.utils import logging
from transformers.utils.hub import cached_file

from transformers_cee.exits.config_loading import spoken_exits
from transformers_cee.exits.fields import MAX_LAYERS, Kind, check_fields, listed, mapping, shown, text, whole
from transformers_cee.files import replacing
from transformers_cee.modeling.fingerprints import are_fingerprints, fingerprints, is_of, saved_tensors


logger = logging.get_logger(__name__)

# Field of config.json that tells a folder with exits alone from a whole model.
RECORD = "exits_of"
WEIGHTS = "exits.safetensors"
CARD = "README.md"
EXITS = "exit_"
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")
_WHOLE = re.compile(r"(pytorch_|adapter_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?|adapter_config\.json")
_FIELDS = {
    "base": text,
    "revision": text.or_none(),
    "fingerprints": Kind(are_fingerprints, "a dictionary from dtypes to fingerprints"),
    "task_modules": listed(text),
    "weights": text,
    "generation": mapping,
    "layers": listed(whole(1, MAX_LAYERS)),
}
_SIZES = ("num_hidden_layers", "hidden_size", "vocab_size", "depths", "hidden_sizes")
_SHOWN = 3


@dataclass
class ExitsFolder:
    """What a folder with exits holds.

    Args:
        source: where it was read from.
        base (`str`), revision (`str`, *optional*): Hub name or folder of the base, and its commit.
        fingerprints (`dict[str, str]`): of the base's weights, by dtype.
        task_modules (`list[str]`): modules of the task that the folder holds, because the base has none or others.
        generation (`dict`): exit arguments of the generation config.
        layers (`list[int]`): layers (1-based) of the exits, the last one included.
        tensors (`dict[str, Tensor]`): the weights.
    """

    source: Any
    base: str
    revision: str | None
    fingerprints: dict[str, str]
    task_modules: list[str]
    generation: dict[str, Any]
    layers: list[int]
    tensors: dict[str, Tensor]

    def check_config(self, config: Any) -> None:
        """Raises `ValueError` where a config asks for other exits than there are."""
        if config.exit_layer_numbers != self.layers:
            raise ValueError(
                f"`exit_layers`={config.exit_layers!r} of a model with {config.num_hidden_layers} layers, but "
                f"{self.source} holds {spoken_exits(self.layers)}; accepted are these, for a base of as many layers."
            )

    def check_tensors(self, blank: Any) -> None:
        """Raises `ValueError` unless the weights are those of a model's exits.

        Args:
            blank (`PreTrainedModel`): a model of the folder's config; its weights are not read.
        """
        unknown = set(self.task_modules) - set(blank.task_modules)
        if unknown:
            raise ValueError(
                f"`{RECORD}.task_modules`={self.task_modules!r} of {self.source} must be among "
                f"{', '.join(blank.task_modules)}."
            )
        expected = {
            name: value for name, value in saved_tensors(blank).items() if belongs_to_exits(name, self.task_modules)
        }
        for names, spoken in (
            (expected.keys() - self.tensors, "lacks tensors of the exits that its config describes"),
            (self.tensors.keys() - expected, "has tensors that are of no exit that its config describes"),
        ):
            if names:
                raise ValueError(
                    f"{self.source} {spoken}: {len(names)}, among them {some(names)}. Accepted are folders as "
                    "`save_exits` writes them."
                )
        for name, value in expected.items():
            if value.shape != self.tensors[name].shape:
                raise ValueError(
                    f"{name!r} of {self.source} has the shape {tuple(self.tensors[name].shape)}, and "
                    f"{tuple(value.shape)} in a {type(blank).__name__} of these sizes, labels and exits."
                )

    def check_sizes(self, config: Any, base_config: Any, base: Any, cut: bool = False) -> None:
        """Raises `ValueError` where a base of other sizes is given.

        Args:
            cut (`bool`, *optional*, defaults to `False`): may the base have further layers?
            config (`PreTrainedConfig`): of the folder.
            base_config (`PreTrainedConfig`): of the base.
            base: what to call it.
        """
        for name in _SIZES:
            if isinstance(getattr(type(config), name, None), property):
                # Follows from others, and may mean something else in a stock config.
                continue
            wanted, found = _size(config, name), _size(base_config, name)
            deeper = cut and name == "num_hidden_layers" and wanted < found
            if wanted != found and not deeper:
                raise ValueError(
                    f"{base} has `{name}`={found!r}, but the exits of {self.source} were trained on {self.base} with "
                    f"{wanted!r}."
                )

    def check_labels(self, config: Any, base_config: Any, base: Any, model_class: Any) -> None:
        """Raises `ValueError` where the last exit is the base's own head and has other labels than the exits.

        Args:
            config (`PreTrainedConfig`): of the folder.
            base_config (`PreTrainedConfig`): of the base.
            base: what to call it.
            model_class (`type`): class of the model.
        """
        if model_class.logits_module in self.task_modules:
            return
        own, theirs = list(config.id2label.values()), list(base_config.id2label.values())
        named = not any(_are_default(labels) for labels in (own, theirs))
        if len(own) != len(theirs) or (named and own != theirs):
            raise ValueError(
                f"{base} has the labels {shown(theirs)}, but the exits of {self.source} tell {shown(own)} apart "
                "(`id2label`, `num_labels`); accepted are bases with the same labels in the same order."
            )

    def check_base(self, tensors: Mapping[str, Tensor], base: Any) -> None:
        """Raises `ValueError` unless weights are those that the exits were trained on, and warns where that cannot be
        known.

        Args:
            tensors (mapping of `str` to `Tensor`): all weights of the model but those of the folder.
        """
        if any(value.is_meta or hasattr(value, "full_tensor") for value in tensors.values()):
            self.say_unknown(base, "its weights are not all in memory")
            return
        answer = is_of(self.fingerprints, tensors)
        if answer is None:
            raise ValueError(
                f"The exits of {self.source} were trained in {' and '.join(self.fingerprints)}; whether {base} is "
                "their base is not known in a dtype that holds neither more nor less. Load it with that `dtype`."
            )
        if not answer:
            raise ValueError(
                f"The weights of {base} are not those that the exits of {self.source} were trained on, which are "
                f"{self.base}{f' at revision {self.revision}' if self.revision else ''}: their fingerprints differ."
            )

    def say_unknown(self, base: Any, reason: str) -> None:
        """Warns that the base was not looked at."""
        logger.warning(f"Whether {base} is the base that {self.source} was trained on is not known: {reason}.")

    def fill(self, model: nn.Module) -> None:
        """Gives a model's exits their weights, in its own dtypes and on its devices."""
        own = saved_tensors(model)
        away = {name for name in self.tensors if own[name].is_meta}
        if away:
            raise ValueError(
                f"`device_map` leaves {some(away)} and {len(away) - 1} more weights of exits out of memory; accepted "
                "are maps that place everything that begins with 'exit_' on a device."
            )
        with torch.no_grad():
            for name, value in self.tensors.items():
                own[name].copy_(value)


def _size(config: Any, name: str) -> Any:
    """A size of a config; lists are tuples before they are saved."""
    value = getattr(config, name, None)
    return list(value) if isinstance(value, tuple) else value


def read_exits(source: Any, record: Any = None, **kwargs: Any) -> ExitsFolder:
    """Reads a folder with exits, or a repository of the Hub.

    Args:
        source (`str` or `os.PathLike`): the folder, or a name on the Hub.
        record (*optional*): what its config.json says of the exits, where that is read already.
        kwargs: `revision`, `token`, `cache_dir`, `local_files_only` and the like, as in `from_pretrained`.

    Raises:
        ValueError: it holds no exits, or a whole model, or is damaged.
    """
    unknown = set(kwargs) - set(HUB_ARGUMENTS)
    if unknown:
        raise TypeError(f"{some(unknown)} are unknown; accepted are {', '.join(HUB_ARGUMENTS)}.")
    if record is None:
        record = _record_of(source, kwargs)
    if not isinstance(record, dict):
        raise ValueError(f"`{RECORD}`={record!r} in the config.json of {source} must be a dictionary.")
    check_fields(record, _FIELDS, tuple(_FIELDS), RECORD)
    try:
        path = cached_file(source, WEIGHTS, **kwargs)
    except OSError as error:
        raise ValueError(f"{source} lacks {WEIGHTS}, which its config.json speaks of.") from error
    content = Path(str(path)).read_bytes()
    if hashlib.sha256(content).hexdigest() != record["weights"]:
        raise ValueError(
            f"{WEIGHTS} of {source} is damaged, or not the one that its config.json was written with. Get or save "
            "both again."
        )
    rest = {name: value for name, value in record.items() if name != "weights"}
    return ExitsFolder(source, tensors=safetensors.torch.load(content), **rest)


def _record_of(source: Any, kwargs: Mapping[str, Any]) -> Any:
    values = config_values(source, kwargs)
    if values is None:
        raise ValueError(f"{source} holds no config.json; accepted are folders as `save_exits` writes them.")
    if RECORD not in values:
        raise ValueError(
            f"{source} is a whole model and no folder with exits alone: load it with `from_pretrained`. `save_exits` "
            "of a model writes such a folder."
        )
    return values[RECORD]


def config_values(source: Any, kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The config.json of a folder or repository, None where there is none.

    Args:
        kwargs (mapping): arguments of `from_pretrained`, among them those of the Hub.
    """
    given = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
    try:
        values: dict[str, Any] = PreTrainedConfig.get_config_dict(source, **given)[0]
    except OSError:
        return None
    # Some releases give nothing where there is no such file.
    return values or None


def blank_model(model_class: Any, config: Any, **kwargs: Any) -> Any:
    """A model without weights, for the names and shapes that it would have."""
    with torch.device("meta"):
        return model_class._from_config(copy.deepcopy(config), **kwargs)


def belongs_to_exits(name: str, task_modules: Collection[str]) -> bool:
    """Is this a weight of the exits, or of one of these modules of the task?"""
    return name.startswith(EXITS) or any(name.startswith(one + ".") for one in task_modules)


def write_exits(model: Any, folder: str | os.PathLike[str], record: dict[str, Any]) -> None:
    """Writes weights and config of a model's exits.

    Args:
        record (`dict`): what `ExitsFolder` says of them, fingerprints and tensors left out.
    """
    tensors = saved_tensors(model)
    own = {name for name in tensors if belongs_to_exits(name, record["task_modules"])}
    weights = {name: tensors[name].detach().to("cpu").contiguous() for name in sorted(own)}
    content = safetensors.torch.save(weights, metadata={"format": "pt"})
    config = copy.deepcopy(model.config)
    config.exit_layers = list(model.layer_numbers)
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    base = {name: value for name, value in tensors.items() if name not in own}
    digest = hashlib.sha256(content).hexdigest()
    setattr(config, RECORD, {**record, "fingerprints": fingerprints(base), "weights": digest})
    with replacing(Path(folder) / WEIGHTS) as path:
        path.write_bytes(content)
    config.save_pretrained(folder)


def check_target(folder: str | os.PathLike[str]) -> None:
    """Raises `ValueError` where exits would be written over something else."""
    path = Path(folder)
    if not path.exists():
        return
    if not path.is_dir():
        raise ValueError(f"`save_directory`={os.fspath(folder)!r} is a file; accepted is a folder.")
    others = sorted(one.name for one in path.iterdir() if _WHOLE.fullmatch(one.name))
    if not others and (path / "config.json").exists() and RECORD not in (config_values(path, {}) or {}):
        others = ["config.json"]
    if others:
        raise ValueError(
            f"`save_directory`={os.fspath(folder)!r} holds a whole model or an adapter ({others[0]}); accepted is a "
            "folder of its own."
        )


def some(names: Collection[str]) -> str:
    """A few names for a sentence."""
    return ", ".join(map(repr, sorted(names)[:_SHOWN]))


def _are_default(labels: list[str]) -> bool:
    return labels == [f"LABEL_{index}" for index in range(len(labels))]


__all__ = [
    "CARD",
    "HUB_ARGUMENTS",
    "RECORD",
    "WEIGHTS",
    "ExitsFolder",
    "belongs_to_exits",
    "blank_model",
    "check_target",
    "config_values",
    "read_exits",
    "some",
    "write_exits",
]
