# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What a config may be made from, and what it loses when it is loaded with other exits than it was saved with."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from transformers.utils import logging

from transformers_cee.exits.fields import shown


logger = logging.get_logger(__name__)

# Fields that configs once had and training arguments have now, with the value that needs no word.
_MOVED = {"reward_hardness": (True, "reward"), "copy_exit_states": (True, "consistent_copy_states")}


class ConfigLoadingMixin:
    """Loads configs of our own and of the stock architecture, and no others; mix in before `PreTrainedConfig`."""

    @classmethod
    def check_model_type(cls, model_type: Any, source: Any = None) -> None:
        """Raises `ValueError` unless checkpoints of this model type can be loaded.

        Args:
            model_type (`str`, *optional*): `model_type` of the checkpoint's config; None where it has none.
            source (*optional*): where it was found, for the message.
        """
        accepted = [kind for one in cls.__mro__ if (kind := vars(one).get("model_type"))]
        if model_type is not None and model_type not in accepted:
            found = "" if source is None else f" of {source}"
            raise ValueError(
                f"`model_type`={model_type!r}{found} is not supported by {cls.__name__}, whose layers would compute "
                f"something else with its weights; accepted are {', '.join(map(repr, dict.fromkeys(accepted)))}."
                + cls.class_hint(model_type)
            )

    @classmethod
    def class_hint(cls, model_type: Any) -> str:
        """A sentence, with a blank in front, that names the class for another model type's checkpoints, or nothing."""
        return ""

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict, dict]:
        """As `PreTrainedConfig.get_config_dict`; what a stock checkpoint says becomes ours.

        Raises:
            ValueError: a checkpoint of another architecture.
        """
        values, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]
        if values.get("model_type") is not None:
            cls.check_model_type(values["model_type"], pretrained_model_name_or_path)
            values["model_type"] = cls.model_type  # type: ignore[attr-defined]
        return values, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As `PreTrainedConfig.from_dict`. Where `kwargs` ask for other exits than those that were saved, what was
        fitted for these is dropped, with a warning that names it, unless `kwargs` give it anew.

        Raises:
            ValueError: a field is out of its range, among them those of `kwargs`.
        """
        given, values = dict(kwargs), dict(config_dict)
        try:
            saved: Any = cls(**values) if "exit_layers" in given else None
            found = super().from_dict(config_dict, **kwargs)  # type: ignore[misc]
        except Exception as error:
            if isinstance(error, ValueError) and any(name in str(error) for name in values):
                raise
            # Whatever the stock config trips over.
            raise ValueError(f"{_damaged(cls, values, given)}: {type(error).__name__}: {str(error)[:500]}") from error
        config = found[0] if isinstance(found, tuple) else found
        if saved is not None and saved.num_hidden_layers == config.num_hidden_layers:
            config.check_exit_layers()
            drop_unfit(config, saved.exit_layer_numbers, given)
        config.check_exits()
        return found


def drop_moved(values: dict[str, Any]) -> None:
    """Takes fields that are training arguments by now out of what a config is made from; warns once of a value that
    was not the default.

    Args:
        values (`dict`): changed in place.
    """
    for name, (default, argument) in _MOVED.items():
        value = values.pop(name, default)
        if value != default:
            logger.warning_once(
                f"`{name}`={shown(value)} of a config is ignored: `{argument}` of `ConsistentEETrainingArguments` "
                "has taken its place."
            )


def _damaged(config_class: Any, values: dict[str, Any], given: dict[str, Any]) -> str:
    """Which field of a config that cannot be made is to blame, and its value: where the saved `values` make one, the
    keyword of `given` with which they do not, otherwise the saved one without which they do."""
    if _makes(config_class, values):
        for name, value in given.items():
            if not _makes(config_class, {**values, name: value}):
                return f"`{name}`={shown(value)} is not accepted by {config_class.__name__}"
        return f"These keywords do not fit a {config_class.__name__}: {', '.join(map(repr, given))}"
    for name in values:
        if _makes(config_class, {other: value for other, value in values.items() if other != name}):
            return f"`{name}`={shown(values[name])} of a {config_class.__name__} is not accepted"
    return f"These fields do not make a {config_class.__name__}"


def _makes(config_class: Any, values: dict[str, Any]) -> bool:
    try:
        config_class(**values)
    except Exception:
        return False
    return True


def drop_unfit(config: Any, before: Sequence[int], given: Collection[str] = ()) -> None:
    """Takes out of a config what was fitted for other exits than it has, and warns of all that it took.

    Args:
        config (`ExitConfigMixin`): changed in place.
        before (sequence of `int`): layers (1-based) of the exits that estimators, budgets, operating points and
            thresholds were fitted for.
        given (collection of `str`): fields that belong to the new exits already.
    """
    now = config.exit_layer_numbers
    if list(before) == now:
        return
    dropped, defaults = [], type(config)
    if "exit_estimators" not in given:
        from transformers_cee.exits.estimators import fitting_estimators

        kept = fitting_estimators(config.exit_estimators, before, now)
        dropped += [f"the estimator {name!r}" for name in config.exit_estimators if name not in kept]
        config.exit_estimators = kept
    if "exit_operating_points" not in given:
        dropped += [f"the operating point {name!r}" for name in config.exit_operating_points]
        config.exit_operating_points = {}
    if "exit_budgets" not in given and config.exit_budgets:
        dropped.append("`exit_budgets`")
        config.exit_budgets = []
    if "exit_budget" not in given and config.exit_budget is not None and not config.exit_budgets:
        dropped.append(f"`exit_budget`={config.exit_budget}")
        config.exit_budget = None
    if "exit_threshold" not in given:
        threshold, points = config.exit_threshold, config.exit_operating_points
        if threshold not in points if isinstance(threshold, str) else isinstance(threshold, list | tuple):
            dropped.append(f"`exit_threshold`={threshold!r}, now {defaults.exit_threshold!r}")
            config.exit_threshold = defaults.exit_threshold
    if "exit_criterion" not in given and _lacks_estimator(config):
        dropped.append(f"`exit_criterion`={config.exit_criterion!r}, now {defaults.exit_criterion!r}")
        config.exit_criterion = defaults.exit_criterion
        if "exit_threshold" not in given:
            config.exit_threshold = defaults.exit_threshold
    if dropped:
        logger.warning(
            f"The model has {spoken_exits(now)}; what was fitted for {spoken_exits(before)} is dropped: "
            f"{', '.join(dropped)}."
        )


def _lacks_estimator(config: Any) -> bool:
    from transformers_cee.exits.estimators import ESTIMATORS

    return config.exit_criterion in ESTIMATORS and config.exit_criterion not in config.exit_estimators


def spoken_exits(layers: Sequence[int]) -> str:
    """Exits for a sentence: `exits after layers 2, 4 and 6`, `exits after layers 1 to 29`, `an exit after layer 6`."""
    if len(layers) == 1:
        return f"an exit after layer {layers[0]}"
    if len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"exits after layers {layers[0]} to {layers[-1]}"
    return f"exits after layers {', '.join(map(str, layers[:-1]))} and {layers[-1]}"
