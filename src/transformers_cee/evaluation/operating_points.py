# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Operating points: metric, depth and speed of a criterion at a threshold, in hindsight from stored exits or executed.

Hindsight asks where each row would have left; it takes no time measurements. `measure_wall_clock` really leaves.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction

from transformers_cee.evaluation.store import ExitStore
from transformers_cee.exits.criteria import (
    CRITERIA,
    CriterionSettings,
    ExitStep,
    Thresholds,
    build_criterion,
    check_thresholds,
)
from transformers_cee.exits.policy import ExitPolicies


Metrics = Callable[[EvalPrediction], dict[str, float]]
# Criteria whose score is one of the confidence features.
CONFIDENCE_FEATURES = {"max_probability": 0, "margin": 1, "entropy": 2}


@dataclass
class OperatingPoint:
    """What a model does with one criterion at one threshold.

    Args:
        criterion (`str`): exit criterion.
        exit_threshold (`float` or `list[float]`): its threshold.
        depth (`float`): mean exit layer.
        saved_layers (`float`): `1 − depth/L`.
        layer_speedup (`float`): `L/depth`.
        wall_clock_speedup (`float`, *optional*): time at full depth over time with exits, same run; None if not timed.
        metrics (`dict[str, float]`): the task's metrics.
        exit_histogram (`dict[str, int]`): rows, or tokens that may leave, per exit layer.
    """

    criterion: str
    exit_threshold: float | list[float]
    depth: float
    saved_layers: float
    layer_speedup: float
    wall_clock_speedup: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    exit_histogram: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for JSON."""
        return asdict(self)


def depth_figures(exit_layers: Tensor, num_layers: int) -> dict[str, float]:
    """Depth, saved layers and layer speed-up of exit layers (rows,)."""
    depth = float(exit_layers.float().mean())
    return {"depth": depth, "saved_layers": 1 - depth / num_layers, "layer_speedup": num_layers / depth}


def exit_histogram(exit_layers: Tensor, layer_numbers: Sequence[int]) -> dict[str, int]:
    """Rows that left at each exit layer."""
    counts = torch.bincount(exit_layers.cpu(), minlength=layer_numbers[-1] + 1)
    return {str(layer): int(counts[layer]) for layer in layer_numbers}


def token_figures(
    losses: Tensor,
    predictions: Tensor,
    labels: Tensor,
    may_exit: Tensor,
    full_depth: Tensor | None = None,
) -> dict[str, float]:
    """Loss, perplexity and token accuracy over all counted tokens, and agreement with the full depth over those that
    may leave early.

    Args:
        losses (`Tensor` of shape `(tokens,)`): cross-entropy in nats of each token at its exit.
        predictions, labels (`LongTensor` of shape `(tokens,)`): most probable token at the exit, and the true one.
        may_exit (`BoolTensor` of shape `(tokens,)`): tokens that may leave early.
        full_depth (`LongTensor` of shape `(tokens,)`, *optional*): most probable token at full depth.
    """
    loss = float(losses.double().mean())
    figures = {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "token_accuracy": float((predictions == labels).double().mean()),
    }
    if full_depth is not None:
        same = (predictions == full_depth)[may_exit]
        figures["agreement"] = float(same.double().mean()) if len(same) else 1.0
    return figures


@torch.no_grad()
def score_exits(
    criterion: str,
    store: ExitStore,
    policies: ExitPolicies | None = None,
    settings: CriterionSettings | None = None,
) -> Tensor:
    """Scores (entries, exits − 1) of a criterion at every internal exit, as if nothing had left before.

    Raises:
        ValueError: of a store of tokens, a criterion that its states and confidence features do not tell.
    """
    if store.logits is None:
        return _score_tokens(criterion, store, policies)
    num_exits = store.logits.shape[1]
    columns = []
    device = next(policies.parameters()).device if policies is not None and len(policies.networks) else "cpu"
    for states, logits in zip(store.states.split(4096), store.logits.split(4096), strict=True):
        off = CRITERIA[criterion].off
        walk = build_criterion(criterion, off, num_exits, store.problem_type, policies, settings)
        states, logits = states.to(device), logits.to(device)
        scores = [
            walk.score(ExitStep(index, states[:, index], lambda _, index=index, logits=logits: logits[:, index]))
            for index in range(num_exits - 1)
        ]
        columns.append(torch.stack(scores, dim=1).cpu() if scores else torch.empty(len(logits), 0))
    return torch.cat(columns)


def _score_tokens(criterion: str, store: ExitStore, policies: ExitPolicies | None) -> Tensor:
    if criterion == "policy" and policies is not None:
        some = next(policies.parameters())
        parts = []
        for entries in torch.arange(len(store)).split(4096):
            features = None if store.features is None else store.features[entries].to(some.device)
            parts.append(policies(store.states[entries].to(some), features).sigmoid().cpu())
        return torch.cat(parts)
    if criterion not in CONFIDENCE_FEATURES or store.features is None:
        known = ["policy", *(CONFIDENCE_FEATURES if store.features is not None else ())]
        raise ValueError(
            f"`criterion`={criterion!r} cannot be asked of stored tokens; accepted are {', '.join(known)}."
        )
    return store.features[..., CONFIDENCE_FEATURES[criterion]].clone()


def exits_taken(criterion: str, threshold: Thresholds, scores: Tensor) -> Tensor:
    """Exit (0-based, (rows,)) at which each row leaves, from scores (rows, exits − 1)."""
    num_exits = scores.shape[1] + 1
    thresholds = check_thresholds(criterion, threshold, num_exits)
    passes = CRITERIA[criterion].passes
    leaves = torch.stack(
        [passes(scores[:, index], thresholds[index]) for index in range(num_exits - 1)]
        + [torch.ones(len(scores), dtype=torch.bool)],
        dim=1,
    )
    return leaves.int().argmax(1)


def point_at(
    criterion: str, threshold: Thresholds, exits: Tensor, store: ExitStore, metrics: Metrics | None
) -> OperatingPoint:
    """The operating point of entries that leave at `exits` (0-based, (entries,)).

    Entries that may not leave early do not, and do not count for the depth. Of tokens the metrics are those of
    `token_figures`; `metrics` is not asked. They know nothing of keys and values that earlier tokens did not compute.
    """
    numbers = store.layers.tolist()
    exits = torch.where(store.may_exit, exits, len(numbers) - 1)
    taken = torch.arange(len(exits)), exits
    layers = store.layers[exits[store.may_exit] if bool(store.may_exit.any()) else exits]
    if store.logits is None:
        predictions = store.predictions
        values = token_figures(
            store.losses[taken], predictions[taken], store.labels, store.may_exit, full_depth=predictions[:, -1]
        )
    else:
        values = {} if metrics is None else metrics(EvalPrediction(store.logits[taken].numpy(), store.labels.numpy()))
    return OperatingPoint(
        criterion,
        threshold if isinstance(threshold, int | float) else list(threshold),
        **depth_figures(layers, numbers[-1]),
        metrics={name: float(value) for name, value in values.items()},
        exit_histogram=exit_histogram(layers, numbers),
    )


def hindsight_point(
    criterion: str, threshold: Thresholds, scores: Tensor, store: ExitStore, metrics: Metrics | None
) -> OperatingPoint:
    """The operating point of a criterion at a threshold, from its scores (rows, exits − 1)."""
    return point_at(criterion, threshold, exits_taken(criterion, threshold, scores), store, metrics)


def full_depth_point(store: ExitStore, metrics: Metrics | None) -> OperatingPoint:
    """All rows at the last exit."""
    exits = torch.full((len(store),), len(store.layers) - 1)
    return point_at("full depth", 1.0, exits, store, metrics)


def oracle_point(store: ExitStore, metrics: Metrics | None) -> OperatingPoint:
    """Each row at its first correct exit; rows that every exit gets wrong leave at the first. Needs the labels: an
    upper bound on the metric and not a method."""
    return point_at("oracle", 1.0, store.correct.int().argmax(1), store, metrics)


def thresholds_for_depths(
    criterion: str, scores: Tensor, layer_numbers: Sequence[int], depths: Sequence[float], candidates: int = 256
) -> list[float]:
    """For each wanted mean depth, the one threshold whose depth comes closest on these rows.

    Args:
        scores (`Tensor` of shape `(rows, exits − 1)`): the criterion's scores on the rows to fit on.
        depths (sequence of `float`): wanted mean exit layers, in 1..L.
        candidates (`int`): quantiles of the scores that are tried.
    """
    layers = torch.tensor(layer_numbers)
    cls = CRITERIA[criterion]
    values = torch.quantile(scores.flatten()[:10_000_000].double(), torch.linspace(0, 1, candidates).double())
    tries = sorted({float(value) for value in values.float() if cls.check(float(value))})
    found = [
        (float(layers[exits_taken(criterion, threshold, scores)].float().mean()), threshold) for threshold in tries
    ]
    return [min(found, key=lambda pair: abs(pair[0] - depth))[1] for depth in depths]


def hindsight_curve(
    criterion: str, thresholds: Sequence[float], scores: Tensor, store: ExitStore, metrics: Metrics | None
) -> list[OperatingPoint]:
    """Operating points at several thresholds, by rising depth, each depth once."""
    points = [hindsight_point(criterion, threshold, scores, store, metrics) for threshold in dict.fromkeys(thresholds)]
    by_depth = {point.depth: point for point in points}
    return [by_depth[depth] for depth in sorted(by_depth)]


def metric_at_depth(curve: Sequence[OperatingPoint], metric: str, depth: float) -> float | None:
    """Metric of a curve at a depth, linear between its points; None outside of them."""
    below = [point for point in curve if point.depth <= depth]
    above = [point for point in curve if point.depth >= depth]
    if not below or not above:
        return None
    left, right = max(below, key=lambda point: point.depth), min(above, key=lambda point: point.depth)
    if right.depth == left.depth:
        return left.metrics[metric]
    share = (depth - left.depth) / (right.depth - left.depth)
    return left.metrics[metric] + share * (right.metrics[metric] - left.metrics[metric])


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@torch.no_grad()
def _seconds(model: nn.Module, batch: dict[str, Tensor], criterion: str, threshold: Thresholds) -> float:
    _synchronize(model.device)
    start = time.perf_counter()
    model(**batch, exit_criterion=criterion, exit_threshold=threshold)
    _synchronize(model.device)
    return time.perf_counter() - start


def measure_wall_clock(
    model: nn.Module,
    batches: Sequence[dict[str, Tensor]],
    settings: Sequence[tuple[str, Thresholds]],
    repeats: int = 3,
) -> list[float]:
    """Wall-clock speed-up of each setting over full depth: really executed, exits against no exits, in turn on the
    same batches; the median of `repeats` ratios of total times.

    Args:
        model (`nn.Module`): an early-exit model; its device is synchronised around every forward pass.
        batches (sequence of `dict`): tokenised inputs without labels, on the model's device.
        settings (sequence of pairs): criterion and threshold.
        repeats (`int`): passes over all batches.

    Returns:
        `list[float]`: one ratio per setting; above 1 is faster than full depth.
    """
    training = model.training
    model.eval()
    _seconds(model, batches[0], "policy", 1.0)  # warm-up
    ratios: list[list[float]] = [[] for _ in settings]
    for _ in range(repeats):
        full, early = [0.0] * len(settings), [0.0] * len(settings)
        for batch in batches:
            for index, (criterion, threshold) in enumerate(settings):
                full[index] += _seconds(model, batch, "policy", 1.0)
                early[index] += _seconds(model, batch, criterion, threshold)
        for index in range(len(settings)):
            ratios[index].append(full[index] / early[index])
    model.train(training)
    return [statistics.median(values) for values in ratios]
