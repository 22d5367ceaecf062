# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Roll-outs of a model's drafter over a known text: what it learns from.

From every token on it drafts a few tokens, each from the states of its own draft before it, as it does in use, and its
distribution is to be the model's (KL; training-time test of EAGLE-3, Li et al. 2025).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache

from transformers_cee.exits.cache_name import CACHE_NAME
from transformers_cee.exits.evaluating import evaluating
from transformers_cee.exits.jump_drafter import JumpDrafter
from transformers_cee.exits.row_batch import SLIDING
from transformers_cee.exits.token_targets import IGNORED


# Weight of the squared error of predicted states, over their mean square.
_STATES = 0.1


@dataclass
class TextRead:
    """What the model made of a text: all but `keys` and `values` of shape (rows, time, …)."""

    input_ids: Tensor
    counts: Tensor
    embedded: Tensor
    before: Tensor
    behind: Tensor
    last: Tensor
    keys: Tensor
    values: Tensor


@torch.no_grad()
def read_text(model: Any, input_ids: Tensor, attention_mask: Tensor | None) -> TextRead:
    """One pass of the model over texts (rows, time), padded on either side."""
    layer, ids = model.config.drafter_layer, input_ids
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    cache, decoder = DynamicCache(), model.get_decoder()
    with evaluating(decoder):
        output = decoder(
            input_ids=ids, attention_mask=mask, use_cache=True, output_hidden_states=True, **{CACHE_NAME: cache}
        )
    hidden, held = output.hidden_states, cache.layers[layer - 1]
    behind = hidden[layer]
    return TextRead(
        ids,
        mask != 0,
        model.get_input_embeddings()(ids),
        hidden[layer - 1],
        behind,
        hidden[-1],
        held.keys,
        held.values,
    )


@dataclass
class RollOut:
    """What drafting so far ahead came to.

    Args:
        loss (`Tensor`): mean over tokens of KL and the weighted error of predicted states.
        divergence (`Tensor` of shape `(rows, starts)`):
            KL of the drafter's distribution from the model's, over the drafter's vocabulary; 0 where nothing counts.
        stands (`BoolTensor` of shape `(rows, starts)`): is the draft the model's own choice?
        counted (`BoolTensor` of shape `(rows, starts)`): which drafts count.
        kinds (`LongTensor` of shape `(rows, starts)`): the drafts' kinds, see `JumpDrafter`.
    """

    loss: Tensor
    divergence: Tensor
    stands: Tensor
    counted: Tensor
    kinds: Tensor

    @property
    def kl(self) -> Tensor:
        """Mean divergence of the drafts that count."""
        return self.divergence.sum() / self.counted.sum()


class _RollOutCache:
    """What the drafter's layer sees as its cache: the model's keys and values, then those of the roll-outs so far."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = [keys], [values]

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys.append(keys)
        self.values.append(values)
        return torch.cat(self.keys, 2), torch.cat(self.values, 2)


@contextmanager
def _keeping_its_cache(layer: Any) -> Iterator[None]:
    """Gradient checkpointing takes a layer's cache, and one layer has no need of it."""
    was = getattr(layer, "gradient_checkpointing", False)
    layer.gradient_checkpointing = False
    try:
        yield
    finally:
        layer.gradient_checkpointing = was


def roll_outs(model: Any, read: TextRead, ahead: int) -> Iterator[RollOut]:
    """Drafts from every token on, all in parallel: the k-th token of each roll-out sees what the model has of the
    tokens before it began, and what the roll-out has of its own."""
    drafter: JumpDrafter = model.exit_drafter
    config, layer = model.config, model.config.drafter_layer
    window = config.sliding_window if model.layer_types[layer - 1] == SLIDING else None
    time = read.input_ids.shape[1]
    # Short texts end sooner; of one token there is nothing to draft.
    ahead = min(ahead, time - 1)
    starts = time - ahead
    cache = _RollOutCache(read.keys, read.values)
    places = torch.arange(starts, device=read.input_ids.device) + 1
    columns = torch.arange(time, device=places.device)
    own = torch.eye(starts, dtype=torch.bool, device=places.device)
    head = model.lm_head.weight[drafter.token_ids]
    state = read.behind[:, :starts]
    chosen, wanted = _said_by_model(model, read.last, drafter.token_ids)
    for step in range(ahead):
        here = places + step
        embedded, counted = read.embedded[:, here], read.counts[:, here] & read.counts[:, places - 1]
        if not counted.any():
            # Behind padding there is nothing to draft.
            break
        jumped = drafter.jump(state, embedded)
        seen = columns < places.unsqueeze(1)
        if window is not None:
            seen &= here.unsqueeze(1) - columns < window
        seen_by_row = seen & read.counts.unsqueeze(1)
        owns = own.expand(len(seen_by_row), -1, -1)
        # A row of padding alone sees itself.
        mask = torch.cat((seen_by_row, *[owns] * (step + 1)), 2).unsqueeze(1)
        if config._attn_implementation == "eager":
            mask = torch.zeros_like(mask, dtype=jumped.dtype).masked_fill(~mask, torch.finfo(jumped.dtype).min)
        positions = here.unsqueeze(0)
        with _keeping_its_cache(drafter.layer):
            state = drafter.layer(
                jumped,
                attention_mask=mask,
                position_embeddings=model.model.rotary_emb(jumped, positions),
                position_ids=positions,
                use_cache=True,
                **{CACHE_NAME: cache},
            )
        logits = F.linear(model.model.norm(drafter.read(state[counted])), head)
        said, to_say = logits.float().log_softmax(-1), wanted[:, here][counted]
        divergence = (to_say.exp() * (to_say - said)).sum(-1)
        true = read.before[:, here][counted]
        error = (jumped[counted] - true).pow(2).mean() / true.pow(2).mean()
        stands = drafter.token_ids[said.argmax(-1)] == chosen[:, here][counted]
        kinds = drafter.kinds(said.detach().amax(-1).exp())
        yield RollOut(
            divergence.mean() + _STATES * error,
            torch.zeros_like(counted, dtype=torch.float).masked_scatter(counted, divergence.detach()),
            torch.zeros_like(counted).masked_scatter(counted, stands),
            counted,
            torch.zeros_like(counted, dtype=torch.long).masked_scatter(counted, kinds),
        )


@torch.no_grad()
def _said_by_model(model: Any, last: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The model's choice (rows, time) and its log-probabilities of the drafter's tokens (rows, time, words), of which
    all steps of a roll-out need most."""
    chosen, words = [], []
    # Logits over the whole vocabulary are large: those of one row at a time.
    for row in last:
        logits = model.lm_head(row).float()
        chosen.append(logits.argmax(-1))
        words.append(logits[:, token_ids] - logits.logsumexp(-1, keepdim=True))
    return torch.stack(chosen), torch.stack(words)


def note_drafts(model: Any, first: RollOut, labels: Tensor | None = None) -> None:
    """Lets a model's drafter keep what came of first drafts of a text; labels as in [`judge_drafts`]."""
    counted = first.counted & _judged(labels, 0, first.counted.shape[1])
    model.exit_drafter.judge(first.kinds[counted], first.stands[counted])


def _judged(labels: Tensor | None, step: int, starts: int) -> Tensor | bool:
    """Which drafts (rows, starts) of a step labels (rows, time) let judge."""
    if labels is None:
        return True
    # The first draft begins at the second token, and drafts the third.
    return F.pad(labels[:, 2 + step :] != IGNORED, (0, starts))[:, :starts]


@torch.no_grad()
def judge_drafts(found: Sequence[RollOut], labels: Tensor | None, ahead: int) -> Tensor:
    """What roll-outs of a text came to, row by row.

    Args:
        found (sequence of [`RollOut`]): the first, second, … drafts.
        labels (`LongTensor` of shape `(rows, time)`, *optional*):
            Only tokens whose label is not −100 are judged, such as an answer's; without labels all of them.
        ahead (`int`): so many were asked for; short texts end sooner.

    Returns:
        `Tensor` of shape `(rows, ahead, 4)`: sums over the drafts that count, of their divergence, of those that stand
        with all before them, of those whose turn comes since all before them stand, and of their number.
    """
    rows, starts = found[0].counted.shape
    sums = found[0].divergence.new_zeros(rows, ahead, 4)
    counted, stands = torch.ones_like(found[0].counted), torch.ones_like(found[0].stands)
    for step, one in enumerate(found):
        counted = counted & one.counted & _judged(labels, step, starts)
        turn, stands = stands, stands & one.stands
        for column, values in enumerate((one.divergence, stands, turn, counted)):
            sums[:, step, column] = (values * counted).sum(1)
    return sums


def draft_figures(judged: Tensor) -> dict[str, float]:
    """Figures of what [`judge_drafts`] gave for all rows.

    Returns:
        `dict[str, float]`: `loss`, the mean divergence; `accepted_1`, `accepted_2`, … the share of first, second, …
        drafts that stand where those before them do; and `tokens_per_pass`, what a pass that verifies so many drafts
        gives of tokens. Empty where no draft counts.
    """
    divergence, stands, turns, counted = judged.double().sum(0).unbind(-1)
    if not counted.sum():
        return {}
    shares = (stands / turns.clamp_min(1)).tolist()
    figures = {f"accepted_{step}": share for step, share in enumerate(shares, 1)}
    per_pass = 1 + float((stands / counted.clamp_min(1)).sum())
    return {"loss": float(divergence.sum() / counted.sum()), **figures, "tokens_per_pass": per_pass}


__all__ = ["RollOut", "TextRead", "draft_figures", "judge_drafts", "note_drafts", "read_text", "roll_outs"]
