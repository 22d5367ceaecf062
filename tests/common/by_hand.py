# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Slow and independent: one row at a time, without padding, batches or caches, through transformers' own model. Of the
package nothing is called; of the exits, weights are read by their names."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import families
import torch
from torch import Tensor, nn


@dataclass
class Walk:
    """What each exit says of one row or token, from the first exit to the last."""

    states: list[Tensor]
    logits: list[Tensor]
    scores: list[float] = field(default_factory=list)


def exit_layers(config: Any) -> list[int]:
    """1-based layers of the exits, for `exit_layers` of None or a list."""
    depth = config.num_hidden_layers
    return [*range(1, depth + 1)] if config.exit_layers is None else sorted({*config.exit_layers, depth})


def weight(model: nn.Module, name: str) -> Tensor:
    """A weight of the exits, by its name in a checkpoint."""
    return model.get_parameter(name)


def scores(model: nn.Module, walk: Walk, criterion: str) -> list[float]:
    """Score of every internal exit: the largest probability, or the policy's probability of leaving."""
    internal = exit_layers(model.config)[:-1]
    if criterion == "max_probability":
        return [float(logits.detach().double().softmax(0).max()) for logits in walk.logits[: len(internal)]]
    assert criterion == "policy" and model.config.policy_inputs == "state"
    found = []
    for layer, state in zip(internal, walk.states, strict=False):
        parts = [
            weight(model, f"exit_policies.networks.layer_{layer}.{part}").detach().double()
            for part in ("0.weight", "0.bias", "2.weight", "2.bias")
        ]
        hidden = parts[0] @ state.detach().double() + parts[1]
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))  # GELU
        found.append(1 / (1 + math.exp(-float(parts[2][0] @ hidden + parts[3][0]))))
    return found


def exit_index(scores: list[float], thresholds: list[float]) -> int:
    """0-based exit at which a row leaves."""
    for index, score in enumerate(scores):
        if score > thresholds[index]:
            return index
    return len(scores)


def spreading(all_scores: list[list[float]], share: float = 0.4) -> list[float]:
    """One threshold per exit at which about `share` of what reaches it leaves, in the widest gap around there."""
    remaining, thresholds = all_scores, []
    for index in range(len(all_scores[0])):
        here = sorted((one[index] for one in remaining), reverse=True)
        target = min(max(1, round(share * len(here))), len(here) - 1)
        if target < 1:
            thresholds.append(1.0)
            continue
        cut = max(range(1, min(target + 2, len(here))), key=lambda cut: here[cut - 1] - here[cut])
        thresholds.append((here[cut - 1] + here[cut]) / 2)
        remaining = [one for one in remaining if one[index] <= thresholds[-1]]
    return [*thresholds, 1.0]


def slack(all_scores: list[list[float]], thresholds: list[float]) -> float:
    """Distance of the closest decision to the other side."""
    found = [math.inf]
    for mine in all_scores:
        asked = mine[: exit_index(mine, thresholds) + 1]
        found += [abs(score - threshold) for score, threshold in zip(asked, thresholds, strict=False)]
    return min(found)


@contextmanager
def noted(stock: Any) -> Iterator[dict[int, Tensor]]:
    """Collects what each layer (1-based) gives."""
    behind: dict[int, Tensor] = {}

    def note(number: int) -> Any:
        return lambda _, __, output: behind.update({number: output})

    handles = [layer.register_forward_hook(note(n)) for n, layer in enumerate(families.layers(stock), start=1)]
    try:
        yield behind
    finally:
        for handle in handles:
            handle.remove()


# Rows that leave as a whole.


def pooled_walk(model_type: str, model: Any, stock: Any, row: dict[str, Tensor]) -> Walk:
    """One row at the internal exits, under the fields of `families.POOLED`, and at the last one by the stock head."""
    family, walk = families.FAMILIES[model_type], Walk([], [])
    if family.layers is None:
        behind = dict(enumerate(stock(**row, output_hidden_states=True).hidden_states))
    else:
        with noted(stock) as behind:
            stock(**row)
    for layer in exit_layers(model.config)[:-1]:
        walk.states.append(family.pooled(stock, behind[layer]))
        head = f"exit_heads.heads.layer_{layer}"
        walk.logits.append(weight(model, f"{head}.weight") @ walk.states[-1] + weight(model, f"{head}.bias"))
    return walk


def walk_alone(model: Any, row: dict[str, Tensor]) -> Walk:
    """One row at every exit by our own model, alone: nothing is padded and nobody leaves."""
    output = model(**row, output_all_exits=True)
    states = list(output.all_exit_states[0])
    for index, layer in enumerate(exit_layers(model.config)[:-1]):
        # Where exits differ in width, narrow states are filled up.
        width = weight(model, f"exit_heads.heads.layer_{layer}.weight").shape[1]
        assert not states[index][width:].any()
        states[index] = states[index][:width]
    return Walk(states, list(output.all_exit_logits[0]))


# Tokens.


@contextmanager
def frozen(stock: Any, exits: list[int]) -> Iterator[None]:
    """A token keeps its state behind the layer at which it left: what deeper layers see of it is made of that. `exits`
    holds the layer of each position, the rest runs to the end."""

    def keep(number: int) -> Any:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            left = torch.zeros(output.shape[1], dtype=torch.bool)
            left[: len(exits)] = torch.tensor(exits) < number
            return torch.where(left[None, :, None], inputs[0], output)

        return hook

    handles = [layer.register_forward_hook(keep(n)) for n, layer in enumerate(families.layers(stock), start=1)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def token_walks(model: Any, stock: Any, ids: Tensor, exits: list[int], positions: range) -> list[Walk]:
    """Some positions of a text (time,) at all exits, where the first tokens have left at `exits`."""
    # Hooks run in their order: what is noted has not been put back yet.
    with noted(stock) as behind, frozen(stock, exits):
        logits = stock(ids[None]).logits[0]
    layers, walks = exit_layers(model.config), []
    for position in positions:
        walk = Walk([], [])
        for layer in layers[:-1]:
            walk.states.append(normed(model, behind[layer][0, position], layer))
            walk.logits.append(stock.lm_head.weight @ walk.states[-1])
        last = behind[layers[-1]][0, position]
        walk.states.append(rms(last, stock.model.norm.weight, model.config.rms_norm_eps))
        walk.logits.append(logits[position])
        walks.append(walk)
    return walks


def normed(model: Any, state: Tensor, layer: int) -> Tensor:
    """State (hidden,) of an internal exit with a norm of its own."""
    assert model.config.exit_head == "norm"
    return rms(state, weight(model, f"exit_norms.norms.layer_{layer}.weight"), model.config.rms_norm_eps)


def rms(state: Tensor, scale: Tensor, eps: float) -> Tensor:
    return state / (state.square().mean() + eps).sqrt() * scale


@dataclass
class Text:
    """One row of a generation: tokens, the exit layer behind each new one, and every decision's scores."""

    tokens: list[int]
    layers: list[int]
    logits: list[Tensor]
    scores: list[list[float]]


@torch.no_grad()
def generate(
    model: Any,
    stock: Any,
    ids: Tensor,
    thresholds: list[float],
    skipped_kv: str,
    criterion: str,
    new_tokens: int,
    left: tuple[int, ...] = (),
) -> Text:
    """Greedy search over one unpadded prompt (time,): every step runs the whole text from its first token. The first
    tokens of the prompt have left behind the layers `left` when they were generated."""
    layers, text = exit_layers(model.config), Text(ids.tolist(), [], [], [])
    exits = [*left, *[layers[-1]] * (len(ids) - len(left))]
    for step in range(new_tokens):
        earlier = exits[: len(text.tokens) - 1] if skipped_kv == "copy" else []
        position = len(text.tokens) - 1
        walk = token_walks(model, stock, torch.tensor(text.tokens), earlier, range(position, position + 1))[0]
        index = len(layers) - 1
        if step > 0:
            text.scores.append(scores(model, walk, criterion))
            index = exit_index(text.scores[-1], thresholds)
            exits.append(layers[index])
        text.layers.append(layers[index])
        text.logits.append(walk.logits[index])
        text.tokens.append(int(walk.logits[index].argmax()))
    return text
