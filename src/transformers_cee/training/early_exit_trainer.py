# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""🤗 Trainer for models with exits: depth in every evaluation, operating points, and a card that shows them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.trainer_utils import default_compute_objective, has_length, speed_metrics
from transformers.utils import logging

from transformers_cee.evaluation.operating_points import FULL_DEPTH, OperatingPoint, depth_figures, exit_histogram
from transformers_cee.evaluation.timing import Timer
from transformers_cee.evaluation.wall_clock import measure_wall_clock
from transformers_cee.exits.deciding import resolve_decision
from transformers_cee.training.accepted import check_model, checked_arguments
from transformers_cee.training.exit_evaluation import ExitEvaluationTrainer, ExitLoopOutput
from transformers_cee.training.items import ItemsFound, items_of
from transformers_cee.training.publishing import PublishingTrainer
from transformers_cee.training.token_evaluation import KnownText
from transformers_cee.training.trained_card import FULL_DEPTH_CRITERION, trained_card
from transformers_cee.training.training_args import ConsistentEETrainingArguments


logger = logging.get_logger(__name__)

# What `evaluate` adds to the metrics of the task.
EXIT_FIGURES = ("depth", "saved_layers", "layer_speedup")
TIME_FIGURES = ("wall_clock_speedup", "wall_clock_spread")
# What it adds of time and progress.
RUN_FIGURES = ("runtime", "samples_per_second", "steps_per_second", "epoch", "model_preparation_time")


class EarlyExitTrainer(PublishingTrainer, ExitEvaluationTrainer):
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
        args = checked_arguments(args, kwargs)
        own_loss = kwargs.pop("compute_loss_func", None)
        if model is not None:
            check_model(model, args, kwargs.get("preprocess_logits_for_metrics"), own_loss)
        super().__init__(model=model, args=args, own_loss=own_loss, **kwargs)
        # What the last `evaluate()` found, by the prefix of its metrics.
        self.operating_points: dict[str, list[OperatingPoint]] = {}
        self.data_collator = self.items.collator(self.data_collator)

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
        if items_of(model) is not self.items:
            raise ValueError(f"`model_init` made a {type(model).__name__} after models of another kind.")
        if self.place_model_on_device:
            self._move_model_to_device(model, self.args.device)
        self.model = self.model_wrapped = model
        self.optimizer = self.lr_scheduler = None

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
        about = (tags, model_name, finetuned_from, tasks, dataset_tags, dataset, dataset_args)
        if not self.operating_points:
            return super().create_model_card(language, license, *about)
        if self.is_world_process_zero():
            trained_card(self, language, license, *about).save(self.args.output_dir)
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
        `args.eval_timing_rows` rows, in several rounds; noise (see `timing.Figure`) is no metric. A decoder is run on
        known text, where all layers are executed whatever the exits, so there is no time to take: that is a matter of
        `generate`. Its depth and its exit histogram are those of the counted tokens that may leave early; the last
        token of a prompt may not, as in generation.

        Several evaluation sets are run one after the other, each behind its name. Inside a phase `exit_loss` is there
        without a name, too: its mean over the sets.

        Returns:
            `dict[str, float]`: Trainer's metrics, and with the prefix `depth`, `saved_layers` and `layer_speedup`; of
            an encoder `wall_clock_speedup` and `wall_clock_spread`, if they were taken; of a decoder `loss`,
            `perplexity` and `token_accuracy` over all counted tokens, and `agreement` with the last exit over those
            that may leave. A set without rows
            gives none of them. `operating_points[prefix]` then holds the [`OperatingPoint`] of the config, those of
            `args.eval_exit_thresholds` in their order, and of a decoder that without exits, its criterion
            "full depth".
        """
        override = eval_dataset is not None
        dataset = eval_dataset if override else self.eval_dataset
        if isinstance(dataset, dict):
            return self._evaluate_several(dataset, override, ignore_keys, metric_key_prefix)
        loader = self.get_eval_dataloader(eval_dataset)
        self.operating_points = {}
        if has_length(loader) and len(loader) == 0:
            logger.warning("The evaluation set gives no batch: there is nothing to measure.")
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self._memory_tracker.start()
        run = (loader, ignore_keys, metric_key_prefix)
        full, text = self._full_depth(*run) if self.items.compares_with_full_depth else ([], None)
        output = self._measure(*run, text)
        metrics = output.metrics
        if output.items is not None:
            points = [self._own_point(output, output.items, metric_key_prefix)]
            for threshold in self.args.eval_exit_thresholds:
                points += self._run_at("policy", threshold, *run, text)[0]
            if self.items.is_timed and self.args.eval_timing_rows > 0:
                self._time_points(loader, points)
                metrics |= _wall_clock_metrics(points[0], metric_key_prefix)
            self.operating_points = {metric_key_prefix: points + full}
        self._memory_tracker.stop_and_update_metrics(metrics)
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

    def _measure(
        self, loader: Any, ignore_keys: list[str] | None, prefix: str, full_depth: KnownText | None
    ) -> ExitLoopOutput:
        """Runs the model as its config asks, and tells callbacks what came of it."""
        start = time.time()
        output = self.run_exits(loader, "Evaluation", ignore_keys, prefix, full_depth=full_depth)
        start += output.metrics.get(f"{prefix}_model_preparation_time", 0.0)
        steps = math.ceil(output.num_samples / (self.args.eval_batch_size * self.args.world_size))
        output.metrics.update(speed_metrics(prefix, start, num_samples=output.num_samples, num_steps=steps))
        self.log(output.metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, output.metrics)
        return output

    def _run_at(
        self,
        criterion: str,
        threshold: Any,
        loader: Any,
        ignore_keys: list[str] | None,
        prefix: str,
        full_depth: KnownText | None = None,
    ) -> tuple[list[OperatingPoint], KnownText | None]:
        """Runs the model at a threshold: the point, if there is any row, and a decoder's text."""
        at = {"exit_criterion": criterion, "exit_threshold": threshold}
        output = self.run_exits(loader, f"Exit threshold {threshold}", ignore_keys, prefix, at, full_depth)
        if output.items is None:
            return [], None
        return [self._point(criterion, threshold, output.metrics, output.items, prefix)], output.items.known_text

    def _full_depth(self, *run: Any) -> tuple[list[OperatingPoint], KnownText | None]:
        """Runs known text without exits, which other runs are then compared with."""
        points, text = self._run_at("policy", 1.0, *run)
        for point in points:
            point.criterion = FULL_DEPTH_CRITERION
            point.metrics["agreement"] = 1.0
        return points, text

    def _own_point(self, output: ExitLoopOutput, items: ItemsFound, prefix: str) -> OperatingPoint:
        """The point that the config asks for."""
        config = self._exit_model.config
        decision, name = resolve_decision(config), config.exit_threshold
        criterion: str = decision.criterion
        threshold: Any = decision.threshold
        if config.exit_budget is None and name is None:
            # Off, in the words of every full depth: not every criterion's own word for it can be written as JSON.
            criterion, threshold = FULL_DEPTH["exit_criterion"], FULL_DEPTH["exit_threshold"]
        elif config.exit_budget is None and isinstance(name, str):
            threshold = name
        point = self._point(criterion, threshold, output.metrics, items, prefix)
        point.exit_budget = config.exit_budget
        return point

    def _point(
        self, criterion: str, threshold: Any, metrics: dict[str, float], items: ItemsFound, prefix: str
    ) -> OperatingPoint:
        config, layers = self._exit_model.config, items.exit_layers
        values = {name.removeprefix(f"{prefix}_"): value for name, value in metrics.items()}
        return OperatingPoint(
            criterion,
            threshold,
            **depth_figures(layers, config.num_hidden_layers),
            metrics={name: value for name, value in values.items() if name not in (*RUN_FIGURES, *EXIT_FIGURES)},
            exit_histogram=exit_histogram(layers, config.exit_layer_numbers),
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
        # Processes that share one model must run it equally often.
        timer = Timer(attempts=1) if self._splits_model else Timer()
        timed = measure_wall_clock(self.accelerator.unwrap_model(self.model), batches, settings, timer)
        for point, executed in zip(points, timed, strict=True):
            point.wall_clock = executed.speedup.reported


def _wall_clock_metrics(point: OperatingPoint, prefix: str) -> dict[str, float]:
    """What `evaluate` says of a point's time; nothing of noise."""
    speedup, spread = point.wall_clock_speedup, point.wall_clock_spread
    if speedup is None or spread is None:
        logger.warning(
            "The wall-clock speed-up is noise, so it is no metric: rounds lie too far apart, or show more speed than "
            "the saved layers allow. Measure again while the machine does nothing else."
        )
        return {}
    return {f"{prefix}_wall_clock_speedup": speedup, f"{prefix}_wall_clock_spread": spread}


def _objective(metrics: dict[str, float]) -> float:
    """Transformers' default of a search, of the task's own metrics."""
    figures = (*EXIT_FIGURES, *TIME_FIGURES, "perplexity", "token_accuracy", "agreement", "preparation_time")
    return default_compute_objective({name: value for name, value in metrics.items() if not name.endswith(figures)})
