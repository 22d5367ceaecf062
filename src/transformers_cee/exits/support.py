# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What rows cannot leave under: ways to run a model that need to know beforehand which layers run for which rows."""

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


# Implementations of attention that take a mask of any kind.
MASKED = ("eager", "sdpa")
_WAY_OUT = "Switch exits off with `exit_threshold`=1.0 (0.0 for a criterion whose smaller scores leave)"


def check_rows_can_leave(config: Any, layers: Iterable[nn.Module]) -> None:
    """Called where rows may leave, before any layer runs.

    Raises:
        ValueError: the model is being exported, its attention is `flex_attention`, or FSDP has its layers one by one.
    """
    check_no_graph()
    if getattr(config, "_attn_implementation", None) == "flex_attention":
        raise ValueError(
            "`attn_implementation`='flex_attention' makes masks that rows cannot be taken out of; accepted with exits "
            f"on are 'sdpa', 'eager' and flash attention. {_WAY_OUT} to use it."
        )
    kinds = _sharded_kinds()
    if kinds and any(isinstance(layer, kinds) for layer in layers):
        raise ValueError(
            "FSDP shards single layers of this model, and to put one together all processes must run it; "
            f"with exits they would wait for each other for ever. {_WAY_OUT}, or shard the model as one unit."
        )


def check_no_graph() -> None:
    """Called where decisions depend on scores. Raises `ValueError` while the model is exported or traced."""
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        raise ValueError(
            "A model cannot be exported or traced with exits on: what runs depends on the input, and a graph has one "
            f"way for all. {_WAY_OUT}: the graph is that of the whole model."
        )


def _sharded_kinds() -> tuple[type, ...]:
    """Classes of layers that FSDP shards, if anybody has loaded it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    names = ("FSDPModule", "FullyShardedDataParallel")
    return () if fsdp is None else tuple(getattr(fsdp, name) for name in names if hasattr(fsdp, name))
