# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The model card of a training: operating points that the trainer measured last, and the arguments that led there."""

from __future__ import annotations

import os
from typing import Any

from transformers_cee.evaluation.operating_points import OperatingPoint
from transformers_cee.families import MODELS
from transformers_cee.hub.model_card import EarlyExitCard


CARD_ARGUMENTS = (
    "phases",
    "num_train_epochs",
    "learning_rate",
    "exit_learning_rate",
    "per_device_train_batch_size",
    "trainable",
    "heads_objective",
    "token_loss",
    "policy_gradient",
    "policy_learning_rate",
    "policy_num_train_epochs",
    "policy_holdout",
    "reward",
    "reward_loss",
    "consistent_objective",
    "consistent_num_rounds",
    "consistent_num_train_epochs",
)


FULL_DEPTH_CRITERION = "full depth"


def trained_card(
    trainer: Any,
    language: str | None = None,
    license: str | None = None,
    tags: str | list[str] | None = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    tasks: str | list[str] | None = None,
    dataset_tags: str | list[str] | None = None,
    dataset: str | list[str] | None = None,
    dataset_args: str | list[str] | None = None,
) -> EarlyExitCard:
    """The card of a trainer that has evaluated; arguments as in its `create_model_card`.

    Args:
        trainer ([`EarlyExitTrainer`]): its `operating_points` are shown.
    """
    (first, measured), *others = trainer.operating_points.items()
    points, full = _without_full_depth(measured)
    where, split = "the evaluation set", "evaluation"
    if others:
        where, split = "the evaluation sets", first.partition("_")[2]
    config = trainer._exit_model.config
    names = [name for name in points[0].metrics if name != "loss"]
    return EarlyExitCard(
        model_name=model_name or os.path.basename(os.path.abspath(trainer.args.output_dir)),
        repo_id=trainer.hub_model_id if trainer.args.push_to_hub else trainer.args.output_dir,
        num_layers=config.num_hidden_layers,
        dataset_name=", ".join(_listed(dataset)) or where,
        dataset_id=next(iter(_listed(dataset_tags)), None),
        dataset_config=next(iter(_listed(dataset_args)), None),
        task=next(iter(_listed(tasks)), MODELS[config.model_type].task or "text-classification"),
        image_shape=_image_shape(config),
        tags=_listed(tags),
        metric_name=names[0] if names else "loss",
        curves={"policy": sorted(points, key=lambda point: point.depth)},
        split=split,
        other_sets={f"the {prefix.partition('_')[2]} rows": _card_points(found) for prefix, found in others},
        exit_layers=None if config.exit_layers is None else config.exit_layer_numbers,
        # What the policies were judged at, where the config names none.
        exit_threshold=0.5 if config.exit_threshold is None else config.exit_threshold,
        full_depth=full,
        base_model=finetuned_from,
        figure=None,
        training_arguments={name: getattr(trainer.args, name) for name in CARD_ARGUMENTS},
        seeds=[trainer.args.seed],
        problem_type=trainer._problem_type(),
        language=language,
        license=license,
    )


def _image_shape(config: Any) -> list[int] | None:
    """Channels, height and width of an image that a model takes; None for models of texts."""
    if not hasattr(config, "num_channels"):
        return None
    # Convolutions take any size.
    side = getattr(config, "image_size", 224)
    return [config.num_channels, *(side if isinstance(side, list | tuple) else (side, side))]


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _without_full_depth(points: list[OperatingPoint]) -> tuple[list[OperatingPoint], OperatingPoint | None]:
    """Points with exits, and that without, if a decoder has it."""
    full = next((point for point in points if point.criterion == FULL_DEPTH_CRITERION), None)
    return [point for point in points if point is not full], full


def _card_points(points: list[OperatingPoint]) -> list[OperatingPoint]:
    """Points as a table shows them: full depth first, then by rising depth."""
    with_exits, full = _without_full_depth(points)
    return [*filter(None, [full]), *sorted(with_exits, key=lambda point: point.depth)]
