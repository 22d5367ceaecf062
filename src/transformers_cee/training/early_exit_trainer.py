# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""🤗 Trainer for models with exits: depth in every evaluation, operating points, and a card that shows them."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction
from transformers.trainer_utils import EvalLoopOutput, default_compute_objective, has_length
from transformers.utils import logging

from transformers_cee.evaluation.operating_points import FULL_DEPTH, OperatingPoint, depth_figures, exit_histogram
from transformers_cee.evaluation.timing import measure_wall_clock
from transformers_cee.exits.deciding import default_arguments, resolve_decision
from transformers_cee.exits.losses import resolve_problem_type
from transformers_cee.hub.model_card import EarlyExitCard
from transformers_cee.training.checkpoints import ResumableTrainer
from transformers_cee.training.checks import check_arguments, check_model
from transformers_cee.training.labels import FiniteLoss
from transformers_cee.training.model_step import own_exit_losses
from transformers_cee.training.parameters import bare_model
from transformers_cee.training.publishing import PublishingTrainer
from transformers_cee.training.token_evaluation import (
    KnownText,
    PlainTextLabels,
    aligned_prediction,
    token_prediction_step,
)
from transformers_cee.training.training_args import ConsistentEETrainingArguments


logger = logging.get_logger(__name__)

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
# What `evaluate` adds to the metrics of the task.
EXIT_FIGURES = ("depth", "saved_layers", "layer_speedup")


class EarlyExitTrainer(FiniteLoss, PublishingTrainer, ResumableTrainer):
    """Evaluates early-exit models where they leave. [`ConsistentEETrainer`] adds the training.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            An early-exit model, such as [`BertForConsistentEE`] or [`LlamaForConsistentEECausalLM`], or one with
            adapters of 🤗 PEFT around it; or give `model_init`.
        args ([`ConsistentEETrainingArguments`]): arguments.
        kwargs: those of `transformers.Trainer`. `compute_loss_func` of an encoder is asked for each exit, with its
            `logits`, in the phases `heads` and `consistent` and in evaluation; class weights go there. It returns one
            number, or (rows,) where a phase weighs rows; `num_items_in_batch` is None. Of a decoder,
            rows without `labels` are plain text, all of which is learnt, and `compute_metrics` gets the most probable
            token for each label, not logits.

    Raises:
        ValueError: a model without exits, or arguments that early exits do not support.
    """

    args: ConsistentEETrainingArguments

    def __init__(
        self, model: nn.Module | None = None, args: ConsistentEETrainingArguments | None = None, **kwargs: Any
    ) -> None:
        check_arguments(args, kwargs)
        # Trainer would ask it for the loss of a whole output; here it is asked for every exit's.
        self.own_loss = kwargs.pop("compute_loss_func", None)
        if model is not None:
            check_model(model, args, kwargs.get("preprocess_logits_for_metrics"), self.own_loss)
        super().__init__(model=model, args=args, **kwargs)
        if model is None:
            check_model(self.model, args, self.preprocess_logits_for_metrics, self.own_loss)
        # What the last `evaluate()` found, by the prefix of its metrics.
        self.operating_points: dict[str, list[OperatingPoint]] = {}
        self._exit_arguments: dict[str, Any] = {}
        self._in_phase = False
        self._exit_loss: Callable[[Tensor], Tensor] = torch.mean
        self._full_depth: KnownText | None = None
        self._per_token: bool = self._exit_model.exits_per_token
        # Of an encoder, a phase's loss is a mean over the micro-batch.
        self.model_accepts_loss_kwargs = self._per_token
        if self._per_token:
            self.data_collator = PlainTextLabels(self.data_collator)
            # Losses are divided by the counted tokens of all micro-batches and processes, see `compute_loss` of
            # `ConsistentEETrainer`; `_get_num_items_in_batch` shifts labels itself.
            self._loss_shifts_labels = False

    @property
    def _exit_model(self) -> nn.Module:
        """The early-exit model itself, without wrappers."""
        return bare_model(self.accelerator.unwrap_model(self.model))

    @property
    def _splits_model(self) -> bool:
        """Does a backend split the model over devices, and prepare it for good?"""
        return self.is_deepspeed_enabled or self.is_fsdp_enabled or bool(self.is_fsdp_xla_enabled)

    def _place_model(self) -> None:
        """Moves the model where its inputs go, if Trainer leaves that to the beginning of its own loop, as with
        `bf16_full_eval`."""
        if not (self.place_model_on_device or self.is_model_parallel or self._splits_model):
            self._move_model_to_device(self.model, self.args.device)

    def _take_model(self, model: nn.Module) -> None:
        """Puts a fresh model in the place of the trainer's."""
        check_model(model, self.args, self.preprocess_logits_for_metrics, self.own_loss)
        if model.exits_per_token != self._per_token:
            raise ValueError(f"`model_init` made a {type(model).__name__} after models of another kind.")
        if self.place_model_on_device:
            self._move_model_to_device(model, self.args.device)
        self.model = self.model_wrapped = model
        self.optimizer = self.lr_scheduler = None

    def _problem_type(self, dataset: Any = None) -> str:
        if self._per_token:
            # The next token is one class of the vocabulary.
            return "single_label_classification"
        config = self._exit_model.config
        labels = None
        if config.problem_type is None and config.num_labels > 1:
            datasets = (dataset, self.train_dataset, self.eval_dataset)
            rows = next(one for one in datasets if one is not None)
            rows = next(iter(rows.values())) if isinstance(rows, dict) else rows
            # Some data sets can only be gone through.
            row = rows[0] if hasattr(rows, "__getitem__") else next(iter(rows))
            # As Trainer's loaders do: a row may carry its text along.
            labels = self._get_collator_with_removed_columns(self.data_collator)([row]).get("labels")
        return resolve_problem_type(config.problem_type, config.num_labels, labels)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """Counted tokens of a decoder's accumulated batches, in all processes. What counts is the label of the next
        position; whether Trainer itself knows that depends on its version."""
        if self._per_token:
            batch_samples = [{"labels": batch["labels"][:, 1:]} for batch in batch_samples]
        return super()._get_num_items_in_batch(batch_samples, device)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """Trainer's step; the predictions are a pair of logits and exit layers, of a decoder those of
        `token_prediction_step`."""
        config = self._exit_model.config
        if self._per_token:
            with self.compute_loss_context_manager():
                inputs = {**self._prepare_inputs(inputs), **(self._exit_arguments or default_arguments(config))}
                return token_prediction_step(model, inputs)
        ignore_keys = list(config.keys_to_ignore_at_inference if ignore_keys is None else ignore_keys)
        wanted = {"exit_layers", *(("all_exit_losses",) if self._in_phase else ())}
        ignore_keys = [key for key in ignore_keys if key not in wanted]
        return super().prediction_step(model, {**inputs, **self._exit_arguments}, prediction_loss_only, ignore_keys)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Trainer's loss; where the caller has one, that of the exits taken, and in `all_exit_losses` of all exits."""
        if self.own_loss is None or "labels" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        outputs, labels = model(**inputs), inputs["labels"]
        loss = self.own_loss(outputs, labels, num_items_in_batch=None).mean()
        if outputs.all_exit_losses is not None:
            losses = own_exit_losses(self.own_loss, outputs, labels)
            outputs.all_exit_losses = losses.expand(len(labels), -1).contiguous()
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Trainer's loop; metrics get the depth, predictions are the logits alone, or a decoder's tokens."""
        if has_length(dataloader) and len(dataloader) == 0:
            # Loaders of some releases give a batch that is None.
            return EvalLoopOutput(predictions=None, label_ids=None, metrics={}, num_samples=0)
        compute, preprocess = self.compute_metrics, self.preprocess_logits_for_metrics
        if compute is not None:
            chosen = aligned_prediction if self._per_token else _without_exit_layers
            self.compute_metrics = lambda prediction: compute(chosen(prediction))
        if preprocess is not None:
            self.preprocess_logits_for_metrics = lambda outputs, labels: (preprocess(outputs[0], labels), *outputs[1:])
        try:
            output = super().evaluation_loop(
                dataloader, description, self.args.prediction_loss_only, ignore_keys, metric_key_prefix
            )
        finally:
            self.compute_metrics, self.preprocess_logits_for_metrics = compute, preprocess
        batches = output.predictions if isinstance(output.predictions, list) else [output.predictions]
        if output.num_samples == 0 or not batches or batches[0] is None:
            self._exit_layers, self._known_text = torch.empty(0, dtype=torch.long), None
            return output
        figures: dict[str, Any] = {}
        if self._per_token:
            labels = output.label_ids if isinstance(output.label_ids, list) else [output.label_ids]
            self._known_text = KnownText.from_arrays(batches, labels)
            figures |= self._known_text.figures(self._full_depth)
            if self._in_phase:
                figures["exit_loss"] = float(self._exit_loss(self._known_text.losses.double()))
            self._exit_layers, logits = self._known_text.decided_layers, [batch[1] for batch in batches]
        else:
            logits, exit_layers, *losses = (list(column) for column in zip(*batches, strict=True))
            self._exit_layers = torch.cat([torch.as_tensor(one) for one in exit_layers])
            if losses:
                all_losses = torch.cat([torch.as_tensor(one) for one in losses[0]])
                figures["exit_loss"] = float(self._exit_loss(all_losses.double()))
            elif self._in_phase and f"{metric_key_prefix}_loss" in output.metrics:
                figures["exit_loss"] = output.metrics[f"{metric_key_prefix}_loss"]
        figures |= depth_figures(self._exit_layers, self._exit_model.config.num_hidden_layers)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        return output._replace(predictions=logits if isinstance(output.predictions, list) else logits[0])

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Writes the card of an early-exit model, with the operating points of the last `evaluate()`; before any, that
        of 🤗 Trainer. Arguments as in Trainer; a card has one task and one data set of the Hub, the first of `tasks`,
        `dataset_tags` and `dataset_args`."""
        if not self.operating_points:
            about = (tags, model_name, finetuned_from, tasks, dataset_tags, dataset, dataset_args)
            return super().create_model_card(language, license, *about)
        if not self.is_world_process_zero():
            return None
        (first, measured), *others = self.operating_points.items()
        points, full = _without_full_depth(measured)
        where, split = "the evaluation set", "evaluation"
        if others:
            where, split = "the evaluation sets", first.partition("_")[2]
        config = self._exit_model.config
        names = [name for name in points[0].metrics if name != "loss"]
        EarlyExitCard(
            model_name=model_name or os.path.basename(os.path.abspath(self.args.output_dir)),
            repo_id=self.hub_model_id if self.args.push_to_hub else self.args.output_dir,
            num_layers=config.num_hidden_layers,
            dataset_name=", ".join(_listed(dataset)) or where,
            dataset_id=next(iter(_listed(dataset_tags)), None),
            dataset_config=next(iter(_listed(dataset_args)), None),
            task=next(iter(_listed(tasks)), "text-generation" if self._per_token else "text-classification"),
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
            training_arguments={name: getattr(self.args, name) for name in CARD_ARGUMENTS},
            seeds=[self.args.seed],
            problem_type=self._problem_type(),
            language=language,
            license=license,
        ).save(self.args.output_dir)
        return None

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, Any]:
        """Metrics and depth at the configured threshold, and the operating points of `args.eval_exit_thresholds`.

        Every operating point is executed. Inside a training phase only the metrics and depth are computed, and
        `exit_loss`: in `heads` what the phase's objective makes of all exits' losses, of a decoder their
        cross-entropy whatever `token_loss` (the mean over exits, where the objective needs more than losses or
        changes from step to step), else the loss at the exits taken. It is what improves where full
        depth stays the same: with `trainable="exits"`, and in the second stage of `heads_objective="two_stage"`, which
        always judges by it.

        Of an encoder, the wall-clock speed-up over full depth is taken in the same run, on up to
        `args.eval_timing_rows` rows. A decoder is run on known text, where all layers are executed whatever the exits,
        so there is no time to take: that is a matter of `generate`. Its depth and its exit histogram are those of the
        counted tokens that may leave early; the last token of a prompt may not, as in generation.

        Several evaluation sets are run one after the other, each behind its name. Inside a phase `exit_loss` is there
        without a name, too: its mean over the sets.

        Returns:
            `dict[str, float]`: Trainer's metrics, and with the prefix `depth`, `saved_layers` and `layer_speedup`; of
            an encoder `wall_clock_speedup`, if it was taken; of a decoder `loss`, `perplexity` and `token_accuracy`
            over all counted tokens, and `agreement` with the last exit over those that may leave. A set without rows
            gives none of them. `operating_points[prefix]` then holds the [`OperatingPoint`] of the config, those of
            `args.eval_exit_thresholds` in their order, and of a decoder that without exits, its criterion
            "full depth".
        """
        override = eval_dataset is not None
        dataset = eval_dataset if override else self.eval_dataset
        if isinstance(dataset, dict):
            return self._evaluate_several(dataset, override, ignore_keys, metric_key_prefix)
        if self._in_phase:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        loader = self.get_eval_dataloader(eval_dataset)
        self.operating_points = {}
        if has_length(loader) and len(loader) == 0:
            logger.warning("The evaluation set gives no batch: there is nothing to measure.")
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        run = (loader, ignore_keys, metric_key_prefix)
        try:
            full = [self._full_depth_point(*run)] if self._per_token else []
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            points = [self._own_point(metrics, metric_key_prefix)]
            points += [self._run_point("policy", threshold, *run) for threshold in self.args.eval_exit_thresholds]
        finally:
            self._full_depth = None
        if not self._per_token and self.args.eval_timing_rows > 0:
            self._time_points(loader, points)
            metrics[f"{metric_key_prefix}_wall_clock_speedup"] = points[0].wall_clock_speedup
        self.operating_points = {metric_key_prefix: points + full}
        return metrics

    def _evaluate_several(
        self, sets: dict[str, Any], override: bool, ignore_keys: list[str] | None, prefix: str
    ) -> dict[str, float]:
        """Evaluates sets one after the other, those of the trainer by name, as its loaders want them."""
        metrics: dict[str, float] = {}
        points: dict[str, list[OperatingPoint]] = {}
        for name, rows in sets.items():
            metrics |= self.evaluate(rows if override else name, ignore_keys, f"{prefix}_{name}")
            points |= self.operating_points
        losses = [metrics[key] for name in sets if (key := f"{prefix}_{name}_exit_loss") in metrics]
        if losses:
            # Callbacks have been told of each set, and now hear of all.
            overall = {f"{prefix}_exit_loss": sum(losses) / len(losses)}
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, overall)
            metrics |= overall
        self.operating_points = points
        return metrics

    def hyperparameter_search(
        self,
        hp_space: Any = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As `Trainer.hyperparameter_search`; runs lie in `output_dir/run-<trial>`. By default the objective is the
        evaluation loss, or the sum of what `compute_metrics` gives: figures of exits do not count."""
        return super().hyperparameter_search(hp_space, compute_objective or _objective, *args, **kwargs)

    def _run_point(
        self, criterion: str, threshold: Any, loader: Any, ignore_keys: list[str] | None, prefix: str
    ) -> OperatingPoint:
        self._exit_arguments = {"exit_criterion": criterion, "exit_threshold": threshold}
        try:
            output = self.evaluation_loop(loader, f"Exit threshold {threshold}", None, ignore_keys, prefix)
        finally:
            self._exit_arguments = {}
        return self._point(criterion, threshold, output.metrics, prefix)

    def _full_depth_point(self, loader: Any, ignore_keys: list[str] | None, prefix: str) -> OperatingPoint:
        """Runs known text without exits, which other runs are then compared with."""
        point = self._run_point("policy", 1.0, loader, ignore_keys, prefix)
        self._full_depth = self._known_text
        point.criterion = FULL_DEPTH_CRITERION
        point.metrics["agreement"] = 1.0
        return point

    def _own_point(self, metrics: dict[str, float], prefix: str) -> OperatingPoint:
        """The point that the config asks for."""
        config = self._exit_model.config
        decision, name = resolve_decision(config), config.exit_threshold
        if config.exit_budget is None and name is None:
            # Off, in the words of every full depth: not every criterion's own word for it can be written as JSON.
            return self._point(FULL_DEPTH["exit_criterion"], FULL_DEPTH["exit_threshold"], metrics, prefix)
        is_named = config.exit_budget is None and isinstance(name, str)
        point = self._point(decision.criterion, name if is_named else decision.threshold, metrics, prefix)
        point.exit_budget = config.exit_budget
        return point

    def _point(self, criterion: str, threshold: Any, metrics: dict[str, float], prefix: str) -> OperatingPoint:
        values = {name.removeprefix(f"{prefix}_"): value for name, value in metrics.items()}
        ignored = ("runtime", "samples_per_second", "steps_per_second", "epoch", "model_preparation_time")
        ignored += EXIT_FIGURES
        return OperatingPoint(
            criterion,
            threshold,
            **depth_figures(self._exit_layers, self._exit_model.config.num_hidden_layers),
            metrics={name: value for name, value in values.items() if name not in ignored},
            exit_histogram=exit_histogram(self._exit_layers, self._exit_model.config.exit_layer_numbers),
        )

    def _time_points(self, loader: Any, points: list[OperatingPoint]) -> None:
        batches, rows = [], 0
        for batch in loader:
            batch = self._prepare_inputs(batch)
            batches.append({name: value for name, value in batch.items() if name not in self.label_names})
            rows += self.args.per_device_eval_batch_size
            if rows >= self.args.eval_timing_rows:
                break
        settings = [point.exit_arguments for point in points]
        speedups = measure_wall_clock(self.accelerator.unwrap_model(self.model), batches, settings)
        for point, speedup in zip(points, speedups, strict=True):
            point.wall_clock_speedup = speedup


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


def _objective(metrics: dict[str, float]) -> float:
    """Transformers' default of a search, of the task's own metrics."""
    figures = (*EXIT_FIGURES, "wall_clock_speedup", "perplexity", "token_accuracy", "agreement", "preparation_time")
    return default_compute_objective({name: value for name, value in metrics.items() if not name.endswith(figures)})


def _without_exit_layers(prediction: EvalPrediction) -> EvalPrediction:
    predictions = prediction.predictions
    # Batches are not joined with `eval_do_concat_batches=False`.
    logits = [batch[0] for batch in predictions] if isinstance(predictions, list) else predictions[0]
    return EvalPrediction(logits, prediction.label_ids, inputs=prediction.inputs, losses=prediction.losses)
