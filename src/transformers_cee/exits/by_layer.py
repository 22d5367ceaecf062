# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Modules that belong to exits and are named by the exits' layers, so that weights are found by layer whatever exits a
model has that loads them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import nn


_NAME = re.compile(r"(?:^|\.)layer_(\d+)(?:\.|$)")


def layer_name(layer: int) -> str:
    """Name of what belongs to the exit after a layer (1-based), as it stands in a `state_dict`."""
    return f"layer_{layer}"


def each_size(size: int | Sequence[int], layers: Sequence[int]) -> list[int]:
    """Size of the state of each exit: one number stands for all of them.

    Args:
        layers (sequence of `int`): layers (1-based) of the exits.
    """
    return [size] * len(layers) if isinstance(size, int) else list(size)


def layers_named(names: Iterable[str]) -> list[int]:
    """Layers (1-based, ascending) whose exits names of a `state_dict` belong to."""
    return sorted({int(found[1]) for name in names if (found := _NAME.search(name))})


class LayerModules(nn.Module):
    """One module per exit. Exits are counted from 0 in code, as in a list, and named by their layers in weights.

    Args:
        layers (sequence of `int`): layers (1-based) of the exits, ascending.
        make (`Callable`): makes the module of one exit, from its size where there are `sizes`.
        sizes (sequence of `int`, *optional*): of each exit's state.
    """

    def __init__(
        self, layers: Sequence[int], make: Callable[..., nn.Module], sizes: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        for number, layer in enumerate(layers):
            self.add_module(layer_name(layer), make() if sizes is None else make(sizes[number]))

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._modules.values())  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> nn.Module:
        return list(self._modules.values())[index]  # type: ignore[return-value]

    def __setitem__(self, index: int, module: nn.Module) -> None:
        self._modules[list(self._modules)[index]] = module
