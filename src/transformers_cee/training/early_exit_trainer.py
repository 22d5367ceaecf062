# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""🤗 Trainer for models with exits: depth in every evaluation, operating points, and a card that shows them."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction

from transformers_cee.evaluation.operating_points import (
    OperatingPoint,
    depth_figures,
    exit_histogram,
    measure_wall_clock,
)
from transformers_cee.exits.configuration import ExitConfigMixin
from transformers_cee.exits.deciding import default_arguments, resolve_decision
from transformers_cee.exits.losses import resolve_problem_type
from transformers_cee.hub.model_card import EarlyExitCard
from transformers_cee.training.checkpoints import ResumableTrainer
from transformers_cee.training.heads_objectives import check_heads_objective
from transformers_cee.training.parameters import bare_model
from transformers_cee.training.publishing import PublishingTrainer
from transformers_cee.training.token_evaluation import (
    KnownText,
    PlainTextLabels,
    aligned_prediction,
    token_prediction_step,
)
from transformers_cee.training.training_args import ConsistentEETrainingArguments


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
    "reward_loss",
    "consistent_objective",
    "consistent_num_rounds",
    "consistent_num_train_epochs",
)


class EarlyExitTrainer(PublishingTrainer, ResumableTrainer):
    """Evaluates early-exit models where they leave. [`ConsistentEETrainer`] adds the training.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            An early-exit model, such as [`BertForConsistentEE`] or [`LlamaForConsistentEECausalLM`], or one with
            adapters of 🤗 PEFT around it.
        args ([`ConsistentEETrainingArguments`]): arguments.
        kwargs: those of `transformers.Trainer`. Of a decoder, rows without `labels` are plain text, all of which is
            learnt, and `compute_metrics` gets the most probable token for each label, not logits.

    Raises:
        ValueError: a model without exits, or arguments that early exits do not support.
    """

    args: ConsistentEETrainingArguments

    def __init__(self, model: nn.Module, args: ConsistentEETrainingArguments, **kwargs: Any) -> None:
        _check_arguments(model, args, kwargs)
        super().__init__(model=model, args=args, **kwargs)
        self._exit_arguments: dict[str, Any] = {}
        # What the last `evaluate()` measured, by evaluation set (None: the only one): operating points, full depth.
        self._measured: dict[str | None, tuple[list[OperatingPoint], OperatingPoint | None]] = {}
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

    def _problem_type(self, dataset: Any = None) -> str:
        if self._per_token:
            # The next token is one class of the vocabulary.
            return "single_label_classification"
        config = self._exit_model.config
        labels = None
        if config.problem_type is None and config.num_labels > 1:
            datasets = (dataset, self.train_dataset, self.eval_dataset)
            row = next(one for one in datasets if one is not None)[0]
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

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Trainer's loop; metrics get the depth, predictions are the logits alone, or a decoder's tokens."""
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
        if output.predictions is None:
            return output
        figures: dict[str, Any] = {}
        if self._per_token:
            self._known_text = KnownText.from_arrays(output.predictions, output.label_ids)
            figures |= self._known_text.figures(self._full_depth)
            if self._in_phase:
                figures["exit_loss"] = float(self._exit_loss(self._known_text.losses.double()))
            self._exit_layers, predictions = self._known_text.decided_layers, output.predictions[1]
        else:
            predictions, exit_layers, *losses = output.predictions
            self._exit_layers = torch.as_tensor(exit_layers)
            if losses:
                figures["exit_loss"] = float(self._exit_loss(torch.as_tensor(losses[0]).double()))
            elif self._in_phase and f"{metric_key_prefix}_loss" in output.metrics:
                figures["exit_loss"] = output.metrics[f"{metric_key_prefix}_loss"]
        figures |= depth_figures(self._exit_layers, self._exit_model.config.num_hidden_layers)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        return output._replace(predictions=predictions)

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
        if not self._measured:
            return super().create_model_card(
                language, license, model_name=model_name, finetuned_from=finetuned_from, dataset=dataset, **kwargs
            )
        if not self.is_world_process_zero():
            return None
        config = self._exit_model.config
        (first, (points, full)), *others = self._measured.items()
        names = [name for name in points[0].metrics if name != "loss"]
        where = "the evaluation set" if first is None else "the evaluation sets"
        EarlyExitCard(
            model_name=model_name or os.path.basename(os.path.abspath(self.args.output_dir)),
            repo_id=self.hub_model_id if self.args.push_to_hub else self.args.output_dir,
            num_layers=config.num_hidden_layers,
            dataset_name=(dataset if isinstance(dataset, str) else ", ".join(dataset or ())) or where,
            metric_name=names[0] if names else "loss",
            curves={"policy": sorted(points, key=lambda point: point.depth)},
            split="evaluation" if first is None else first,
            other_sets={f"the {name} rows": card_points(*measured) for name, measured in others},
            exit_layers=None if config.exit_layers is None else config.exit_layer_numbers,
            exit_threshold=config.exit_threshold,
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

        Returns:
            `dict[str, Any]`: Trainer's metrics, and with the prefix `depth`, `saved_layers`, `layer_speedup`,
            `exit_histogram` (rows or tokens per layer) and `operating_points` (list of `dict`, see
            [`OperatingPoint`]); of an encoder `wall_clock_speedup`; of a decoder `loss`, `perplexity` and
            `token_accuracy` over all counted tokens, `agreement` with the last exit over those that may leave, and
            `full_depth`, the operating point without exits.
        """
        if self._in_phase:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        several = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(several, dict):
            results, measured = {}, {}
            for name, rows in several.items():
                results |= self.evaluate(
                    name if eval_dataset is None else rows, ignore_keys, f"{metric_key_prefix}_{name}"
                )
                measured[name] = self._measured[None]
            self._measured = measured
            return results
        loader = self.get_eval_dataloader(eval_dataset)
        run = (loader, ignore_keys, metric_key_prefix)
        try:
            full = self._full_depth_point(*run) if self._per_token else None
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            points = [self._own_point(metrics, metric_key_prefix)]
            points += [self._run_point("policy", threshold, *run) for threshold in self.args.eval_exit_thresholds]
        finally:
            self._full_depth = None
        self._measured = {None: (points, full)}
        extra: dict[str, Any] = {"exit_histogram": points[0].exit_histogram}
        if full is None:
            self._time_points(loader, points)
            extra["wall_clock_speedup"] = points[0].wall_clock_speedup
        else:
            extra["full_depth"] = full.to_dict()
        extra["operating_points"] = [point.to_dict() for point in points[1:]]
        return {**metrics, **{f"{metric_key_prefix}_{name}": value for name, value in extra.items()}}

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
        point.criterion = "full depth"
        point.metrics["agreement"] = 1.0
        return point

    def _own_point(self, metrics: dict[str, float], prefix: str) -> OperatingPoint:
        """The point that the config asks for."""
        config = self._exit_model.config
        decision, name = resolve_decision(config), config.exit_threshold
        is_named = config.exit_budget is None and isinstance(name, str)
        point = self._point(decision.criterion, name if is_named else decision.threshold, metrics, prefix)
        point.exit_budget = config.exit_budget
        return point

    def _point(self, criterion: str, threshold: Any, metrics: dict[str, float], prefix: str) -> OperatingPoint:
        values = {name.removeprefix(f"{prefix}_"): value for name, value in metrics.items()}
        ignored = ("runtime", "samples_per_second", "steps_per_second", "epoch", "model_preparation_time")
        ignored += ("depth", "saved_layers", "layer_speedup")
        return OperatingPoint(
            criterion,
            threshold,
            **depth_figures(self._exit_layers, self._exit_model.config.num_hidden_layers),
            metrics={name: value for name, value in values.items() if name not in ignored},
            exit_histogram=exit_histogram(self._exit_layers, self._exit_model.config.exit_layer_numbers),
        )

    def _time_points(self, loader: Any, points: list[OperatingPoint]) -> None:
        if self.args.eval_timing_rows == 0:
            return
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


def card_points(points: list[OperatingPoint], full: OperatingPoint | None) -> list[OperatingPoint]:
    """Points as a table shows them: full depth first, then by rising depth."""
    return [*filter(None, [full]), *sorted(points, key=lambda point: point.depth)]


def _check_arguments(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Raises `ValueError` for what early exits do not support."""
    exit_model = bare_model(model)
    if not isinstance(getattr(exit_model, "config", None), ExitConfigMixin):
        raise ValueError(
            f"`model` of type {type(model).__name__} has no exits; give a model such as BertForConsistentEE."
        )
    if not isinstance(args, ConsistentEETrainingArguments):
        raise ValueError(f"`args` of type {type(args).__name__} must be ConsistentEETrainingArguments.")
    if any(kwargs.get("optimizers") or ()):
        raise ValueError("`optimizers` is not supported: every phase makes its own; use `args.optim`.")
    if kwargs.get("compute_loss_func") is not None:
        raise ValueError("`compute_loss_func` is not supported: the loss of a phase is its objective.")
    if args.prediction_loss_only or args.batch_eval_metrics:
        raise ValueError("`prediction_loss_only` and `batch_eval_metrics` are not supported: exit layers are needed.")
    check_heads_objective(args.heads_objective, exit_model.config, exit_model.exits_per_token)
    if exit_model.exits_per_token:
        if kwargs.get("preprocess_logits_for_metrics") is not None:
            raise ValueError("`preprocess_logits_for_metrics` is not supported: a decoder's logits are not collected.")
    elif args.token_loss != "ce" or args.policy_max_tokens is not None:
        raise ValueError(
            f"`token_loss`={args.token_loss!r} and `policy_max_tokens`={args.policy_max_tokens} are for decoders; "
            f"{type(exit_model).__name__} leaves row by row: accepted are 'ce' and None."
        )


def _without_exit_layers(prediction: EvalPrediction) -> EvalPrediction:
    return EvalPrediction(
        prediction.predictions[0], prediction.label_ids, inputs=prediction.inputs, losses=prediction.losses
    )
