# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Slow and independent: one unpadded row at a time, own pooling, own heads, own policies, own exit rules.

Of the code under test nothing is called; of the model only the weights and the layers of transformers' own BERT.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Walk:
    """What happened to one row. `scores` holds one number per internal exit that was asked."""

    logits: Tensor
    exit_layer: int
    scores: list[float] = field(default_factory=list)
    thresholds: list[float] = field(default_factory=list)
    all_logits: list[Tensor] = field(default_factory=list)
    all_states: list[Tensor] = field(default_factory=list)

    @property
    def slack(self) -> float:
        """Distance of the closest decision to the other side."""
        pairs = zip(self.scores, self.thresholds, strict=True)
        return min((abs(score - threshold) for score, threshold in pairs), default=math.inf)


def layer_states(model, ids: Tensor, types: Tensor | None = None, positions: Tensor | None = None) -> list[Tensor]:
    """Hidden states (time, hidden) behind every layer, for one unpadded row of ids (time,)."""
    hidden = model.bert.embeddings(
        input_ids=ids[None],
        token_type_ids=torch.zeros_like(ids)[None] if types is None else types[None],
        position_ids=torch.arange(len(ids))[None] if positions is None else positions[None],
    )
    states = []
    for layer in model.bert.encoder.layer:
        hidden = layer(hidden, None)
        states.append(hidden[0])
    return states


def exit_state(model, hidden: Tensor, index: int) -> Tensor:
    """Exit state (hidden,) from one row's hidden states (time, hidden)."""
    if model.config.exit_pooling == "mean":
        state = sum(hidden[column] for column in range(len(hidden))) / len(hidden)
    else:
        dense = model.bert.pooler.dense
        state = torch.tanh(dense.weight @ hidden[0] + dense.bias)
    if model.config.exit_norm == "layer_norm":
        norm = model.exit_norms.norms[index]
        centred = state - state.mean()
        state = centred / (centred.square().mean() + model.config.layer_norm_eps).sqrt() * norm.weight + norm.bias
    return state


def head_logits(model, state: Tensor, index: int) -> Tensor:
    """Logits (labels,) of exit `index`."""
    layers = exit_layers(model.config)
    head = model.classifier if index == len(layers) - 1 else model.exit_heads.heads[index]
    return head.weight @ state + head.bias


def exit_layers(config) -> list[int]:
    """1-based layers of the exits."""
    depth = config.num_hidden_layers
    if config.exit_layers is None:
        return [*range(1, depth + 1)]
    if isinstance(config.exit_layers, int):
        return [layer for layer in range(1, depth + 1) if (depth - layer) % config.exit_layers == 0]
    return sorted(set(config.exit_layers) | {depth})


def label_probabilities(logits: Tensor, problem_type: str) -> list[list[float]]:
    """One distribution over classes, or one pair per label."""
    values = logits.detach().double().tolist()
    if problem_type == "multi_label_classification":
        positive = [1 / (1 + math.exp(-value)) for value in values]
        return [[1 - share, share] for share in positive]
    total = sum(math.exp(value) for value in values)
    return [[math.exp(value) / total for value in values]]


def confidence(logits: Tensor, problem_type: str) -> tuple[float, float, float]:
    """Maximum probability, margin, normalised entropy; means over labels."""
    maxima, margins, entropies = [], [], []
    for shares in label_probabilities(logits, problem_type):
        largest, second = sorted(shares, reverse=True)[:2]
        maxima.append(largest)
        margins.append(largest - second)
        entropies.append(-sum(share * math.log(share) for share in shares if share > 0) / math.log(len(shares)))
    return tuple(sum(values) / len(values) for values in (maxima, margins, entropies))


def prediction(logits: Tensor, problem_type: str) -> tuple[int, ...]:
    """What two exits must share to agree."""
    return tuple(shares.index(max(shares)) for shares in label_probabilities(logits, problem_type))


def policy_score(model, state: Tensor, history: list[Tensor], problem_type: str, index: int) -> float:
    """`p_l` of one row; `history` holds the logits of exits up to and with this one."""
    features = []
    if model.config.policy_inputs in ("state", "both"):
        features += state.detach().tolist()
    if model.config.policy_inputs != "state":
        earlier = history[:-1]
        previous = confidence(earlier[-1], problem_type)[1] if earlier else 0.0
        now = prediction(history[-1], problem_type)
        same = [prediction(logits, problem_type) == now for logits in earlier]
        seen = [*confidence(history[-1], problem_type), previous, sum(same) / len(same) if same else 0.0]
        if model.config.policy_inputs == "log_confidence":
            inside = [min(max(one, 1e-5), 1 - 1e-5) for one in seen]
            seen = [math.log(one / (1 - one)) / math.log(1e5) for one in inside]
        features += seen
    first, _, second = model.exit_policies.networks[index]
    hidden = first.weight.detach().double() @ torch.tensor(features).double() + first.bias.detach().double()
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))  # GELU
    logit = float(second.weight.detach().double()[0] @ hidden + second.bias.detach().double()[0])
    return 1 / (1 + math.exp(-max(-30.0, min(30.0, logit))))


def walk(
    model,
    ids: Tensor,
    criterion: str = "policy",
    threshold: float | list[float] = 0.5,
    types: Tensor | None = None,
    positions: Tensor | None = None,
    problem_type: str = "single_label_classification",
) -> Walk:
    """Where one unpadded row leaves, and with which logits."""
    layers = exit_layers(model.config)
    thresholds = threshold if isinstance(threshold, list) else [threshold] * len(layers)
    hidden = layer_states(model, ids, types, positions)
    states = [exit_state(model, hidden[layer - 1], index) for index, layer in enumerate(layers)]
    logits = [head_logits(model, state, index) for index, state in enumerate(states)]
    result = Walk(logits[-1], layers[-1], all_logits=logits, all_states=states)
    streak = 0
    for index in range(len(layers) - 1):
        if criterion == "policy":
            score = policy_score(model, states[index], logits[: index + 1], problem_type, index)
        elif criterion == "patience":
            same = index > 0 and prediction(logits[index], problem_type) == prediction(logits[index - 1], problem_type)
            streak = streak + 1 if same else 0
            score = float(streak)
        else:
            maximum, _, entropy = confidence(logits[index], problem_type)
            score = maximum if criterion == "max_probability" else entropy
        result.scores.append(score)
        # Half a step aside for patience, whose scores are whole numbers.
        result.thresholds.append(thresholds[index] - 0.5 if criterion == "patience" else thresholds[index])
        leaves = {
            "policy": score > thresholds[index],
            "max_probability": score > thresholds[index],
            "entropy": score < thresholds[index],
            "patience": score >= thresholds[index],
        }[criterion]
        if leaves:
            result.logits, result.exit_layer = logits[index], layers[index]
            break
    return result


def spreading_thresholds(model, rows: list[dict], criterion: str, share: float = 0.3, **options) -> list[float]:
    """One threshold per exit at which about `share` of the rows that reach it leave, in the widest gap
    between two scores around there."""
    never = 0.0 if criterion == "entropy" else 1.0
    walks = [walk(model, row["input_ids"], criterion, never, row["token_type_ids"], **options) for row in rows]
    remaining, thresholds = list(range(len(rows))), []
    for index in range(len(exit_layers(model.config)) - 1):
        scores = sorted({walks[row].scores[index] for row in remaining}, reverse=criterion != "entropy")
        target = min(max(1, round(share * len(scores))), len(scores) - 1)
        if target < 1:
            thresholds.append(never)
            continue
        cuts = range(max(1, target - 1), min(target + 1, len(scores) - 1) + 1)
        leaving = max(cuts, key=lambda cut: abs(scores[cut - 1] - scores[cut]))
        thresholds.append((scores[leaving - 1] + scores[leaving]) / 2)
        stays = (lambda score, cut: score >= cut) if criterion == "entropy" else (lambda score, cut: score <= cut)
        remaining = [row for row in remaining if stays(walks[row].scores[index], thresholds[-1])]
    return [*thresholds, 0.5]
