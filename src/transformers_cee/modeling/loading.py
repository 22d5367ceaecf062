# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Checkpoints into models with exits and back: what fits is loaded, what is new is said, what does not fit is
refused."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Container, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import PreTrainedConfig
from transformers.utils import logging

from transformers_cee.exits.by_layer import layers_named
from transformers_cee.exits.config_loading import drop_unfit, spoken_exits
from transformers_cee.lazy import named
from transformers_cee.modeling.exit_sets import ExitSetsMixin, note_brought
from transformers_cee.modeling.exits_folder import EXITS, RECORD, config_values
from transformers_cee.modeling.exits_loading import load_from_folder


logger = logging.get_logger(__name__)

# Containers of what is an exit's own, and what a person calls it.
_OWN = {"exit_heads": "heads", "exit_norms": "norms", "exit_policies": "policies"}
_ESTIMATORS = "exit_estimators"
# What came of its drafts is a record, and no weight.
_DRAFTER, _RECORD = "exit_drafter", "exit_drafter.judged"
_BY_POSITION = re.compile(
    r"^(exit_(heads|norms|policies)\.\w+|exit_estimators\.\w+\.(linears|projections))\.\d+\.|\.log_temperatures$"
)
_LAYER = re.compile(r"\.layers?\.(\d+)\.")
# Fields of a config that say that a folder is loaded elsewhere, and by what.
_ELSEWHERE = {"exit_engine": "transformers_cee.engines.loading.load_exported"}


@dataclass
class _Request:
    """One call of `from_pretrained`, and what it found."""

    source: Any = None
    ignores_sizes: bool = False
    # Names of weights that come from elsewhere, whatever the checkpoint has.
    brings: Container[str] = ()
    found: dict[str, set] = field(default_factory=dict)


_REQUEST: ContextVar[_Request | None] = ContextVar("request", default=None)


class EarlyExitLoadingMixin(ExitSetsMixin):
    """`from_pretrained` and `save_pretrained` of a model with exits; mix in before the family's `PreTrainedModel`."""

    # Modules beside the exits that a checkpoint of another task may lack.
    task_modules: ClassVar[tuple[str, ...]] = ()
    # That of them which gives logits: what there is one of for each label.
    logits_module: ClassVar[str] = "classifier"

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        config: Any = None,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As `PreTrainedModel.from_pretrained`. Weights of exits are found by layer, so that `exit_layers` may name
        other exits than those that were trained: these are kept as they are, and new ones are announced as untrained.

        From a folder or repository with exits alone, see `save_exits`, the base that it names is loaded at its own
        revision, and then the exits; `revision` and `subfolder` concern the exits.

        Raises:
            ValueError: a checkpoint of another architecture, or one that lacks weights of the layers; more layers than
                it has; fewer layers than a model with exits was trained with; a field of the exits is out of its
                range; exits without their base, or on another one.
        """
        source = pretrained_model_name_or_path
        if isinstance(config, PreTrainedConfig):
            check_config_class(config, cls)
        own = isinstance(config, PreTrainedConfig) and (source is None or config.name_or_path == str(source))
        values = vars(config) if own else config_values(source, kwargs) or {}
        for record, full_name in _ELSEWHERE.items():
            if record in values and source is not None:
                given = config if isinstance(config, PreTrainedConfig) else None
                model = named(full_name)(source, given, **kwargs)
                return (model, {}) if output_loading_info else model
        if RECORD in values and source is not None:
            if isinstance(config, str | os.PathLike):
                config = cls.config_class.from_pretrained(config)  # type: ignore[attr-defined]
            model, info = cls.from_exits_folder(source, config=config, **kwargs)
        else:
            if isinstance(config, PreTrainedConfig):
                config.check_model_type(values.get("model_type"), source)
            model, info = cls.load_checkpoint(
                source, *args, config=config, ignore_mismatched_sizes=ignore_mismatched_sizes, **kwargs
            )
        return (model, info) if output_loading_info else model

    @classmethod
    def from_exits_folder(
        cls, source: Any, config: Any = None, base: Any = None, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """A base with the exits of a folder, and what `output_loading_info` is to say.

        Args:
            source (`str` or `os.PathLike`): the folder or its name on the Hub.
            config (`PreTrainedConfig`, *optional*): of the folder.
            base (`str` or `os.PathLike`, *optional*): instead of the base that the folder names.
            kwargs: of `from_pretrained`.
        """
        model, info, folder = load_from_folder(cls, cls.load_checkpoint, source, config, base, kwargs)
        note_brought(model, folder.task_modules)
        return model, {**info, "missing_keys": set(info["missing_keys"]) - folder.tensors.keys()}

    @classmethod
    def load_checkpoint(
        cls, source: Any, *args: Any, brings: Container[str] = (), ignore_mismatched_sizes: bool = False, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """A whole checkpoint, and what was found in it.

        Args:
            brings (container of `str`, *optional*): names of weights that come from elsewhere.
            kwargs: of `PreTrainedModel.from_pretrained`.
        """
        request = _Request(source, ignore_mismatched_sizes, brings)
        before = _REQUEST.set(request)
        try:
            model, info = super().from_pretrained(  # type: ignore[misc]
                source,
                *args,
                output_loading_info=True,
                ignore_mismatched_sizes=ignore_mismatched_sizes or bool(brings),
                **kwargs,
            )
        finally:
            _REQUEST.reset(before)
        return model, {**info, **request.found}

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.load_adapter`.

        Raises:
            ValueError: the installed release of transformers has passed over what the adapter saves in full.
        """
        info = super().load_adapter(*args, **kwargs)  # type: ignore[misc]
        left = sorted(name for name in getattr(info, "unexpected_keys", ()) if "exit_" in name)
        if left:
            raise ValueError(
                f"The adapter holds {left[0]!r} and {len(left) - 1} more weights of exits, which this release of "
                "transformers does not load. Use `PeftModel.from_pretrained` or `AutoPeftModelFor...`, or a newer one."
            )
        return info

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As `PreTrainedModel.save_pretrained`. The saved config names the exits that the weights are of."""
        config, own = self.config, self.layer_numbers  # type: ignore[attr-defined]
        if config.exit_layer_numbers != own:
            logger.warning(
                f"`config.exit_layers`={config.exit_layers} was changed after the model was made; the config is saved "
                f"with what its weights are of, {spoken_exits(own)}. For others, load the model with "
                "`from_pretrained(..., exit_layers=...)`."
            )
            config.exit_layers = list(own)
        # Of a folder with exits alone, which this is not.
        vars(config).pop(RECORD, None)
        super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        # After new weights are drawn and tied, before transformers prints its table of them.
        super()._adjust_missing_and_unexpected_keys(loading_info)  # type: ignore[misc]
        request = _REQUEST.get() or _Request()
        request.found = {
            "missing_keys": set(loading_info.missing_keys),
            "unexpected_keys": set(loading_info.unexpected_keys),
            "mismatched_keys": set(loading_info.mismatched_keys),
        }
        try:
            if request.brings:
                _review_base(self, loading_info, request)
            else:
                _review(self, loading_info, request)
        except ValueError:
            # The error says it all.
            loading_info.missing_keys, loading_info.unexpected_keys = set(), set()
            loading_info.mismatched_keys = set()
            raise


def check_config_class(config: Any, model_class: Any) -> None:
    """Raises `TypeError` unless a model class can be made from a config."""
    accepted = model_class.config_class
    if not isinstance(config, accepted):
        raise TypeError(
            f"`config` of type {type(config).__name__} does not fit {model_class.__name__}; accepted is "
            f"{accepted.__name__}, made by `{accepted.__name__}.from_pretrained` from a stock checkpoint, too."
        )


def announce_untrained(model: Any, names: Collection[str], source: Any = None) -> None:
    """Says in one sentence which exits and heads of a model no checkpoint has given weights to.

    Args:
        names (collection of `str`): names of parameters and buffers.
        source (*optional*): what was loaded.
    """
    layers: dict[str, list[str]] = {}
    for container, spoken in _OWN.items():
        own = layers_named(name for name in names if name.startswith(container + "."))
        if own:
            layers.setdefault(spoken_exits(own), []).append(spoken)
    new = [f"{_listed(kinds)} of {found}" for found, kinds in layers.items()]
    new += [f"the estimator {name!r}" for name in sorted(_estimators_of(names))]
    of_drafter = any(name.startswith(_DRAFTER + ".") and name != _RECORD for name in names)
    new += ["weights of the drafter"] if of_drafter else []
    new += [f"`{task}`" for task in model.task_modules if any(name.startswith(task + ".") for name in names)]
    if new:
        loaded = "" if source is None else f" loaded from {source}"
        logger.warning(f"{type(model).__name__}{loaded}: untrained are {_listed(new)}.")


def _review(model: Any, info: Any, request: _Request) -> None:
    """Refuses what cannot be meant, announces what is new, and takes both out of what transformers reports. What it
    leaves there is unknown to it."""
    missing, unexpected = set(info.missing_keys), set(info.unexpected_keys)
    if any(_BY_POSITION.search(name) for name in unexpected):
        raise ValueError(
            f"{request.source} names its exits by position, as development versions did; accepted are weights that "
            "name them by layer, such as 'exit_policies.networks.layer_2'. Train it anew."
        )
    sizes = {name for name, *_ in info.mismatched_keys}
    new = {name for name in missing if _is_new(model, name)}
    _check_layers(model, missing - new, unexpected, missing, request.source)
    if request.ignores_sizes:
        resized = {name for name in sizes if _is_new(model, name)}
        info.mismatched_keys = {entry for entry in info.mismatched_keys if entry[0] not in resized}
        new |= resized
    info.missing_keys = missing - new
    _drop_what_no_longer_fits(model, missing, unexpected)
    info.unexpected_keys = {name for name in unexpected if not _is_left_out(model, name)}
    if not info.mismatched_keys:
        # Otherwise transformers raises an error, with its table.
        announce_untrained(model, new & set(model.state_dict()), request.source)


def _review_base(model: Any, info: Any, request: _Request) -> None:
    """As `_review`, for a model that gets its exits from elsewhere: only what it takes from the checkpoint counts."""
    missing = {name for name in info.missing_keys if name not in request.brings}
    unexpected = {name for name in info.unexpected_keys if not name.startswith(EXITS)}
    # Whatever exits it has give way.
    _check_layers(model, missing, unexpected, set(model.state_dict()), request.source)
    sizes = sorted(name for name, *_ in info.mismatched_keys if name not in request.brings)
    if sizes:
        raise ValueError(
            f"{request.source} has other sizes than the {type(model).__name__} that its exits are of: "
            f"{', '.join(sizes[:3])} {'differs' if len(sizes) == 1 else 'differ'} in shape."
        )
    info.missing_keys, info.mismatched_keys = set(), set()
    info.unexpected_keys = {name for name in unexpected if not _is_left_out(model, name)}


def _is_new(model: Any, name: str) -> bool:
    """May a checkpoint lack this weight?"""
    return name.split(".")[0] in (*_OWN, _ESTIMATORS, _DRAFTER) or any(
        name.startswith(one + ".") for one in model.task_modules
    )


def _is_left_out(model: Any, name: str) -> bool:
    """Is this weight of a checkpoint one that the config has no place for: of an exit that is not asked for, of a
    layer behind the last one, or of another task's head?"""
    container = name.split(".")[0]
    if container in (_ESTIMATORS, _DRAFTER):
        return True
    if container in _OWN:
        return bool(set(layers_named([name])) - set(model.layer_numbers))
    layer = _LAYER.search(name)
    if layer is not None and int(layer[1]) >= model.config.num_hidden_layers:
        return True
    return not name.startswith(model.base_model_prefix + ".") or any(f"{one}." in name for one in model.task_modules)


def _check_layers(model: Any, lacking: set[str], unexpected: set[str], missing: set[str], source: Any) -> None:
    """Raises `ValueError` where the layers of a model and those of a checkpoint do not fit."""
    asked = model.config.num_hidden_layers
    layers = {int(found[1]) for name in lacking if (found := _LAYER.search(name))}
    if lacking and layers == set(range(min(layers, default=0), asked)) and min(layers) > 0 and _all_in_layers(lacking):
        raise ValueError(
            f"`num_hidden_layers`={asked}, but {source} has the weights of {min(layers)} layers; accepted are at most "
            "as many."
        )
    if lacking:
        some = ", ".join(sorted(lacking)[:3])
        raise ValueError(
            f"{source} lacks {len(lacking)} weights of the layers of {type(model).__name__}, among them {some}: "
            f"accepted are whole checkpoints of {_stock(model)} and of {model.config.model_type}."
        )
    loaded = {name for name, _ in model.named_parameters() if name.startswith("exit_policies.")} - missing
    has_exits = loaded or any(name.startswith("exit_policies.") for name in unexpected)
    behind = [int(found[1]) for name in unexpected if (found := _LAYER.search(name)) and int(found[1]) >= asked]
    if has_exits and behind:
        raise ValueError(
            f"`num_hidden_layers`={asked}, but the last exit of {source} is trained for layer {max(behind) + 1}; "
            "accepted is that number. Exits of a model are chosen by `exit_layers`."
        )


def _all_in_layers(names: Iterable[str]) -> bool:
    return all(_LAYER.search(name) for name in names)


def _drop_what_no_longer_fits(model: Any, missing: set[str], unexpected: set[str]) -> None:
    """What a config says of exits that its weights are not of, as after a change by hand."""
    policies = "exit_policies.networks."
    untrained = layers_named(name for name in missing if name.startswith(policies))
    left_out = layers_named(name for name in unexpected if name.startswith(policies))
    internal = model.layer_numbers[:-1]
    if left_out or (untrained and set(untrained) != set(internal)):
        before = sorted({*model.layer_numbers, *left_out} - set(untrained))
        drop_unfit(model.config, before, {"exit_threshold", "exit_criterion"})
        for name in set(model.exit_estimators) - set(model.config.exit_estimators):
            del model.exit_estimators[name]
    if left_out:
        logger.info(f"Left out: {spoken_exits(left_out)}.")


def _estimators_of(names: Iterable[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith(_ESTIMATORS + ".")}


def _stock(model: Any) -> str:
    kinds = [kind for one in type(model.config).__mro__ if (kind := vars(one).get("model_type"))]
    return str(kinds[-1])


def _listed(words: list[str]) -> str:
    return " and ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)


__all__ = ["EarlyExitLoadingMixin", "announce_untrained", "check_config_class"]
