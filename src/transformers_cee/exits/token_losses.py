# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Losses of a language model's exits, token by token, in chunks: the logits of all tokens never exist together."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from transformers_cee.exits.policy import NUM_CONFIDENCE_FEATURES, ExitHistory
from transformers_cee.exits.registry import Registry


# Rows of logits (tokens times exits) that exist at once.
CHUNK_ROWS = 512

# Loss (tokens,) from an exit's logits and the last exit's, both (tokens, vocabulary), and label tokens (tokens,).
TokenLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
Head = Callable[[Tensor, int], Tensor]


TOKEN_LOSSES: Registry[type | TokenLoss] = Registry("token_loss", "register_token_loss")
register_token_loss = TOKEN_LOSSES.register


@register_token_loss
@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy with the label token."""

    name: ClassVar[str] = "ce"

    def __call__(self, exit_logits: Tensor, final_logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(exit_logits.float(), labels, reduction="none")


@register_token_loss
@dataclass(frozen=True)
class FinalDistributionKL:
    """`T²·KL(final ‖ exit)` at temperature T, over the vocabulary or over the final exit's most probable tokens: needs
    no labels but the text itself (self-supervised exits, Valade 2026).

    Args:
        temperature (`float`): divides both logits; T² keeps the size of the gradient.
        top_k (`int`): tokens compared; 0 stands for all.

    Raises:
        ValueError: a temperature that is not positive, or a `top_k` that is negative or no whole number.
    """

    name: ClassVar[str] = "kl"
    temperature: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"`temperature`={self.temperature} must be positive.")
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"`top_k`={self.top_k} must not be negative, and be whole; 0 stands for all tokens.")

    def __call__(self, exit_logits: Tensor, final_logits: Tensor, labels: Tensor) -> Tensor:
        exit_logits, final_logits = exit_logits.float(), final_logits.float()
        if 0 < self.top_k < final_logits.shape[-1]:
            final_logits, tokens = final_logits.topk(self.top_k, dim=-1)
            exit_logits = exit_logits.gather(-1, tokens)
        ours = (exit_logits / self.temperature).log_softmax(-1)
        wanted = (final_logits / self.temperature).log_softmax(-1)
        return self.temperature**2 * F.kl_div(ours, wanted, reduction="none", log_target=True).sum(-1)


@register_token_loss
@dataclass(frozen=True)
class FinalArgmax:
    """`(1 − a)·CE − a·H`: cross-entropy with the final exit's most probable token, minus the entropy in nats of the
    exit's own distribution, which keeps an unsure exit from looking sure (Valade 2024).

    Args:
        entropy_weight (`float`): a, in [0, 1].

    Raises:
        ValueError: a weight outside of [0, 1].
    """

    name: ClassVar[str] = "argmax"
    entropy_weight: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.entropy_weight <= 1:
            raise ValueError(f"`entropy_weight`={self.entropy_weight} must lie in [0, 1].")

    def __call__(self, exit_logits: Tensor, final_logits: Tensor, labels: Tensor) -> Tensor:
        log_probabilities = exit_logits.float().log_softmax(-1)
        loss = F.nll_loss(log_probabilities, final_logits.argmax(-1), reduction="none")
        entropy = -(log_probabilities.exp() * log_probabilities).sum(-1)
        return (1 - self.entropy_weight) * loss - self.entropy_weight * entropy


@dataclass
class TokenExits:
    """What every exit makes of every token.

    Args:
        losses (`Tensor` of shape `(tokens, exits)`): float32.
        predictions (`LongTensor` of shape `(tokens, exits)`): most probable token.
        features (`Tensor` of shape `(tokens, exits − 1, 5)`, *optional*): confidence features of the policies.
    """

    losses: Tensor
    predictions: Tensor
    features: Tensor | None = None


def token_exit_losses(
    states: Tensor,
    labels: Tensor,
    head: Head,
    loss: TokenLoss,
    *,
    features: bool = False,
    chunk_rows: int = CHUNK_ROWS,
) -> TokenExits:
    """Loss of each token at each exit. Logits live for one chunk of tokens at a time and are computed again for the
    gradient.

    Args:
        states (`Tensor` of shape `(tokens, exits, hidden)`): normed exit states.
        labels (`LongTensor` of shape `(tokens,)`): tokens to predict.
        head (`Callable`): logits (tokens, vocabulary) from the states (tokens, hidden) of an exit (0-based).
        loss (`TokenLoss`): from logits of an exit and of the last one (tokens, vocabulary) and labels to (tokens,).
        features (`bool`): also return confidence features.
        chunk_rows (`int`): rows of logits, tokens times exits, that exist at once.
    """
    num_exits = states.shape[1]

    def chunk(states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = [head(states[:, index], index) for index in range(num_exits)]
        final = logits[-1].detach()
        losses = torch.stack([loss(one, final, labels) for one in logits], dim=1)
        with torch.no_grad():
            predictions = torch.stack([one.argmax(-1) for one in logits], dim=1)
            seen = _features(logits) if features else losses.new_zeros(0)
        return losses, predictions, seen

    parts = []
    size = max(1, chunk_rows // num_exits)
    for some, their_labels in zip(states.split(size), labels.split(size), strict=True):
        if torch.is_grad_enabled():
            parts.append(checkpoint(chunk, some, their_labels, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(chunk(some, their_labels))
    losses, predictions, seen = (torch.cat(column) for column in zip(*parts, strict=True))
    return TokenExits(losses, predictions, seen if features else None)


def _features(logits: list[Tensor]) -> Tensor:
    """Confidence features (tokens, exits − 1, 5) from the logits of all exits."""
    history = ExitHistory()
    columns = [history.features(one, "single_label_classification") for one in logits[:-1]]
    if not columns:
        return logits[-1].new_zeros(len(logits[-1]), 0, NUM_CONFIDENCE_FEATURES)
    return torch.stack(columns, dim=1)


def taken_exit_losses(
    states: Tensor, exits: Tensor, labels: Tensor, head: Head, num_exits: int, chunk_rows: int = CHUNK_ROWS
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and most probable token, both (tokens,), of each token at its own exit only.

    Args:
        states (`Tensor` of shape `(tokens, hidden)`): each token's normed state at its exit.
        exits (`LongTensor` of shape `(tokens,)`): each token's exit, 0-based.
        labels (`LongTensor` of shape `(tokens,)`): tokens to predict.
        head (`Callable`): logits (tokens, vocabulary) from the states (tokens, hidden) of an exit.
        num_exits (`int`): number of exits.
        chunk_rows (`int`): rows of logits that exist at once.
    """
    order, parts = [], [(states.new_zeros(0, dtype=torch.float32), labels[:0])]
    for index in range(num_exits):
        mine = (exits == index).nonzero().squeeze(1)
        order.append(mine)
        for some in mine.split(chunk_rows) if len(mine) else ():

            def chunk(states: Tensor, labels: Tensor, index: int = index) -> tuple[Tensor, Tensor]:
                logits = head(states, index)
                return F.cross_entropy(logits.float(), labels, reduction="none"), logits.detach().argmax(-1)

            if torch.is_grad_enabled():
                parts.append(
                    checkpoint(chunk, states[some], labels[some], use_reentrant=False, preserve_rng_state=False)
                )
            else:
                parts.append(chunk(states[some], labels[some]))
    back = torch.cat(order).argsort()
    losses, predictions = (torch.cat(column) for column in zip(*parts, strict=True))
    return losses[back], predictions[back]


__all__ = [
    "TOKEN_LOSSES",
    "CrossEntropy",
    "FinalArgmax",
    "FinalDistributionKL",
    "TokenExits",
    "TokenLoss",
    "register_token_loss",
    "taken_exit_losses",
    "token_exit_losses",
]
