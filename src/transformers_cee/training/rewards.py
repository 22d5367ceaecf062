# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Rewards of leaving at each exit: functions of one registry, named by the argument `reward`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from transformers_cee.exits.registry import Registry


@dataclass(frozen=True)
class RewardStep:
    """What a reward is made from. Of a decoder, rows are counted tokens.

    Args:
        losses (`Tensor` of shape `(rows, exits)`): loss or error of each row at each exit, by `reward_loss`.
        layers (`LongTensor` of shape `(exits,)`): 1-based layer of each exit.
        memorized_layers (`LongTensor` of shape `(rows,)`): hardness M of each row, a layer.
        num_layers (`int`): number of layers L.
        alpha (`float`): price α of one layer.
    """

    losses: Tensor
    layers: Tensor
    memorized_layers: Tensor
    num_layers: int
    alpha: float


# From what is known to the reward (rows, exits) of leaving at each exit.
Reward = Callable[[RewardStep], Tensor]

REWARDS: Registry[Reward] = Registry("reward", "register_reward")
register_reward = REWARDS.register


@register_reward
def hardness_guided(step: RewardStep) -> Tensor:
    """`−CE_l − α·(1 − M/L)·l` (Zeng et al. 2024): hard rows feel no pressure to leave early."""
    price = 1 - step.memorized_layers.to(step.losses).unsqueeze(1) / step.num_layers
    return -step.losses - step.alpha * price * step.layers.to(step.losses)


@register_reward
def per_layer(step: RewardStep) -> Tensor:
    """`−CE_l − α·l`: every row pays the same."""
    return -step.losses - step.alpha * step.layers.to(step.losses)


def rewards_of(name: str, step: RewardStep) -> Tensor:
    """Rewards (rows, exits) by the name of a reward.

    Raises:
        ValueError: an unknown name, or a result of another shape.
    """
    rewards = REWARDS.make(name)(step)
    if not isinstance(rewards, Tensor) or rewards.shape != step.losses.shape:
        shape = tuple(rewards.shape) if isinstance(rewards, Tensor) else type(rewards).__name__
        raise ValueError(f"`reward`={name!r} gave shape {shape}, needed a tensor of {tuple(step.losses.shape)}.")
    return rewards


def rewards_and_prices(name: str, step: RewardStep) -> tuple[Tensor, Tensor]:
    """Rewards at α = 0, and what each exit costs at α = 1, both (rows, exits): `R = rewards − α·prices` at any α, as
    conditioned policies need it.

    Raises:
        ValueError: the reward is not linear in α; and as `rewards_of`.
    """
    # Doubles, since prices are differences.
    step = replace(step, losses=step.losses.double())
    free, one, two = (rewards_of(name, replace(step, alpha=alpha)) for alpha in (0.0, 1.0, 2.0))
    if not torch.allclose(two - one, one - free, rtol=1e-4, atol=1e-4, equal_nan=True):
        raise ValueError(
            f"`reward`={name!r} is not linear in `alpha`, and policies conditioned on it need one that is; "
            "`policy_condition`='none' does not."
        )
    return free.float(), (free - one).float()


def check_reward(name: str, layers: Sequence[int], num_layers: int, is_conditioned: bool) -> None:
    """Tries a reward on three made-up rows. Raises `ValueError` as `rewards_of` or, for policies that are conditioned
    on α, as `rewards_and_prices`.

    Args:
        name (`str`): of the reward.
        layers (sequence of `int`): 1-based layers of the exits.
        num_layers (`int`): number of layers L.
        is_conditioned (`bool`): are the policies conditioned on α?
    """
    losses = torch.linspace(1.0, 0.1, len(layers)).repeat(3, 1)
    memorized = torch.tensor([layers[0], layers[len(layers) // 2], layers[-1]])
    step = RewardStep(losses, torch.tensor(layers), memorized, num_layers, 0.1)
    if is_conditioned:
        rewards_and_prices(name, step)
    else:
        rewards_of(name, step)


__all__ = [
    "REWARDS",
    "Reward",
    "RewardStep",
    "check_reward",
    "hardness_guided",
    "per_layer",
    "register_reward",
    "rewards_and_prices",
    "rewards_of",
]
