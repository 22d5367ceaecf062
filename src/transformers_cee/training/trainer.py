# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""`ConsistentEETrainer`: the phases of ConsistentEE on top of 🤗 Trainer."""

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Subset
from transformers import TrainerCallback, set_seed
from transformers.utils import SAFE_WEIGHTS_NAME

from transformers_cee.evaluation.store import ExitStore, collect_exits
from transformers_cee.exits.losses import exit_losses
from transformers_cee.exits.policy import exit_log_distribution
from transformers_cee.training.early_exit_trainer import EarlyExitTrainer
from transformers_cee.training.hardness import fingerprint, memorized_layers
from transformers_cee.training.objectives import HEADS_OBJECTIVES, consistent_expected, consistent_sampled
from transformers_cee.training.phases import PhaseLog
from transformers_cee.training.policy_phase import StoredRewards, run_policy_phase
from transformers_cee.training.rewards import RewardFunction, layer_reward
from transformers_cee.training.training_args import ConsistentEETrainingArguments


HARDNESS_FILE = "hardness.safetensors"


@dataclass
class _ModelPhase:
    """What a phase that trains the model itself changes: its loss, and where evaluation leaves."""

    loss: Callable[[nn.Module, Any, Tensor], Tensor]
    exit_threshold: float | list[float] | None


class ConsistentEETrainer(EarlyExitTrainer):
    """Trains an early-exit model by ConsistentEE (Zeng et al., AAAI 2024).

    `train()` runs the phases of `args.phases`, and each can be run alone:

    - `train_heads`: all exits learn the task (layer-weighted loss over all exits).
    - `compute_hardness`: the memorized layer of every training row.
    - `train_policy`: the exit policies learn where to leave, by the policy gradient on stored exit states.
    - `train_consistent`: the model learns at the exits its policies take, then the policies learn again, in rounds.

    Everything else (optimizer, precision, accumulation, processes, callbacks, checkpoints, logging) is 🤗 Trainer's.

    Args:
        model (`PreTrainedModel`): an early-exit model, such as [`BertForConsistentEE`].
        args ([`ConsistentEETrainingArguments`]): arguments.
        reward_function (`Callable`, *optional*):
            Replaces the reward: takes losses or errors (rows, exits), exit layers (exits,), memorized layers (rows,)
            and the number of layers, and returns rewards (rows, exits).
        kwargs: those of `transformers.Trainer`.

    Raises:
        ValueError: arguments that early exits do not support.
    """

    args: ConsistentEETrainingArguments

    def __init__(
        self,
        model: nn.Module,
        args: ConsistentEETrainingArguments,
        *,
        reward_function: RewardFunction | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model=model, args=args, callbacks=callbacks, **kwargs)
        self.reward_function = reward_function
        self._own_callbacks = list(callbacks or [])
        self._phase: _ModelPhase | None = None
        self._stores: dict[str, tuple[str, ExitStore]] = {}

    # The run

    def train(self, resume_from_checkpoint: bool | str | None = None, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Runs the phases in order.

        Args:
            resume_from_checkpoint (`bool` or `str`, *optional*):
                `True` goes on with the run in `args.output_dir`: finished phases are not repeated, an interrupted one
                goes on from its last checkpoint. A path names another run's `output_dir`, or a checkpoint inside it.

        Returns:
            `dict[str, Any]`: result of each step by name, a `TrainOutput` or, for hardness, the memorized layers.

        Raises:
            ValueError: nothing to resume, or arguments that Trainer's `train` takes and phases do not.
        """
        if kwargs:
            raise ValueError(f"`train` got {sorted(kwargs)}; only `resume_from_checkpoint` is accepted.")
        log = PhaseLog(self._phases_directory(resume_from_checkpoint), self.args.should_save)
        if resume_from_checkpoint:
            log.resume()
            self._load_finished(log)
        else:
            with self.accelerator.main_process_first():
                log.start()
        results = {}
        for number, (step, run) in enumerate(self._steps().items()):
            if step not in log.finished:
                # Each step draws its own random numbers, so that a resumed run draws the same.
                set_seed(self.args.seed + number)
                results[step] = run(log.folder(step), log.checkpoint(step) if resume_from_checkpoint else None)
                self._keep(log, step)
        if self.args.push_to_hub:
            self.save_model()
        return results

    def train_heads(self, resume_from_checkpoint: str | None = None) -> Any:
        """Phase `heads`: the whole model learns with `args.heads_objective` over all exits."""
        return self._heads(self._folder("heads"), resume_from_checkpoint)

    def compute_hardness(self) -> Tensor:
        """Phase `hardness`: memorized layer (rows,) of every training row, in evaluation mode.

        Kept in `output_dir/hardness.safetensors` with a fingerprint of data and weights, and computed again when
        either has changed.
        """
        mark = fingerprint(self.accelerator.unwrap_model(self.model), self.train_dataset)
        about = {"fingerprint": mark, "tolerance": str(self.args.hardness_tolerance)}
        path = os.path.join(self.args.output_dir, HARDNESS_FILE)
        if os.path.isfile(path):
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}) == about:
                    return file.get_tensor("memorized_layers")
        store = self._store("train", self.train_dataset, mark)
        layers = memorized_layers(store.correct, store.layers)
        if self.args.should_save:
            os.makedirs(self.args.output_dir, exist_ok=True)
            # In one move: another process may be looking for the file.
            save_file({"memorized_layers": layers}, path + ".part", metadata=about)
            os.replace(path + ".part", path)
        self.log({"memorized_layer": float(layers.float().mean())})
        return layers

    def train_policy(self, resume_from_checkpoint: str | None = None) -> Any:
        """Phase `policy`: the policies alone learn on stored exit states; backbone and heads stay as they are."""
        return self._policy(self._folder("policy"), resume_from_checkpoint)

    def train_consistent(self) -> dict[str, Any]:
        """Phase `consistent`: rounds of a model step (loss at the exits that the policies take) and a policy step."""
        return {step: run(self._folder(step), None) for step, run in self._rounds().items()}

    def _steps(self) -> dict[str, Callable[[str, str | None], Any]]:
        """All steps of the run by name, in order."""
        steps: dict[str, Callable[[str, str | None], Any]] = {}
        for phase in self.args.phases:
            if phase == "consistent":
                steps |= self._rounds()
            else:
                steps[phase] = {
                    "heads": self._heads,
                    "hardness": lambda folder, checkpoint: self.compute_hardness(),
                    "policy": self._policy,
                }[phase]
        return steps

    def _rounds(self) -> dict[str, Callable[[str, str | None], Any]]:
        steps: dict[str, Callable[[str, str | None], Any]] = {}
        for number in range(1, self.args.consistent_num_rounds + 1):
            steps[f"consistent-{number}-model"] = self._consistent_model
            steps[f"consistent-{number}-policy"] = self._policy
        return steps

    # Phases

    def _heads(self, folder: str, checkpoint: str | None) -> Any:
        objective = HEADS_OBJECTIVES[self.args.heads_objective]
        phase = _ModelPhase(lambda model, outputs, losses: objective(losses), exit_threshold=1.0)
        epochs = self.args.heads_num_train_epochs
        return self._train_model(
            phase,
            folder,
            checkpoint,
            self.args.learning_rate if self.args.heads_learning_rate is None else self.args.heads_learning_rate,
            self.args.num_train_epochs if epochs is None else epochs,
        )

    def _consistent_model(self, folder: str, checkpoint: str | None) -> Any:
        rate = self.args.consistent_learning_rate
        return self._train_model(
            _ModelPhase(self._consistent_loss, exit_threshold=None),
            folder,
            checkpoint,
            self.args.learning_rate if rate is None else rate,
            self.args.consistent_num_train_epochs,
        )

    def _consistent_loss(self, model: nn.Module, outputs: Any, losses: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(losses.device.type, enabled=False):
            policies = self.accelerator.unwrap_model(model).exit_policies
            exit_logits = policies(
                outputs.all_exit_states.to(next(policies.parameters()).dtype),
                outputs.all_exit_logits,
                self._problem_type(),
            )
            distribution = exit_log_distribution(exit_logits)
        if self.args.consistent_objective == "expected":
            return consistent_expected(losses, distribution)
        return consistent_sampled(losses, distribution, self.args.consistent_samples)

    def _train_model(
        self, phase: _ModelPhase, folder: str, checkpoint: str | None, learning_rate: float, epochs: float
    ) -> Any:
        """Trainer's own loop with the phase's loss, on the rows of the heads, policies frozen."""
        own = copy.copy(self.args)
        own.output_dir, own.learning_rate, own.num_train_epochs = folder, learning_rate, epochs
        own.push_to_hub = False
        kept = (self.args, self.train_dataset, self._exit_arguments)
        policies = self.accelerator.unwrap_model(self.model).exit_policies
        self.args, self._phase, self._in_phase = own, phase, True
        self.train_dataset = _subset(self.train_dataset, self._split()[0])
        if phase.exit_threshold is not None:
            self._exit_arguments = {"exit_criterion": "policy", "exit_threshold": phase.exit_threshold}
        self.optimizer = self.lr_scheduler = None
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "early_stopping_patience_counter"):
                callback.early_stopping_patience_counter = 0
        policies.requires_grad_(False)
        try:
            return super().train(resume_from_checkpoint=checkpoint)
        finally:
            policies.requires_grad_(True)
            self.args, self.train_dataset, self._exit_arguments = kept
            self._phase, self._in_phase = None, False

    def _policy(self, folder: str, checkpoint: str | None) -> Any:
        model = self.accelerator.unwrap_model(self.model)
        if len(model.config.exit_layer_numbers) == 1:
            raise ValueError("`exit_layers` leaves the last layer as the only exit: there is nothing to decide.")
        mark = fingerprint(model, self.train_dataset)
        store = self._store("train", self.train_dataset, mark)
        train = StoredRewards(store, self._rewards(store, self.compute_hardness()), self._split()[1])
        evaluation = None
        if self.args.eval_strategy != "no" and self.eval_dataset is not None:
            stored = self._store("eval", self.eval_dataset, fingerprint(model, self.eval_dataset))
            rewards = self._rewards(stored, memorized_layers(stored.correct, stored.layers))
            evaluation = StoredRewards(stored, rewards)
        return run_policy_phase(
            model.exit_policies,
            self.args,
            folder,
            train,
            evaluation,
            exit_threshold=model.config.exit_threshold,
            metrics=self.compute_metrics,
            callbacks=self._own_callbacks,
            resume_from_checkpoint=checkpoint,
        )

    # What the phases need

    def collect_exits(self, dataset: Any, name: str = "other") -> ExitStore:
        """Every exit's states and logits for each row of `dataset`, in evaluation mode.

        Args:
            dataset (sized, indexable): rows as the model takes them, with labels.
            name (`str`): names the file in `output_dir/exit_store` of states above `args.store_memory_limit_mb`.
        """
        description = "exit states"
        collator = self.data_collator
        if hasattr(dataset, "column_names"):
            dataset = self._remove_unused_columns(dataset, description=description)
        else:
            collator = self._get_collator_with_removed_columns(collator, description=description)
        return collect_exits(
            self.accelerator.unwrap_model(self.model),
            dataset,
            collator,
            self.accelerator,
            problem_type=self._problem_type(dataset),
            batch_size=self.args.per_device_eval_batch_size,
            directory=os.path.join(self.args.output_dir, "exit_store", name),
            memory_limit_mb=self.args.store_memory_limit_mb,
            tolerance=self.args.hardness_tolerance,
            disable_tqdm=self.args.disable_tqdm,
        )

    def _store(self, name: str, dataset: Any, mark: str) -> ExitStore:
        if self._stores.get(name, ("", None))[0] != mark:
            self._stores.pop(name, None)
            self._stores[name] = (mark, self.collect_exits(dataset, name))
        return self._stores[name][1]

    def _rewards(self, store: ExitStore, memorized: Tensor) -> Tensor:
        losses = store.losses if self.args.reward_loss == "ce" else store.errors
        config = self.model.config
        if self.reward_function is not None:
            rewards = self.reward_function(losses, store.layers, memorized, config.num_hidden_layers)
            if rewards.shape != losses.shape:
                raise ValueError(f"`reward_function` gave shape {tuple(rewards.shape)}, needed {tuple(losses.shape)}.")
            return rewards
        return layer_reward(
            losses, store.layers, memorized, config.num_hidden_layers, config.reward_alpha, config.reward_hardness
        )

    def _split(self) -> tuple[Tensor, Tensor]:
        """Row numbers that the heads learn from, and those that the policies learn from."""
        rows = len(self.train_dataset)
        held_out = round(self.args.policy_holdout * rows)
        if held_out == 0:
            return torch.arange(rows), torch.arange(rows)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
        return order[held_out:].sort().values, order[:held_out].sort().values

    def _folder(self, step: str) -> str:
        return PhaseLog(self._phases_directory(None)).folder(step)

    def _phases_directory(self, resume_from_checkpoint: bool | str | None) -> str:
        root = self.args.output_dir
        if isinstance(resume_from_checkpoint, str):
            root = resume_from_checkpoint.rstrip(os.sep)
            parts = root.split(os.sep)
            if len(parts) > 2 and parts[-3] == "phases":
                return os.sep.join(parts[:-2])
        return os.path.join(root, "phases")

    def _keep(self, log: PhaseLog, step: str) -> None:
        """Saves the model as the step left it, so that a resumed run starts from there."""
        if step != "hardness":
            self.save_model(log.weights_folder(step), _internal_call=True)
        self.accelerator.wait_for_everyone()
        log.finish(step)

    def _load_finished(self, log: PhaseLog) -> None:
        if log.last_weights is not None:
            weights = load_file(os.path.join(log.last_weights, SAFE_WEIGHTS_NAME))
            self.accelerator.unwrap_model(self.model).load_state_dict(weights)

    # Hooks of Trainer

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        if self._phase is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        outputs = model(**inputs, output_all_exits=True)
        losses = exit_losses(outputs.all_exit_logits, inputs["labels"], self._problem_type())
        loss = self._phase.loss(model, outputs, losses)
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.args.exit_learning_rate is not None and len(optimizer.param_groups) < 4:
            _split_exit_groups(optimizer, self.model, self.args.exit_learning_rate)
        return optimizer


def _subset(dataset: Any, rows: Tensor) -> Any:
    if len(rows) == len(dataset):
        return dataset
    return dataset.select(rows.tolist()) if hasattr(dataset, "select") else Subset(dataset, rows.tolist())


def _split_exit_groups(optimizer: torch.optim.Optimizer, model: nn.Module, learning_rate: float) -> None:
    """Moves what belongs to the exits and not to the layers into parameter groups with their own learning rate."""
    own = {
        id(parameter)
        for name, parameter in model.named_parameters()
        if any(part in name for part in ("exit_heads", "exit_norms", "pooler", "classifier"))
    }
    for group in list(optimizer.param_groups):
        mine = [parameter for parameter in group["params"] if id(parameter) in own]
        if mine:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
            options = {name: value for name, value in group.items() if name not in ("params", "lr")}
            optimizer.add_param_group({"params": mine, "lr": learning_rate, **options})
