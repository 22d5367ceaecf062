# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Fits the estimators that some exit criteria need, on stored exits: the model itself does not run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transformers_cee.exits.estimators import ESTIMATORS, check_estimators
from transformers_cee.exits.losses import exit_losses
from transformers_cee.exits.policy import all_features, check_has_classes, predicted_classes
from transformers_cee.stores.store import ExitStore
from transformers_cee.training.parameters import bare_model


TOKEN_HASH = "token_hash"
# Entries whose loss is computed at once when it is only reported.
REPORTED_ENTRIES = 4096


def fit_estimators(
    model: nn.Module,
    store: ExitStore,
    names: Sequence[str],
    *,
    seed: int = 0,
    steps: int = 500,
    batch_size: int = 256,
    learning_rate: float = 1e-2,
) -> dict[str, float]:
    """Fits estimators and gives them to the model: `model.exit_estimators` holds them, `config.exit_estimators` names
    them, `save_pretrained` keeps them. Earlier ones of the same names are replaced. An adapter of PEFT does not
    save them: merge it first (`merge_and_unload`).

    Fitted on the internal exits of entries that can leave early, by Adam with a rate that falls to 0; temperatures by
    LBFGS on all entries at once.

    Args:
        model: an early-exit model; nothing else of it changes.
        store (`ExitStore`): stored exits, held out from what the heads were trained on.
        names (sequence of `str`): criteria to fit for, all of `ESTIMATORS` but `"token_hash"` (see `fit_token_hash`).
        seed (`int`): of initial weights and batches.
        steps, batch_size, learning_rate: of Adam.

    Returns:
        `dict[str, float]`: final loss on the store by name: mean squared error, negative log-likelihood in nats, or
        class-balanced cross-entropy in nats.

    Raises:
        ValueError: unknown names, a store of another model, one without entries that can leave, regression where
            classes are needed, unknown labels where these are, or stored tokens that lack what an estimator looks at.
            Nothing has been fitted by then.
    """
    model = bare_model(model)
    _check_names(names)
    _check_store(model, store)
    for name in names:
        _check_fits(name, store)
    if steps < 1 or batch_size < 1 or learning_rate <= 0:
        raise ValueError(
            f"`steps`={steps} and `batch_size`={batch_size} must be at least 1, and `learning_rate`={learning_rate} "
            "positive."
        )
    seen = _Seen(store, model.device)
    fitted, losses = {}, {}
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        for name in names:
            torch.manual_seed(seed)
            estimator = ESTIMATORS[name](model.config).to(model.device)
            if name == "calibrated_probability":
                losses[name] = _fit_temperatures(estimator, store, seen.entries, model.device)
            else:
                loss_of: Callable[[Tensor], Tensor] = _LOSSES[name](estimator, seen)
                losses[name] = _fit(estimator, loss_of, len(seen.entries), steps, batch_size, learning_rate)
            fitted[name] = estimator
    for name, estimator in fitted.items():
        _give(model, name, estimator)
    return losses


def fit_token_hash(
    model: nn.Module, tokens: Iterable[Tensor | Sequence[int]], special_tokens: Iterable[int] = ()
) -> None:
    """Fits HashEE's table from token to exit (Sun et al. 2022) and gives it to the model, as `fit_estimators` does.

    Token types that occur are sorted by frequency and cut into as many groups of equal size as there are exits; the
    most frequent leave at the first exit. Equally frequent tokens are taken by rising id. Tokens that do not occur and
    special tokens leave at the last exit.

    Args:
        model: an early-exit model; nothing else of it changes.
        tokens (iterable of `LongTensor` or lists of `int`): token ids of a corpus, padding left out.
        special_tokens (iterable of `int`): such as a tokenizer's `all_special_ids`.

    Raises:
        ValueError: no token in the corpus beside special ones, or one outside of the vocabulary.
    """
    model = bare_model(model)
    size, num_exits = model.config.vocab_size, len(model.layer_numbers)
    counts = torch.zeros(size, dtype=torch.long)
    for some in tokens:
        ids = torch.as_tensor(some).flatten().cpu()
        if len(ids) == 0:
            continue
        _check_ids("tokens", ids, size)
        counts += torch.bincount(ids, minlength=size)
    special = torch.as_tensor([*special_tokens] or torch.empty(0, dtype=torch.long))
    _check_ids("special_tokens", special, size)
    counts[special] = 0
    order = counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())]
    if len(order) == 0:
        raise ValueError("`tokens` has no token beside `special_tokens`.")
    estimator: Any = ESTIMATORS[TOKEN_HASH](model.config)
    estimator.exits[order] = torch.arange(len(order)) * num_exits // len(order)
    _give(model, TOKEN_HASH, estimator.to(model.device))


def _check_ids(argument: str, ids: Tensor, vocab_size: int) -> None:
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"`{argument}` of dtype {ids.dtype} must be whole numbers, ids in 0..{vocab_size - 1}.")
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if len(outside):
        raise ValueError(f"`{argument}` holds {int(outside[0])}; accepted are ids in 0..{vocab_size - 1}.")


def _give(model: nn.Module, name: str, estimator: nn.Module) -> None:
    """Puts a fitted estimator where the model and its config keep it."""
    model.exit_estimators[name] = estimator.to(model.dtype).requires_grad_(False).eval()
    model.config.exit_estimators = sorted({*model.config.exit_estimators, name})
    model.estimator_changed(name)


def _check_names(names: Sequence[str]) -> None:
    check_estimators(names, "names")
    if TOKEN_HASH in names:
        raise ValueError(f"`names`={list(names)}: {TOKEN_HASH!r} is fitted on token ids, by `fit_token_hash`.")


def _check_store(model: nn.Module, store: ExitStore) -> None:
    store.check_model(model)
    if len(model.layer_numbers) < 2:
        raise ValueError("`model` has no exit before its last layer: there is nothing to fit.")
    if len(store.deciding()) == 0:
        raise ValueError("`store` has no entry that can leave before the last exit.")


def _check_fits(name: str, store: ExitStore) -> None:
    """Raises `ValueError` when a store does not hold what an estimator is fitted on."""
    if name in ("consistency", "calibrated_probability"):
        check_has_classes(store.problem_type, f"`names` has {name!r}", "'learning_to_exit' and 'state_classifier'")
    if name in ("learning_to_exit", "calibrated_probability") and not store.has_labels:
        raise ValueError(f"`names` has {name!r}, which is fitted on labels; those of the store are not known.")
    if store.logits is not None:
        return
    if name == "calibrated_probability":
        raise ValueError(
            "`names` has 'calibrated_probability', which needs the logits of all heads; a store of tokens keeps none."
        )
    if name == "consistency" and store.features is None:
        raise ValueError(
            "`names` has 'consistency', which looks at confidence; this store of tokens has no `features`. They are "
            "collected from models whose `policy_inputs` is 'confidence' or 'both'."
        )


@dataclass
class _Seen:
    """What estimators see of the entries that can leave early, a batch at a time.

    Args:
        store (`ExitStore`): the store.
        device (`torch.device`): where estimators are fitted.
    """

    store: ExitStore
    device: Any

    def __post_init__(self) -> None:
        self.entries = self.store.deciding()

    def states(self, batch: Tensor) -> Tensor:
        """States (batch, exits − 1, hidden)."""
        return self.store.states[self.entries[batch]][:, :-1].to(self.device)

    def features(self, batch: Tensor) -> Tensor:
        """Confidence features (batch, exits − 1, 5)."""
        entries = self.entries[batch]
        if self.store.logits is None:
            assert self.store.features is not None
            return self.store.features[entries].to(self.device)
        return all_features(self.store.logits[entries].to(self.device), self.store.problem_type)

    def predictions(self, batch: Tensor) -> Tensor:
        """Predictions (batch, exits, 1 or labels) of all exits."""
        entries = self.entries[batch]
        if self.store.logits is None:
            assert self.store.predictions is not None
            return self.store.predictions[entries].unsqueeze(-1).to(self.device)
        return predicted_classes(self.store.logits[entries].to(self.device), self.store.problem_type)

    def consistent(self) -> Tensor:
        """Does each internal exit predict what the last one does? (entries, exits − 1), as numbers."""
        return (~self.store.disagrees[self.entries, :-1]).float().to(self.device)

    def expected_errors(self) -> Tensor:
        """BERxiT's targets (entries, exits − 1): 1 where an exit is wrong; in regression |tanh(z − y)|, the mean over
        outputs."""
        store, entries = self.store, self.entries
        if store.problem_type != "regression":
            targets = (store.errors[entries] > 0).float()
        else:
            assert store.logits is not None
            logits = store.logits[entries]
            labels = store.labels[entries].reshape(len(entries), 1, -1).to(logits.dtype)
            targets = (logits - labels).tanh().abs().mean(-1)
        return targets[:, :-1].to(self.device)


def _error_loss(estimator: nn.Module, seen: _Seen) -> Callable[[Tensor], Tensor]:
    targets = seen.expected_errors()
    return lambda batch: F.mse_loss(estimator(seen.states(batch)).sigmoid(), targets[batch])


def _consistency_loss(estimator: nn.Module, seen: _Seen) -> Callable[[Tensor], Tensor]:
    def logits(batch: Tensor) -> Tensor:
        states, features, predictions = seen.states(batch), seen.features(batch), seen.predictions(batch)
        exits = range(states.shape[1])
        return torch.stack([estimator(states[:, i], features[:, i], predictions[:, i], i) for i in exits], dim=1)

    return _balanced(logits, seen)


def _state_loss(estimator: nn.Module, seen: _Seen) -> Callable[[Tensor], Tensor]:
    def logits(batch: Tensor) -> Tensor:
        states = seen.states(batch)
        return torch.stack([estimator(states[:, i], i) for i in range(states.shape[1])], dim=1)

    return _balanced(logits, seen)


def _balanced(logits: Callable[[Tensor], Tensor], seen: _Seen) -> Callable[[Tensor], Tensor]:
    """Cross-entropy with "consistent", where at each exit both answers weigh the same in all, averaged over exits."""
    targets = seen.consistent()
    share = targets.mean(0)
    # An answer that never occurs at an exit has no one to weigh.
    weights = torch.where(targets > 0, 0.5 / share, 0.5 / (1 - share))
    return lambda batch: F.binary_cross_entropy_with_logits(logits(batch), targets[batch], weight=weights[batch])


_LOSSES: dict[str, Callable[[nn.Module, _Seen], Callable[[Tensor], Tensor]]] = {
    "learning_to_exit": _error_loss,
    "consistency": _consistency_loss,
    "state_classifier": _state_loss,
}


def _fit(
    estimator: nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    entries: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
) -> float:
    """Adam on random batches of entries; returns the mean loss over all entries."""
    optimizer = torch.optim.Adam(estimator.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    batches: list[Tensor] = []
    for _ in range(steps):
        batches = batches or list(torch.randperm(entries).split(batch_size))
        optimizer.zero_grad()
        loss_of(batches.pop()).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        parts = torch.arange(entries).split(REPORTED_ENTRIES)
        return sum(float(loss_of(part)) * len(part) for part in parts) / entries


def _fit_temperatures(estimator: Any, store: ExitStore, entries: Tensor, device: Any) -> float:
    """Temperatures of all exits by LBFGS; returns the mean negative log-likelihood."""
    assert store.logits is not None
    logits, labels = store.logits[entries][:, :-1].to(device), store.labels[entries].to(device)
    optimizer = torch.optim.LBFGS(estimator.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        scaled = logits / estimator.temperatures.unsqueeze(-1)
        return exit_losses(scaled, labels, store.problem_type).mean(0).sum()

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    with torch.no_grad():
        return float(loss()) / logits.shape[1]


__all__ = ["fit_estimators", "fit_token_hash"]
