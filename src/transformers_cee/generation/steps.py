# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""One decode step, ready to be taken again and again from the same text."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from transformers_cee.exits.cache_name import CACHE_NAME
from transformers_cee.generation.cache import EarlyExitCache


@torch.no_grad()
def decode_step(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], dict[str, Any]]:
    """Runs a batch of text at full depth, and gives the inputs of the step that adds one token to each row.

    Args:
        model (`nn.Module`): an early-exit language model.
        batch (`dict`): its inputs without labels.

    Returns:
        A function that gives what `forward` takes, with a cache of its own at every call: a step writes into it.
    """
    output = model(**batch, use_cache=True)
    cache = EarlyExitCache.from_cache(output[CACHE_NAME], model.config.num_hidden_layers, model.layer_types)
    inputs = {"input_ids": output.logits[:, -1:].argmax(-1)}
    if "attention_mask" in batch:
        inputs["attention_mask"] = nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
    return lambda: {**inputs, CACHE_NAME: copy.deepcopy(cache)}


__all__ = ["decode_step"]
