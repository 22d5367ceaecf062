# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A model's drafter learns from the model itself: what it says of any text, without labels.

It begins in closed form: its predictor and its readout are linear maps, solved on the first tokens, and the vocabulary
is what the model says and reads most often there. Then it learns by roll-outs: from every token on it drafts a few
tokens, each from the states of its own draft before it, as it does in use, and its distribution is to be the model's
(KL; training-time test of EAGLE-3, Li et al. 2025).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache

from transformers_cee.exits.cache_name import CACHE_NAME
from transformers_cee.exits.jump_drafter import JumpDrafter
from transformers_cee.exits.row_batch import SLIDING


# Weight of the squared error of predicted states, over their mean square.
_STATES = 0.1
_RIDGE = 1e-4


@dataclass
class DrafterSettings:
    """How a drafter learns.

    Args:
        learning_rate (`float`): highest of AdamW's, which falls along a cosine after a rise over the first tenth.
        rollout (`int`): tokens that it drafts from each token on.
        closed_form_tokens (`int`): tokens of the solved start.
        steps (`int`): batches of roll-outs at most, which the learning rate is planned for.
    """

    learning_rate: float = 1e-3
    rollout: int = 3
    closed_form_tokens: int = 20_000
    steps: int = 1000


@dataclass
class DraftedStep:
    """What a step of learning came to.

    Args:
        tokens (`int`): tokens that roll-outs have learned from so far.
        losses (`list[float]`): KL of each drafted token, by how far ahead it is.
        accepted (`list[float]`): share of drafts that are the model's own choice, by how far ahead.
    """

    tokens: int
    losses: list[float]
    accepted: list[float]


@dataclass
class _Read:
    """What the model made of a text: all but `keys` and `values` of shape (rows, time, …)."""

    input_ids: Tensor
    counts: Tensor
    embedded: Tensor
    before: Tensor
    behind: Tensor
    last: Tensor
    keys: Tensor
    values: Tensor


def fit_drafter(
    model: Any, batches: Iterable[dict[str, Tensor]], settings: DrafterSettings | None = None
) -> Iterator[DraftedStep]:
    """Fits the drafter of a language model; all else stays. Each step that is taken from the iterator learns a batch.

    Args:
        model (`EarlyExitCausalLM`): with a drafter (`drafter_layer` of its config).
        batches: dictionaries with `input_ids` and `attention_mask` (rows, time), padded on the right if at all.

    Raises:
        ValueError: the model has no drafter.
    """
    settings = settings or DrafterSettings()
    if model.exit_drafter is None:
        raise ValueError("`drafter_layer`=None of the config: the model has no drafter to fit.")
    model.eval()
    rest = iter(batches)
    _solve(model, rest, settings.closed_form_tokens)
    yield from _learn(model, rest, settings)


@torch.no_grad()
def _read(model: Any, batch: dict[str, Tensor]) -> _Read:
    """One pass of the model over a batch."""
    layer = model.config.drafter_layer
    ids, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
    cache = DynamicCache()
    output = model.get_decoder()(
        input_ids=ids, attention_mask=mask, use_cache=True, output_hidden_states=True, **{CACHE_NAME: cache}
    )
    hidden, held = output.hidden_states, cache.layers[layer - 1]
    behind = hidden[layer]
    if layer == len(hidden) - 1:
        raise ValueError(f"`drafter_layer`={layer} must be less than {layer}: the last states are normed.")
    return _Read(
        ids,
        mask != 0,
        model.get_input_embeddings()(ids),
        hidden[layer - 1],
        behind,
        hidden[-1],
        held.keys,
        held.values,
    )


@torch.no_grad()
def _solve(model: Any, batches: Iterator[dict[str, Tensor]], tokens: int) -> None:
    """Vocabulary, predictor and readout, from the first tokens."""
    drafter: JumpDrafter = model.exit_drafter
    size, seen = model.config.hidden_size, 0
    counts = torch.zeros(model.config.vocab_size, dtype=torch.long, device=model.device)
    jump = _Regression(2 * size, size)
    readout = _Regression(size, size)
    for batch in batches:
        read = _read(model, batch)
        follows = read.counts[:, 1:]
        said = model.lm_head(read.last[read.counts]).argmax(-1)
        counts += torch.bincount(torch.cat((said, read.input_ids[read.counts])), minlength=len(counts))
        given = drafter.seen(read.behind[:, :-1][follows], read.embedded[:, 1:][follows])
        jump.add(given, (read.before - read.embedded)[:, 1:][follows])
        readout.add(*_for_readout(model, read))
        seen += int(follows.sum())
        if seen >= tokens:
            break
    if seen == 0:
        raise ValueError("`batches` have no token to fit.")
    drafter.token_ids.copy_(counts.topk(len(drafter.token_ids)).indices.sort().values)
    weight, bias = jump.solve()
    drafter.predictor.weight.copy_(weight)
    drafter.predictor.bias.copy_(bias)
    drafter.readout.weight.copy_(readout.solve()[0])


def _for_readout(model: Any, read: _Read) -> tuple[Tensor, Tensor]:
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
        given = torch.cat((given, given.new_ones(len(given), 1)), 1)
        self.own += (given.T @ given).double().cpu()
        self.cross += (given.T @ wanted).double().cpu()

    def solve(self) -> tuple[Tensor, Tensor]:
        penalty = _RIDGE * self.own.diagonal().mean() * torch.eye(len(self.own), dtype=torch.float64)
        found = torch.linalg.solve(self.own + penalty, self.cross).float()
        return found[:-1].T, found[-1]


def _learn(model: Any, batches: Iterator[dict[str, Tensor]], settings: DrafterSettings) -> Iterator[DraftedStep]:
    drafter: JumpDrafter = model.exit_drafter
    drafter.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    steps = settings.steps
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / (0.1 * steps))
            * 0.5
            * (1 + torch.cos(torch.tensor(torch.pi * min(1.0, step / steps))).item())
        ),
    )
    tokens = 0
    for _, batch in zip(range(steps), chain(batches), strict=False):
        read = _read(model, batch)
        rollouts = list(_roll_out(model, read, settings.rollout))
        loss = sum(one.loss for one in rollouts) / len(rollouts)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(drafter.parameters(), 1.0)
        optimizer.step()
        rate.step()
        tokens += int(read.counts.sum())
        yield DraftedStep(tokens, [float(one.kl) for one in rollouts], [float(one.accepted) for one in rollouts])
    drafter.eval()


@dataclass
class _RollOut:
    loss: Tensor
    kl: Tensor
    accepted: Tensor


class _RollOutCache:
    """What the drafter's layer sees as its cache: the model's keys and values, then those of the roll-outs so far."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = [keys], [values]

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys.append(keys)
        self.values.append(values)
        return torch.cat(self.keys, 2), torch.cat(self.values, 2)


def _roll_out(model: Any, read: _Read, ahead: int) -> Iterator[_RollOut]:
    """Drafts from every token on, all in parallel: the k-th token of each roll-out sees what the model has of the
    tokens before it began, and what the roll-out has of its own."""
    drafter: JumpDrafter = model.exit_drafter
    config, layer = model.config, model.config.drafter_layer
    window = config.sliding_window if model.layer_types[layer - 1] == SLIDING else None
    time = read.input_ids.shape[1]
    starts = time - ahead
    cache = _RollOutCache(read.keys, read.values)
    places = torch.arange(starts, device=read.input_ids.device) + 1
    columns = torch.arange(time, device=places.device)
    own = torch.eye(starts, dtype=torch.bool, device=places.device)
    head = model.lm_head.weight[drafter.token_ids]
    state = read.behind[:, :starts]
    for step in range(ahead):
        here = places + step
        embedded, counted = read.embedded[:, here], read.counts[:, here]
        jumped = drafter.jump(state, embedded)
        seen = columns < places.unsqueeze(1)
        if window is not None:
            seen &= here.unsqueeze(1) - columns < window
        mask = torch.cat((seen, *[own] * (step + 1)), 1)[None, None]
        if config._attn_implementation == "eager":
            mask = torch.zeros_like(mask, dtype=jumped.dtype).masked_fill(~mask, torch.finfo(jumped.dtype).min)
        positions = here.unsqueeze(0)
        state = drafter.layer(
            jumped,
            attention_mask=mask,
            position_embeddings=model.model.rotary_emb(jumped, positions),
            position_ids=positions,
            use_cache=True,
            **{CACHE_NAME: cache},
        )
        logits = F.linear(model.model.norm(drafter.read(state[counted])), head)
        with torch.no_grad():
            teacher = model.lm_head(read.last[:, here][counted]).float()
            chosen = teacher.argmax(-1)
            wanted = teacher.log_softmax(-1)[:, drafter.token_ids]
        said = logits.float().log_softmax(-1)
        kl = (wanted.exp() * (wanted - said)).sum(-1).mean()
        true = read.before[:, here][counted]
        error = (jumped[counted] - true).pow(2).mean() / true.pow(2).mean()
        accepted = (drafter.token_ids[said.argmax(-1)] == chosen).float().mean()
        yield _RollOut(kl + _STATES * error, kl.detach(), accepted)


__all__ = ["DraftedStep", "DrafterSettings", "fit_drafter"]
