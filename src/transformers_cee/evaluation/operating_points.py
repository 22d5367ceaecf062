# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Operating points: metric, depth and speed of a criterion at a threshold, in hindsight from stored exits or executed.

Hindsight asks where each row would have left; it takes no time measurements. `measure_wall_clock` really leaves.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction

from transformers_cee.evaluation.store import ExitStore, evaluating
from transformers_cee.exits.criteria import (
    CRITERIA,
    CriterionSettings,
    ExitStep,
    Thresholds,
    build_criterion,
    check_criterion,
    check_thresholds,
)
from transformers_cee.exits.numbers import plain
from transformers_cee.exits.policy import ExitPolicies


FULL_DEPTH: dict[str, Any] = {"exit_criterion": "policy", "exit_threshold": 1.0}
Metrics = Callable[[EvalPrediction], dict[str, float]]
# Criteria whose score is one of the confidence features.
CONFIDENCE_FEATURES = {"max_probability": 0, "margin": 1, "entropy": 2}
# Entries of a store that are scored at once.
SCORED_ENTRIES = 4096


@dataclass
class OperatingPoint:
    """What a model does with one criterion at one threshold.

    Args:
        criterion (`str`): exit criterion.
        exit_threshold (`float`, `list[float]` or `str`): its threshold, or the model's name for it.
        depth (`float`): mean exit layer.
        saved_layers (`float`): `1 − depth/L`.
        layer_speedup (`float`): `L/depth`.
        wall_clock_speedup (`float`, *optional*): time at full depth over time with exits, same run; None if not timed.
        metrics (`dict[str, float]`): the task's metrics.
        exit_histogram (`dict[str, int]`): rows, or tokens that may leave, per exit layer.
        exit_budget (`float`, *optional*): budget that conditioned policies were asked for, instead of the threshold.
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

    @property
    def exit_arguments(self) -> dict[str, Any]:
        """What `forward` takes to be at this point."""
        if self.exit_budget is not None:
            return {"exit_budget": self.exit_budget}
        return {"exit_criterion": self.criterion, "exit_threshold": self.exit_threshold}

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
    min_exit_layer: int | None = None,
) -> Tensor:
    """Scores (entries, exits − 1) of a criterion at every internal exit, as if nothing had left before.

    Args:
        criterion (`str`): name of an exit criterion.
        store (`ExitStore`): stored exits of rows or tokens.
        policies (`ExitPolicies`, *optional*): the model's policy networks; conditioned ones without an α in `settings`
            are asked for their default, in training mode, too.
        settings (`CriterionSettings`, *optional*):
            As `criterion_settings` takes them from a model, whose patience and tolerance are those of its own walks;
            by default a patience of 2 and the store's tolerance. What they hold of the input, such as `input_ids`,
            belongs to the store's entries in their order. Labels are the store's own by default.
        min_exit_layer (`int`, *optional*): first layer (1-based) to leave at; scores before it pass no threshold.

    Raises:
        ValueError: what the criterion needs is missing; policies of other exits; or of a store of tokens, a criterion
            that its states, predictions and confidence features do not tell.
    """
    check_criterion(criterion)
    if policies is not None and len(policies.networks) != store.states.shape[1] - 1:
        raise ValueError(
            f"`policies` decide at {len(policies.networks)} exits; `store` has {store.states.shape[1] - 1} before its "
            f"last one, at layers {store.layers.tolist()}."
        )
    settings = settings or CriterionSettings(tolerance=store.tolerance)
    if settings.labels is None and store.has_labels:
        settings = replace(settings, labels=store.labels)
    if settings.alpha is None and policies is not None and policies.is_conditioned:
        settings = replace(settings, alpha=policies.default_alpha)
    first_exit = int((store.layers[:-1] < (min_exit_layer or 1)).sum())
    settings = replace(settings, first_exit=first_exit)
    if store.logits is None:
        _check_stored_tokens(criterion, store, policies, settings)
    like = _like(policies, settings.estimators[criterion] if criterion in settings.estimators else None)
    num_exits = store.states.shape[1]
    parts = []
    for entries in torch.arange(len(store)).split(SCORED_ENTRIES):
        walk = build_criterion(
            criterion,
            CRITERIA[criterion].off,
            num_exits,
            store.problem_type,
            policies,
            _settings_of(settings, entries, like.device),
        )
        scores = [walk.score(step) for step in _stored_steps(store, entries, like)]
        parts.append(torch.stack(scores, dim=1).float().cpu() if scores else torch.empty(len(entries), 0))
    return close_exits(criterion, torch.cat(parts), first_exit)


def close_exits(criterion: str, scores: Tensor, first_exit: int) -> Tensor:
    """Scores (entries, exits − 1) of a criterion, changed in place to pass no threshold before exit `first_exit`
    (0-based)."""
    scores[:, :first_exit] = 0.0 if CRITERIA[criterion].higher_is_deeper else 1.0
    return scores


def _like(*modules: nn.Module | None) -> Tensor:
    """An empty tensor where, and as precise as, the first of some modules is that has weights."""
    for module in modules:
        for value in () if module is None else module.state_dict().values():
            return torch.empty(0, device=value.device, dtype=value.dtype if value.is_floating_point() else None)
    return torch.empty(0)


def _settings_of(settings: CriterionSettings, entries: Tensor, device: torch.device) -> CriterionSettings:
    """The settings with what belongs to some entries only."""
    of_entries = {name: getattr(settings, name) for name in ("input_ids", "attention_mask", "labels")}
    return replace(
        settings, **{name: value[entries].to(device) for name, value in of_entries.items() if value is not None}
    )


def _stored_steps(store: ExitStore, entries: Tensor, like: Tensor) -> Iterator[ExitStep]:
    """What a criterion sees of some entries at each internal exit, where and as precise as `like` is."""
    states, rows = store.states[entries].to(like), torch.arange(len(entries), device=like.device)
    logits, features, predicted = (
        None if value is None else value[entries].to(like.device)
        for value in (store.logits, store.features if store.logits is None else None, store.predictions)
    )
    for index in range(store.states.shape[1] - 1):
        yield ExitStep(
            index,
            states[:, index],
            lambda _, index=index: logits[:, index],
            rows,
            None if features is None else features[:, index],
            None if predicted is None else predicted[:, index],
        )


def _check_stored_tokens(
    criterion: str, store: ExitStore, policies: ExitPolicies | None, settings: CriterionSettings
) -> None:
    """Raises `ValueError` when a store of tokens, which has no logits, does not tell a criterion's scores."""
    kept = {"state", "predictions", *(() if store.features is None else ("confidence",))}
    if settings.input_ids is not None:
        kept.add("tokens")
    if policies is None or not policies.needs_logits or store.features is not None:
        kept.add("policy")
    accepted = sorted(name for name, cls in CRITERIA.items() if cls.looks_at <= kept)
    if criterion not in accepted:
        raise ValueError(
            f"`criterion`={criterion!r} cannot be asked of stored tokens; accepted are {', '.join(accepted)}."
        )


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
    tries = _tried_thresholds(criterion, scores, candidates)
    found = [
        (float(layers[exits_taken(criterion, threshold, scores)].float().mean()), threshold) for threshold in tries
    ]
    return [min(found, key=lambda pair: abs(pair[0] - depth))[1] for depth in depths]


def _tried_thresholds(criterion: str, scores: Tensor, candidates: int) -> list[float]:
    """Thresholds between "all leave" and "nobody leaves", ascending: the scores if few are distinct, or quantiles."""
    check_criterion(criterion)
    cls = CRITERIA[criterion]
    flat = scores.flatten()[:10_000_000]
    values = flat.unique()
    if len(values) > candidates:
        values = torch.quantile(flat.double(), torch.linspace(0, 1, candidates).double()).float()
    # Counts have no largest number: as many as there are exits lets nobody out.
    off = float(scores.shape[1] + 1) if math.isinf(cls.off) else cls.off
    return sorted(value for value in {*values.tolist(), 0.0, 1.0, off} if cls.check(value))


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


def synchronize(device: torch.device) -> None:
    """Waits until a device has done what it was asked for; a CPU has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@torch.no_grad()
def _seconds(model: nn.Module, batch: dict[str, Tensor], exit_arguments: Mapping[str, Any]) -> float:
    synchronize(model.device)
    start = time.perf_counter()
    model(**batch, **exit_arguments)
    synchronize(model.device)
    return time.perf_counter() - start


def measure_wall_clock(
    model: nn.Module,
    batches: Sequence[dict[str, Tensor]],
    settings: Sequence[Mapping[str, Any]],
    repeats: int = 3,
) -> list[float]:
    """Wall-clock speed-up of each setting over full depth: really executed, exits against no exits, in turn on the
    same batches; the median of `repeats` ratios of total times.

    Args:
        model (`nn.Module`): an early-exit model; its device is synchronised around every forward pass.
        batches (sequence of `dict`): tokenised inputs without labels, on the model's device.
        settings (sequence of mappings): exit arguments of `forward`, see `OperatingPoint.exit_arguments`.
        repeats (`int`): passes over all batches.

    Returns:
        `list[float]`: one ratio per setting; above 1 is faster than full depth.

    Raises:
        ValueError: no batches or no repeats.
    """
    if not len(batches) or repeats < 1:
        raise ValueError(f"`batches` ({len(batches)}) and `repeats` ({repeats}) must both be at least 1.")
    ratios: list[list[float]] = [[] for _ in settings]
    with evaluating(model):
        _seconds(model, batches[0], FULL_DEPTH)  # warm-up
        for _ in range(repeats):
            full, early = [0.0] * len(settings), [0.0] * len(settings)
            for batch in batches:
                for index, exit_arguments in enumerate(settings):
                    full[index] += _seconds(model, batch, FULL_DEPTH)
                    early[index] += _seconds(model, batch, exit_arguments)
            for index in range(len(settings)):
                ratios[index].append(full[index] / early[index])
    return [statistics.median(values) for values in ratios]
