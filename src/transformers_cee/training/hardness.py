# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Hardness of training rows: the memorized layer, and the fingerprint that says when it is out of date."""

import hashlib
import os
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils import logging

from transformers_cee.files import replacing
from transformers_cee.training.parameters import OTHERS_OWN, POLICIES


logger = logging.get_logger(__name__)

HARDNESS_FILE = "hardness.safetensors"


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
        if not any(part in name for part in (POLICIES, *OTHERS_OWN)):
            digest.update(name.encode())
            _update(digest, value)
    for index in range(len(dataset)):
        row = dataset[index]
        for name in sorted(row):
            digest.update(name.encode())
            _update(digest, row[name])
    return digest.hexdigest()


def read_hardness(folder: str, about: dict[str, str]) -> Tensor | None:
    """Memorized layers that `write_hardness` kept in a folder, or None: there are none, they are about something else,
    or the file is damaged, which a warning says; they can be computed again."""
    path = os.path.join(folder, HARDNESS_FILE)
    if not os.path.isfile(path):
        return None
    try:
        with safe_open(path, framework="pt") as file:
            layers = file.get_tensor("memorized_layers") if (file.metadata() or {}) == about else None
    except (OSError, SafetensorError) as error:
        logger.warning(f"{path} cannot be read ({error}): hardness is computed again.")
        return None
    return layers


def write_hardness(folder: str, layers: Tensor, about: dict[str, str]) -> None:
    """Keeps memorized layers (entries,) in a folder, with what they are about."""
    with replacing(os.path.join(folder, HARDNESS_FILE)) as beside:
        save_file({"memorized_layers": layers}, beside, metadata=about)


def _update(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    else:
        # Lists, since `repr` shortens and rounds arrays.
        digest.update(repr(value.tolist() if isinstance(value, np.ndarray) else value).encode())
