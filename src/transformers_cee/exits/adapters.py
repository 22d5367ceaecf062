# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Adapters of PEFT under which rows cannot leave, or layers cannot be run one by one."""

from collections.abc import Iterable
from typing import Any

from torch import nn


_WAYS_OUT = "merge it first (`merge_and_unload`), give each call rows of one adapter, or switch exits off with "


def check_adapters(model: nn.Module, layers: Iterable[nn.Module], rows_leave: bool) -> None:
    """Called before layers are run one by one.

    Args:
        model (`nn.Module`): the model that has the exits.
        layers (iterable of `nn.Module`): its layers.
        rows_leave (`bool`): may the layers see a part of the batch?

    Raises:
        ValueError: an adapter of PEFT wraps whole layers, or chooses for each row of the whole batch.
    """
    if not getattr(model, "peft_config", None):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = list(layers)
    tuner = next((one for layer in layers for one in layer.modules() if isinstance(one, BaseTunerLayer)), None)
    if tuner is None or tuner.disable_adapters:
        return
    if any(tuner is layer for layer in layers):
        raise ValueError(
            f"{_kind(model)} adapter of PEFT wraps whole layers, so that they cannot be run one by one, as exits need "
            "it. Disable it (`disable_adapter`), or take a method whose layers are the model's own, such as LoRA."
        )
    for module in (*([tuner] if rows_leave else []), *model.children()):
        chooses = any(_is_of_peft(hook) for hook in module._forward_pre_hooks.values())
        if chooses:
            raise ValueError(
                f"{_kind(model)} adapter of PEFT chooses for each row of the whole batch (`adapter_names`, `task_ids` "
                f"or tokens that invoke it), and exits see a part of it: {_WAYS_OUT}`exit_threshold`=1.0."
            )


def _kind(model: Any) -> str:
    kinds = {str(getattr(config.peft_type, "value", config.peft_type)) for config in model.peft_config.values()}
    return "The " + ", ".join(sorted(kinds))


def _is_of_peft(hook: Any) -> bool:
    return getattr(getattr(hook, "func", hook), "__module__", "").startswith("peft.")
