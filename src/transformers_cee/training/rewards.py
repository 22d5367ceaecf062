# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Rewards of leaving at each exit."""

from collections.abc import Callable

import torch
from torch import Tensor


RewardFunction = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def layer_prices(layers: Tensor, memorized_layers: Tensor, num_layers: int, hardness: bool = True) -> Tensor:
    """What each row pays at each exit for α = 1: `l`, or hardness-guided `(1 − M/L)·l` (Zeng et al. 2024), so that
    hard rows feel no pressure to leave early.

    Args:
        layers (`LongTensor` of shape `(exits,)`): 1-based layer of each exit.
        memorized_layers (`LongTensor` of shape `(rows,)`): hardness M of each row, a layer; used with `hardness`.
        num_layers (`int`): number of layers L.
        hardness (`bool`): scale the price by `1 − M/L`.

    Returns:
        `Tensor` of shape `(rows, exits)`, float32.
    """
    price = torch.ones(len(memorized_layers), 1, device=memorized_layers.device)
    if hardness:
        price = 1 - memorized_layers.float().unsqueeze(1) / num_layers
    return price * layers.float()


def layer_reward(
    losses: Tensor, layers: Tensor, memorized_layers: Tensor, num_layers: int, alpha: float, hardness: bool = True
) -> Tensor:
    """Reward `−CE_l − α·l`, or hardness-guided `−CE_l − α·(1 − M/L)·l` (Zeng et al. 2024).

    Args:
        losses (`Tensor` of shape `(rows, exits)`): loss or error of each row at each exit.
        alpha (`float`): price α of one layer.
        layers, memorized_layers, num_layers, hardness: as in `layer_prices`.

    Returns:
        `Tensor` of shape `(rows, exits)`.
    """
    return -losses - alpha * layer_prices(layers, memorized_layers, num_layers, hardness).to(losses)
