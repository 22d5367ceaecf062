# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""🤗 Trainer that runs a model with exits: losses of exits, and evaluations that say where items left."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerControl
from transformers.trainer_utils import EvalLoopOutput, has_length

from transformers_cee.evaluation.operating_points import depth_figures
from transformers_cee.training.accepted import check_model
from transformers_cee.training.items import Collator, ItemsFound, Rows, items_of
from transformers_cee.training.model_step import OwnLoss, own_exit_losses
from transformers_cee.training.parameters import bare_model
from transformers_cee.training.token_evaluation import KnownText
from transformers_cee.training.training_args import ConsistentEETrainingArguments


class ExitBatches:
    """The batches of a loader with exit arguments beside their tensors: so these reach the model's forward through
    Trainer's own loop.

    Args:
        loader: any loader of batches that are mappings.
        exit_arguments (`dict`): arguments of the model's forward.
    """

    def __init__(self, loader: Any, exit_arguments: Mapping[str, Any]) -> None:
        self.loader, self.exit_arguments = loader, exit_arguments

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.loader:
            yield {**batch, **self.exit_arguments}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


class ExitLoopOutput(EvalLoopOutput):
    """What an evaluation gives back, and in `items` what it found of exits ([`ItemsFound`]); None without rows."""

    items: ItemsFound | None = None


class ExitEvaluationTrainer(Trainer):
    """What the trainers of this package share: they know the early-exit model, what one of its items is, and where
    items left in an evaluation.

    Args:
        own_loss (`Callable`, *optional*):
            `compute_loss_func` of the caller. Trainer would ask it for the loss of a whole output; here it is asked
            for every exit's.
        args, kwargs: those of `transformers.Trainer`.

    Raises:
        ValueError: a model without exits, or one that the arguments do not fit.
    """

    args: ConsistentEETrainingArguments
    control: TrainerControl
    data_collator: Collator
    compute_metrics: Callable[..., Any] | None
    preprocess_logits_for_metrics: Callable[..., Any] | None

    def __init__(self, *args: Any, own_loss: OwnLoss | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.own_loss = own_loss
        check_model(self.model, self.args, self.preprocess_logits_for_metrics, own_loss)
        self.items: Rows = items_of(self._exit_model)
        # Trainer then leaves the division by what it has counted to the loss.
        self.model_accepts_loss_kwargs = self.items.counts_items
        # `counted_batches` shifts labels itself.
        self._loss_shifts_labels = False

    @property
    def _exit_model(self) -> Any:
        """The early-exit model itself, without wrappers."""
        return bare_model(self.accelerator.unwrap_model(self.model))

    def _problem_type(self, dataset: Any = None) -> str:
        def labels() -> Any:
            datasets = (dataset, self.train_dataset, self.eval_dataset)
            rows = next(one for one in datasets if one is not None)
            rows = next(iter(rows.values())) if isinstance(rows, dict) else rows
            # Some data sets can only be gone through.
            row = rows[0] if hasattr(rows, "__getitem__") else next(iter(rows))
            # As Trainer's loaders do: a row may carry its text along.
            return self._get_collator_with_removed_columns(self.data_collator)([row]).get("labels")

        return self.items.problem_type(self._exit_model.config, labels)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """Counted items of the batches of an optimizer step, in all processes."""
        return super()._get_num_items_in_batch(self.items.counted_batches(batch_samples), device)

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

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """Trainer's step; predictions come with what is known of exits, see the `prediction_step` of the items."""
        known = self._exit_model.config.keys_to_ignore_at_inference
        ignored = list(known if ignore_keys is None else ignore_keys)
        stock = super().prediction_step
        return self.items.prediction_step(stock, self, model, inputs, prediction_loss_only, ignored)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> ExitLoopOutput:
        """Trainer's loop; metrics get the depth, predictions are the logits alone, or a decoder's tokens."""
        return self.run_exits(dataloader, description, ignore_keys, metric_key_prefix)

    def run_exits(
        self,
        dataloader: Any,
        description: str,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        exit_arguments: Mapping[str, Any] | None = None,
        full_depth: KnownText | None = None,
    ) -> ExitLoopOutput:
        """`evaluation_loop` with exit arguments of its own.

        Args:
            exit_arguments (`dict`, *optional*): arguments of the model's forward; by default the config's.
            full_depth (`KnownText`, *optional*): the same text without exits, which tokens are compared with.
        """
        if has_length(dataloader) and len(dataloader) == 0:
            # Loaders of some releases give a batch that is None.
            return ExitLoopOutput(predictions=None, label_ids=None, metrics={}, num_samples=0)
        if exit_arguments is None:
            exit_arguments = self.items.exit_arguments(self._exit_model.config)
        batches = ExitBatches(dataloader, exit_arguments)
        with self._metrics_of_predictions():
            output = super().evaluation_loop(
                batches, description, self.args.prediction_loss_only, ignore_keys, metric_key_prefix
            )
        joined = not isinstance(output.predictions, list)
        if output.num_samples == 0 or output.predictions is None or output.predictions == []:
            return ExitLoopOutput(*output)
        found = self.items.found(output, full_depth)
        figures = found.figures | depth_figures(found.exit_layers, self._exit_model.config.num_hidden_layers)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        carried = ExitLoopOutput(*output._replace(predictions=found.predictions[0] if joined else found.predictions))
        carried.items = found
        return carried

    @contextmanager
    def _metrics_of_predictions(self) -> Iterator[None]:
        """What callers gave to look at predictions sees these, without what is known of exits."""
        compute, preprocess = self.compute_metrics, self.preprocess_logits_for_metrics
        if compute is not None:
            self.compute_metrics = lambda prediction: compute(self.items.plain_prediction(prediction))
        if preprocess is not None:
            self.preprocess_logits_for_metrics = lambda outputs, labels: (preprocess(outputs[0], labels), *outputs[1:])
        try:
            yield
        finally:
            self.compute_metrics, self.preprocess_logits_for_metrics = compute, preprocess
