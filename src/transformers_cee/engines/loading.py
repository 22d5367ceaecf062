# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Folders of exported models: what they hold, and how they are loaded.

`config.json` is that of the model, and says under `exit_engine` what the folder is for; `exits.safetensors` has the
policies and estimators, which calibration asks; the rest is the engine's.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig
from transformers.utils.hub import cached_file

from transformers_cee.engines.engine import ENGINES
from transformers_cee.engines.model import ExportedSequenceClassifier
from transformers_cee.engines.serving import is_of, load_serving
from transformers_cee.exits.criteria import CRITERIA
from transformers_cee.exits.fields import Kind, check_fields, choice, listed, text


RECORD = "exit_engine"
EXITS = "exits.safetensors"
GRAPHS = "engine"
_OF_HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")


def _is_own_file(name: Any) -> bool:
    """Is this the name of a file inside of the folder?"""
    if not isinstance(name, str) or "\\" in name:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and len(path.parts) in (1, 2)


_FIELDS = {
    "engine": text,
    "precision": text,
    "criterion": choice(CRITERIA).or_none(),
    "files": listed(Kind(_is_own_file, "names of files of the folder")),
}


def load_exported(source: Any, config: Any = None, **kwargs: Any) -> ExportedSequenceClassifier:
    """An exported model from its folder or from the Hub.

    Args:
        source (`str` or `os.PathLike`): the folder or its name on the Hub.
        config (`PreTrainedConfig`, *optional*): of the folder.
        kwargs: `threads` (`int`), by default as many as torch uses; `device` (`str`), where the engine has others than
            the CPU; options of the engine, such as `compile` of `"torch"`; those of `from_pretrained` that say where
            to find a file, such as `revision`; and fields of the config, among them `exit_layers`, of which the folder
            has the exits.

    Raises:
        ImportError: the engine is not installed.
        OSError: there is no such folder, or it lacks a file.
        ValueError: a record that is not of its kind, an unknown engine, or a device or option that it does not have.
    """
    hub = {name: kwargs.pop(name) for name in _OF_HUB if name in kwargs}
    threads, device = kwargs.pop("threads", None), str(kwargs.pop("device", "cpu"))
    kwargs.pop("dtype", None)
    options = {name: kwargs.pop(name) for one in ENGINES.values() for name in one.options if name in kwargs}
    if config is None:
        config = AutoConfig.from_pretrained(source, **hub, **kwargs)
    record = getattr(config, RECORD)
    check_fields(record, _FIELDS, list(_FIELDS), RECORD)
    engine = ENGINES.find(record["engine"])
    engine.require()
    engine.check_precision(record["precision"])
    unknown = sorted(options.keys() - set(engine.options))
    if unknown:
        raise ValueError(f"`{unknown[0]}`={options[unknown[0]]!r} is no option of the engine {engine.name!r}.")
    paths = {name: Path(str(cached_file(source, name, **hub))) for name in record["files"]}
    weights = Path(str(cached_file(source, EXITS, **hub)))
    threads = threads or torch.get_num_threads()
    made = engine(weights.parent / GRAPHS, config, record["precision"], threads, device, **options)
    places = (weights.parent, weights.parent / GRAPHS)
    missing = [name for name, path in paths.items() if path.parent not in places]
    if missing:
        raise ValueError(
            f"`{RECORD}.files` of {source}: {missing[0]!r} lies elsewhere; accepted are files of `{GRAPHS}`."
        )
    model = ExportedSequenceClassifier(config, made)
    kept = {name: value for name, value in load_file(weights).items() if is_of(name, model.layer_numbers)}
    model.load_state_dict(kept)
    model.name_or_path = str(source)
    load_serving(model, weights.parent)
    return model
