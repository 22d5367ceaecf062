# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A phase that trains the model itself: a 🤗 Trainer of its own, made from the phase and its run."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.trainer_utils import TrainOutput, has_length

from transformers_cee.training.checkpoints import ResumableTrainer
from transformers_cee.training.exit_evaluation import ExitEvaluationTrainer, ExitLoopOutput
from transformers_cee.training.labels import FiniteLabels, FiniteLoss
from transformers_cee.training.model_step import ModelPhase, RowJudge, with_gradient
from transformers_cee.training.parameters import freeze_for_model_step, keeping_requires_grad, split_exit_groups
from transformers_cee.training.policy_phase import at_rate
from transformers_cee.training.training_args import ConsistentEETrainingArguments, judge_by


def phase_arguments(
    args: ConsistentEETrainingArguments, phase: ModelPhase, folder: str, learning_rate: float, epochs: float
) -> ConsistentEETrainingArguments:
    """A phase's own arguments; its checkpoints lie in `folder`."""
    own = copy.copy(args)
    own.output_dir, own.learning_rate, own.num_train_epochs = folder, learning_rate, epochs
    own.push_to_hub = False
    if own.metric_for_best_model is not None:
        # Nothing else that an evaluation reports can change.
        if phase.judge is not None:
            judge_by(own, phase.judge.best_by, greater_is_better=True)
        elif phase.trainable == "internal_exits":
            judge_by(own, "exit_loss", greater_is_better=False)
    return own


class ModelPhaseTrainer(FiniteLoss, ResumableTrainer, ExitEvaluationTrainer):
    """🤗 Trainer's own loop with a phase's loss, where only what the phase trains is not frozen. It takes model, data,
    metrics, optimizer and callbacks from the run; batches with labels that are no finite numbers are refused.

    A subclass that overrides a hook of 🤗 Trainer, such as `create_optimizer` or `get_train_dataloader`, becomes the
    `phase_trainer` of a subclass of [`ConsistentEETrainer`].

    Args:
        run ([`ConsistentEETrainer`]): the trainer of all phases.
        phase (`ModelPhase`): what the phase learns, and at which exits it is judged.
        args ([`ConsistentEETrainingArguments`]): the phase's own, see `phase_arguments`.
        train_dataset (*optional*): the rows that the phase learns from.
        compute_metrics (`Callable`, *optional*): takes the place of the run's.
    """

    def __init__(
        self,
        run: Any,
        phase: ModelPhase,
        args: ConsistentEETrainingArguments,
        train_dataset: Any = None,
        compute_metrics: Callable | None = None,
    ) -> None:
        # Whoever is told of the run is told of its phases: nobody else is to be called.
        reporters, checkpoints = args.report_to, args.enable_jit_checkpoint
        args.report_to, args.enable_jit_checkpoint = [], False
        # A wrapper that an earlier phase left would wait for the gradients of that phase.
        run.model_wrapped = run.model
        # Of the model itself: a backend may have put another one around it by the next phase.
        run._set_signature_columns_if_needed()
        with _keeping_random_numbers():
            super().__init__(
                model=run.model,
                args=args,
                data_collator=FiniteLabels(run.data_collator),
                train_dataset=train_dataset,
                eval_dataset=run.eval_dataset,
                processing_class=run.processing_class,
                compute_metrics=compute_metrics or run.compute_metrics,
                preprocess_logits_for_metrics=run.preprocess_logits_for_metrics,
                optimizer_cls_and_kwargs=at_rate(run.optimizer_cls_and_kwargs, args.learning_rate),
                own_loss=run.own_loss,
            )
        args.report_to, args.enable_jit_checkpoint = reporters, checkpoints
        self.run, self.phase = run, phase
        self.callback_handler, self.control = run.callback_handler, run.control
        # It knows what a backend has prepared for good.
        self.accelerator, self.gather_function = run.accelerator, run.gather_function
        self.deepspeed = run.deepspeed
        self.label_names, self.can_return_loss = run.label_names, run.can_return_loss
        self._signature_columns = run._signature_columns

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trains what the phase trains; everything else is frozen until it ends.

        Args:
            resume_from_checkpoint (`bool` or `str`, *optional*): a checkpoint of the phase; `True` is the newest.
        """
        with keeping_requires_grad(self.model):
            freeze_for_model_step(self.model, self.phase.trainable, self.phase.trains_policies)
            if self.accelerator.num_processes > 1:
                # An evaluation before any training marks the model as prepared: gradients would not be averaged.
                self.model.__dict__.pop("_is_accelerate_prepared", None)
            for callback in self.callback_handler.callbacks:
                if hasattr(callback, "early_stopping_patience_counter"):
                    callback.early_stopping_patience_counter = 0
                if getattr(callback, "jit_manager", None) is not None:
                    callback.jit_manager.trainer = self
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """The phase's loss. Of a decoder, the micro-batch's share in the mean over all counted tokens of the step, as
        Trainer counts them (`num_items_in_batch`)."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        loss, outputs = self.phase.loss(model, inputs, self.state)
        # Gradients are averaged over processes.
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        loss = self.items.share(loss, inputs["labels"], kwargs.get("num_items_in_batch"), processes)
        loss = with_gradient(loss, model)
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.args.exit_learning_rate is not None and len(optimizer.param_groups) < 4:
            new = self.items.new_modules(self._exit_model)
            split_exit_groups(optimizer, self.model, self.args.exit_learning_rate, new)
        return optimizer

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As the run evaluates inside of a phase: by `measure`, and by what a subclass of the run adds to that."""
        return self.run.evaluate(
            eval_dataset=eval_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix
        )

    def measure(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Metrics, depth and `exit_loss` where the phase is judged, or figures of the phase's own judge; of several
        sets each behind its name. What the best checkpoint is chosen by, its mean over the sets, has no name, too."""
        override = eval_dataset is not None
        sets = eval_dataset if override else self.eval_dataset
        if not isinstance(sets, dict):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        metrics: dict[str, float] = {}
        for name, rows in sets.items():
            metrics |= self.evaluate(rows if override else name, ignore_keys, f"{metric_key_prefix}_{name}")
        best = "exit_loss" if self.phase.judge is None else self.phase.judge.best_by
        figures = [metrics[key] for name in sets if (key := f"{metric_key_prefix}_{name}_{best}") in metrics]
        if figures:
            # Callbacks have been told of each set, and now hear of all.
            overall = {f"{metric_key_prefix}_{best}": sum(figures) / len(figures)}
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, overall)
            metrics |= overall
        return metrics

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> ExitLoopOutput:
        """Trainer's loop where the phase is judged; metrics get depth and `exit_loss`, or are those of its judge."""
        if self.phase.judge is not None:
            return self._judged(self.phase.judge, dataloader, metric_key_prefix)
        output = self.run_exits(dataloader, description, ignore_keys, metric_key_prefix, self.phase.evaluation)
        if output.items is not None and output.items.losses is not None:
            loss = float(self.phase.exit_loss(output.items.losses.double()))
            output.metrics[f"{metric_key_prefix}_exit_loss"] = loss
        elif f"{metric_key_prefix}_loss" in output.metrics:
            output.metrics[f"{metric_key_prefix}_exit_loss"] = output.metrics[f"{metric_key_prefix}_loss"]
        return output

    @torch.no_grad()
    def _judged(self, judge: RowJudge, dataloader: Any, metric_key_prefix: str) -> ExitLoopOutput:
        model, found = self.model_wrapped, []
        # Loaders of some releases give a batch that is None.
        batches = [] if has_length(dataloader) and len(dataloader) == 0 else dataloader
        is_training = model.training
        model.eval()
        self.callback_handler.eval_dataloader = dataloader
        try:
            for batch in batches:
                with self.compute_loss_context_manager():
                    output = model(**self._prepare_inputs(batch), exit_training=judge.options)
                found.append(self.gather_function(output[judge.output]).cpu())
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        finally:
            model.train(is_training)
        figures = judge.figures(torch.cat(found)) if found else {}
        if found and not figures:
            raise ValueError(
                f"`eval_dataset` has nothing that the phase {self.phase.trainable!r} could be judged by: no row has a "
                "token with a label behind its second one."
            )
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        rows = sum(map(len, found))
        return ExitLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=rows)

    def _load_best_model(self) -> None:
        # Adapters that are loaded may come unfrozen.
        with keeping_requires_grad(self.model):
            super()._load_best_model()

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with keeping_requires_grad(self.model):
            super()._load_from_checkpoint(*args, **kwargs)


@contextmanager
def _keeping_random_numbers() -> Iterator[None]:
    """Trainer seeds all generators when it is made: a phase goes on with the random numbers of its run."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        yield
    random.setstate(state)
    np.random.set_state(numpy_state)
