# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""`ConsistentEETrainer`: the phases of ConsistentEE, each a 🤗 Trainer of its own."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import TrainerState, set_seed
from transformers.utils import logging

from transformers_cee.exits.policy import ExitPolicies, make_policies
from transformers_cee.fitting.drafter import fit_drafter
from transformers_cee.training.checkpoints import needs_of
from transformers_cee.training.checks import check_hooks, check_phases
from transformers_cee.training.hardness import fingerprint
from transformers_cee.training.model_phase import ModelPhaseTrainer, phase_arguments
from transformers_cee.training.model_step import ModelPhase, consistent_phase, drafter_phase, heads_phase
from transformers_cee.training.parameters import keeping_requires_grad
from transformers_cee.training.phases import HARDNESS, PhaseLog
from transformers_cee.training.rehearsal import subset
from transformers_cee.training.run_output import RunOutput, StepResult
from transformers_cee.training.stored_exits import StoredExitsTrainer
from transformers_cee.training.stored_phases import hardness_step, policy_step
from transformers_cee.training.training_args import ConsistentEETrainingArguments


logger = logging.get_logger(__name__)

# From the folder of its checkpoints, and one of these to go on from, to what a step gives back.
Step = Callable[[str, str | bool | None], StepResult]
# What people and backends ask a Trainer for after its training.
HANDED_BACK = ("model", "model_wrapped", "deepspeed", "optimizer", "lr_scheduler", "state", "control")


class OfThePhase:
    """An attribute of a trainer that is its own, and that of the phase's trainer while one trains the model: callbacks
    that hold the trainer see what is at work."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, run: Any, owner: type | None = None) -> Any:
        if run is None:
            return self
        if run._running is not None:
            return getattr(run._running, self.name)
        if self.name not in vars(run):
            raise AttributeError(f"{type(run).__name__} has no attribute {self.name!r} yet.")
        return vars(run)[self.name]

    def __set__(self, run: Any, value: Any) -> None:
        vars(run)[self.name] = value


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
    # Trains the model in the phases that do; a subclass names its own.
    phase_trainer: type[ModelPhaseTrainer] = ModelPhaseTrainer
    # That of the phase that runs.
    _running: ModelPhaseTrainer | None = None
    state: TrainerState = OfThePhase()  # type: ignore[assignment]
    optimizer, lr_scheduler, model_wrapped, deepspeed = OfThePhase(), OfThePhase(), OfThePhase(), OfThePhase()

    def __init__(
        self,
        model: nn.Module | None = None,
        args: ConsistentEETrainingArguments | None = None,
        **kwargs: Any,
    ) -> None:
        check_hooks(type(self), type(self).phase_trainer)
        super().__init__(model=model, args=args, **kwargs)

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
            # Adapters that are loaded may come unfrozen.
            with keeping_requires_grad(self.model):
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
                result = run(log.folder(step), log.checkpoint(step, needs_of(self)))
                results[step] = result.output
                history += [{**entry, "phase": step} for entry in result.log_history]
                self._keep(log, step, result)
        if set(self.args.phases) != {"drafter"}:
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
        self._renew_budgets(fits=False)
        return result.output

    def compute_hardness(self) -> Tensor:
        """Phase `hardness`: memorized layer (rows,) of every training row, in evaluation mode; of a decoder (tokens,),
        of every counted token or of those that `args.policy_max_tokens` leaves.

        Kept in `output_dir/hardness.safetensors` with a fingerprint of data and weights and the layers of the exits,
        and computed again when any of them has changed.
        """
        self.check_phases(["hardness"])
        return hardness_step(self).output

    def train_policy(self, resume_from_checkpoint: bool | str | None = None) -> Any:
        """Phase `policy`: the policies alone learn on stored exit states; backbone and heads stay as they are."""
        self.check_phases(["policy"])
        result = policy_step(self, self._folder("policy"), resume_from_checkpoint)
        self._renew_budgets()
        return result.output

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
            policy_step(self, self._folder(f"policy-alpha-{alpha:g}"), None, policies, alpha, mark)
            family[alpha] = policies.eval()
        return family

    def train_drafter(self) -> Any:
        """Phase `drafter`: the drafter alone learns, first solved on some text, then by roll-outs."""
        self.check_phases(["drafter"])
        return self._drafter(self._folder("drafter"), None).output

    def train_consistent(self) -> RunOutput:
        """Phase `consistent`: rounds of a model step (loss at the exits that the policies take) and a policy step."""
        start = time.time()
        self.check_phases(["consistent"])
        results = {step: run(self._folder(step), None).output for step, run in self._rounds().items()}
        self._renew_budgets()
        return RunOutput.of(results, time.time() - start)

    def _steps(self) -> dict[str, Step]:
        """All steps of the run by name, in order."""
        steps: dict[str, dict[str, Step]] = {
            "heads": self._heads_steps(),
            "hardness": {HARDNESS: lambda folder, checkpoint: hardness_step(self)},
            "policy": {"policy": partial(policy_step, self)},
            "consistent": self._rounds(),
            "drafter": {"drafter": self._drafter},
        }
        return {name: step for phase in self.args.phases for name, step in steps[phase].items()}

    def _heads_steps(self) -> dict[str, Step]:
        return {stage: partial(self._heads, stage) for stage in self.args.make_heads_objective().stages}

    @property
    def _step_names(self) -> tuple[str, ...]:
        """Steps of all phases, those of a run before this one included."""
        return (*self._heads_steps(), HARDNESS, "policy", *self._rounds(), "drafter")

    def _rounds(self) -> dict[str, Step]:
        steps: dict[str, Step] = {}
        for number in range(1, self.args.consistent_num_rounds + 1):
            steps[f"consistent-{number}-model"] = self._consistent_model
            steps[f"consistent-{number}-policy"] = partial(policy_step, self)
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
        return heads_phase(self.args, self._exit_model, stage, self.own_loss)

    def _consistent_phase(self) -> ModelPhase:
        return consistent_phase(self.args, self._exit_model, self._problem_type, self.own_loss)

    def _heads(self, stage: str, folder: str, checkpoint: str | bool | None) -> StepResult:
        epochs = self.args.heads_num_train_epochs
        return self._train_model(
            self._heads_phase(stage),
            folder,
            checkpoint,
            self.args.learning_rate if self.args.heads_learning_rate is None else self.args.heads_learning_rate,
            self.args.num_train_epochs if epochs is None else epochs,
        )

    def _consistent_model(self, folder: str, checkpoint: str | bool | None) -> StepResult:
        rate = self.args.consistent_learning_rate
        return self._train_model(
            self._consistent_phase(),
            folder,
            checkpoint,
            self.args.learning_rate if rate is None else rate,
            self.args.consistent_num_train_epochs,
        )

    def _drafter(self, folder: str, checkpoint: str | bool | None) -> StepResult:
        phase = drafter_phase(self.args, self._exit_model)
        if self.args.drafter_fit_tokens and not checkpoint:
            rows = self.get_train_dataloader()
            fit_drafter(self._exit_model, rows, self.args.drafter_fit_tokens)
        args = self.args
        return self._train_model(phase, folder, checkpoint, args.drafter_learning_rate, args.drafter_num_train_epochs)

    def _train_model(
        self, phase: ModelPhase, folder: str, checkpoint: str | bool | None, learning_rate: float, epochs: float
    ) -> StepResult:
        """Trains the model as a phase asks, on the rows of the heads."""
        args = phase_arguments(self.args, phase, folder, learning_rate, epochs)
        trainer = self.make_phase_trainer(phase, args, subset(self.train_dataset, self._split()[0].tolist()))
        # The optimizer that an earlier phase left is as large as that of this one.
        self.optimizer = self.lr_scheduler = None
        self._running = trainer
        try:
            output = trainer.train(resume_from_checkpoint=checkpoint)
        finally:
            self._running = None
            for name in HANDED_BACK:
                setattr(self, name, getattr(trainer, name))
        return StepResult(output, trainer.state.log_history)

    def make_phase_trainer(
        self,
        phase: ModelPhase,
        args: ConsistentEETrainingArguments,
        train_dataset: Any = None,
        compute_metrics: Callable | None = None,
    ) -> ModelPhaseTrainer:
        """The trainer of a phase that trains the model, an instance of `phase_trainer`; arguments as there."""
        return self.phase_trainer(self, phase, args, train_dataset, compute_metrics)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, Any]:
        # A phase evaluates as it goes, and so do callbacks that hold this trainer.
        judge = super().evaluate if self._running is None else self._running.measure
        return judge(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        # A model that trains is not cast to half precision, and a backend has prepared it for the phase.
        return (super().predict if self._running is None else self._running.predict)(*args, **kwargs)

    def _folder(self, step: str) -> str:
        return PhaseLog.of(self.args.output_dir, None).folder(step)

    def _keep(self, log: PhaseLog, step: str, result: StepResult) -> None:
        """Saves the model as the step left it, so that a resumed run starts from there."""
        if step != HARDNESS:
            self.save_model(log.weights_folder(step), _internal_call=True)
        self.accelerator.wait_for_everyone()
        log.finish(step, result.output, result.log_history)
