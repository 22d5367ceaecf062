# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What a forward pass really did: rows and columns that each layer saw, and synchronisations with the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@contextmanager
def layer_inputs(model: Any) -> Iterator[list[tuple[int, int, int]]]:
    """Collects (layer, rows, columns) of every call of an encoder layer."""
    seen: list[tuple[int, int, int]] = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, inputs, number=number: seen.append((number, inputs[0].shape[0], inputs[0].shape[1]))
        )
        for number, layer in enumerate(model.bert.encoder.layer, start=1)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


class HostSynchronisations(TorchFunctionMode):
    """Counts what would make an accelerator wait, on CPU: tensors count as being on the device until `.cpu()` is
    called on them; what is derived from its result is on the host until `.to(...)`."""

    WAITS = frozenset({"item", "tolist", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__", "cpu"})
    WAITS_TOO = frozenset({"masked_select", "unique", "equal", "allclose", "where1", "repeat_interleave"})

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self._host: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.calls)

    def _on_host(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and id(value) in self._host

    def _mark(self, value: torch.Tensor) -> torch.Tensor:
        self._host[id(value)] = value  # the reference keeps the id from being given to another tensor
        return value

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        flat = [*args, *(kwargs or {}).values()]
        flat += [inner for value in flat if isinstance(value, tuple | list) for inner in value]
        tensors = [value for value in flat if isinstance(value, torch.Tensor)]
        device = [value for value in tensors if not self._on_host(value)]
        if name in self.WAITS | self.WAITS_TOO and device:
            self.calls.append(name)
        if name == "where" and len(tensors) == 1 and device:
            self.calls.append(name)
        if name in ("__getitem__", "__setitem__") and any(value.dtype == torch.bool for value in device[1:]):
            self.calls.append(f"{name} with a mask")
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, torch.Tensor):
            return result
        if name == "cpu":
            return self._mark(result.clone())
        if name == "to":
            return result.clone()
        return self._mark(result) if tensors and not device else result
