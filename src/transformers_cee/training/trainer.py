# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""`ConsistentEETrainer`: the phases of ConsistentEE on top of 🤗 Trainer."""

import copy
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from transformers import EvalPrediction, TrainerCallback, set_seed
from transformers.trainer_pt_utils import nested_numpify
from transformers.utils import logging

from transformers_cee.evaluation.exit_budget import fit_exit_budgets
from transformers_cee.evaluation.store import ExitStore, collect_exits
from transformers_cee.exits.policy import ExitPolicies, make_policies
from transformers_cee.training.checkpoints import needs_of
from transformers_cee.training.early_exit_trainer import EarlyExitTrainer
from transformers_cee.training.hardness import fingerprint, memorized_layers, read_hardness, write_hardness
from transformers_cee.training.model_step import (
    ModelPhase,
    consistent_phase,
    first_exit,
    heads_phase,
    operating_point,
    token_share,
    with_gradient,
)
from transformers_cee.training.parameters import (
    active_module,
    freeze_for_model_step,
    keeping_requires_grad,
    split_exit_groups,
)
from transformers_cee.training.phases import HARDNESS, PhaseLog
from transformers_cee.training.policy_phase import StoredRewards, run_policy_phase
from transformers_cee.training.rewards import RewardFunction
from transformers_cee.training.training_args import ConsistentEETrainingArguments


logger = logging.get_logger(__name__)


class ConsistentEETrainer(EarlyExitTrainer):
    """Trains an early-exit model by ConsistentEE (Zeng et al., AAAI 2024).

    `train()` runs the phases of `args.phases`, and each can be run alone:

    - `train_heads`: all exits learn the task (layer-weighted loss over all exits).
    - `compute_hardness`: the memorized layer of every training row.
    - `train_policy`: the exit policies learn where to leave, by the policy gradient on stored exit states.
    - `train_consistent`: the model learns at the exits its policies take, then the policies learn again, in rounds.

    Of a decoder each counted token (one whose next label is not −100) takes the place of a row: losses are means over
    all counted tokens of an optimizer step, however they are spread over micro-batches and processes.

    Everything else (optimizer, precision, accumulation, processes, callbacks, checkpoints, logging) is 🤗 Trainer's.

    Args:
        model (`PreTrainedModel` or `PeftModel`): an early-exit model, such as [`BertForConsistentEE`] or
            [`LlamaForConsistentEECausalLM`]. With adapters around it, `modules_to_save` of their config has to name
            `"exit_policies"`, and `"exit_heads"` and `"exit_norms"` where these are to learn.
        args ([`ConsistentEETrainingArguments`]): arguments.
        reward_function (`Callable`, *optional*):
            Replaces the reward: takes losses or errors (rows, exits), exit layers (exits,), memorized layers (rows,)
            and the number of layers, and returns rewards (rows, exits). Of a decoder, rows are counted tokens.
        kwargs: those of [`EarlyExitTrainer`].

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
        self._phase: ModelPhase | None = None
        self._stores: dict[str, tuple[str, ExitStore]] = {}

    # The run

    def train(self, resume_from_checkpoint: bool | str | None = None, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Runs the phases in order.

        Args:
            resume_from_checkpoint (`bool` or `str`, *optional*):
                `True` goes on with the run in `args.output_dir`, if there is one: finished phases are not repeated, an
                interrupted one goes on from its newest checkpoint that can be read in full. A path names another
                run's `output_dir`, or a checkpoint inside it.

        Returns:
            `dict[str, Any]`: result of each step by name, a `TrainOutput` or, for hardness that was not finished
            before, the memorized layers.

        Raises:
            ValueError: a run that cannot be resumed, nothing to train, or arguments that Trainer's `train` takes and
                phases do not.
        """
        if kwargs:
            raise ValueError(f"`train` got {sorted(kwargs)}; only `resume_from_checkpoint` is accepted.")
        self._check_run()
        log = PhaseLog.of(self.args.output_dir, resume_from_checkpoint, self.args.should_save)
        if self.resumes(resume_from_checkpoint):
            log.resume(self._step_names)
            log.load(self.accelerator.unwrap_model(self.model), self._load_from_checkpoint)
        else:
            if resume_from_checkpoint:
                logger.warning(f"`resume_from_checkpoint`: {log.directory} holds nothing to resume; starting anew.")
            with self.accelerator.main_process_first():
                log.start()
        results: dict[str, Any] = {step: log.result(step) for step in log.finished if step != HARDNESS}
        for number, (step, run) in enumerate(self._steps().items()):
            if step not in log.finished:
                # Each step draws its own random numbers, so that a resumed run draws the same.
                set_seed(self.args.seed + number)
                results[step] = run(log.folder(step), log.checkpoint(step, needs_of(self)))
                self._keep(log, step, results[step])
        self._renew_budgets()
        if self.args.push_to_hub:
            self.save_model()
        return results

    def resumes(self, resume_from_checkpoint: bool | str | None) -> bool:
        """Does `train(resume_from_checkpoint)` go on with weights that an earlier run left? What prepares the model
        for a new run, such as `fit_exit_heads`, is not to be repeated then.

        Raises:
            ValueError: a run that cannot be resumed.
        """
        if not resume_from_checkpoint:
            return False
        log = PhaseLog.of(self.args.output_dir, resume_from_checkpoint)
        log.resume(self._step_names)
        return bool(log.finished) or log.checkpoint(next(iter(self._steps())), needs_of(self)) is not None

    def train_heads(self, resume_from_checkpoint: str | None = None) -> Any:
        """Phase `heads`: the whole model learns with `args.heads_objective` over all exits.

        Args:
            resume_from_checkpoint (`str`, *optional*): a checkpoint of the phase, or of one of its stages; stages
                before that are not repeated.

        Returns:
            `TrainOutput` of the phase, or of its last stage.
        """
        steps = self._heads_steps()
        names = list(steps)
        folder = None if resume_from_checkpoint is None else os.path.dirname(os.path.abspath(resume_from_checkpoint))
        stage = os.path.basename(folder or "")
        first = names.index(stage) if stage in names else 0
        for name in names[first:]:
            result = steps[name](self._folder(name), resume_from_checkpoint if name == names[first] else None)
        return result

    def compute_hardness(self) -> Tensor:
        """Phase `hardness`: memorized layer (rows,) of every training row, in evaluation mode; of a decoder (tokens,),
        of every counted token or of those that `args.policy_max_tokens` leaves.

        Kept in `output_dir/hardness.safetensors` with a fingerprint of data and weights and the layers of the exits,
        and computed again when any of them has changed.
        """
        self._check_rows()
        return self._hardness(fingerprint(self._exit_model, self.train_dataset))

    def _hardness(self, mark: str) -> Tensor:
        """`compute_hardness` of the training rows whose fingerprint is known."""
        about = {
            "fingerprint": mark,
            "tolerance": str(self.args.hardness_tolerance),
            # Weights do not tell where exits are: those of a shared head are the same anywhere.
            "layers": str(self._exit_model.layer_numbers),
        }
        if self.args.policy_max_tokens is not None:
            about["tokens"] = f"{self.args.policy_max_tokens} of {self.args.policy_holdout}, seed {self._data_seed}"
        stored = self._stores.get("train")
        kept = read_hardness(self.args.output_dir, about)
        # The collator, which the mark does not know of, may count other tokens now.
        if kept is not None and (stored is None or stored[0] != mark or len(stored[1]) == len(kept)):
            return kept
        store = self._store("train", self.train_dataset, mark)
        layers = memorized_layers(store.correct, store.layers)
        if self.args.should_save:
            write_hardness(self.args.output_dir, layers, about)
        self.log({"memorized_layer": float(layers[store.may_exit].float().mean())})
        return layers

    def train_policy(self, resume_from_checkpoint: str | None = None) -> Any:
        """Phase `policy`: the policies alone learn on stored exit states; backbone and heads stay as they are."""
        result = self._policy(self._folder("policy"), resume_from_checkpoint)
        self._renew_budgets()
        return result

    def train_policies_at(self, alphas: Sequence[float]) -> dict[float, ExitPolicies]:
        """New policies for each reward weight α, on the stored states of the model as it is; its own stay as they are.

        One policy holds one speed. The states are stored once, so a family of policies costs seconds.

        Args:
            alphas (sequence of `float`): weights α of one layer in the reward.

        Returns:
            `dict[float, ExitPolicies]`: policies by α, in evaluation mode.

        Raises:
            ValueError: a negative α, or a `reward_function`, which knows of none.
        """
        if self.reward_function is not None:
            raise ValueError(
                f"`reward_function` knows no α that could be one of `alphas`={list(alphas)}; needed None."
            )
        wrong = [alpha for alpha in alphas if alpha < 0]
        if wrong:
            raise ValueError(f"`alphas`={list(alphas)} must not be negative; got {wrong[0]}.")
        family = {}
        config = copy.copy(self._exit_model.config)
        config.policy_condition = "none"
        own = next(self._exit_model.exit_policies.parameters())
        self._check_rows()
        mark = fingerprint(self._exit_model, self.train_dataset)
        for alpha in alphas:
            set_seed(self.args.seed)
            policies = make_policies(config, self._exit_model.layer_numbers).to(own)
            self._policy(self._folder(f"policy-alpha-{alpha:g}"), None, policies, alpha, mark)
            family[alpha] = policies.eval()
        return family

    def fit_exit_budgets(self) -> list[list[float]]:
        """Maps budgets to prices of a layer on the evaluation set, of conditioned policies: `exit_budget=` then works.
        `train()` ends with it; labels are not looked at. See `evaluation.exit_budget`.

        Raises:
            ValueError: policies that are not conditioned, or not one evaluation set.
        """
        if self.eval_dataset is None or isinstance(self.eval_dataset, dict):
            raise ValueError(f"`eval_dataset` of type {type(self.eval_dataset).__name__} must be one data set.")
        model = self._exit_model
        store = self._store("eval", self.eval_dataset, fingerprint(model, self.eval_dataset))
        first_layer = getattr(model.config, "min_exit_layer", None)
        policies = active_module(model.exit_policies)
        model.config.exit_budgets = fit_exit_budgets(policies, store, min_exit_layer=first_layer)
        return model.config.exit_budgets

    def train_consistent(self) -> dict[str, Any]:
        """Phase `consistent`: rounds of a model step (loss at the exits that the policies take) and a policy step."""
        results = {step: run(self._folder(step), None) for step, run in self._rounds().items()}
        self._renew_budgets()
        return results

    def _renew_budgets(self) -> None:
        """Fits budgets to the policies as they are, if there are rows for it; names what is older than the weights."""
        config, older = self._exit_model.config, ["exit_operating_points", "exit_estimators"]
        is_conditioned = active_module(self._exit_model.exit_policies).is_conditioned
        if is_conditioned and self.eval_dataset is not None and not isinstance(self.eval_dataset, dict):
            self.fit_exit_budgets()
        else:
            older.append("exit_budgets")
        stale = [name for name in older if getattr(config, name)]
        if stale:
            logger.warning(f"{' and '.join(stale)} of the config were fitted before this training: fit them again.")

    def _steps(self) -> dict[str, Callable[[str, str | None], Any]]:
        """All steps of the run by name, in order."""
        steps: dict[str, Callable[[str, str | None], Any]] = {}
        for phase in self.args.phases:
            if phase == "consistent":
                steps |= self._rounds()
            elif phase == "heads":
                steps |= self._heads_steps()
            else:
                steps[phase] = {
                    "hardness": lambda folder, checkpoint: self.compute_hardness(),
                    "policy": self._policy,
                }[phase]
        return steps

    def _heads_steps(self) -> dict[str, Callable[[str, str | None], Any]]:
        return {stage: partial(self._heads, stage) for stage in self.args.make_heads_objective().stages}

    @property
    def _step_names(self) -> tuple[str, ...]:
        """Steps of all phases, those of a run before this one included."""
        return (*self._heads_steps(), HARDNESS, "policy", *self._rounds())

    def _rounds(self) -> dict[str, Callable[[str, str | None], Any]]:
        steps: dict[str, Callable[[str, str | None], Any]] = {}
        for number in range(1, self.args.consistent_num_rounds + 1):
            steps[f"consistent-{number}-model"] = self._consistent_model
            steps[f"consistent-{number}-policy"] = self._policy
        return steps

    # Phases

    def _heads_phase(self, stage: str) -> ModelPhase:
        return heads_phase(self.args, self._exit_model, lambda: self.state, stage)

    def _check_run(self) -> None:
        """Raises `ValueError` where a step of the run would have nothing to train, or could not be evaluated."""
        self._check_rows()
        judges_policies = self.args.eval_strategy != "no" and {"policy", "consistent"} & {*self.args.phases}
        if judges_policies and self.compute_metrics is not None and self.args.include_for_metrics:
            raise ValueError(
                f"`include_for_metrics`={self.args.include_for_metrics} is not supported with `eval_strategy`="
                f"'{self.args.eval_strategy}': policies are judged on stored exits, of which logits and labels alone "
                "are known; accepted is []."
            )
        checked = list(map(self._heads_phase, self._heads_steps())) if "heads" in self.args.phases else []
        if "consistent" in self.args.phases:
            checked.append(consistent_phase(self.args, self._exit_model, self._problem_type))
        for phase in checked:
            with keeping_requires_grad(self.model):
                freeze_for_model_step(self.model, phase.trainable, phase.trains_policies)

    def _check_rows(self) -> None:
        """Raises `ValueError` unless there is a data set of which every phase can take the same rows."""
        rows = self.train_dataset
        if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
            raise ValueError(
                f"`train_dataset` of type {type(rows).__name__} must have a length and rows by number: phases come "
                "back to the same rows."
            )

    def _heads(self, stage: str, folder: str, checkpoint: str | None) -> Any:
        epochs = self.args.heads_num_train_epochs
        return self._train_model(
            self._heads_phase(stage),
            folder,
            checkpoint,
            self.args.learning_rate if self.args.heads_learning_rate is None else self.args.heads_learning_rate,
            self.args.num_train_epochs if epochs is None else epochs,
        )

    def _consistent_model(self, folder: str, checkpoint: str | None) -> Any:
        rate = self.args.consistent_learning_rate
        return self._train_model(
            consistent_phase(self.args, self._exit_model, self._problem_type),
            folder,
            checkpoint,
            self.args.learning_rate if rate is None else rate,
            self.args.consistent_num_train_epochs,
        )

    def _train_model(
        self, phase: ModelPhase, folder: str, checkpoint: str | None, learning_rate: float, epochs: float
    ) -> Any:
        """Trainer's own loop with the phase's loss, on the rows of the heads, where only what the phase trains is not
        frozen."""
        self._check_rows()
        own = copy.copy(self.args)
        own.output_dir, own.learning_rate, own.num_train_epochs = folder, learning_rate, epochs
        own.push_to_hub = False
        if phase.trainable == "internal_exits" and own.metric_for_best_model is not None:
            # Nothing else that an evaluation reports can change.
            own.metric_for_best_model, own.greater_is_better = "exit_loss", False
        kept = (self.args, self.train_dataset, self._exit_arguments)
        with keeping_requires_grad(self.model):
            freeze_for_model_step(self.model, phase.trainable, phase.trains_policies)
            # A wrapper that an earlier phase left would wait for the gradients of that phase.
            self.model_wrapped = self.model
            self.args, self._phase, self._in_phase = own, phase, True
            self.train_dataset = _subset(self.train_dataset, self._split()[0])
            self._exit_arguments, self._exit_loss = phase.evaluation, phase.exit_loss
            self.optimizer = self.lr_scheduler = None
            for callback in self.callback_handler.callbacks:
                if hasattr(callback, "early_stopping_patience_counter"):
                    callback.early_stopping_patience_counter = 0
            try:
                return super().train(resume_from_checkpoint=checkpoint)
            finally:
                self.args, self.train_dataset, self._exit_arguments = kept
                self._phase, self._in_phase = None, False

    def _policy(
        self,
        folder: str,
        checkpoint: str | None,
        policies: ExitPolicies | None = None,
        alpha: float | None = None,
        mark: str | None = None,
    ) -> Any:
        """Trains the model's policies, or others at a reward weight of their own; `mark` is the fingerprint of the
        training rows, if it is known."""
        self._check_rows()
        model = self._exit_model
        config = model.config
        if len(config.exit_layer_numbers) == 1:
            raise ValueError("`exit_layers` leaves the last layer as the only exit: there is nothing to decide.")
        mark = fingerprint(model, self.train_dataset) if mark is None else mark
        store = self._store("train", self.train_dataset, mark)
        entries = store.deciding(self._split()[1])
        used = active_module(model.exit_policies) if policies is None else policies
        train = self._stored_rewards(store, self._hardness(mark), alpha, used.is_conditioned, entries)
        evaluation = None
        if self.args.eval_strategy != "no" and isinstance(self.eval_dataset, dict):
            logger.warning("`eval_dataset` holds several data sets: policies learn without being evaluated.")
        elif self.args.eval_strategy != "no" and self.eval_dataset is not None:
            stored = self._store("eval", self.eval_dataset, fingerprint(model, self.eval_dataset))
            memorized = memorized_layers(stored.correct, stored.layers)
            evaluation = self._stored_rewards(stored, memorized, alpha, used.is_conditioned, stored.deciding())
        criterion, threshold = operating_point(model)
        return run_policy_phase(
            used,
            self.args,
            folder,
            train,
            evaluation,
            exit_threshold=threshold if criterion == "policy" else 0.5,
            first_exit=first_exit(config),
            metrics=self._stored_metrics(),
            callbacks=self._own_callbacks,
            resume_from_checkpoint=checkpoint,
        )

    def _stored_metrics(self) -> Callable[[EvalPrediction], dict[str, float]] | None:
        """`compute_metrics` for stored logits, which `preprocess_logits_for_metrics` has not seen yet."""
        compute, preprocess = self.compute_metrics, self.preprocess_logits_for_metrics
        if compute is None or preprocess is None:
            return compute

        def metrics(prediction: EvalPrediction) -> dict[str, float]:
            labels = prediction.label_ids
            seen = preprocess(torch.as_tensor(prediction.predictions), torch.as_tensor(labels))
            return compute(EvalPrediction(nested_numpify(seen), labels))

        return metrics

    # What the phases need

    def collect_exits(
        self, dataset: Any, name: str = "other", max_tokens: int | None = None, rows: Tensor | None = None
    ) -> ExitStore:
        """Every exit's states and results for each row, or counted token, of `dataset`, in evaluation mode. What a
        phase has stored of the same rows and weights is not computed again.

        Args:
            dataset (sized, indexable): rows as the model takes them, with labels.
            name (`str`): names the file in `output_dir/exit_store` of states above `args.store_memory_limit_mb`.
            max_tokens (`int`, *optional*): of a decoder, the most tokens to keep, those of rows drawn at random.
            rows (`LongTensor`, *optional*): rows to draw from with `max_tokens`.
        """
        if max_tokens is None and self.args.policy_max_tokens is None and self._stores:
            mark = fingerprint(self._exit_model, dataset)
            for stored_mark, store in self._stores.values():
                if stored_mark == mark:
                    return store
        description = "exit states"
        collator = self.data_collator
        if hasattr(dataset, "column_names"):
            dataset = self._remove_unused_columns(dataset, description=description)
        else:
            collator = self._get_collator_with_removed_columns(collator, description=description)
        return collect_exits(
            self._exit_model,
            dataset,
            collator,
            self.accelerator,
            problem_type=self._problem_type(dataset),
            batch_size=self.args.per_device_eval_batch_size,
            directory=os.path.join(self.args.output_dir, "exit_store", name),
            memory_limit_mb=self.args.store_memory_limit_mb,
            tolerance=self.args.hardness_tolerance,
            max_tokens=max_tokens,
            rows=rows,
            seed=self._data_seed,
            disable_tqdm=self.args.disable_tqdm,
        )

    def _store(self, name: str, dataset: Any, mark: str) -> ExitStore:
        if self._stores.get(name, ("", None))[0] != mark:
            self._stores.pop(name, None)
            limit = self.args.policy_max_tokens
            rows = self._split()[1] if name == "train" and limit is not None else None
            self._stores[name] = (mark, self.collect_exits(dataset, name, limit, rows))
        return self._stores[name][1]

    def _stored_rewards(
        self, store: ExitStore, memorized: Tensor, alpha: float | None, is_conditioned: bool, entries: Tensor
    ) -> StoredRewards:
        return StoredRewards.of(
            store,
            memorized,
            self._exit_model.config,
            loss=self.args.reward_loss,
            alpha=alpha,
            is_conditioned=is_conditioned,
            reward_function=self.reward_function,
            entries=entries,
        )

    def _split(self) -> tuple[Tensor, Tensor]:
        """Row numbers that the heads learn from, and those that the policies learn from."""
        rows = len(self.train_dataset)
        held_out = round(self.args.policy_holdout * rows)
        if held_out == 0:
            return torch.arange(rows), torch.arange(rows)
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(self._data_seed))
        return order[held_out:].sort().values, order[:held_out].sort().values

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _folder(self, step: str) -> str:
        return PhaseLog.of(self.args.output_dir, None).folder(step)

    def _keep(self, log: PhaseLog, step: str, result: Any) -> None:
        """Saves the model as the step left it, so that a resumed run starts from there."""
        if step != HARDNESS:
            self.save_model(log.weights_folder(step), _internal_call=True)
        self.accelerator.wait_for_everyone()
        log.finish(step, result)

    # Hooks of Trainer

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """The phase's loss. Of a decoder, the micro-batch's share in the mean over all counted tokens of the step, as
        Trainer counts them (`num_items_in_batch`)."""
        if self._phase is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        loss, outputs = self._phase.loss(model, inputs)
        items = kwargs.get("num_items_in_batch")
        if self._per_token and items is not None:
            # Gradients are averaged over processes.
            processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            loss = token_share(loss, inputs["labels"], items, processes)
        loss = with_gradient(loss, model)
        return (loss, outputs) if return_outputs else loss

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        # Adapters that are loaded may come unfrozen.
        with keeping_requires_grad(self.model):
            super()._load_from_checkpoint(*args, **kwargs)

    def _load_best_model(self) -> None:
        with keeping_requires_grad(self.model):
            super()._load_best_model()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.args.exit_learning_rate is not None and len(optimizer.param_groups) < 4:
            split_exit_groups(optimizer, self.model, self.args.exit_learning_rate)
        return optimizer


def _subset(dataset: Any, rows: Tensor) -> Any:
    if len(rows) == len(dataset):
        return dataset
    return dataset.select(rows.tolist()) if hasattr(dataset, "select") else Subset(dataset, rows.tolist())
