# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Hardness of training rows: the memorized layer, and the fingerprint that says when it is out of date."""

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from transformers_cee.training.parameters import ESTIMATORS, POLICIES


def memorized_layers(correct: Tensor, layers: Tensor) -> Tensor:
    """Memorized layer M of each row: the smallest exit layer such that it and all deeper exits predict the label; the
    last layer if the last exit is wrong (Zeng et al. 2024).

    Args:
        correct (`BoolTensor` of shape `(rows, exits)`): does the exit predict the row's label?
        layers (`LongTensor` of shape `(exits,)`): 1-based layer of each exit, ascending.

    Returns:
        `LongTensor` of shape `(rows,)`.
    """
    # Length of the run of correct exits that ends at the last one.
    run = correct.flip(1).long().cumprod(1).sum(1)
    first = (correct.shape[1] - run).clamp_max(correct.shape[1] - 1)
    return layers.to(first.device)[first]


def fingerprint(model: nn.Module, dataset: Any) -> str:
    """Hash of a data set's rows and of a model's weights without policies and estimators, which hardness does not
    depend on."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        if POLICIES not in name and ESTIMATORS not in name:
            digest.update(name.encode())
            _update(digest, value)
    for index in range(len(dataset)):
        row = dataset[index]
        for name in sorted(row):
            digest.update(name.encode())
            _update(digest, row[name])
    return digest.hexdigest()


def _update(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    else:
        # Lists, since `repr` shortens and rounds arrays.
        digest.update(repr(value.tolist() if isinstance(value, np.ndarray) else value).encode())
