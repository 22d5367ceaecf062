# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A few rows of each data set, run as the phases would, before any of them has begun."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from transformers_cee.exits.evaluating import evaluating
from transformers_cee.training.labels import FiniteLabels, without_labels
from transformers_cee.training.model_step import ModelPhase, own_exit_losses


def subset(dataset: Any, rows: Sequence[int]) -> Any:
    """Some rows of a data set, as a data set of the same kind where it has a way to make one."""
    if len(rows) == len(dataset):
        return dataset
    return dataset.select(rows) if hasattr(dataset, "select") else Subset(dataset, rows)


def take_rows(trainer: Any, dataset: Any, rows: Sequence[int]) -> Mapping[str, Tensor]:
    """A batch of some rows, without the columns that the model does not take, as Trainer's loaders make it."""
    return _collate(trainer, [dataset[row] for row in rows])


def _collate(trainer: Any, rows: list) -> Mapping[str, Tensor]:
    return trainer._get_collator_with_removed_columns(trainer.data_collator)(rows)


@torch.no_grad()
def first_batch(
    trainer: Any, dataset: Any, rows: Tensor | None = None, per_row: bool = False, needs_labels: bool = True
) -> None:
    """Runs the first of some rows to all exits; raises whatever data set, collator and model have to say. A model that
    is split over devices is not run: whatever prepares it does so for good.

    Args:
        rows (`LongTensor`, *optional*): numbers of the rows; by default some are drawn.
        per_row (`bool`): must a loss of the caller's own tell rows apart?
        needs_labels (`bool`): with `False`, labels are not looked at.
    """
    checked = FiniteLabels if needs_labels else without_labels
    count = trainer.args.eval_batch_size
    some = _some_rows(dataset, count) if rows is None else [dataset[row] for row in rows[:count].tolist()]
    batch = checked(partial(_collate, trainer))(list(some))
    if trainer._splits_model:
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    with _aside(trainer), evaluating(model):
        inputs = trainer._prepare_inputs(dict(batch))
        outputs = model(**inputs, output_all_exits=True)
        if trainer.own_loss is not None and needs_labels:
            losses = own_exit_losses(trainer.own_loss, outputs, inputs["labels"])
            if per_row and len(losses) != len(inputs["labels"]):
                raise ValueError(
                    "`compute_loss_func` gave one number for all rows, and these phases weigh rows; it must return "
                    "(rows,), as torch's losses do with `reduction='none'`. One number will do for `phases`=['heads'] "
                    "with an objective of means."
                )


def rehearse_evaluation(run: Any, phases: Sequence[ModelPhase], wanted: str | None) -> None:
    """Evaluates some rows of each evaluation set as phases will; all rows, once, where a metric cannot do with few, or
    is not among theirs.

    Args:
        run ([`ConsistentEETrainer`]): the trainer of all phases.
        phases (sequence of `ModelPhase`): how they judge.
        wanted (`str`, *optional*): the metric that each of them goes by.

    Raises:
        TypeError: `compute_metrics` gives something else than numbers by name.
        ValueError: the metric is not among those of a phase.
    """
    of_all_rows: dict[str, dict[str, float]] = {}
    for phase in phases:
        metrics = _evaluate_sets(run, phase, of_all_rows)
        if wanted is None or phase.trainable == "internal_exits" or _others_add_metrics(run):
            continue
        name = f"eval_{wanted.removeprefix('eval_')}"
        if name not in metrics and name not in (metrics := _evaluate_sets(run, phase, of_all_rows, whole=True)):
            found = sorted(name.removeprefix("eval_") for name in metrics)
            raise ValueError(
                f"`metric_for_best_model`={wanted!r} is none of the metrics: accepted are {', '.join(found)}."
            )


def _others_add_metrics(run: Any) -> bool:
    """May a subclass of a trainer or a callback put metrics of its own beside those of an evaluation?"""
    phase = run.phase_trainer
    asked = [
        type(run).evaluate,
        phase.evaluate,
        phase.measure,
        *(type(one).on_evaluate for one in run.callback_handler.callbacks),
    ]
    return not all(one.__module__.split(".")[0] in ("transformers", "transformers_cee") for one in asked)


def _evaluate_sets(
    run: Any, phase: ModelPhase, of_all_rows: dict[str, dict[str, float]], whole: bool = False
) -> dict[str, float]:
    """Metrics of some rows of all evaluation sets, and those `of_all_rows`, which are taken once for all phases."""
    metrics: dict[str, float] = {}
    sets = run.eval_dataset if isinstance(run.eval_dataset, dict) else {"": run.eval_dataset}
    for name, rows in sets.items():
        prefix = f"eval_{name}" if name else "eval"
        few = _some_rows(rows, run.args.eval_batch_size * run.args.world_size)
        found, does = _evaluate(run, phase, few, prefix, forgives=True)
        if (whole or not does) and prefix not in of_all_rows:
            of_all_rows[prefix], _ = _evaluate(run, phase, rows, prefix)
        metrics |= of_all_rows.get(prefix, {}) | found
        if f"{prefix}_exit_loss" in metrics:
            metrics["eval_exit_loss"] = metrics[f"{prefix}_exit_loss"]
    return metrics


def _evaluate(
    run: Any, phase: ModelPhase, rows: Any, prefix: str, forgives: bool = False
) -> tuple[dict[str, float], bool]:
    """Metrics of some rows, and whether these did. With `forgives` they may not do: `compute_metrics` may fail, as on
    rows of one class only."""
    compute, failed = run.compute_metrics, []

    def watched(prediction: Any) -> Any:
        try:
            result = compute(prediction)
        except Exception as error:
            if not forgives:
                raise
            failed.append(error)
            return {}
        return _check_metrics(result)

    with _aside(run), evaluating(run.model):
        trainer = run.make_phase_trainer(phase, copy.copy(run.args), compute_metrics=compute and watched)
        trainer.is_in_train = True
        # The loader of tests is never kept for later evaluations.
        loader = trainer.get_test_dataloader(rows)
        return trainer.evaluation_loop(loader, "Rehearsal", metric_key_prefix=prefix).metrics, not failed


def _check_metrics(result: Any) -> dict[str, Any]:
    if not isinstance(result, Mapping):
        raise TypeError(
            f"`compute_metrics` gave {type(result).__name__} {result!r}; accepted is a dictionary of numbers by name."
        )
    for name, value in result.items():
        is_number = isinstance(value, int | float | np.number) or (np.ndim(value) == 0 and hasattr(value, "item"))
        if not isinstance(name, str) or not is_number:
            raise TypeError(
                f"`compute_metrics` gave {type(value).__name__} {value!r} for {name!r}; accepted are numbers by name."
            )
    return dict(result)


def _some_rows(dataset: Any, count: int) -> Any:
    """Rows from all over a data set, since the first ones may be of one class; the first ones of one that can only be
    gone through."""
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        return list(islice(iter(dataset), count))
    drawn = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:count]
    return subset(dataset, drawn.sort().values.tolist())


@contextmanager
def _aside(trainer: Any) -> Iterator[None]:
    """Nobody is told, no random number is used up, and the model keeps its precision and its problem type.

    Trainer's evaluation prepares a model that nobody has prepared, and marks it: training would then take it as it is,
    without what averages gradients over processes.
    """
    handler, config, prepared = trainer.callback_handler, trainer._exit_model.config, trainer.accelerator._models
    kept = (handler.callbacks, trainer.is_in_train, handler.eval_dataloader)
    problem_type = getattr(config, "problem_type", None)
    handler.callbacks, trainer.is_in_train = [], True
    prepared.append(trainer.model)
    try:
        with torch.random.fork_rng(devices=[]), trainer.accelerator.autocast():
            yield
    finally:
        prepared.pop()
        handler.callbacks, trainer.is_in_train, handler.eval_dataloader = kept
        config.problem_type = problem_type
