# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Arguments of [`ConsistentEETrainer`]."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments


PHASES = ("heads", "hardness", "policy", "consistent", "drafter")
POLICY_GRADIENTS = ("exact", "reinforce", "optimal_stopping")
CONSISTENT_OBJECTIVES = ("expected", "sampled")
TRAINABLE = ("all", "exits")


_AT_LEAST_0 = (lambda value: value >= 0, "of at least 0")
_AT_LEAST_1 = (lambda value: value >= 1, "of at least 1")
_SHARE = (lambda value: 0 <= value < 1, "in [0, 1)")
_RATE_OR_DEFAULT = (lambda value: value is None or value >= 0, "of at least 0, or None")
# What numbers may be: whole or any, a condition, and how it is said.
NUMBERS: dict[str, tuple[type, Callable[[Any], bool], str]] = {
    "heads_learning_rate": (float, *_RATE_OR_DEFAULT),
    "consistent_learning_rate": (float, *_RATE_OR_DEFAULT),
    "exit_learning_rate": (float, *_RATE_OR_DEFAULT),
    "heads_num_train_epochs": (float, *_RATE_OR_DEFAULT),
    "policy_learning_rate": (float, *_AT_LEAST_0),
    "policy_num_train_epochs": (float, *_AT_LEAST_0),
    "consistent_num_train_epochs": (float, *_AT_LEAST_0),
    "policy_batch_size": (int, *_AT_LEAST_1),
    "policy_samples": (int, *_AT_LEAST_1),
    "consistent_samples": (int, *_AT_LEAST_1),
    "consistent_num_rounds": (int, *_AT_LEAST_1),
    "policy_holdout": (float, *_SHARE),
    "policy_exploration": (float, *_SHARE),
    "policy_max_tokens": (int, lambda value: value is None or value >= 1, "of at least 1, or None for all"),
    "policy_entropy_bonus": (float, lambda value: value is not None, "that is finite"),
    "hardness_tolerance": (float, *_AT_LEAST_0),
    "store_memory_limit_mb": (int, *_AT_LEAST_0),
    "eval_timing_rows": (int, *_AT_LEAST_0),
    "drafter_learning_rate": (float, *_AT_LEAST_0),
    "drafter_num_train_epochs": (float, *_AT_LEAST_0),
    "drafter_roll_outs": (int, *_AT_LEAST_1),
    "drafter_fit_tokens": (int, *_AT_LEAST_0),
}


# Schedules that go by the metric of the best checkpoint, and are told whether more of it is better.
_BY_METRIC = ("reduce_lr_on_plateau", "greedy")


def judge_by(args: TrainingArguments, metric: str, greater_is_better: bool) -> None:
    """Makes a metric of a phase the one that its best checkpoint, early stopping and schedule go by.

    Args:
        args (`TrainingArguments`): those of the phase, which are changed.
        metric (`str`): its name.
        greater_is_better (`bool`): is more of it better?
    """
    args.metric_for_best_model, args.greater_is_better = metric, greater_is_better
    if getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type) in _BY_METRIC:
        given = args.lr_scheduler_kwargs or {}
        args.lr_scheduler_kwargs = {**given, "mode": "max" if greater_is_better else "min"}  # type: ignore[dict-item]


def check_number(name: str, value: Any, kind: type, accepts: Callable[[Any], bool], wanted: str) -> None:
    """Raises `ValueError` unless an argument is a finite number of a kind, or None, that is accepted."""
    whole = kind is int
    is_number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not (value is None or (is_number and math.isfinite(value))) or not _passes(accepts, value):
        raise ValueError(f"`{name}`={value!r} must be a {'whole ' if whole else ''}number {wanted}.")


def _passes(accepts: Callable[[Any], bool], value: Any) -> bool:
    try:
        return accepts(value)
    except TypeError:
        # None, where that is not accepted.
        return False


@dataclass
class ConsistentEETrainingArguments(TrainingArguments):
    """`TrainingArguments` and the options of the phases. An option that starts with a phase's name belongs to it; the
    other arguments (optimizer, schedule, batch size, accumulation, precision, saving, …) hold for every phase.

    `max_steps`, `eval_strategy` and `save_strategy` count within each phase. Checkpoints of a phase lie in
    `output_dir/phases/<phase>/checkpoint-*`. With `push_to_hub`, the model is published once, when all phases are
    done; `hub_strategy` may be `"end"` or `"every_save"`, which do the same.

    Args:
        phases (`list[str]`): phases that `train()` runs, in this order. Defaults to all.
        trainable (`str`): `"all"` (default), or `"exits"`: only exit heads, exit norms and policies learn; embeddings,
            layers and the model's own norm and head stay as they are. What is frozen already stays frozen.
            `metric_for_best_model` is then better `"exit_loss"` than `"loss"` (`EarlyExitTrainer.evaluate`).
        heads_objective (`str`): a key of `HEADS_OBJECTIVES`: `"layer_weighted"` (default, `Σ i·CE_i / Σ i`),
            `"uniform"`, `"last"`, `"two_stage"`, `"alternate"`, `"gradient_equilibrium"`, `"cosee"`, `"variational"`
            or `"self_distillation"`. Of a decoder, all but `"cosee"` and `"self_distillation"`. `"variational"` trains
            the policies beside the model; `"two_stage"` is two steps, `heads-backbone` and `heads`.
        heads_objective_options (`dict[str, float]`, *optional*): options of the objective by name, see its class; on a
            command line as JSON.
        token_loss (`str`): loss of a decoder's tokens in the phase `heads`, a key of `TOKEN_LOSSES`: `"ce"` (default,
            the label), `"kl"` or `"argmax"` (the last exit's distribution or most probable token, which need nothing
            but text).
        token_loss_options (`dict[str, float]`, *optional*): options of the loss by name: `temperature` and `top_k` of
            `"kl"`, `entropy_weight` of `"argmax"`; on a command line as JSON.
        heads_learning_rate, consistent_learning_rate (`float`, *optional*): default to `learning_rate`.
        heads_num_train_epochs (`float`, *optional*): defaults to `num_train_epochs`.
        exit_learning_rate (`float`, *optional*): of exit heads, norms, pooler and classifier in the phases `heads` and
            `consistent`; defaults to the phase's own.
        policy_learning_rate, policy_num_train_epochs, policy_batch_size: of the phase `policy` on stored states.
        policy_gradient (`str`): `"exact"` (default), `"reinforce"` with `policy_samples` draws (the paper's), or
            `"optimal_stopping"`, a regression of what leaving gains (no exploration, no entropy bonus).
        policy_holdout (`float`): share of the training rows that the heads never see and the policies learn from.
            Heads have memorised their own training rows, which makes early exits look better than they are.
        policy_max_tokens (`int`, *optional*): of a decoder, the tokens that the policies learn from and are judged on,
            of rows drawn at random until there are enough; their hardness is all that is computed. Defaults to all.
        policy_exploration (`float`): share of decisions taken by a fair coin while training. Off by default.
        policy_entropy_bonus (`float`): weight of the exit distribution's entropy. Off by default.
        reward (`str`): a key of `REWARDS`: `"hardness_guided"` (default, the paper's `−CE_l − α·(1 − M/L)·l`) or
            `"per_layer"` (`−CE_l − α·l`), with `reward_alpha` of the model's config as α.
        reward_loss (`str`): loss term of the reward: `"ce"` (the paper), `"error"`, or `"disagreement"`, the error
            when the last exit's prediction is taken for the truth.
        hardness_tolerance (`float`): in regression, the absolute error up to which a head counts as right.
        consistent_num_rounds (`int`): rounds of one model step and one policy step.
        consistent_num_train_epochs (`float`): epochs of each model step.
        consistent_objective (`str`): `"expected"` (default) or `"sampled"` at `consistent_samples` exits. A decoder
            takes one pass per sample; memory grows with the samples.
        consistent_copy_states (`bool`): of a decoder with `"sampled"`, tokens that left keep their exit state as input
            of deeper layers (default), as generation with `skipped_kv="copy"` sees it.
        store_memory_limit_mb (`int`): exit states above this size (MB) are memory-mapped on disk.
        eval_exit_thresholds (`list[float]`): operating points of `evaluate()`.
        drafter_learning_rate, drafter_num_train_epochs (`float`): of the phase `drafter`, in which a decoder's drafter
            learns the model's own distribution, without labels; it is no phase by default.
        drafter_roll_outs (`int`): tokens that it drafts from every token on while it learns.
        drafter_fit_tokens (`int`): tokens that its start is solved on, see `fit_drafter`; 0 goes on from what it has.
        eval_timing_rows (`int`): rows on which `evaluate()` takes wall-clock times of an encoder; 0 takes none.
    """

    _VALID_DICT_FIELDS = (*TrainingArguments._VALID_DICT_FIELDS, "heads_objective_options", "token_loss_options")

    phases: list[str] = field(
        default_factory=lambda: list(PHASES[:4]), metadata={"help": f"Phases to run, of {', '.join(PHASES)}."}
    )
    trainable: str = field(default="all", metadata={"help": "What learns: all or exits."})
    heads_objective: str = field(
        default="layer_weighted",
        metadata={
            "help": "Loss of the heads: layer_weighted, uniform, last, two_stage, alternate, gradient_equilibrium, "
            "cosee, variational or self_distillation."
        },
    )
    heads_objective_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of heads_objective by name, as JSON."}
    )
    token_loss: str = field(default="ce", metadata={"help": "Loss of a decoder's tokens in heads: ce, kl or argmax."})
    token_loss_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of token_loss by name, as JSON."}
    )
    heads_learning_rate: float | None = field(default=None, metadata={"help": "Defaults to learning_rate."})
    heads_num_train_epochs: float | None = field(default=None, metadata={"help": "Defaults to num_train_epochs."})
    exit_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of exit heads, norms, pooler and classifier."}
    )
    policy_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the policies."})
    policy_num_train_epochs: float = field(default=20.0, metadata={"help": "Epochs of policies on stored states."})
    policy_batch_size: int = field(default=256, metadata={"help": "Rows per step of the policies, per device."})
    policy_gradient: str = field(default="exact", metadata={"help": "exact, reinforce or optimal_stopping."})
    policy_samples: int = field(default=8, metadata={"help": "Draws per row of reinforce."})
    policy_holdout: float = field(
        default=0.0, metadata={"help": "Share of training rows kept from the heads and used for the policies."}
    )
    policy_max_tokens: int | None = field(
        default=None, metadata={"help": "Tokens that a decoder's policies learn from; all by default."}
    )
    policy_exploration: float = field(default=0.0, metadata={"help": "Share of decisions taken by a fair coin."})
    policy_entropy_bonus: float = field(default=0.0, metadata={"help": "Weight of the exit distribution's entropy."})
    reward: str = field(
        default="hardness_guided", metadata={"help": "Reward of leaving: hardness_guided or per_layer."}
    )
    reward_loss: str = field(default="ce", metadata={"help": "Loss term of the reward: ce, error or disagreement."})
    hardness_tolerance: float = field(
        default=0.5, metadata={"help": "Absolute error up to which a regression head counts as right."}
    )
    consistent_num_rounds: int = field(default=1, metadata={"help": "Rounds of model step and policy step."})
    consistent_learning_rate: float | None = field(default=None, metadata={"help": "Defaults to learning_rate."})
    consistent_num_train_epochs: float = field(default=1.0, metadata={"help": "Epochs of each model step."})
    consistent_objective: str = field(
        default="expected", metadata={"help": "Loss at the exit only: expected or sampled."}
    )
    consistent_samples: int = field(
        default=8, metadata={"help": "Exits drawn per row by consistent_objective=sampled."}
    )
    consistent_copy_states: bool = field(
        default=True, metadata={"help": "With sampled exits of a decoder, deeper layers see the state of the exit."}
    )
    store_memory_limit_mb: int = field(
        default=2048, metadata={"help": "Exit states larger than this are memory-mapped on disk."}
    )
    eval_exit_thresholds: list[float] = field(
        default_factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.9], metadata={"help": "Operating points of evaluate()."}
    )
    eval_timing_rows: int = field(
        default=512, metadata={"help": "Rows on which evaluate() measures wall-clock; 0 for none."}
    )
    drafter_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of a decoder's drafter."})
    drafter_num_train_epochs: float = field(default=1.0, metadata={"help": "Epochs of the phase drafter."})
    drafter_roll_outs: int = field(default=3, metadata={"help": "Tokens that are drafted from every token on."})
    drafter_fit_tokens: int = field(
        default=20_000, metadata={"help": "Tokens that the drafter's start is solved on; 0 goes on from what it has."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_phases()

    def check_phases(self) -> None:
        """Raises `ValueError` for options of the phases that are unknown or out of their range; asked again before a
        run, since arguments may have been changed."""
        from transformers_cee.stores.store import REWARD_LOSSES
        from transformers_cee.training.rewards import REWARDS

        unknown = [phase for phase in self.phases if phase not in PHASES]
        if unknown or not self.phases:
            raise ValueError(f"`phases`={self.phases}: {unknown} unknown; accepted are {', '.join(PHASES)}.")
        if len({*self.phases}) < len(self.phases):
            raise ValueError(f"`phases`={self.phases} names a phase twice; `consistent_num_rounds` repeats.")
        for name, (kind, accepts, wanted) in NUMBERS.items():
            check_number(name, getattr(self, name), kind, accepts, wanted)
        for name, accepted in (
            ("trainable", TRAINABLE),
            ("policy_gradient", POLICY_GRADIENTS),
            ("reward_loss", REWARD_LOSSES),
            ("consistent_objective", CONSISTENT_OBJECTIVES),
        ):
            if getattr(self, name) not in accepted:
                raise ValueError(f"`{name}`={getattr(self, name)!r} is unknown; accepted are {', '.join(accepted)}.")
        if self.policy_gradient == "optimal_stopping" and (self.policy_exploration or self.policy_entropy_bonus):
            raise ValueError(
                f"`policy_exploration`={self.policy_exploration} and `policy_entropy_bonus`="
                f"{self.policy_entropy_bonus} must be 0 with `policy_gradient`='optimal_stopping': it draws nothing."
            )
        if self.make_heads_objective().last_exit_alone and self.trainable == "exits":
            raise ValueError(
                f"`heads_objective`={self.heads_objective!r} trains the last exit alone, wholly or in turn, which "
                "`trainable`='exits' leaves as it is; 'uniform' trains the others."
            )
        self.make_token_loss()
        REWARDS.find(self.reward)
        if not isinstance(self.eval_exit_thresholds, list | tuple):
            raise ValueError(f"`eval_exit_thresholds`={self.eval_exit_thresholds!r} must be a list of numbers.")
        for threshold in self.eval_exit_thresholds:
            check_number("eval_exit_thresholds", threshold, float, lambda value: 0 <= value <= 1, "in [0, 1]")
        if self.label_smoothing_factor:
            raise ValueError(
                f"`label_smoothing_factor`={self.label_smoothing_factor} is not supported: losses are those of exits."
            )

    def make_heads_objective(self, stage: str | None = None) -> Any:
        """A fresh object of the objective that `heads_objective` and its options name, for one of its stages.

        Raises:
            ValueError: an option is unknown or out of its range.
        """
        from transformers_cee.training.heads_objectives import make_heads_objective

        return make_heads_objective(self.heads_objective, self.heads_objective_options, stage)

    def make_token_loss(self) -> Any:
        """The object that `token_loss` and its options name.

        Raises:
            ValueError: an option is unknown or out of its range.
        """
        from transformers_cee.exits.token_losses import TOKEN_LOSSES

        return TOKEN_LOSSES.make(self.token_loss, self.token_loss_options)
