# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Rewards of leaving at each exit."""

from collections.abc import Callable

import torch
from torch import Tensor


RewardFunction = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def layer_reward(
    losses: Tensor, layers: Tensor, memorized_layers: Tensor, num_layers: int, alpha: float, hardness: bool = True
) -> Tensor:
    """Reward `−CE_l − α·l`, or hardness-guided `−CE_l − α·(1 − M/L)·l` (Zeng et al. 2024).

    Args:
        losses (`Tensor` of shape `(rows, exits)`): loss or error of each row at each exit.
        layers (`LongTensor` of shape `(exits,)`): 1-based layer of each exit.
        memorized_layers (`LongTensor` of shape `(rows,)`): hardness M of each row, a layer; used with `hardness`.
        num_layers (`int`): number of layers L.
        alpha (`float`): price α of one layer.
        hardness (`bool`): scale the price by `1 − M/L`, so that hard rows feel no pressure to leave early.

    Returns:
        `Tensor` of shape `(rows, exits)`.
    """
    price = torch.full((len(losses), 1), alpha, dtype=losses.dtype, device=losses.device)
    if hardness:
        price = price * (1 - memorized_layers.to(losses.dtype).unsqueeze(1) / num_layers)
    return -losses - price * layers.to(losses.dtype)
