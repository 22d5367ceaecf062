# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""FLOPs of what an item (a row, or one new token) runs through, part by part.

They are those of matrix products, two per multiplication and addition; embeddings, norms, biases, activations, softmax
and sums are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from transformers_cee.exits.policy import NUM_CONFIDENCE_FEATURES


@dataclass
class ItemFlops:
    """FLOPs of one item.

    Args:
        layers (`list[int]`): of each layer.
        skipped (`list[int]`): of each layer that the item skips.
        states (`list[int]`): of the state at each exit.
        heads (`list[int]`): of the head at each exit.
        policy (`int`): of one policy network.
    """

    layers: list[int]
    skipped: list[int]
    states: list[int]
    heads: list[int]
    policy: int


def layer_flops(layer: nn.Module, config: Any, tokens: int, keys: int) -> int:
    """FLOPs of a layer of linear maps and attention: `2·w·T` of `w` weights of its linear maps and `T` tokens, and
    `4·T·K·q` of tokens that attend to `K` keys each with heads of `q` units in all.

    Args:
        layer (`nn.Module`): as it is run: matrices of LoRA that are not merged count.
        config (`Any`): of the stock architecture.
        tokens, keys (`int`): tokens that run, and keys that each of them attends to, itself included.
    """
    weights = sum(module.weight.numel() for module in layer.modules() if isinstance(module, nn.Linear))
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * tokens * weights + 4 * tokens * keys * config.num_attention_heads * size


@torch.no_grad()
def counted_flops(run: Callable[[], Any]) -> int:
    """FLOPs that torch counts while a function runs."""
    counter = FlopCounterMode(display=False)
    with counter:
        run()
    return counter.get_total_flops()


def policy_flops(policies: Any, state: torch.Tensor) -> int:
    """FLOPs of one policy network for one item.

    Args:
        policies (`ExitPolicies`): of a model.
        state (`Tensor` of shape `(1, hidden)`): any exit state.
    """
    if not len(policies.networks):
        return 0
    features = state.new_zeros(1, NUM_CONFIDENCE_FEATURES) if policies.needs_logits else None
    return counted_flops(lambda: policies.exit_logit(state, features, 0, policies.default_alpha))


__all__ = ["ItemFlops", "counted_flops", "layer_flops", "policy_flops"]
