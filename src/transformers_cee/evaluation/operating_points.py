# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Operating points: metric, depth and speed of a criterion at a threshold, in hindsight from stored exits.

Hindsight asks where each row would have left; it takes no time measurements, see `timing`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import EvalPrediction

from transformers_cee.evaluation.timing import Reported
from transformers_cee.exits.criteria import Thresholds
from transformers_cee.exits.numbers import plain
from transformers_cee.stores.scoring import exits_taken
from transformers_cee.stores.store import ExitStore


FULL_DEPTH: dict[str, Any] = {"exit_criterion": "policy", "exit_threshold": 1.0}
Metrics = Callable[[EvalPrediction], dict[str, float]]


@dataclass
class OperatingPoint:
    """An operating point (a criterion and its thresholds), measured: what the model does there. One that was chosen
    for a promise, before anything was measured, is a `CalibratedPoint`.

    Args:
        criterion (`str`): exit criterion.
        exit_threshold (`float`, `list[float]` or `str`): its threshold, or the model's name for it.
        depth (`float`): mean exit layer.
        saved_layers (`float`): `1 − depth/L`.
        layer_speedup (`float`): `L/depth`.
        wall_clock_speedup (`float`, *optional*):
            Time at full depth over time with exits, same run; None if not timed, or if noise.
        metrics (`dict[str, float]`): the task's metrics.
        exit_histogram (`dict[str, int]`): rows, or tokens that may leave, per exit layer.
        exit_budget (`float`, *optional*): budget that conditioned policies were asked for, instead of the threshold.
        wall_clock_spread (`float`, *optional*): interquartile range of the timed rounds over their median.
        noisy_wall_clock_speedup (`float`, *optional*):
            What was measured where it is noise, see `timing.Figure`; kept for the record, and shown nowhere.
    """

    criterion: str
    exit_threshold: float | list[float] | str
    depth: float
    saved_layers: float
    layer_speedup: float
    wall_clock_speedup: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    exit_histogram: dict[str, int] = field(default_factory=dict)
    exit_budget: float | None = None
    wall_clock_spread: float | None = None
    noisy_wall_clock_speedup: float | None = None

    @property
    def wall_clock(self) -> Reported:
        """The three fields of wall-clock time, as a timer reports them."""
        return Reported(self.wall_clock_speedup, self.wall_clock_spread, self.noisy_wall_clock_speedup)

    @wall_clock.setter
    def wall_clock(self, found: Reported) -> None:
        self.wall_clock_speedup, self.wall_clock_spread = found.value, found.spread
        self.noisy_wall_clock_speedup = found.noisy_value

    @property
    def exit_arguments(self) -> dict[str, Any]:
        """What `forward` takes to be at this point."""
        if self.exit_budget is not None:
            return {"exit_budget": self.exit_budget}
        return {"exit_criterion": self.criterion, "exit_threshold": self.exit_threshold}

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for JSON."""
        return asdict(self)


def depth_figures(exit_layers: Tensor, num_layers: int) -> dict[str, Any]:
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
        losses, predictions = store.losses, store.predictions
        assert predictions is not None
        values = token_figures(
            losses[taken], predictions[taken], store.labels, store.may_exit, full_depth=predictions[:, -1]
        )
    else:
        values = {} if metrics is None else metrics(EvalPrediction(store.logits[taken].numpy(), store.labels.numpy()))
    return OperatingPoint(
        criterion,
        plain(threshold),
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


def hindsight_curve(
    criterion: str, thresholds: Sequence[float], scores: Tensor, store: ExitStore, metrics: Metrics | None
) -> list[OperatingPoint]:
    """Operating points at several thresholds, by rising depth, each depth once."""
    points = [hindsight_point(criterion, threshold, scores, store, metrics) for threshold in dict.fromkeys(thresholds)]
    return by_depth(points)


def by_depth(points: Sequence[OperatingPoint]) -> list[OperatingPoint]:
    """Points by rising depth; of several at one depth the last."""
    found = {point.depth: point for point in points}
    return [found[depth] for depth in sorted(found)]


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
