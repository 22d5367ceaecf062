# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The model underneath adapters, which of its parameters a phase trains, and how fast."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


POLICIES = "exit_policies"
# No step of the model trains them: estimators are fitted on stored exits, the drafter has a phase of its own.
OTHERS_OWN = ("exit_estimators", "exit_drafter")
# Modules that exist for the exits' sake only.
EXIT_MODULES = ("exit_heads", "exit_norms", POLICIES)


def bare_model(model: nn.Module) -> nn.Module:
    """The early-exit model itself, underneath PEFT's wrapper if there is one; its layers keep their adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def active_module(module: nn.Module) -> nn.Module:
    """The module that runs: PEFT trains a copy of each of its `modules_to_save`."""
    if not hasattr(module, "modules_to_save"):
        return module
    active = module.active_adapters
    return module.modules_to_save[active[0]] if active else module.original_module


@contextmanager
def keeping_requires_grad(model: nn.Module) -> Iterator[None]:
    """Gives every parameter its `requires_grad` back at the end."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)


def freeze_for_model_step(model: nn.Module, trainable: str, policies: bool = False) -> None:
    """Freezes the policies, unless they learn in this step, and what `trainable` leaves alone. Parameters that are
    frozen already stay so.

    Args:
        trainable (`str`): `"all"`; `"last_exit"` freezes what the internal exits have of their own; `"exits"` whatever
            is not the exits' own; `"internal_exits"` also what the last exit has of its own; `"drafter"` all but the
            drafter.
        policies (`bool`): do the policies learn in this step?

    Raises:
        ValueError: nothing is left to train.
    """
    if trainable == "drafter":
        model.requires_grad_(False)
        active_module(bare_model(model).exit_drafter).requires_grad_(True)
        return
    for name, parameter in model.named_parameters():
        others = trainable in ("exits", "internal_exits") and not any(part in name for part in EXIT_MODULES)
        if others or (POLICIES in name and not policies) or any(part in name for part in OTHERS_OWN):
            parameter.requires_grad_(False)
    if trainable in ("last_exit", "internal_exits"):
        bare = bare_model(model)
        internal, norms = len(bare.layer_numbers) - 1, list(active_module(bare.exit_norms).norms)
        idle = norms[internal:] if trainable == "internal_exits" else (*norms[:internal], bare.exit_heads)
        for module in idle:
            module.requires_grad_(False)
    if any(parameter.requires_grad for parameter in model.parameters()):
        return
    if trainable == "internal_exits":
        raise ValueError(
            "`heads_objective`='two_stage' has nothing to train in its second stage: internal exits have no weights "
            "of their own (`exit_head`='shared', or `exit_layers` with the last layer only), or these are frozen."
        )
    if trainable == "exits":
        raise ValueError(
            "`trainable`='exits' leaves nothing to train beside the policies: the exits have no weights of their own "
            "(`exit_head`='shared'), or these are frozen. Accepted are `trainable`='all', `phases` without 'heads' "
            "and 'consistent', or exits with weights of their own."
        )
    raise ValueError("`model` has no parameter to train beside the policies: all are frozen (`requires_grad`).")


def split_exit_groups(
    optimizer: torch.optim.Optimizer, model: nn.Module, learning_rate: float, new_modules: Sequence[str] = ()
) -> None:
    """Moves exit heads, exit norms and what else starts from scratch into parameter groups with their own learning
    rate.

    Args:
        new_modules (sequence of `str`): names of modules of the model that start from scratch for its task.
    """
    parts = [f".{module}." for module in ("exit_heads", "exit_norms", *new_modules)]
    own = {id(weight) for name, weight in model.named_parameters() if any(part in f".{name}" for part in parts)}
    for group in list(optimizer.param_groups):
        mine = [parameter for parameter in group["params"] if id(parameter) in own]
        if mine:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
            options = {name: value for name, value in group.items() if name not in ("params", "lr")}
            optimizer.add_param_group({"params": mine, "lr": learning_rate, **options})
