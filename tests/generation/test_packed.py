# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""`packed_linears` changes how a few rows are computed, and nothing that is computed."""

from __future__ import annotations

import copy

import pytest
import torch
from slow_llama import prompts
from tiny import tiny_llama
from torch import nn
from torch.nn import functional as F

from transformers_cee import packed_linears
from transformers_cee.generation.draft_costs import draft_costs


pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


@pytest.fixture
def calls(monkeypatch):
    """Rows of each product that oneDNN computed."""
    found, real = [], torch.ops.mkldnn._linear_pointwise

    def counted(states, *rest):
        found.append(states.numel() // states.shape[-1])
        return real(states, *rest)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counted)
    return found


def linear(bias=True, size=(160, 130), dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(*size, bias=bias).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 160), (2, 160), (16, 160), (17, 160), (2, 3, 160), (1, 1, 160), (0, 160)])
def test_products_are_those_of_torch(calls, bias, shape):
    layer = linear(bias)
    states = torch.randn(shape)
    expected = F.linear(states, layer.weight, layer.bias)
    with packed_linears(layer) as count:
        found = layer(states)
    assert count == 1
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-5)
    rows = states.numel() // 160
    assert calls == ([rows] if 2 <= rows <= 16 else [])


def test_states_need_not_be_contiguous(calls):
    layer, states = linear(), torch.randn(160, 4).t()
    with packed_linears(layer):
        assert torch.allclose(layer(states), F.linear(states, layer.weight, layer.bias), atol=1e-5)
    assert calls == [4]


def write(layer):
    layer.weight.mul_(2)


def load(layer):
    layer.load_state_dict({name: value + 1 for name, value in layer.state_dict().items()})


def replace(layer):
    layer.weight = nn.Parameter(torch.randn(130, 160), requires_grad=False)


def put(layer):
    layer.weight.data = torch.randn(130, 160)


@pytest.mark.parametrize("change", [write, load, replace, put])
def test_weights_that_change_are_the_ones_used(change):
    layer, states = linear(), torch.randn(3, 160)
    with packed_linears(layer):
        layer(states)
        change(layer)
        assert torch.allclose(layer(states), F.linear(states, layer.weight, layer.bias), atol=1e-5)


def test_gradients_flow():
    layer, states = linear().requires_grad_(), torch.randn(3, 160, requires_grad=True)
    with packed_linears(layer):
        layer(states).sum().backward()
    assert torch.allclose(states.grad, layer.weight.sum(0).expand(3, -1), atol=1e-5)
    assert torch.allclose(layer.weight.grad, states.detach().sum(0).expand(130, -1), atol=1e-5)


def test_ends_with_its_block_also_after_an_error(calls):
    layer = linear()
    before = dict(layer.__dict__)
    with pytest.raises(KeyError), packed_linears(layer):
        assert "forward" in layer.__dict__
        raise KeyError
    assert layer.__dict__ == before
    layer(torch.randn(3, 160))
    assert calls == []


def test_what_it_is_not_for_runs_as_before(calls):
    layer = linear()
    with packed_linears(layer):
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(torch.randn(3, 160)).dtype == torch.bfloat16
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            layer(torch.randn(3, 80))
        copied, states = copy.deepcopy(layer), torch.randn(3, 160)
        torch.testing.assert_close(copied(states), F.linear(states, layer.weight, layer.bias))
        assert calls == []
    with torch.inference_mode():
        made = linear()
    with packed_linears(made) as count:
        assert count == 0


class Scaled(nn.Linear):
    def forward(self, states):
        return 2 * super().forward(states)


def test_only_plain_layers_in_float32_are_packed():
    for layer in (Scaled(160, 130), linear(dtype=torch.bfloat16), linear(size=(8, 8))):
        with packed_linears(layer) as count:
            assert count == 0
    parametrized = torch.nn.utils.parametrizations.weight_norm(linear())
    with packed_linears(parametrized) as count:
        assert count == 0


def test_within_itself_nothing_is_packed_twice(calls):
    layer = linear()
    with packed_linears(layer) as first:
        with packed_linears(layer) as second:
            layer(torch.randn(3, 160))
        layer(torch.randn(3, 160))
    assert (first, second) == (1, 0)
    assert calls == [3, 3]


@torch.no_grad()
def test_verified_texts_are_those_without(calls):
    """Of models whose layers are large enough."""
    model = tiny_llama(hidden_size=128, intermediate_size=256)
    batch = prompts([5, 3], 0)
    asked = {"max_new_tokens": 10, "do_sample": False, "prompt_lookup_num_tokens": 3, "exit_verify": True}
    expected = model.generate(**batch, max_new_tokens=10, do_sample=False)
    weights = copy.deepcopy(model.state_dict())
    with packed_linears(model) as count:
        assert torch.equal(model.generate(**batch, **asked), expected)
        assert torch.equal(model.generate(**batch, max_new_tokens=10, do_sample=False), expected)
    assert count > 0
    assert calls
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_costs_are_measured_anew(monkeypatch):
    model, measured = tiny_llama(), []
    monkeypatch.setattr("transformers_cee.generation.draft_costs._measure", lambda model, rows: measured.append(model))
    draft_costs(model), draft_costs(model)
    # What generates may be a part of it, as under PEFT.
    with packed_linears(nn.Sequential(model)):
        draft_costs(model), draft_costs(model)
    draft_costs(model)
    assert len(measured) == 3
