# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Folders of exported models: what they hold, and how they are loaded.

`config.json` is that of the model, and says under `exit_engine` what the folder is for; `exits.safetensors` has the
policies and estimators, which calibration asks; the rest is the engine's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig
from transformers.utils.hub import cached_file

from transformers_cee.engines.engine import ENGINES
from transformers_cee.engines.model import ExportedSequenceClassifier
from transformers_cee.engines.record import EXITS, GRAPHS, RECORD, check_record
from transformers_cee.engines.serving import is_of, load_serving
from transformers_cee.exits.fields import check_field, whole


_OF_HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")


# Arguments of `from_pretrained` about code or weights, which an exported model has none of.
_WITHOUT_EFFECT = (
    "trust_remote_code",
    "torch_dtype",
    "attn_implementation",
    "use_safetensors",
    "weights_only",
    "low_cpu_mem_usage",
    "ignore_mismatched_sizes",
    "adapter_kwargs",
    "key_mapping",
    "code_revision",
    "commit_hash",
)


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
        ValueError: a record that is not of its kind, an unknown engine, a device or option that it does not have, or
            weights that are damaged or of other exits.
    """
    hub = {name: kwargs.pop(name) for name in _OF_HUB if name in kwargs}
    threads, device = kwargs.pop("threads", None), str(kwargs.pop("device", "cpu"))
    check_field("threads", threads, whole(1).or_none())
    kwargs.pop("dtype", None)
    options = {name: kwargs.pop(name) for one in ENGINES.values() for name in one.options if name in kwargs}
    if config is None:
        config, kwargs = AutoConfig.from_pretrained(source, **hub, **kwargs, return_unused_kwargs=True)
    unknown = [name for name in kwargs if name not in _WITHOUT_EFFECT and not name.startswith("_")]
    if unknown:
        raise TypeError(
            f"`{unknown[0]}`={kwargs[unknown[0]]!r} is no argument of an exported model; accepted are `threads`, "
            "`device`, options of its engine, those that say where to find files, and, without a config, its fields."
        )
    record = check_record(getattr(config, RECORD))
    engine = ENGINES.find(record["engine"])
    engine.require()
    engine.check_precision(record["precision"])
    foreign = sorted(options.keys() - set(engine.options))
    if foreign:
        raise ValueError(f"`{foreign[0]}`={options[foreign[0]]!r} is no option of the engine {engine.name!r}.")
    folder, tensors = _files(source, record["files"], hub)
    threads = threads or torch.get_num_threads()
    made = engine(folder / GRAPHS, config, record["precision"], threads, device, **options)
    model = ExportedSequenceClassifier(config, made)
    kept = {name: value for name, value in tensors.items() if is_of(name, config)}
    try:
        model.load_state_dict(kept)
    except RuntimeError as error:
        raise ValueError(f"{EXITS} of {source} does not belong to its config.json: {error}") from error
    model.name_or_path = str(source)
    load_serving(model, folder)
    if model.device.type != "cpu":
        # Exports measure on the CPU; a GPU's layers and checks cost something else altogether.
        model.costs = None
    return model


def _files(source: Any, names: list[str], hub: dict[str, Any]) -> tuple[Path, dict[str, Tensor]]:
    """The folder with all files of a record, fetched where it is on the Hub, and the weights of its exits."""
    paths = {name: Path(str(cached_file(source, name, **hub))) for name in names}
    weights = Path(str(cached_file(source, EXITS, **hub)))
    places = (weights.parent, weights.parent / GRAPHS)
    missing = [name for name, path in paths.items() if path.parent not in places]
    if missing:
        raise ValueError(
            f"`{RECORD}.files` of {source}: {missing[0]!r} lies elsewhere; accepted are files of `{GRAPHS}`."
        )
    try:
        return weights.parent, load_file(weights)
    except SafetensorError as error:
        raise ValueError(f"{EXITS} of {source} is damaged ({error}). Export the model again.") from error
