# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Phases that learn from stored exits, and leave the model but for its policies as it is: hardness and policy."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from transformers_cee.exits.deciding import ExitDecision
from transformers_cee.exits.policy import ExitPolicies
from transformers_cee.stores.store import ExitStore
from transformers_cee.training.hardness import fingerprint, memorized_layers, read_hardness, write_hardness
from transformers_cee.training.model_step import operating_point
from transformers_cee.training.parameters import active_module
from transformers_cee.training.policy_phase import StoredRewards, run_policy_phase, stored_metrics
from transformers_cee.training.run_output import StepResult


def hardness_step(run: Any, mark: str | None = None) -> StepResult:
    """Memorized layers of a run's training rows, kept in `output_dir/hardness.safetensors`.

    Args:
        run ([`ConsistentEETrainer`]): the trainer of all phases.
        mark (`str`, *optional*): fingerprint of the training rows, where it is known.
    """
    mark = fingerprint(run._exit_model, run.train_dataset) if mark is None else mark
    about = {
        "fingerprint": mark,
        "tolerance": str(run.args.hardness_tolerance),
        # Weights do not tell where exits are: those of a shared head are the same anywhere.
        "layers": str(run._exit_model.layer_numbers),
    }
    if run.args.policy_max_tokens is not None:
        about["tokens"] = f"{run.args.policy_max_tokens} of {run.args.policy_holdout}, seed {run._data_seed}"
    stored = run._stores.get("train")
    kept = read_hardness(run.args.output_dir, about)
    # The collator, which the mark does not know of, may count other tokens now.
    if kept is not None and (stored is None or stored[0] != mark or len(stored[1]) == len(kept)):
        return StepResult(kept, [])
    store = run._store("train", run.train_dataset, mark)
    layers = memorized_layers(store.correct, store.layers)
    if run.args.should_save:
        write_hardness(run.args.output_dir, layers, about)
    history, logged = run.state.log_history, len(run.state.log_history)
    run.log({"memorized_layer": float(layers[store.may_exit].float().mean())})
    return StepResult(layers, history[logged:])


def policy_step(
    run: Any,
    folder: str,
    checkpoint: str | bool | None,
    policies: ExitPolicies | None = None,
    alpha: float | None = None,
    mark: str | None = None,
) -> StepResult:
    """Trains the policies of a run's model, or others at a reward weight of their own.

    Args:
        run ([`ConsistentEETrainer`]): the trainer of all phases.
        folder (`str`): where checkpoints lie.
        checkpoint (`str` or `bool`, *optional*): one to go on from; `True` is the newest.
        policies (`ExitPolicies`, *optional*): the others.
        alpha (`float`, *optional*): their price of a layer.
        mark (`str`, *optional*): fingerprint of the training rows, where it is known.
    """
    model = run._exit_model
    mark = fingerprint(model, run.train_dataset) if mark is None else mark
    store = run._store("train", run.train_dataset, mark)
    used = active_module(model.exit_policies) if policies is None else policies

    def rewards(store: ExitStore, memorized: Tensor, rows: Tensor | None = None) -> StoredRewards:
        return StoredRewards.of(
            store,
            memorized,
            model.config,
            reward=run.args.reward,
            loss=run.args.reward_loss,
            alpha=alpha,
            is_conditioned=used.is_conditioned,
            entries=store.deciding(rows),
        )

    hardness = hardness_step(run, mark)
    train = rewards(store, hardness.output, run._split()[1])
    evaluation = {}
    if run.args.eval_strategy != "no":
        for name, stored in run._evaluation_stores().items():
            evaluation[name] = rewards(stored, memorized_layers(stored.correct, stored.layers))
    own = operating_point(model)
    judged_at = own if own.criterion == "policy" else ExitDecision("policy", 0.5)
    output, history = run_policy_phase(
        used,
        run.args,
        folder,
        train,
        evaluation,
        exit_threshold=judged_at.threshold,
        alpha=judged_at.alpha,
        first_exit=model.first_exit(),
        metrics=stored_metrics(run.compute_metrics, run.preprocess_logits_for_metrics),
        callbacks=run.callback_handler.callbacks,
        processing_class=run.processing_class,
        optimizer_cls_and_kwargs=run.optimizer_cls_and_kwargs,
        resume_from_checkpoint=checkpoint,
    )
    run.state.log_history += history
    return StepResult(output, [*hardness.log_history, *history])
