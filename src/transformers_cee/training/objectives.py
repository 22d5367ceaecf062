# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What the phases `consistent` and `policy` minimise; `heads_objectives` has those of `heads`.

Everywhere: losses, rewards and the exit distribution are (rows, exits); a decoder's rows are its counted tokens.
"""

import torch
from torch import Tensor

from transformers_cee.exits.policy import exit_log_distribution


# A policy's logit at which leaving gains a reward of 1 over going on, with `policy_gradient="optimal_stopping"`.
ADVANTAGE_SCALE = 10.0
# Logit of leaving at an exit that is closed.
CLOSED = -1e4


def consistent_expected(losses: Tensor, log_distribution: Tensor) -> Tensor:
    """Loss at the exit only, in expectation: mean over rows of `Σ_l π_l · CE_l`, π held fixed."""
    return (log_distribution.detach().exp() * losses).sum(-1).mean()


def consistent_sampled(losses: Tensor, log_distribution: Tensor, samples: int) -> Tensor:
    """Loss at the exit only, at `samples` exits drawn from the exit distribution (Zeng et al. 2024)."""
    exits = torch.multinomial(log_distribution.detach().exp(), samples, replacement=True)
    return losses.gather(1, exits).mean()


def closed_before(exit_logits: Tensor, first_exit: int) -> Tensor:
    """Logits (rows, exits − 1) of leaving where nothing leaves before exit `first_exit` (0-based)."""
    if first_exit == 0:
        return exit_logits
    closed = torch.arange(exit_logits.shape[1], device=exit_logits.device) < first_exit
    # Finite, so that a probability of 0 times its logarithm is 0 in the entropy.
    return exit_logits.masked_fill(closed, CLOSED)


def staying_where_forced(log_distribution: Tensor, may_exit: Tensor) -> Tensor:
    """Log exit distribution (rows, exits) in which rows that may not leave early, by `may_exit` (rows,), take the last
    exit for sure."""
    last = torch.full_like(log_distribution[:1], -torch.inf)
    last[:, -1] = 0.0
    return torch.where(may_exit.unsqueeze(1), log_distribution, last)


def exploring_logits(exit_logits: Tensor, exploration: float) -> Tensor:
    """Logits of `(1 − ε)·p + ε/2`: with probability ε a fair coin decides instead of the policy."""
    if exploration == 0.0:
        return exit_logits
    probabilities = (1 - exploration) * exit_logits.sigmoid() + exploration / 2
    # A coin opens no exit that `closed_before` closed.
    return torch.where(exit_logits > CLOSED, probabilities.logit(), exit_logits)


def policy_exact(log_distribution: Tensor, rewards: Tensor) -> Tensor:
    """Negative expected reward `−Σ_l π_l R_l`, mean over rows. Its gradient is the policy gradient without variance:
    every exit's reward is known, so nothing has to be sampled."""
    return -(log_distribution.exp() * rewards).sum(-1).mean()


def policy_reinforce(log_distribution: Tensor, rewards: Tensor, samples: int) -> Tensor:
    """REINFORCE with `samples` draws per row and the mean of the row's other draws as baseline.

    Zeng et al. subtract the mean of all K draws; leaving a draw out of its own baseline multiplies that by K/(K−1) and
    makes the estimate of the gradient of `policy_exact` unbiased. One draw has no baseline.
    """
    exits = torch.multinomial(log_distribution.detach().exp(), samples, replacement=True)
    drawn = rewards.gather(1, exits)
    advantage = drawn
    if samples > 1:
        advantage = (drawn - drawn.mean(1, keepdim=True)) * (samples / (samples - 1))
    return -(advantage * log_distribution.gather(1, exits)).mean()


def policy_optimal_stopping(exit_logits: Tensor, rewards: Tensor) -> Tensor:
    """Squared error of the logits, in units of `ADVANTAGE_SCALE`, against what leaving gains over going on: a
    regression instead of a policy gradient.

    All rewards of a row are known, so going on from exit l is worth the reward of the first later exit at which the
    policies, as they are, would leave: fitted value iteration for optimal stopping (Tsitsiklis and Van Roy 2001), all
    exits at once. A probability of 0.5 then means that both are worth the same.
    """
    with torch.no_grad():
        following, worth = rewards[:, -1], []
        for index in range(exit_logits.shape[1] - 1, -1, -1):
            worth.append(following)
            following = torch.where(exit_logits[:, index] > 0, rewards[:, index], following)
        advantage = rewards[:, :-1] - torch.stack(worth[::-1], dim=1)
    # Exits that `closed_before` closed have nothing to learn.
    is_open = exit_logits > CLOSED
    return (exit_logits / ADVANTAGE_SCALE - advantage).square()[is_open].mean()


def policy_loss(
    exit_logits: Tensor,
    rewards: Tensor,
    gradient: str = "exact",
    samples: int = 8,
    exploration: float = 0.0,
    entropy_bonus: float = 0.0,
) -> Tensor:
    """Loss whose gradient is the policy gradient.

    Args:
        exit_logits (`Tensor` of shape `(rows, exits − 1)`): logits of leaving at the internal exits.
        rewards (`Tensor` of shape `(rows, exits)`): reward of leaving at each exit, without gradient.
        gradient (`str`): `"exact"`, `"reinforce"` or `"optimal_stopping"`.
        samples (`int`): draws per row of `"reinforce"`.
        exploration (`float`): share ε of decisions taken by a fair coin.
        entropy_bonus (`float`): weight of the exit distribution's entropy in the objective.
    """
    if gradient == "optimal_stopping":
        return policy_optimal_stopping(exit_logits, rewards)
    log_distribution = exit_log_distribution(exploring_logits(exit_logits, exploration))
    if gradient == "exact":
        loss = policy_exact(log_distribution, rewards)
    else:
        loss = policy_reinforce(log_distribution, rewards, samples)
    if entropy_bonus:
        entropy = -(log_distribution.exp() * log_distribution).sum(-1).mean()
        loss = loss - entropy_bonus * entropy
    return loss
