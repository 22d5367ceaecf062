# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Weights in the layout of kernels that read them once for several tokens.

A CPU decodes one token at the speed at which it reads the weights, so that a few more should cost little. The matrix
products that torch takes for a few rows copy the weights into their own layout at every call, which makes the
second token cost half as much as the first. oneDNN takes weights that were laid out once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from transformers_cee.generation.draft_costs import forget_costs


# Rows that the layout is made for, those that it serves, and weights that are too few to matter.
_MADE_FOR, _FEWEST, _MOST, _SMALL = 4, 2, 16, 2**14


@contextmanager
def packed_linears(model: nn.Module) -> Iterator[int]:
    """Within it, linear layers in float32 on the CPU compute few rows by oneDNN, from weights laid out for that:
    passes that verify drafts, and decode steps of small batches. Anything else runs as before.

    The layouts take as much memory as the weights of these layers. Weights must not be written to through `.data`
    meanwhile, which nobody can see; otherwise a layer whose weights have changed runs as before, and so does a copy.

    Args:
        model (`nn.Module`): any model of torch.

    Yields:
        `int`: how many layers have got a layout; 0 where torch was built without oneDNN, or the model is elsewhere.

    Example:

        with packed_linears(model):
            model.generate(**inputs, exit_verify=True)
    """
    layers = [module for module in model.modules() if _can_be_packed(module)]
    try:
        for layer in layers:
            # Shadows the method; the class, its parameters and hooks stay as they are.
            layer.forward = partial(_forward, layer, _Layout(layer.weight))  # type: ignore[method-assign]
        _forget(model)
        yield len(layers)
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
        _forget(model)


def _forget(model: nn.Module) -> None:
    """What generates may be a part of the model, as under PEFT."""
    for module in model.modules():
        forget_costs(module)


class _Layout:
    """A weight as it was, and as oneDNN takes it."""

    def __init__(self, weight: Tensor) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _MADE_FOR)
        self.made_from = self._now(weight)

    @staticmethod
    def _now(weight: Tensor) -> tuple[int, int, int]:
        return id(weight), weight.data_ptr(), weight._version

    def holds(self, weight: Tensor) -> bool:
        return self.made_from == self._now(weight)

    def __deepcopy__(self, memo: Any) -> _Layout:
        """Of a copied layer it holds nothing, whose weight is another."""
        return self


def _can_be_packed(module: nn.Module) -> bool:
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        return False
    weight = module.weight
    return (
        torch.backends.mkldnn.is_available()
        and "forward" not in module.__dict__
        and not is_parametrized(module)
        and type(weight) is nn.Parameter
        and not weight.is_inference()
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.numel() >= _SMALL
    )


def _forward(layer: nn.Linear, layout: _Layout, states: Tensor) -> Tensor:
    weight = layer.weight
    # Steps of one token come here most often: what they need to know is asked first.
    if not _FEWEST <= states.numel() // layer.in_features <= _MOST or not _fits(layer, layout, states):
        return F.linear(states, weight, layer.bias)
    found: Tensor = torch.ops.mkldnn._linear_pointwise(states, layout.packed, layer.bias, "none", [], "")
    return found


def _fits(layer: nn.Linear, layout: _Layout, states: Tensor) -> bool:
    weight = layer.weight
    return (
        states.dtype == weight.dtype
        and states.shape[-1] == layer.in_features
        and not (torch.is_grad_enabled() and (states.requires_grad or weight.requires_grad))
        and layout.holds(weight)
        and not torch.is_autocast_enabled("cpu")
    )


__all__ = ["packed_linears"]
