# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Exit criteria once more, slow: one row, one exit, one number at a time, from what a row meets on its way down."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise

import reference
from torch import Tensor


LOWER_LEAVES = ("entropy", "energy", "entropy_patience", "divergence_patience", "learning_to_exit")


@dataclass
class Journey:
    """One row at all internal exits, and what the rules may know besides.

    Args:
        states, logits: one tensor (hidden,) and one (labels,) per internal exit.
        problem_type: what logits mean.
        policy: probability of leaving at each internal exit.
        estimators: fitted estimators by name.
        layers: 1-based layers of all exits.
        tokens: token ids of the row, without padding.
        label: its label.
    """

    states: list[Tensor]
    logits: list[Tensor]
    problem_type: str = "single_label_classification"
    policy: list[float] = field(default_factory=list)
    estimators: dict = field(default_factory=dict)
    layers: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    label: object = None
    patience: int = 2
    tolerance: float = 0.5


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def linear(layer, inputs: list[float]) -> list[float]:
    rows, biases = layer.weight.detach().double().tolist(), layer.bias.detach().double().tolist()
    return [
        sum(w * x for w, x in zip(row, inputs, strict=True)) + bias for row, bias in zip(rows, biases, strict=True)
    ]


def energy(row: Journey, index: int) -> float:
    values = row.logits[index].double().tolist()
    if row.problem_type == "multi_label_classification":
        parts = [1 / (1 + math.exp(value / 2) + math.exp(-value / 2)) for value in values]
        return sum(parts) / len(parts)
    return 1 / (1 + sum(math.exp(value) for value in values))


def divergence(row: Journey, index: int) -> float:
    parts = []
    for p, q in zip(
        reference.label_probabilities(row.logits[index], row.problem_type),
        reference.label_probabilities(row.logits[index - 1], row.problem_type),
        strict=True,
    ):
        middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        total = 0.0
        for one in (p, q):
            total += sum(a * math.log(a / m) for a, m in zip(one, middle, strict=True) if a > 0) / 2
        parts.append(total / math.log(2))
    return sum(parts) / len(parts)


def streak(signals: list[float | None], patience: int) -> float:
    """Smallest number above which a threshold makes a counter reach `patience` at the last of the signals: counted
    anew for every candidate."""
    for candidate in sorted(signal for signal in signals if signal is not None):
        count = 0
        for signal in signals:
            count = count + 1 if signal is not None and signal <= candidate else 0
        if count >= patience:
            return candidate
    return 1.0


def repeats(row: Journey, index: int) -> float:
    count = 0
    for now, before in zip(row.logits[1 : index + 1], row.logits[:index], strict=True):
        if row.problem_type == "regression":
            differences = [abs(a - b) for a, b in zip(now.tolist(), before.tolist(), strict=True)]
            same = all(difference < row.tolerance for difference in differences)
        else:
            same = reference.prediction(now, row.problem_type) == reference.prediction(before, row.problem_type)
        count = count + 1 if same else 0
    return float(count)


def cosine(row: Journey, index: int) -> float:
    if index == 0:
        return 0.0
    now, before = row.states[index].double().tolist(), row.states[index - 1].double().tolist()
    dot = sum(a * b for a, b in zip(now, before, strict=True))
    return max(0.0, dot / math.sqrt(sum(a * a for a in now) * sum(b * b for b in before)))


def consistency(row: Journey, index: int) -> float:
    estimator = row.estimators["consistency"]
    seen = linear(estimator.projections[index], row.states[index].double().tolist())
    maximum, margin, _ = reference.confidence(row.logits[index], row.problem_type)
    now = reference.prediction(row.logits[index], row.problem_type)
    earlier = [reference.prediction(logits, row.problem_type) == now for logits in row.logits[:index]]
    seen += [maximum, margin, sum(earlier) / len(earlier) if earlier else 0.0, row.layers[index] / row.layers[-1]]
    if row.problem_type == "multi_label_classification":
        seen += [float(value) for value in now]
    else:
        seen += [float(label == now[0]) for label in range(len(row.logits[index]))]
    hidden = [x * 0.5 * (1 + math.erf(x / math.sqrt(2))) for x in linear(estimator.widen, seen)]
    return sigmoid(linear(estimator.narrow, hidden)[0])


def token_hash(row: Journey, index: int) -> float:
    table, exits = row.estimators["token_hash"].exits.tolist(), len(row.layers)
    planned = math.ceil(sum(table[token] for token in row.tokens) / len(row.tokens))
    return min(1.0, max(0.0, 1 - (planned - index) / exits))


def is_right(row: Journey, index: int) -> float:
    if row.problem_type == "regression":
        return float(abs(row.logits[index].item() - float(row.label)) <= row.tolerance)
    label = (int(row.label),) if row.problem_type.startswith("single") else tuple(int(one) for one in row.label)
    return float(reference.prediction(row.logits[index], row.problem_type) == label)


def survive(row: Journey, index: int) -> float:
    left = 0.0
    for now in range(index + 1):
        reached = math.prod(1 - row.policy[before] for before in range(now))
        left += reached * row.policy[now]
    return left


def calibrated(row: Journey, index: int) -> float:
    temperature = math.exp(row.estimators["calibrated_probability"].log_temperatures[index].item())
    return reference.confidence(row.logits[index] / temperature, row.problem_type)[0]


def entropies(row: Journey, index: int) -> list[float]:
    return [reference.confidence(logits, row.problem_type)[2] for logits in row.logits[: index + 1]]


SCORES = {
    "policy": lambda row, i: row.policy[i],
    "exit_cdf": survive,
    "max_probability": lambda row, i: reference.confidence(row.logits[i], row.problem_type)[0],
    "margin": lambda row, i: reference.confidence(row.logits[i], row.problem_type)[1],
    "entropy": lambda row, i: entropies(row, i)[-1],
    "energy": energy,
    "patience": repeats,
    "entropy_patience": lambda row, i: streak(entropies(row, i), row.patience),
    "divergence_patience": lambda row, i: streak([None, *(divergence(row, n) for n in range(1, i + 1))], row.patience),
    "learning_to_exit": lambda row, i: sigmoid(
        linear(row.estimators["learning_to_exit"].linear, row.states[i].double().tolist())[0]
    ),
    "calibrated_probability": calibrated,
    "consistency": consistency,
    "state_classifier": lambda row, i: sigmoid(
        linear(row.estimators["state_classifier"].linears[i], row.states[i].double().tolist())[0]
    ),
    "state_similarity": cosine,
    "token_hash": token_hash,
    "oracle": is_right,
}


def scores_of(name: str, row: Journey) -> list[float]:
    """One score per internal exit."""
    return [SCORES[name](row, index) for index in range(len(row.logits))]


def exit_of(name: str, scores: list[float], threshold: float) -> int:
    """Exit (0-based) at which a row leaves."""
    for index, score in enumerate(scores):
        if name == "patience":
            leaves = score >= threshold
        else:
            leaves = score < threshold if name in LOWER_LEAVES else score > threshold
        if leaves:
            return index
    return len(scores)


def spreading_threshold(name: str, scores: list[list[float]], gap: float = 1e-4) -> float:
    """The threshold, clearly between two scores, that sends the rows to the most exits."""
    values = sorted({value for row in scores for value in row})
    if name == "patience":
        tries = [1.0, 2.0]
    else:
        tries = [(low + high) / 2 for low, high in pairwise(values) if high - low > gap]
    return max(tries, key=lambda threshold: len({exit_of(name, row, threshold) for row in scores}))
