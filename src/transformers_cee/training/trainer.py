# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""`ConsistentEETrainer`: the phases of ConsistentEE on top of 🤗 Trainer."""

import copy
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import set_seed
from transformers.utils import logging

from transformers_cee.exits.policy import ExitPolicies, make_policies
from transformers_cee.stores.store import ExitStore
from transformers_cee.training.checkpoints import needs_of
from transformers_cee.training.checks import check_phases
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
from transformers_cee.training.policy_phase import StoredRewards, at_rate, run_policy_phase, stored_metrics
from transformers_cee.training.rehearsal import subset
from transformers_cee.training.run_output import RunOutput
from transformers_cee.training.stored_exits import StoredExitsTrainer
from transformers_cee.training.training_args import ConsistentEETrainingArguments


logger = logging.get_logger(__name__)


class ConsistentEETrainer(StoredExitsTrainer):
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
            `"exit_policies"`, and `"exit_heads"` and `"exit_norms"` where these are to learn. Or give `model_init`,
            which makes a fresh one for every `train()`.
        args ([`ConsistentEETrainingArguments`]): arguments.
        kwargs: those of [`EarlyExitTrainer`].

    Raises:
        ValueError: arguments that early exits do not support.
    """

    args: ConsistentEETrainingArguments

    def __init__(
        self,
        model: nn.Module | None = None,
        args: ConsistentEETrainingArguments | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model=model, args=args, **kwargs)
        self._phase: ModelPhase | None = None

    # The run

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: bool | str | None = None, trial: Any = None, **kwargs: Any
    ) -> RunOutput:
        """Runs the phases in order, on a fresh model where there is a `model_init`.

        Args:
            resume_from_checkpoint (`bool` or `str`, *optional*):
                `True` goes on with the run in `args.output_dir`, if there is one: finished phases are not repeated, an
                interrupted one goes on from its newest checkpoint that can be read in full. A path names another
                run's `output_dir`, or a checkpoint inside it, and the run goes on there.
            trial (*optional*): what `hyperparameter_search` tries; the run then lies in `output_dir/run-<trial>`.

        Returns:
            [`RunOutput`]: `global_step`, `training_loss` and `metrics` of the run, and in `phases` the result of each
            step by name, a `TrainOutput` or, for hardness that was not finished before, the memorized layers.
            `state.log_history` holds what the phases logged, also before a stop.

        Raises:
            ValueError: a run that cannot be resumed, nothing to train, or arguments that Trainer's `train` takes and
                phases do not.
        """
        if kwargs:
            raise ValueError(f"`train` got {sorted(kwargs)}; only `resume_from_checkpoint` and `trial` are accepted.")
        output_dir = self.args.output_dir
        try:
            self._begin(trial)
            return self._run(resume_from_checkpoint)
        finally:
            self.args.output_dir = output_dir

    def _begin(self, trial: Any) -> None:
        """Makes the model of a run where there is a `model_init`, and takes a trial's arguments."""
        if self.model_init is None:
            if trial is not None:
                raise ValueError(f"`trial`={trial!r} needs a `model_init` that makes its model.")
            return
        set_seed(self.args.seed)
        self._take_model(self.call_model_init(trial))
        if trial is not None and self.hp_search_backend is not None:
            self._hp_search_setup(trial)
            self.args.check_phases()
            self.args.output_dir = self._get_output_dir(trial)

    def _run(self, resume_from_checkpoint: bool | str | None) -> RunOutput:
        start = time.time()
        self.check_phases()
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
        history = log.history
        for number, (step, run) in enumerate(self._steps().items()):
            if step not in log.finished:
                # Each step draws its own random numbers, so that a resumed run draws the same.
                set_seed(self.args.seed + number)
                before, logged = self.state, len(self.state.log_history)
                results[step] = run(log.folder(step), log.checkpoint(step, needs_of(self)))
                # A step of the model starts a state of its own.
                logged = logged if self.state is before else 0
                added = self.state.log_history[logged:]
                history += [{**entry, "phase": step} for entry in added]
                self._keep(log, step, results[step], added)
        self._renew_budgets()
        self.state.log_history = history
        if self.args.push_to_hub:
            self.save_model()
        return RunOutput.of(results, time.time() - start)

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
        return log.goes_on(self._steps(), needs_of(self))

    def train_heads(self, resume_from_checkpoint: bool | str | None = None) -> Any:
        """Phase `heads`: the whole model learns with `args.heads_objective` over all exits.

        Args:
            resume_from_checkpoint (`bool` or `str`, *optional*): a checkpoint of the phase, or of one of its stages;
                stages before that are not repeated. `True` takes the newest.

        Returns:
            `TrainOutput` of the phase, or of its last stage.
        """
        self.check_phases(["heads"])
        steps, log = self._heads_steps(), PhaseLog.of(self.args.output_dir, None)
        names = list(steps)
        first, checkpoint = log.stage(names, resume_from_checkpoint, needs_of(self))
        for name in names[first:]:
            result = steps[name](log.folder(name), checkpoint if name == names[first] else None)
        return result

    def compute_hardness(self) -> Tensor:
        """Phase `hardness`: memorized layer (rows,) of every training row, in evaluation mode; of a decoder (tokens,),
        of every counted token or of those that `args.policy_max_tokens` leaves.

        Kept in `output_dir/hardness.safetensors` with a fingerprint of data and weights and the layers of the exits,
        and computed again when any of them has changed.
        """
        self.check_phases(["hardness"])
        return self._hardness()

    def _hardness(self, mark: str | None = None) -> Tensor:
        """`compute_hardness` of the training rows, whose fingerprint may be known."""
        mark = fingerprint(self._exit_model, self.train_dataset) if mark is None else mark
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

    def train_policy(self, resume_from_checkpoint: bool | str | None = None) -> Any:
        """Phase `policy`: the policies alone learn on stored exit states; backbone and heads stay as they are."""
        self.check_phases(["policy"])
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
            ValueError: a negative α.
        """
        wrong = [alpha for alpha in alphas if alpha < 0]
        if wrong:
            raise ValueError(f"`alphas`={list(alphas)} must not be negative; got {wrong[0]}.")
        family = {}
        config = copy.copy(self._exit_model.config)
        config.policy_condition = "none"
        self.check_phases(["policy"])
        own = next(self._exit_model.exit_policies.parameters())
        mark = fingerprint(self._exit_model, self.train_dataset)
        for alpha in alphas:
            set_seed(self.args.seed)
            policies = make_policies(config, self._exit_model.layer_numbers).to(own)
            self._policy(self._folder(f"policy-alpha-{alpha:g}"), None, policies, alpha, mark)
            family[alpha] = policies.eval()
        return family

    def train_consistent(self) -> RunOutput:
        """Phase `consistent`: rounds of a model step (loss at the exits that the policies take) and a policy step."""
        start = time.time()
        self.check_phases(["consistent"])
        results = {step: run(self._folder(step), None) for step, run in self._rounds().items()}
        self._renew_budgets()
        return RunOutput.of(results, time.time() - start)

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
                    "hardness": lambda folder, checkpoint: self._hardness(),
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

    def check_phases(self, phases: Sequence[str] | None = None) -> None:
        """Raises whatever would stop one of the phases, before any of them has begun: `train()` and the phases' own
        methods start with it. A script that has work of its own before calls it first.

        Args:
            phases (sequence of `str`, *optional*): phases to come; `args.phases` by default.

        Raises:
            ValueError, TypeError: data, labels, metrics, arguments or a model that a phase could not work with.
        """
        check_phases(self, phases)

    def _model_phases(self, phases: Collection[str]) -> list[ModelPhase]:
        """Those of the phases that train the model itself, all their stages."""
        found = list(map(self._heads_phase, self._heads_steps())) if "heads" in phases else []
        return [*found, self._consistent_phase()] if "consistent" in phases else found

    def _heads_phase(self, stage: str) -> ModelPhase:
        return heads_phase(self.args, self._exit_model, lambda: self.state, stage, self.own_loss)

    def _consistent_phase(self) -> ModelPhase:
        return consistent_phase(self.args, self._exit_model, self._problem_type, self.own_loss)

    @contextmanager
    def _evaluating_as(self, phase: ModelPhase | None) -> Iterator[None]:
        """`evaluate()` does what it does inside of a phase."""
        kept = (self._phase, self._in_phase, self._exit_arguments, self._exit_loss)
        if phase is not None:
            self._phase, self._in_phase = phase, True
            self._exit_arguments, self._exit_loss = phase.evaluation, phase.exit_loss
        try:
            yield
        finally:
            self._phase, self._in_phase, self._exit_arguments, self._exit_loss = kept

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
            self._consistent_phase(),
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
        own = copy.copy(self.args)
        own.output_dir, own.learning_rate, own.num_train_epochs = folder, learning_rate, epochs
        own.push_to_hub = False
        if phase.trainable == "internal_exits" and own.metric_for_best_model is not None:
            # Nothing else that an evaluation reports can change.
            own.metric_for_best_model, own.greater_is_better = "exit_loss", False
        kept = (self.args, self.train_dataset, self.model_init, self.optimizer_cls_and_kwargs)
        with keeping_requires_grad(self.model), self._evaluating_as(phase), self._finite_labels():
            freeze_for_model_step(self.model, phase.trainable, phase.trains_policies)
            # A wrapper that an earlier phase left would wait for the gradients of that phase.
            self.model_wrapped = self.model
            if self.accelerator.num_processes > 1:
                # An evaluation before any training marks the model as prepared: gradients would not be averaged.
                vars(self.model).pop("_is_accelerate_prepared", None)
            self.args = own
            self.train_dataset = subset(self.train_dataset, self._split()[0].tolist())
            # The model of this phase is the one that earlier phases left.
            self.optimizer = self.lr_scheduler = self.model_init = None
            self.optimizer_cls_and_kwargs = at_rate(self.optimizer_cls_and_kwargs, learning_rate)
            for callback in self.callback_handler.callbacks:
                if hasattr(callback, "early_stopping_patience_counter"):
                    callback.early_stopping_patience_counter = 0
            try:
                return super().train(resume_from_checkpoint=checkpoint)
            finally:
                self.args, self.train_dataset, self.model_init, self.optimizer_cls_and_kwargs = kept

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
        model = self._exit_model
        config = model.config
        mark = fingerprint(model, self.train_dataset) if mark is None else mark
        store = self._store("train", self.train_dataset, mark)
        entries = store.deciding(self._split()[1])
        used = active_module(model.exit_policies) if policies is None else policies
        train = self._stored_rewards(store, self._hardness(mark), alpha, used.is_conditioned, entries)
        evaluation = {}
        if self.args.eval_strategy != "no":
            for name, stored in self._evaluation_stores().items():
                memorized = memorized_layers(stored.correct, stored.layers)
                entries = stored.deciding()
                evaluation[name] = self._stored_rewards(stored, memorized, alpha, used.is_conditioned, entries)
        criterion, threshold = operating_point(model)
        output, history = run_policy_phase(
            used,
            self.args,
            folder,
            train,
            evaluation,
            exit_threshold=threshold if criterion == "policy" else 0.5,
            first_exit=first_exit(config),
            metrics=stored_metrics(self.compute_metrics, self.preprocess_logits_for_metrics),
            callbacks=self.callback_handler.callbacks,
            processing_class=self.processing_class,
            optimizer_cls_and_kwargs=self.optimizer_cls_and_kwargs,
            resume_from_checkpoint=checkpoint,
        )
        self.state.log_history += history
        return output

    def _stored_rewards(
        self, store: ExitStore, memorized: Tensor, alpha: float | None, is_conditioned: bool, entries: Tensor
    ) -> StoredRewards:
        return StoredRewards.of(
            store,
            memorized,
            self._exit_model.config,
            reward=self.args.reward,
            loss=self.args.reward_loss,
            alpha=alpha,
            is_conditioned=is_conditioned,
            entries=entries,
        )

    def _folder(self, step: str) -> str:
        return PhaseLog.of(self.args.output_dir, None).folder(step)

    def _keep(self, log: PhaseLog, step: str, result: Any, history: list[dict[str, Any]]) -> None:
        """Saves the model as the step left it, so that a resumed run starts from there."""
        if step != HARDNESS:
            self.save_model(log.weights_folder(step), _internal_call=True)
        self.accelerator.wait_for_everyone()
        log.finish(step, result, history)

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
