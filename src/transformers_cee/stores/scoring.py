# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Scores of exit criteria on stored exits, without a model: where each entry would leave, and at which thresholds."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from transformers_cee.exits.configuration import check_min_exit_layer, first_exit
from transformers_cee.exits.criteria import (
    CRITERIA,
    CriterionSettings,
    ExitStep,
    Thresholds,
    build_criterion,
    check_criterion,
    check_thresholds,
)
from transformers_cee.exits.policy import ExitPolicies
from transformers_cee.stores.store import ExitStore


# Maps states (entries, hidden) of an exit (0-based) to its logits (entries, labels).
Heads = Callable[[Tensor, int], Tensor]
# Entries of a store that are scored at once, and tokens whose logits are made anew.
SCORED_ENTRIES = 4096
SCORED_TOKENS = 256


@torch.no_grad()
def score_exits(
    criterion: str,
    store: ExitStore,
    policies: ExitPolicies | None = None,
    settings: CriterionSettings | None = None,
    min_exit_layer: int | None = None,
    heads: Heads | None = None,
) -> Tensor:
    """Scores (entries, exits − 1) of a criterion at every internal exit, as if nothing had left before.

    Args:
        criterion (`str`): name of an exit criterion.
        store (`ExitStore`): stored exits of rows or tokens.
        policies (`ExitPolicies`, *optional*): the model's policy networks; conditioned ones without an α in `settings`
            are asked for their default, in training mode, too.
        settings (`CriterionSettings`, *optional*):
            As `criterion_settings` takes them from a model, whose patience, tolerance and first exit are those of its
            own walks; by default a patience of 2, the store's tolerance and the first exit of all. What they hold of
            the input, such as `input_ids`, belongs to the store's entries in their order. Labels are the store's own
            by default.
        min_exit_layer (`int`, *optional*):
            First layer (1-based) to leave at, by default that of the settings; scores before it pass no threshold.
        heads (`Callable`, *optional*):
            The model's heads, where the store keeps no logits: states (entries, hidden), on the policies' device, and
            the exit (0-based) to logits. Without them tokens have the scores only that states, predictions and
            confidence features tell.

    Raises:
        ValueError: what the criterion needs is missing; policies of other exits; a first layer that is none; or of a
            store of tokens, a criterion that is not told without `heads`, or needs tokens or labels.
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
    if min_exit_layer is not None:
        check_min_exit_layer(min_exit_layer, int(store.layers[-1]))
        settings = replace(settings, first_exit=first_exit(store.layers.tolist(), min_exit_layer))
    if store.logits is None:
        _check_stored_tokens(criterion, store, policies, settings, heads)
    like = _like(policies, settings.estimators[criterion] if criterion in settings.estimators else None)
    num_exits = store.states.shape[1]
    parts = []
    at_once = SCORED_TOKENS if store.logits is None and heads is not None else SCORED_ENTRIES
    for entries in torch.arange(len(store)).split(at_once):
        walk = build_criterion(
            criterion,
            CRITERIA[criterion].off,
            num_exits,
            store.problem_type,
            policies,
            _settings_of(settings, entries, like.device),
        )
        scores = [walk.score(step) for step in _stored_steps(store, entries, like, heads)]
        parts.append(torch.stack(scores, dim=1).float().cpu() if scores else torch.empty(len(entries), 0))
    return close_exits(criterion, torch.cat(parts), settings.first_exit)


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


def _stored_steps(store: ExitStore, entries: Tensor, like: Tensor, heads: Heads | None) -> Iterator[ExitStep]:
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
            partial(_logits, logits, heads, index),
            rows,
            None if features is None else features[:, index],
            None if predicted is None else predicted[:, index],
        )


def _logits(logits: Tensor | None, heads: Heads | None, index: int, states: Tensor) -> Tensor:
    """Logits of an exit: the stored ones, or made anew of its states."""
    if logits is not None:
        return logits[:, index]
    assert heads is not None, "checked by `_check_stored_tokens`"
    return heads(states, index)


def _check_stored_tokens(
    criterion: str,
    store: ExitStore,
    policies: ExitPolicies | None,
    settings: CriterionSettings,
    heads: Heads | None,
) -> None:
    """Raises `ValueError` when a store of tokens, which has no logits, does not tell a criterion's scores."""
    kept = {"state", "predictions"}
    if heads is not None:
        kept |= {"logits", "confidence", "policy"}
    if store.features is not None:
        kept |= {"confidence", "policy"}
    if policies is None or not policies.needs_logits:
        kept.add("policy")
    if settings.input_ids is not None:
        kept.add("tokens")
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
