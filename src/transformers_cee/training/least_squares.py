# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A start in closed form for a language model's exit heads: the linear map from an exit's state to the last one's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


FITTED_HEADS = ("low_rank", "untied", "layernorm_linear")


@torch.no_grad()
def fit_exit_heads(
    model: nn.Module, batches: Iterable[dict[str, Tensor]], ridge: float = 1e-3, max_tokens: int | None = None
) -> dict[int, float]:
    """Sets every internal exit head so that its states, mapped linearly, come closest to the last exit's states.

    With normed states X (tokens, hidden) of an exit and Y of the last one, W = (XᵀX + λI)⁻¹ Xᵀ(Y − X), and the head
    gives what the model's own head gives for `(I + Wᵀ) x`; adapters of low rank take the best W of their rank
    (reduced-rank regression, Izenman 1975). The map is that of a tuned lens (Belrose et al. 2023), solved instead of
    trained: one pass over some text, no labels, and no step size.

    Args:
        model: an early-exit language model with heads of its own (`exit_head` of its config); the heads are set, all
            else stays.
        batches: dictionaries with `input_ids`, `attention_mask` and `labels` (batch, time). Counted positions, those
            whose next label is not −100, are fitted.
        ridge: λ as a share of the mean of XᵀX's diagonal.
        max_tokens: stop after so many tokens; None for all.

    Returns:
        `dict[int, float]`: by exit layer (1-based), the share of the last state's variance that is explained.

    Raises:
        ValueError: exits that share the model's head, no token to fit, or a ridge that is not positive.
    """
    if model.config.exit_head not in FITTED_HEADS:
        raise ValueError(
            f"`exit_head`={model.config.exit_head!r} has no head to fit; accepted are {', '.join(FITTED_HEADS)}."
        )
    if ridge <= 0:
        raise ValueError(f"`ridge`={ridge} must be positive.")
    training = model.training
    model.eval()
    try:
        moments = _Moments(model, batches, max_tokens)
    finally:
        model.train(training)
    return {
        layer: moments.fit(model, index, ridge) for index, layer in enumerate(model.layer_numbers[:-1])
    }  # fmt: skip


class _Moments:
    """Sums over tokens that the regressions need, in double precision.

    Args:
        model: the language model.
        batches: the text.
        max_tokens: stop after so many.
    """

    def __init__(self, model: nn.Module, batches: Iterable[dict[str, Tensor]], max_tokens: int | None) -> None:
        exits, size = len(model.layer_numbers) - 1, model.config.hidden_size
        # Per exit XᵀX and XᵀY; of the last exit the sum of states and of squares.
        self.own = torch.zeros(exits, size, size, dtype=torch.float64)
        self.cross = torch.zeros(exits, size, size, dtype=torch.float64)
        self.total = torch.zeros(size, dtype=torch.float64)
        self.squares = torch.zeros(size, dtype=torch.float64)
        self.tokens = 0
        for batch in batches:
            states, last = _states(model, batch)
            if max_tokens is not None:
                states, last = states[: max_tokens - self.tokens], last[: max_tokens - self.tokens]
            for index in range(exits):
                self.own[index] += (states[:, index].T @ states[:, index]).double().cpu()
                self.cross[index] += (states[:, index].T @ last).double().cpu()
            self.total += last.double().sum(0).cpu()
            self.squares += last.double().square().sum(0).cpu()
            self.tokens += len(last)
            if max_tokens is not None and self.tokens >= max_tokens:
                break
        if self.tokens == 0:
            raise ValueError("`batches` have no token to fit: every label is -100, or there is no batch.")

    def fit(self, model: nn.Module, index: int, ridge: float) -> float:
        """Sets the head of an internal exit (0-based); returns the explained share of variance."""
        own, cross = self.own[index], self.cross[index]
        identity = torch.eye(len(own), dtype=own.dtype)
        penalty = ridge * own.diagonal().mean() * identity
        change = torch.linalg.solve(own + penalty, cross - own)
        head = model.exit_heads.heads[index]
        if model.config.exit_head == "low_rank":
            rank = min(head.down.weight.shape[0], len(own))
            # Directions in which the fitted change moves the states most.
            directions = torch.linalg.eigh(change.T @ own @ change).eigenvectors[:, -rank:]
            _set_rows(head.down.weight, (change @ directions).T)
            _set_rows(head.up.weight.T, directions.T)
            change = change @ directions @ directions.T
        else:
            weight = model.get_output_embeddings().weight.double().cpu() @ (identity + change).T
            head.weight.copy_(weight.to(head.weight))
            if head.bias is not None:
                head.bias.zero_()
        whole = identity + change
        error = self.squares.sum() - 2 * (whole * cross).sum() + (whole * (own @ whole)).sum()
        variance = self.squares.sum() - self.total.square().sum() / self.tokens
        return float(1 - error / variance)


def _states(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Normed states of the internal exits (tokens, exits, hidden) and of the last (tokens, hidden)."""
    inputs: dict[str, Any] = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
    hidden = model.get_decoder()(**inputs, output_hidden_states=True, use_cache=False).hidden_states
    counted = batch["labels"][:, 1:].to(model.device) != -100
    states = [
        model.exit_state(hidden[layer][:, :-1][counted], index).float()
        for index, layer in enumerate(model.layer_numbers[:-1])
    ]
    # The decoder has normed what its last layer gave.
    last = hidden[-1][:, :-1][counted].float()
    return (torch.stack(states, dim=1) if states else last.new_zeros(len(last), 0, last.shape[1])), last


def _set_rows(target: Tensor, rows: Tensor) -> None:
    """Writes the first rows, and zeros behind them."""
    target.zero_()
    target[: len(rows)].copy_(rows.to(target))


__all__ = ["fit_exit_heads"]
