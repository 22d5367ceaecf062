# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What calibration works on: scores of one criterion at all internal exits, and what each exit would have answered.

Inside of this package scores are *oriented*: larger is surer and a row leaves at the first exit whose score is
strictly above the threshold, whatever the criterion's own direction. This file is the border between both.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from transformers_cee.exits.criteria import CRITERIA, CriterionSettings
from transformers_cee.exits.deciding import criterion_settings
from transformers_cee.exits.evaluating import evaluating
from transformers_cee.exits.numbers import plain
from transformers_cee.exits.policy import confidence_scores
from transformers_cee.stores.scoring import score_exits
from transformers_cee.stores.store import ExitStore


RISKS = ("error", "excess_error")
# Criteria whose score is one of the confidence features.
CONFIDENCE_FEATURES = {"max_probability": 0, "margin": 1, "entropy": 2}


@dataclass
class ExitScores:
    """Scores of one criterion on rows (of an encoder) or tokens (of a decoder) that may leave at any exit.

    Args:
        criterion (`str`): exit criterion that the scores belong to.
        scores (`Tensor` of shape `(rows, exits − 1)`): its score at every internal exit, as if nothing left before.
        layers (`LongTensor` of shape `(exits,)`): 1-based layer of each exit.
        disagrees (`BoolTensor` of shape `(rows, exits)`): does the exit predict something else than the last one?
        losses (`Tensor` of shape `(rows, exits)`): the task's own risk of each row at each exit, 0/1 error by default;
            NaN where labels are not known.
        risk (`str`): name of that risk.
        groups (`LongTensor` of shape `(rows,)`, *optional*):
            Which rows depend on one another: the text of each token. Means are then taken over texts of means over
            their tokens, and a certificate counts texts.
        last_scores (`Tensor` of shape `(rows,)`, *optional*): the score at the last exit, to reject rows there.
        alpha (`float`, *optional*): price of one layer that the scores' policies were asked for.
        has_memory (`bool`, *optional*):
            Does a score depend on which exits were asked before? By default what the criterion says; policies that
            look at confidences look back, too.
        made_on (`str`, *optional*): engine and precision of the model, see `ExitStore`.

    Raises:
        ValueError: an unknown criterion, shapes that do not fit, no rows, or a score that is not a number.
    """

    criterion: str
    scores: Tensor
    layers: Tensor
    disagrees: Tensor
    losses: Tensor
    risk: str = "error"
    groups: Tensor | None = None
    last_scores: Tensor | None = None
    alpha: float | None = None
    has_memory: bool | None = None
    made_on: str | None = None

    def __post_init__(self) -> None:
        criterion = CRITERIA.find(self.criterion, "criterion")
        if self.has_memory is None:
            self.has_memory = criterion.has_memory is True
        self.layers = torch.as_tensor(self.layers)
        if self.scores.dim() != 2 or len(self.scores) == 0:
            raise ValueError(f"`scores` of shape {tuple(self.scores.shape)} must be (rows, exits − 1), rows above 0.")
        rows, exits = len(self.scores), self.scores.shape[1] + 1
        shapes: dict[str, tuple[int, ...]] = {"layers": (exits,), "disagrees": (rows, exits), "losses": (rows, exits)}
        shapes |= {"groups": (rows,), "last_scores": (rows,)}
        for name, shape in shapes.items():
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(f"`{name}` of shape {tuple(value.shape)} must be {shape} for {rows} rows.")
        if bool(self.scores.isnan().any()):
            raise ValueError("`scores` contains NaN; accepted are numbers.")

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def num_exits(self) -> int:
        return len(self.layers)

    @property
    def oriented(self) -> Tensor:
        """Scores (rows, exits − 1) of which larger is surer."""
        return orient(self.criterion, self.scores)

    def select(self, rows: Tensor) -> "ExitScores":
        """Scores of some rows (LongTensor or BoolTensor) only."""
        names = ("scores", "disagrees", "losses", "groups", "last_scores")
        kept = {field.name: getattr(self, field.name) for field in fields(self) if field.name in names}
        return replace(self, **{name: value[rows] for name, value in kept.items() if value is not None})

    def at_layers(self, layers: Sequence[int]) -> "ExitScores":
        """Scores of some exits only, as they are when all are asked.

        Args:
            layers (sequence of `int`): layers (1-based, ascending) of exits, the last one included.

        Raises:
            ValueError: layers that are not those of exits, or without the last one.
        """
        known = self.layers.tolist()
        wanted = [int(layer) for layer in plain(layers)]
        if not {*wanted} <= {*known} or wanted != sorted({*wanted, known[-1]}):
            raise ValueError(f"`layers`={wanted} must be ascending ones of {known}, the last one included.")
        places = torch.tensor([known.index(layer) for layer in wanted])
        parts = {"layers": self.layers, "disagrees": self.disagrees, "losses": self.losses}
        kept = {name: value[..., places] for name, value in parts.items()}
        return replace(self, scores=self.scores[:, places[:-1]], **kept)

    def mean(self, values: Tensor) -> float:
        """Mean of values (rows,): over rows, or over groups of means within groups."""
        weights, units = unit_weights(self.groups, len(values))
        return float((values.double() * weights).sum() / units)


def unit_weights(groups: Tensor | None, rows: int) -> tuple[Tensor, int]:
    """Weight (rows,) of each row such that each independent unit counts once, and the number of units."""
    if groups is None:
        return torch.ones(rows, dtype=torch.double), rows
    _, unit, counts = groups.unique(return_inverse=True, return_counts=True)
    return 1.0 / counts[unit].double(), len(counts)


def score_store(
    store: ExitStore,
    criterion: str,
    model: nn.Module | None = None,
    settings: CriterionSettings | None = None,
    risk: str | Tensor | Callable[[ExitStore], Tensor] = "error",
    min_exit_layer: int | None = None,
) -> ExitScores:
    """Scores of a criterion for every entry of a store that may leave early.

    Args:
        store (`ExitStore`): exits of held-out rows, see `collect_exits`.
        criterion (`str`): exit criterion.
        model (`nn.Module`, *optional*):
            The early-exit model, whose policies, estimators, patience and `min_exit_layer` decide its walks, and whose
            heads make the logits of tokens anew, which no store keeps. Criteria that look at predictions alone, like
            `"margin"`, do without.
        settings (`CriterionSettings`, *optional*):
            Instead of the model's own, see `exits.deciding.criterion_settings`: `alpha` of conditioned policies, which
            is kept, or the `input_ids` that `"token_hash"` needs.
        risk (`str`, `Tensor` or `Callable`, *optional*, defaults to `"error"`):
            The task's risk: `"error"`; `"excess_error"`, what an exit errs more than the last one; losses (entries,
            exits); or a function from the store to such losses, as 1 − ROUGE-L of each exit's answer.
        min_exit_layer (`int`, *optional*):
            First layer (1-based) to leave at, by default the model's. A promise made for walks that may leave before
            it does not hold for those that may not.

    Returns:
        `ExitScores`: with losses of NaN where the store's labels are not known.

    Raises:
        ValueError: a model with other exits, an unknown risk, nothing that may leave, or as `score_exits`.
    """
    policies, heads = None, None
    mode: AbstractContextManager = nullcontext()
    if model is not None:
        store.check_model(model)
        policies, settings = model.exit_policies, settings or criterion_settings(model)
        heads, mode = model.exit_logits if store.logits is None else None, evaluating(model)
        min_exit_layer = model.config.min_exit_layer if min_exit_layer is None else min_exit_layer
    if isinstance(risk, str) and risk not in RISKS:
        raise ValueError(f"`risk`={risk!r} is unknown; accepted are {', '.join(RISKS)}, losses, or a function.")
    deciding = store.deciding()
    with mode:
        scores = score_exits(criterion, store, policies, settings, min_exit_layer, heads)
    losses = _store_losses(store, risk)
    if not isinstance(losses, Tensor) or losses.shape != store.disagrees.shape:
        shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(f"`risk` gave {shape}; needed are losses (entries, exits) = {tuple(store.disagrees.shape)}.")
    asks_policies = "policy" in CRITERIA[criterion].looks_at
    last_scores = None
    if criterion in CONFIDENCE_FEATURES and store.logits is not None:
        last_scores = confidence_scores(store.logits[:, -1], store.problem_type)[CONFIDENCE_FEATURES[criterion]]
    return ExitScores(
        criterion,
        scores[deciding],
        store.layers,
        store.disagrees[deciding],
        losses[deciding],
        risk if isinstance(risk, str) else "own",
        groups=None if store.logits is not None else store.rows[deciding],
        last_scores=None if last_scores is None else last_scores[deciding],
        alpha=None if settings is None else settings.alpha,
        has_memory=True if asks_policies and policies is not None and policies.needs_logits else None,
        made_on=store.made_on,
    )


def _store_losses(store: ExitStore, risk: str | Tensor | Callable[[ExitStore], Tensor]) -> Tensor:
    if isinstance(risk, Tensor):
        return risk
    if not isinstance(risk, str):
        return risk(store)
    if not store.has_labels:
        return torch.full((len(store), len(store.layers)), math.nan)
    # In regression a head is right up to the store's tolerance, so that the error stays in [0, 1].
    losses = (~store.correct).float() if store.problem_type == "regression" else store.errors
    return losses if risk == "error" else excess_risk(losses)


def excess_risk(losses: Tensor) -> Tensor:
    """What each exit loses more than the last one, `max(0, loss_l − loss_L)`, from losses (rows, exits) (CALM,
    Schuster et al. 2022)."""
    return (losses - losses[:, -1:]).clamp_min(0)


def boldest_threshold(criterion: str) -> float:
    """The criterion's own threshold that lets out whoever can be let out."""
    cls = CRITERIA[criterion]
    tries = (-math.inf, 0.0, 1.0) if cls.higher_is_deeper else (math.inf, 1.0, 0.0)
    return next(value for value in tries if cls.check(value))


def orient(criterion: str, scores: Tensor) -> Tensor:
    """A criterion's scores with larger as surer; −inf where no accepted threshold lets the row out."""
    cls = CRITERIA[criterion]
    surer = scores if cls.higher_is_deeper else -scores
    return surer.masked_fill(~cls.passes(scores, boldest_threshold(criterion)), -math.inf)


def own_thresholds(criterion: str, thresholds: Sequence[float] | Tensor, oriented: Tensor) -> list[float]:
    """Thresholds of the criterion itself from those for oriented scores.

    Args:
        criterion (`str`): exit criterion.
        thresholds (`Tensor` of shape `(exits,)`): −inf lets everybody out who can leave, inf nobody.
        oriented (`Tensor` of shape `(rows, exits)`): oriented scores that the thresholds were fitted on. An exit that
            lets none of them out is closed, wherever the thresholds will be used.
    """
    cls, boldest = CRITERIA[criterion], boldest_threshold(criterion)
    own = []
    for index, threshold in enumerate(map(float, thresholds)):
        if bool((oriented[:, index] == -math.inf).all()):
            own.append(cls.off)
            continue
        if threshold == -math.inf:
            own.append(boldest)
            continue
        if cls.leaves_at_threshold():
            # The threshold is the lowest score that shall leave.
            above = oriented[:, index][oriented[:, index] > threshold]
            threshold = float(above.min()) if len(above) else math.inf
        sign = 1 if cls.higher_is_deeper else -1
        if threshold >= sign * cls.off:
            own.append(cls.off)
        else:
            own.append(sign * threshold if cls.check(sign * threshold) else boldest)
    return own


def leave_at(oriented: Tensor, thresholds: Sequence[float] | Tensor) -> Tensor:
    """Exit (0-based, (rows,)) at which each row leaves, from oriented scores (rows, exits − 1) and one threshold per
    internal exit."""
    limits = torch.as_tensor(thresholds, dtype=oriented.dtype)
    last = torch.ones(len(oriented), 1, dtype=torch.bool)
    return torch.cat((oriented > limits, last), dim=1).int().argmax(1)


def just_below(value: Tensor) -> Tensor:
    """The largest number below: `score > just_below(v)` is `score >= v`."""
    return torch.nextafter(value, torch.full_like(value, -math.inf))
