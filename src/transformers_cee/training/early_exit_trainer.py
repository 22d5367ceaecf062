# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""🤗 Trainer for models with exits: depth in every evaluation, operating points, and a card that shows them."""

import os
from typing import Any

import torch
from torch import nn
from transformers import EvalPrediction, Trainer

from transformers_cee.evaluation.operating_points import (
    OperatingPoint,
    depth_figures,
    exit_histogram,
    measure_wall_clock,
)
from transformers_cee.exits.configuration import ExitConfigMixin
from transformers_cee.exits.losses import resolve_problem_type
from transformers_cee.hub.model_card import EarlyExitCard
from transformers_cee.training.training_args import ConsistentEETrainingArguments


CARD_ARGUMENTS = (
    "phases",
    "num_train_epochs",
    "learning_rate",
    "exit_learning_rate",
    "per_device_train_batch_size",
    "heads_objective",
    "policy_gradient",
    "policy_learning_rate",
    "policy_num_train_epochs",
    "policy_holdout",
    "reward_loss",
    "consistent_objective",
    "consistent_num_rounds",
    "consistent_num_train_epochs",
)


class EarlyExitTrainer(Trainer):
    """Evaluates early-exit models where they leave. [`ConsistentEETrainer`] adds the training.

    Args:
        model (`PreTrainedModel`): an early-exit model, such as [`BertForConsistentEE`].
        args ([`ConsistentEETrainingArguments`]): arguments.
        kwargs: those of `transformers.Trainer`.

    Raises:
        ValueError: a model without exits, or arguments that early exits do not support.
    """

    args: ConsistentEETrainingArguments

    def __init__(self, model: nn.Module, args: ConsistentEETrainingArguments, **kwargs: Any) -> None:
        if not isinstance(getattr(model, "config", None), ExitConfigMixin):
            raise ValueError(f"`model` of type {type(model).__name__} has no exits; give a model such as "
                             "BertForConsistentEE.")  # fmt: skip
        if not isinstance(args, ConsistentEETrainingArguments):
            raise ValueError(f"`args` of type {type(args).__name__} must be ConsistentEETrainingArguments.")
        if any(kwargs.get("optimizers") or ()):
            raise ValueError("`optimizers` is not supported: every phase makes its own; use `args.optim`.")
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("`compute_loss_func` is not supported: the loss of a phase is its objective.")
        if args.prediction_loss_only or args.batch_eval_metrics:
            raise ValueError(
                "`prediction_loss_only` and `batch_eval_metrics` are not supported: exit layers are needed."
            )
        super().__init__(model=model, args=args, **kwargs)
        self._exit_arguments: dict[str, Any] = {}
        self._points: list[OperatingPoint] = []
        self._in_phase = False

    def _problem_type(self, dataset: Any = None) -> str:
        config = self.model.config
        labels = None
        if config.problem_type is None and config.num_labels > 1:
            datasets = (dataset, self.train_dataset, self.eval_dataset)
            row = next(one for one in datasets if one is not None)[0]
            # As Trainer's loaders do: a row may carry its text along.
            labels = self._get_collator_with_removed_columns(self.data_collator)([row]).get("labels")
        return resolve_problem_type(config.problem_type, config.num_labels, labels)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """Trainer's step; the predictions are a pair of logits and exit layers."""
        ignore_keys = list(self.model.config.keys_to_ignore_at_inference if ignore_keys is None else ignore_keys)
        ignore_keys = [key for key in ignore_keys if key != "exit_layers"]
        return super().prediction_step(model, {**inputs, **self._exit_arguments}, prediction_loss_only, ignore_keys)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Trainer's loop; metrics get the depth, predictions are the logits alone."""
        compute, preprocess = self.compute_metrics, self.preprocess_logits_for_metrics
        if compute is not None:
            self.compute_metrics = lambda prediction: compute(
                EvalPrediction(
                    prediction.predictions[0], prediction.label_ids, inputs=prediction.inputs, losses=prediction.losses
                )
            )
        if preprocess is not None:
            self.preprocess_logits_for_metrics = lambda outputs, labels: (preprocess(outputs[0], labels), outputs[1])
        try:
            output = super().evaluation_loop(
                dataloader, description, self.args.prediction_loss_only, ignore_keys, metric_key_prefix
            )
        finally:
            self.compute_metrics, self.preprocess_logits_for_metrics = compute, preprocess
        if output.predictions is None:
            return output
        logits, exit_layers = output.predictions
        self._exit_layers = torch.as_tensor(exit_layers)
        figures = depth_figures(self._exit_layers, self.model.config.num_hidden_layers)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        return output._replace(predictions=logits)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        dataset: str | list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes the card of an early-exit model, with the operating points of the last `evaluate()`; before any, that
        of 🤗 Trainer. Arguments as in Trainer."""
        if not self._points:
            return super().create_model_card(
                language, license, model_name=model_name, finetuned_from=finetuned_from, dataset=dataset, **kwargs
            )
        if not self.is_world_process_zero():
            return None
        config = self.model.config
        names = [name for name in self._points[0].metrics if name != "loss"]
        EarlyExitCard(
            model_name=model_name or os.path.basename(os.path.abspath(self.args.output_dir)),
            repo_id=self.hub_model_id if self.args.push_to_hub else self.args.output_dir,
            num_layers=config.num_hidden_layers,
            dataset_name=(dataset if isinstance(dataset, str) else ", ".join(dataset or ())) or "the evaluation set",
            metric_name=names[0] if names else "loss",
            curves={"policy": sorted(self._points, key=lambda point: point.depth)},
            split="evaluation",
            exit_layers=None if config.exit_layers is None else config.exit_layer_numbers,
            exit_threshold=config.exit_threshold,
            base_model=finetuned_from,
            figure=None,
            training_arguments={name: getattr(self.args, name) for name in CARD_ARGUMENTS},
            seeds=[self.args.seed],
            regression=self._problem_type() == "regression",
            language=language or "en",
            license=license,
        ).save(self.args.output_dir)
        return None

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, Any]:
        """Metrics and depth at the configured threshold, and the operating points of `args.eval_exit_thresholds`.

        Every operating point is executed; its wall-clock speed-up over full depth is taken in the same run, on up to
        `args.eval_timing_rows` rows. Inside a training phase only the metrics and depth are computed.

        Returns:
            `dict[str, Any]`: Trainer's metrics, and with the prefix `depth`, `saved_layers`, `layer_speedup`,
            `wall_clock_speedup`, `exit_histogram` (rows per layer) and `operating_points` (list of `dict`, see
            [`OperatingPoint`]).
        """
        if self._in_phase or isinstance(eval_dataset or self.eval_dataset, dict):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        config = self.model.config
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        settings = [(config.exit_criterion, config.exit_threshold)]
        points = [self._point(*settings[0], metrics, metric_key_prefix)]
        loader = self.get_eval_dataloader(eval_dataset)
        for threshold in self.args.eval_exit_thresholds:
            settings.append(("policy", threshold))
            self._exit_arguments = {"exit_criterion": "policy", "exit_threshold": threshold}
            try:
                output = self.evaluation_loop(
                    loader, f"Exit threshold {threshold}", None, ignore_keys, metric_key_prefix
                )
            finally:
                self._exit_arguments = {}
            points.append(self._point(*settings[-1], output.metrics, metric_key_prefix))
        self._time_points(loader, settings, points)
        self._points = points
        return {
            **metrics,
            f"{metric_key_prefix}_wall_clock_speedup": points[0].wall_clock_speedup,
            f"{metric_key_prefix}_exit_histogram": points[0].exit_histogram,
            f"{metric_key_prefix}_operating_points": [point.to_dict() for point in points[1:]],
        }

    def _point(self, criterion: str, threshold: Any, metrics: dict[str, float], prefix: str) -> OperatingPoint:
        values = {name.removeprefix(f"{prefix}_"): value for name, value in metrics.items()}
        ignored = ("runtime", "samples_per_second", "steps_per_second", "epoch", "model_preparation_time")
        ignored += ("depth", "saved_layers", "layer_speedup")
        return OperatingPoint(
            criterion,
            threshold,
            **depth_figures(self._exit_layers, self.model.config.num_hidden_layers),
            metrics={name: value for name, value in values.items() if name not in ignored},
            exit_histogram=exit_histogram(self._exit_layers, self.model.config.exit_layer_numbers),
        )

    def _time_points(self, loader: Any, settings: list[tuple[str, Any]], points: list[OperatingPoint]) -> None:
        if self.args.eval_timing_rows == 0:
            return
        batches, rows = [], 0
        for batch in loader:
            batch = self._prepare_inputs(batch)
            batches.append({name: value for name, value in batch.items() if name not in self.label_names})
            rows += self.args.per_device_eval_batch_size
            if rows >= self.args.eval_timing_rows:
                break
        model = self.accelerator.unwrap_model(self.model)
        for point, speedup in zip(points, measure_wall_clock(model, batches, settings), strict=True):
            point.wall_clock_speedup = speedup
