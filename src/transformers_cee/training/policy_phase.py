# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The policy phase: policies trained alone, on stored exit states, by the policy gradient."""

import copy
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import EvalPrediction, TrainerCallback, TrainerControl
from transformers.trainer_pt_utils import nested_numpify
from transformers.trainer_utils import TrainOutput

from transformers_cee.evaluation.operating_points import Metrics, hindsight_point
from transformers_cee.exits.criterion import CriterionSettings
from transformers_cee.exits.policy import ExitPolicies
from transformers_cee.stores.scoring import score_exits
from transformers_cee.stores.store import ExitStore
from transformers_cee.training.checkpoints import ResumableTrainer
from transformers_cee.training.labels import FiniteLoss
from transformers_cee.training.objectives import closed_before, policy_loss
from transformers_cee.training.rewards import RewardStep, rewards_and_prices, rewards_of
from transformers_cee.training.training_args import ConsistentEETrainingArguments, judge_by


# Prices of a layer at which conditioned policies are judged, over the range that they learn.
JUDGED_ALPHAS = 8


class PolicyObjective(nn.Module):
    """The policies and the loss that trains them, from stored states, features and rewards to one number.

    Conditioned policies get rewards without a price, and what each exit costs at α = 1; every row then pays an α of
    its own. Rows are weighted by `1/(1 + α·L)`, or else the dearest would drown the others.

    Args:
        policies (`ExitPolicies`): the model's own policies; trained in place.
        first_exit (`int`): exit (0-based) before which nothing leaves.
        num_layers (`int`): number of layers L, of conditioned policies.
        options: keyword arguments of `policy_loss`.
    """

    def __init__(self, policies: ExitPolicies, first_exit: int = 0, num_layers: int = 1, **options: Any) -> None:
        super().__init__()
        self.policies = policies
        self.first_exit, self.num_layers = first_exit, num_layers
        self.options = options

    def forward(
        self, states: Tensor, rewards: Tensor, features: Tensor | None = None, prices: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Mean loss over rows.

        Args:
            states (`Tensor` of shape `(rows, exits, hidden)`): exit states.
            rewards (`Tensor` of shape `(rows, exits)`): reward of leaving at each exit, without `prices` if given.
            features (`Tensor` of shape `(rows, exits − 1, 5)`, *optional*): confidence features.
            prices (`Tensor` of shape `(rows, exits)`, *optional*): of conditioned policies, each exit's cost at α = 1.
        """
        with torch.autocast(states.device.type, enabled=False):
            states = states.to(next(self.policies.parameters()).dtype)
            if prices is None:
                return {"loss": self._loss(states, features, rewards, None)}
            if self.training:
                alphas = [self.policies.draw_alphas(len(states), states.device)]
            else:
                low, high = (math.log(alpha) for alpha in self.policies.alphas)
                judged = torch.linspace(low, high, JUDGED_ALPHAS, device=states.device).exp()
                alphas = [alpha.expand(len(states)) for alpha in judged]
            losses = []
            for alpha in alphas:
                price = alpha.unsqueeze(1)
                paid = (rewards - price * prices) / (1 + price * self.num_layers)
                losses.append(self._loss(states, features, paid, alpha))
            return {"loss": torch.stack(losses).mean()}

    def _loss(self, states: Tensor, features: Tensor | None, rewards: Tensor, alpha: Tensor | None) -> Tensor:
        exit_logits = closed_before(self.policies(states, features, alpha), self.first_exit)
        return policy_loss(exit_logits, rewards, **(self.options if self.training else {}))


class StoredRewards(Dataset):
    """Entries of an `ExitStore` with their rewards (entries, exits), fetched a batch at a time.

    Args:
        store (`ExitStore`): the store.
        rewards (`Tensor` of shape `(entries, exits)`): reward of each entry of the store at each exit.
        entries (`LongTensor`, *optional*): numbers of the entries to take; all by default.
        prices (`Tensor` of shape `(entries, exits)`, *optional*):
            Of conditioned policies, what each exit costs at α = 1; the rewards are then without it.
    """

    def __init__(
        self, store: ExitStore, rewards: Tensor, entries: Tensor | None = None, prices: Tensor | None = None
    ) -> None:
        self.store, self.rewards, self.prices = store, rewards, prices
        self.entries = torch.arange(len(store)) if entries is None else entries

    @classmethod
    def of(
        cls,
        store: ExitStore,
        memorized: Tensor,
        config: Any,
        *,
        reward: str = "hardness_guided",
        loss: str = "ce",
        alpha: float | None = None,
        is_conditioned: bool = False,
        entries: Tensor | None = None,
    ) -> "StoredRewards":
        """Rewards of a store: at one α, or for conditioned policies at none, with prices.

        Args:
            memorized (`LongTensor` of shape `(entries,)`): memorized layers.
            config (`ExitConfigMixin`): gives `reward_alpha` and the number of layers.
            reward (`str`): a name of `REWARDS`.
            loss (`str`): `"ce"`, `"error"` or `"disagreement"`.
            alpha (`float`, *optional*): price of a layer; `config.reward_alpha` by default.

        Raises:
            ValueError: an unknown reward, one whose result has another shape or, for conditioned policies, one that is
                not linear in α.
        """
        price = config.reward_alpha if alpha is None else alpha
        step = RewardStep(store.reward_losses(loss), store.layers, memorized, config.num_hidden_layers, price)
        if is_conditioned:
            rewards, prices = rewards_and_prices(reward, step)
            return cls(store, rewards, entries, prices)
        return cls(store, rewards_of(reward, step), entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int] | Tensor) -> dict[str, Tensor]:
        entries = self.entries[indices]
        batch = {"states": self.store.states[entries], "rewards": self.rewards[entries]}
        for name, value in (("features", self.store.features), ("prices", self.prices)):
            if value is not None:
                batch[name] = value[entries]
        return batch


def check_policies_learn(policies: nn.Module) -> None:
    """Raises `ValueError` for policies that are frozen, as a plain adapter leaves them."""
    if not any(parameter.requires_grad for parameter in policies.parameters()):
        raise ValueError(
            "The exit policies are frozen (`requires_grad`); a model with adapters needs 'exit_policies' in "
            "`modules_to_save`, as `exit_lora_config` has it."
        )


def as_fetched(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Collator for data that arrive as a batch."""
    return batch


class PolicyPhaseTrainer(FiniteLoss, ResumableTrainer):
    """🤗 Trainer on stored states. Its evaluation says what the policies earn on stored evaluation sets: of the one
    named "", and of others behind their names; loss and reward also over the rows of all.

    Args:
        evaluation (`dict[str, StoredRewards]`): stored evaluation sets by name.
        exit_threshold (`float` or `list[float]`): operating point whose metric and depth are reported.
        alpha (`float`, *optional*): price of a layer at that point, of conditioned policies.
        metrics (`Callable`, *optional*): `compute_metrics` of the caller.
    """

    control: TrainerControl

    def __init__(
        self,
        *args: Any,
        evaluation: dict[str, StoredRewards],
        exit_threshold: Any,
        alpha: float | None,
        metrics: Callable | None,
        **kwargs: Any,
    ) -> None:
        # Trainer asks whether there is anything to evaluate on; `evaluate` here looks no further.
        super().__init__(*args, eval_dataset=evaluation or None, **kwargs)
        self.evaluation, self.exit_threshold, self.alpha, self.metrics = evaluation, exit_threshold, alpha, metrics

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        objective: PolicyObjective = self.model
        objective.eval()
        metrics: dict[str, float] = {}
        totals = {name: self._total_loss(rows) for name, rows in self.evaluation.items()}
        for name, rows in self.evaluation.items():
            loss = totals[name] / len(rows)
            first_layer = int(rows.store.layers[objective.first_exit])
            settings = CriterionSettings(alpha=self.alpha)
            scores = score_exits("policy", rows.store, objective.policies, settings, min_exit_layer=first_layer)
            point = hindsight_point("policy", self.exit_threshold, scores, rows.store, self.metrics)
            values = {"loss": loss, "reward": -loss, "depth": point.depth}
            values |= {one: value for one, value in point.metrics.items() if one != "loss"}
            prefix = f"{metric_key_prefix}_{name}" if name else metric_key_prefix
            metrics |= {f"{prefix}_{one}": value for one, value in values.items()}
        loss = sum(totals.values()) / sum(map(len, self.evaluation.values()))
        metrics |= {f"{metric_key_prefix}_loss": loss, f"{metric_key_prefix}_reward": -loss}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def _total_loss(self, rows: StoredRewards) -> float:
        device, total = next(self.model.parameters()).device, 0.0
        for indices in torch.arange(len(rows)).split(1024):
            batch = {name: value.to(device) for name, value in rows.__getitems__(indices).items()}
            total += float(self.model(**batch)["loss"]) * len(indices)
        return total


def stored_metrics(compute: Metrics | None, preprocess: Callable | None) -> Metrics | None:
    """`compute_metrics` for stored logits, which `preprocess_logits_for_metrics` has not seen yet."""
    if compute is None or preprocess is None:
        return compute

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        labels = prediction.label_ids
        seen = preprocess(torch.as_tensor(prediction.predictions), torch.as_tensor(labels))
        return compute(EvalPrediction(nested_numpify(seen), labels))

    return metrics


def at_rate(optimizer: tuple[type, dict[str, Any]] | None, learning_rate: float) -> tuple[type, dict[str, Any]] | None:
    """An optimizer's class and arguments with the learning rate of a phase."""
    return None if optimizer is None else (optimizer[0], {**optimizer[1], "lr": learning_rate})


def policy_arguments(args: ConsistentEETrainingArguments, directory: str, evaluates: bool) -> Any:
    """The phase's own arguments: stored entries need neither accumulation nor workers, and a policy is judged by its
    reward, not by its accuracy."""
    own = copy.copy(args)
    own.output_dir = directory
    own.learning_rate = args.policy_learning_rate
    own.num_train_epochs = args.policy_num_train_epochs
    own.per_device_train_batch_size = args.policy_batch_size
    own.gradient_accumulation_steps = 1
    own.dataloader_num_workers = 0
    own.dataloader_persistent_workers = False
    own.dataloader_prefetch_factor = own.neftune_noise_alpha = None
    own.remove_unused_columns = False
    own.train_sampling_strategy = "random"
    own.activation_checkpointing = own.gradient_checkpointing = False
    own.dataloader_drop_last = False
    own.push_to_hub = False
    own.label_names = []
    # Whoever is told of the run is told of this phase, see `run_policy_phase`.
    own.report_to = []
    judge_by(own, "reward", greater_is_better=True)
    own.include_num_input_tokens_seen = "no"
    if not evaluates:
        own.eval_strategy, own.load_best_model_at_end, own.eval_on_start = "no", False, False
    return own


def run_policy_phase(
    policies: ExitPolicies,
    args: ConsistentEETrainingArguments,
    directory: str,
    train: StoredRewards,
    evaluation: dict[str, StoredRewards],
    *,
    exit_threshold: Any,
    alpha: float | None = None,
    first_exit: int = 0,
    metrics: Metrics | None = None,
    callbacks: list[TrainerCallback] | None = None,
    processing_class: Any = None,
    optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None,
    resume_from_checkpoint: str | bool | None = None,
) -> tuple[TrainOutput, list[dict[str, float]]]:
    """Trains `policies` in place. Checkpoints lie in `directory`.

    Args:
        evaluation (`dict[str, StoredRewards]`): sets to evaluate on by name, "" for one without; empty for none.
        callbacks (`list[TrainerCallback]`, *optional*): all callbacks of the phase; Trainer's defaults if None.

    Returns:
        `TrainOutput` of the phase, and what it logged.

    Raises:
        ValueError: the policies are frozen, or there is nothing to learn from.
    """
    check_policies_learn(policies)
    if len(train) == 0:
        raise ValueError("`train_dataset` has no token that may leave early: every answer is one token long.")
    objective = PolicyObjective(
        policies,
        first_exit,
        num_layers=int(train.store.layers[-1]),
        gradient=args.policy_gradient,
        samples=args.policy_samples,
        exploration=args.policy_exploration,
        entropy_bonus=args.policy_entropy_bonus,
    )
    trainer = PolicyPhaseTrainer(
        model=objective,
        args=policy_arguments(args, os.fspath(directory), bool(evaluation)),
        data_collator=as_fetched,
        train_dataset=train,
        evaluation=evaluation,
        exit_threshold=exit_threshold,
        alpha=alpha,
        metrics=metrics,
        processing_class=processing_class,
        optimizer_cls_and_kwargs=at_rate(optimizer_cls_and_kwargs, args.policy_learning_rate),
    )
    if callbacks is not None:
        trainer.callback_handler.callbacks = list(callbacks)
    output = trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return output, trainer.state.log_history
