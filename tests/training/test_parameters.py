# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What is frozen, what trains, and how fast; underneath adapters, too."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_llama, tiny_model, with_adapters

from transformers_cee.training.items import items_of
from transformers_cee.training.parameters import (
    active_module,
    bare_model,
    freeze_for_model_step,
    keeping_requires_grad,
    split_exit_groups,
)


def trainable(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_bare_model():
    model = tiny_llama()
    assert bare_model(model) is model
    assert bare_model(with_adapters(model)) is model


def test_active_module():
    model = tiny_llama()
    policies = model.exit_policies
    assert active_module(policies) is policies
    with_adapters(model)
    copied = active_module(model.exit_policies)
    assert type(copied) is type(policies) and copied is not policies
    assert all(parameter.requires_grad for parameter in copied.parameters())


def test_keeping():
    model = tiny_llama()
    model.lm_head.requires_grad_(False)
    before = trainable(model)
    with pytest.raises(RuntimeError), keeping_requires_grad(model):
        model.requires_grad_(False)
        model.lm_head.requires_grad_(True)
        raise RuntimeError
    assert trainable(model) == before


@pytest.mark.parametrize("what,parts", [("all", None), ("exits", ("exit_heads.", "exit_norms."))])
def test_freeze(what, parts):
    model = tiny_llama(exit_head="low_rank")
    model.exit_heads.heads[0].requires_grad_(False)
    before = trainable(model)
    freeze_for_model_step(model, what)
    allowed = {name for name in before if "exit_policies" not in name}
    assert trainable(model) == {name for name in allowed if parts is None or name.startswith(parts)}


def test_freeze_adapters():
    """Adapters are no exits of their own; what PEFT froze stays frozen."""
    model = with_adapters(tiny_llama())
    before = trainable(model)
    freeze_for_model_step(model, "all")
    assert trainable(model) == {name for name in before if "exit_policies" not in name}
    freeze_for_model_step(model, "exits")
    assert trainable(model) and all("exit_norms.modules_to_save" in name for name in trainable(model))


@pytest.mark.parametrize("adapted", [False, True])
def test_freeze_for_two_stages(adapted):
    """The two stages share nothing, and only policies are in neither."""
    model = tiny_llama(exit_head="untied")
    if adapted:
        model = with_adapters(model)
    before, stages = trainable(model), []
    for what in ("last_exit", "internal_exits"):
        with keeping_requires_grad(model):
            freeze_for_model_step(model, what)
            stages.append(trainable(model))
    assert not stages[0] & stages[1]
    assert before - stages[0] - stages[1] == {name for name in before if "exit_policies" in name}
    assert all("exit_heads" in name or "exit_norms" in name for name in stages[1]) and len(stages[1]) == 6


def test_the_last_exits_own_norm():
    model = tiny_model(num_hidden_layers=4, exit_norm="layer_norm")
    with keeping_requires_grad(model):
        freeze_for_model_step(model, "internal_exits")
        names = trainable(model)
    assert {name for name in names if "norms" in name} == {
        f"exit_norms.norms.layer_{layer}.{part}" for layer in (1, 2, 3) for part in ("weight", "bias")
    }
    freeze_for_model_step(model, "last_exit")
    assert {name for name in trainable(model) if "exit_" in name} == {
        "exit_norms.norms.layer_4.weight",
        "exit_norms.norms.layer_4.bias",
    }


@pytest.mark.parametrize("what", ["all", "exits"])
def test_policies_on_request(what):
    model = tiny_llama()
    freeze_for_model_step(model, what, policies=True)
    assert {name for name, _ in model.named_parameters() if "exit_policies" in name} <= trainable(model)


def test_nothing_left():
    with pytest.raises(ValueError, match=r"trainable.*exits.*shared"):
        freeze_for_model_step(tiny_llama(exit_head="shared"), "exits")
    with pytest.raises(ValueError, match=r"two_stage.*second stage.*shared"):
        freeze_for_model_step(tiny_llama(exit_head="shared"), "internal_exits")
    with pytest.raises(ValueError, match=r"no parameter to train"):
        freeze_for_model_step(tiny_llama().requires_grad_(False), "all")


@pytest.mark.parametrize("make", [lambda: tiny_model(num_hidden_layers=4), tiny_llama])
def test_groups(make):
    model = make()
    new = items_of(model).new_modules(model)
    optimizer = torch.optim.SGD(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=0.1,
    )
    split_exit_groups(optimizer, model, 0.5, new)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen = set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert name not in seen
            seen.add(name)
            fast = any(part in name for part in ("exit_heads", "exit_norms", "pooler", "classifier"))
            assert group["lr"] == (0.5 if fast else 0.1), name
            assert group["weight_decay"] == (0.1 if parameter.dim() > 1 else 0.0)
    assert seen == set(names.values())
