# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Exits learn from stored states: heads what the last exit says, policies where it would say something else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from transformers_cee.evaluation.exit_budget import fit_exit_budgets
from transformers_cee.exits.policy import all_features
from transformers_cee.fitting.heads import draw_folds, fit_head, put_head
from transformers_cee.stores.store import ExitStore
from transformers_cee.training.hardness import memorized_layers
from transformers_cee.training.policy_phase import PolicyObjective, StoredRewards


# Of Adam: policies see a few numbers per exit, and learn in seconds.
POLICY_STEPS, POLICY_ROWS, POLICY_RATE = 500, 512, 5e-3


def learn_heads(model: Any, store: ExitStore, learning: Tensor, seed: int, disable_tqdm: bool) -> ExitStore:
    """Fits the internal exits' heads on some rows of a store.

    Args:
        model ([`EarlyExitSequenceClassifier`]): its heads are set.
        store (`ExitStore`): exits of all rows.
        learning (`LongTensor`): numbers of the rows to learn from.

    Returns:
        `ExitStore`: with the heads' logits; of a row that heads have learned from, those of heads that have not.
    """
    logits = store.logits.clone()  # type: ignore[union-attr]
    targets = logits[:, -1]
    folds = draw_folds(len(learning), seed)
    exits = range(len(store.layers) - 1)
    for index in tqdm(exits, desc="Exit heads", disable=disable_tqdm):
        # Of one exit at a time: states may be larger than the memory.
        states = torch.as_tensor(store.states[:, index])
        fitted = fit_head(states[learning], targets[learning], folds, store.problem_type)
        logits[:, index] = fitted(states)
        logits[learning, index] = fitted.held_out
        put_head(model.exit_heads.heads[index], fitted)
    return replace(store, logits=logits, features=all_features(logits, store.problem_type))


def learn_policies(model: Any, store: ExitStore, learning: Tensor, seed: int, disable_tqdm: bool) -> None:
    """Trains the conditioned policies of a model on some rows of a store, with the disagreement as what an early
    answer loses, and fits budgets to them.

    Args:
        model: with conditioned policies, which learn; its config gets the budgets.
        store (`ExitStore`): exits of texts, or of their tokens.
        learning (`LongTensor`): numbers of the entries to learn from.
    """
    config = model.config
    if not model.exit_policies.sees_states:
        # States are large.
        store = replace(store, states=torch.empty(len(store), len(store.layers), 0))
    seen = store.select(learning)
    rewards = StoredRewards.of(
        seen,
        memorized_layers(~seen.disagrees, seen.layers),
        config,
        loss="disagreement",
        is_conditioned=True,
    )
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        model.exit_policies.reset_parameters()
    objective = PolicyObjective(
        model.exit_policies, model.first_exit(), num_layers=config.num_hidden_layers, gradient="optimal_stopping"
    ).train()
    optimizer = torch.optim.Adam(objective.parameters(), lr=POLICY_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=POLICY_STEPS)
    drawn = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices), torch.enable_grad():
        torch.manual_seed(seed)
        for _ in tqdm(range(POLICY_STEPS), desc="Exit policies", disable=disable_tqdm):
            some = torch.randint(len(rewards), (POLICY_ROWS,), generator=drawn)
            batch = {name: value.to(model.device) for name, value in rewards.__getitems__(some).items()}
            optimizer.zero_grad()
            objective(**batch)["loss"].backward()
            optimizer.step()
            schedule.step()
    model.eval()
    config.exit_budgets = fit_exit_budgets(model.exit_policies, seen, min_exit_layer=config.min_exit_layer)
