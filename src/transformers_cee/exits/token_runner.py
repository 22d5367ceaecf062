# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The walk over layers in which single tokens leave, of a sequence that is known in advance."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from transformers_cee.exits.criteria import ExitCriterion, ExitStep
from transformers_cee.exits.row_batch import RowBatch
from transformers_cee.exits.runner import Exits, Layer


@dataclass
class TokenRun:
    """Result of a walk in which single tokens leave.

    Args:
        exits (`LongTensor` of shape `(rows, time)`): exit (0-based) of each token.
        states (`Tensor` of shape `(rows · time, hidden)`): each token's state at its exit.
        scores (`Tensor` of shape `(rows, time, exits)`): the criterion's scores where it was asked, NaN elsewhere.
    """

    exits: Tensor
    states: Tensor
    scores: Tensor


def run_token_exits(
    batch: RowBatch,
    layers: Sequence[Layer],
    exits: Exits,
    criterion: ExitCriterion,
    may_exit: Tensor,
    *,
    first_exit: int = 0,
    copy_states: bool = True,
    draw: bool = False,
) -> TokenRun:
    """Walks all layers with sequences known in advance, each token leaving at its own exit.

    All layers are executed for all tokens: others attend to a token that left. With `copy_states` its state stays what
    it was at the exit, so that deeper layers take its keys and values from there, as in token-by-token generation.

    Args:
        may_exit (`BoolTensor` of shape `(rows, time)`): tokens that may leave before the last exit.
        first_exit (`int`): exit (0-based) before which no token leaves.
        draw (`bool`): leave with the criterion's score as probability, whatever the thresholds.
    """
    rows, time = may_exit.shape
    last, device = len(exits.layer_numbers) - 1, may_exit.device
    taken = torch.full((rows * time,), last, device=device)
    frozen = torch.zeros(rows, time, 1, dtype=torch.bool, device=device)
    scores_of = torch.full((rows * time, last + 1), float("nan"), device=device)
    active = may_exit.flatten().nonzero().squeeze(1)
    left, states = [], []
    exit_of = {number: index for index, number in enumerate(exits.layer_numbers)}
    for number, layer in enumerate(layers, start=1):
        after = layer(batch)
        batch = replace(batch, hidden_states=torch.where(frozen, batch.hidden_states, after) if copy_states else after)
        index = exit_of.get(number, last)
        if index == last or not len(active):
            continue
        state = exits.state(batch.hidden_states, None, index).flatten(0, 1)
        step = ExitStep(index, state[active], partial(exits.logits, index=index), active)
        scores = criterion.score(step).detach()
        scores_of[active, index] = scores.to(scores_of.dtype)
        if index < first_exit:
            continue
        leaves = torch.rand_like(scores) < scores if draw else criterion.passes(scores, criterion.thresholds[index])
        out, kept = leaves.nonzero().squeeze(1), (~leaves).nonzero().squeeze(1)
        criterion.select(kept)
        left.append(active[out])
        states.append(step.state[out])
        taken[left[-1]] = index
        # A new mask: autograd keeps the one that was used.
        frozen = (taken != last).view(rows, time, 1)
        active = active[kept]
    stayed = (taken == last).nonzero().squeeze(1)
    order = torch.cat([*left, stayed]).argsort()
    states.append(exits.state(batch.hidden_states, None, last).flatten(0, 1)[stayed])
    return TokenRun(taken.view(rows, time), torch.cat(states)[order], scores_of.view(rows, time, -1))
