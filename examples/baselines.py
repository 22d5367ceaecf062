# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Exit criteria that have to be fitted before they can be compared, and what they look at besides logits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from transformers_cee.exits.criteria import CRITERIA, CriterionSettings
from transformers_cee.exits.deciding import criterion_settings
from transformers_cee.exits.estimators import ESTIMATORS
from transformers_cee.stores.store import ExitStore
from transformers_cee.training.estimators import TOKEN_HASH, fit_estimators, fit_token_hash


# It knows the labels: a bound, which every comparison has a line for, and no criterion that could be run.
ORACLE = "oracle"
# Of a decoder: known text and its labels stand in no batch while it generates, and its stores keep no logits.
NOT_GENERATED = (ORACLE, TOKEN_HASH)
NOT_FITTED_ON_TOKENS = ("calibrated_probability", "consistency")


def check_criteria(argument: str, names: Sequence[str], left_out: Sequence[str]) -> None:
    """Raises `ValueError` for a name that is no exit criterion, or one that cannot be compared.

    Args:
        argument: what to call the names.
        names: those that were asked for.
        left_out: criteria that do not fit the script.
    """
    accepted = sorted(set(CRITERIA) - {*left_out})
    unknown = [name for name in names if name not in accepted]
    if unknown:
        raise ValueError(f"`{argument}` must be among {', '.join(accepted)}; got {unknown[0]!r}.")


def fit_criteria(
    model: nn.Module,
    names: Iterable[str],
    dev: ExitStore,
    rows: Sequence[Sequence[int]] = (),
    special_tokens: Iterable[int] = (),
    keep: bool = False,
) -> dict[str, float]:
    """Fits those of the criteria that need it, on dev, and gives their estimators to the model.

    Args:
        model: an early-exit model.
        names: exit criteria; most need no fitting.
        dev: stored exits of rows that the heads were not trained on.
        rows: token ids of the training rows, for `token_hash`.
        special_tokens: ids that `token_hash` lets nobody leave at.
        keep: leave those alone that the model brings along.

    Returns:
        The estimators' losses by name.
    """
    known = set(model.config.exit_estimators) if keep else set()
    wanted = [name for name in dict.fromkeys(names) if name in ESTIMATORS and name not in known]
    if TOKEN_HASH in wanted:
        fit_token_hash(model, rows, special_tokens)
        wanted.remove(TOKEN_HASH)
    return fit_estimators(model, dev, wanted) if wanted else {}


def settings_for(model: nn.Module, rows: Sequence[Sequence[int]]) -> CriterionSettings:
    """What criteria need besides the stored exits of some rows, given as token ids."""
    ids, mask = pad_tokens(rows)
    return criterion_settings(model, input_ids=ids, attention_mask=mask)


def pad_tokens(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """`input_ids` and `attention_mask` (rows, time)."""
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows]).unsqueeze(1)
    return ids, (torch.arange(ids.shape[1]) < lengths).long()


def check_fitted(argument: str, names: Iterable[str], config: Any) -> None:
    """Raises `ValueError` for criteria of a decoder that can be fitted on no stored tokens and that it lacks."""
    missing = [name for name in names if name in NOT_FITTED_ON_TOKENS and name not in config.exit_estimators]
    if missing:
        raise ValueError(
            f"`{argument}` has {missing[0]!r}, whose estimator this checkpoint lacks and which cannot be fitted here: "
            "stored tokens keep no logits. Fit it with `transformers_cee.training.estimators` and save the model, or "
            "leave it out."
        )
