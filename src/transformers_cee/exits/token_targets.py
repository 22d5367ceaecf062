# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Which tokens a language model is to predict, from which positions, and which positions may leave early."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F


IGNORED = -100


@dataclass(frozen=True)
class TokenTargets:
    """What is to be learnt of a batch of text.

    Args:
        labels (`LongTensor` of shape `(batch, time)`): each position's own token, −100 where it is not learnt.
        following (`LongTensor` of shape `(batch, time)`): the token that each position is to predict, or −100.
    """

    labels: Tensor
    following: Tensor

    @cached_property
    def positions(self) -> Tensor:
        """Flat positions (tokens,) that count, row by row."""
        return (self.following != IGNORED).flatten().nonzero().squeeze(1)

    @cached_property
    def tokens(self) -> Tensor:
        """Tokens (tokens,) to predict there."""
        return self.following.flatten()[self.positions]

    @property
    def rows(self) -> Tensor:
        """Rows (tokens,) of the batch that they are in."""
        return self.positions // self.labels.shape[1]

    def may_exit(self, attention_mask: Tensor | None) -> Tensor:
        """Positions (batch, time) that generation would run as decode steps: the text that is to be learnt, but for a
        row's first token, which has nothing before it.

        Args:
            attention_mask (`Tensor` of shape `(batch, time)` or `(batch, 1, time, time)`, *optional*): of the text.
        """
        may_exit = self.labels != IGNORED
        if attention_mask is not None and attention_mask.dim() == 4:
            # Also of several texts packed into one row.
            seen = attention_mask[:, 0] if attention_mask.dtype == torch.bool else attention_mask[:, 0] == 0
            return may_exit & (seen.sum(-1) > 1)
        if attention_mask is None or attention_mask.shape != self.labels.shape:
            may_exit[:, 0] = False
        else:
            may_exit.scatter_(1, (attention_mask != 0).to(torch.int8).argmax(1, keepdim=True), False)
        return may_exit


def token_targets(
    labels: Tensor | None, shape: tuple[int, ...], shift_labels: Tensor | None = None, ignore_index: int = IGNORED
) -> TokenTargets | None:
    """What is to be learnt, from what Transformers' models and Trainer take; None without labels.

    Args:
        labels (`Tensor` of shape `(batch, time)`, *optional*): tokens of the same positions.
        shape (`tuple`): (batch, time) of the input.
        shift_labels (`Tensor` of shape `(batch, time)`, *optional*):
            What each position is to predict, where the text is one part of a longer one, as in context parallelism.
        ignore_index (`int`): stands where nothing is to be learnt, as −100 does.

    Raises:
        ValueError: labels of another shape, or that are no whole numbers.
    """
    if labels is not None:
        labels = _whole("labels", labels, shape, ignore_index)
    if shift_labels is not None:
        shift_labels = _whole("shift_labels", shift_labels, shape, ignore_index)
        if labels is None:
            labels = F.pad(shift_labels[:, :-1], (1, 0), value=IGNORED)
    elif labels is not None:
        shift_labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    return None if labels is None or shift_labels is None else TokenTargets(labels, shift_labels)


def count_tokens(labels: Tensor) -> Tensor:
    """Counted tokens (rows,) of labels (rows, time): positions whose next label is not −100."""
    return (labels[:, 1:] != IGNORED).sum(1)


def _whole(name: str, labels: Tensor, shape: tuple[int, ...], ignore_index: int) -> Tensor:
    if tuple(labels.shape) != shape:
        raise ValueError(f"`{name}` of shape {tuple(labels.shape)} must be (batch, time) = {shape}.")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"`{name}` of dtype {labels.dtype} must be numbers of tokens: integers.")
    labels = labels.long()
    return labels if ignore_index == IGNORED else labels.masked_fill(labels == ignore_index, IGNORED)
