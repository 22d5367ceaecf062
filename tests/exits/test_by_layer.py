# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Modules of exits, named by layer."""

from __future__ import annotations

import copy

import torch
from torch import nn

from transformers_cee.exits.by_layer import LayerModules, layers_named


def test_in_order_and_named_by_layer():
    modules = LayerModules([2, 10, 11], lambda: nn.Linear(2, 1, bias=False))
    assert list(modules.state_dict()) == ["layer_2.weight", "layer_10.weight", "layer_11.weight"]
    assert len(modules) == 3 and [modules[index] for index in range(3)] == list(modules)
    assert modules[-1] is modules[2]
    assert copy.deepcopy(modules).state_dict().keys() == modules.state_dict().keys()


def test_a_module_is_replaced_in_its_place():
    modules = LayerModules([2, 10], lambda: nn.Linear(2, 1))
    new = nn.Linear(2, 3)
    modules[0] = new
    assert modules[0] is new and next(iter(modules.state_dict())) == "layer_2.weight"


def test_others_are_not_taken_for_one_another():
    """Weights of other exits are missing, whatever their number."""
    first, second = (LayerModules(layers, lambda: nn.Linear(2, 1)) for layers in ([2, 4], [4, 6]))
    kept = copy.deepcopy(second[1])
    found = second.load_state_dict(first.state_dict(), strict=False)
    assert torch.equal(second[0].weight, first[1].weight) and torch.equal(second[1].weight, kept.weight)
    assert found.missing_keys == ["layer_6.weight", "layer_6.bias"]
    assert found.unexpected_keys == ["layer_2.weight", "layer_2.bias"]


def test_layers_named():
    names = ["exit_heads.heads.layer_10.weight", "layer_2.bias", "bert.encoder.layer.3.x", "player_4.x", "layer_2.w"]
    assert layers_named(names) == [2, 10]
