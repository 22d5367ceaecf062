# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A start in closed form for a language model's drafter: its predictor and its readout are linear maps, solved on some
text, and its vocabulary is what the model says and reads most often there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from transformers_cee.exits.jump_drafter import JumpDrafter
from transformers_cee.exits.support import MASKED
from transformers_cee.modeling.roll_outs import TextRead, note_drafts, read_text, roll_outs


_RIDGE = 1e-4
# Text that the vocabulary is counted on, in times of what is solved on: no layer runs for the rest.
_COUNTED = 50
# Further tokens, whose drafts are judged at the end.
_JUDGED, _ROWS = 2_000, 4


@torch.no_grad()
def fit_drafter(model: Any, batches: Iterable[dict[str, Tensor]], max_tokens: int = 20_000) -> int:
    """Solves the drafter of a language model; all else stays. The phase `drafter` of [`ConsistentEETrainer`] goes on
    from there.

    Args:
        model (`EarlyExitCausalLM`): with a drafter (`drafter_layer` of its config).
        batches: dictionaries with `input_ids` (rows, time), padded on either side, and then `attention_mask`.
        max_tokens (`int`): stop to solve after so many; the vocabulary is counted on more of the text.

    Returns:
        `int`: tokens that it was solved on.

    Raises:
        ValueError: the model has no drafter, or there is no token.
    """
    if model.exit_drafter is None:
        raise ValueError("`drafter_layer`=None of the config: the model has no drafter to fit.")
    training = model.training
    model.eval()
    try:
        return _solve(model, batches, max_tokens)
    finally:
        model.train(training)


def _solve(model: Any, batches: Iterable[dict[str, Tensor]], tokens: int) -> int:
    drafter: JumpDrafter = model.exit_drafter
    size, seen = model.config.hidden_size, 0
    counts = torch.zeros(model.config.vocab_size, dtype=torch.long, device=model.device)
    jump = _Regression(2 * size, size)
    readout = _Regression(size, size)
    counted, kept, held_out = 0, 0, []
    for batch in batches:
        ids, mask = batch["input_ids"].to(model.device), batch.get("attention_mask")
        mask = None if mask is None else mask.to(model.device)
        known = ids.flatten() if mask is None else ids[mask != 0]
        counts += torch.bincount(known, minlength=len(counts))
        counted += len(known)
        if seen >= tokens:
            if kept < _JUDGED:
                held_out.append((ids, mask))
                kept += len(known)
            if counted >= _COUNTED * tokens:
                break
            continue
        read = read_text(model, ids, mask)
        follows = read.counts[:, 1:] & read.counts[:, :-1]
        said = model.lm_head(read.last[read.counts]).argmax(-1)
        counts += torch.bincount(said, minlength=len(counts))
        given = drafter.seen(read.behind[:, :-1][follows], read.embedded[:, 1:][follows])
        jump.add(given, (read.before - read.embedded)[:, 1:][follows])
        readout.add(*_for_readout(model, read))
        seen += int(follows.sum())
    if seen == 0:
        raise ValueError("`batches` have no token to fit.")
    # Of tokens that were not seen the first ones: tokenizers merge what is frequent first.
    order = counts.double() - torch.arange(len(counts), device=counts.device) / len(counts)
    drafter.token_ids.copy_(order.topk(len(drafter.token_ids)).indices.sort().values)
    weight, bias = jump.solve()
    drafter.predictor.weight.copy_(weight)
    drafter.predictor.bias.copy_(bias)
    drafter.readout.weight.copy_(readout.solve()[0])
    _judge(model, held_out)
    return seen


def _judge(model: Any, texts: Sequence[tuple[Tensor, Tensor | None]]) -> None:
    """Lets the drafter keep what came of its drafts of texts that it was not solved on, few rows at a time."""
    model.exit_drafter.judged.zero_()
    if model.config._attn_implementation not in MASKED:
        return
    for ids, mask in texts:
        for rows in range(0, len(ids), _ROWS):
            some = slice(rows, rows + _ROWS)
            if model.exit_drafter.judged[0].sum() < _JUDGED:
                for first in roll_outs(model, read_text(model, ids[some], None if mask is None else mask[some]), 1):
                    note_drafts(model, first)


def _for_readout(model: Any, read: TextRead) -> tuple[Tensor, Tensor]:
    """States behind the drafter's layer, and what is to be added so that the norm gives the model's last states: those
    are normed already, so each is scaled to the size of what stands before the norm."""
    states = read.behind[read.counts]
    gain = getattr(model.model.norm, "weight", None)
    last = read.last[read.counts]
    if gain is not None:
        last = last / torch.where(gain.abs() < 1e-3, 1e-3, gain)
    scale = states.pow(2).mean(-1, keepdim=True).sqrt().clamp_min(1e-6)
    return states, last * scale - states


class _Regression:
    """Ridge regression with an intercept, of sums in double precision."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self.own = torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64)
        self.cross = torch.zeros(inputs + 1, outputs, dtype=torch.float64)

    def add(self, given: Tensor, wanted: Tensor) -> None:
        # Half precision would round what is summed up.
        given, wanted = given.float(), wanted.float()
        given = torch.cat((given, given.new_ones(len(given), 1)), 1)
        self.own += (given.T @ given).double().cpu()
        self.cross += (given.T @ wanted).double().cpu()

    def solve(self) -> tuple[Tensor, Tensor]:
        penalty = _RIDGE * self.own.diagonal().mean() * torch.eye(len(self.own), dtype=torch.float64)
        found = torch.linalg.solve(self.own + penalty, self.cross).float()
        return found[:-1].T, found[-1]


__all__ = ["fit_drafter"]
