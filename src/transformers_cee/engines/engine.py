# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What an engine is: it writes a classifier's graphs into a folder, and runs blocks of them from there."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from transformers_cee.engines.graphs import Cut
from transformers_cee.exits.registry import Registry


# Runs a block: tensors by name in, tensors by name out.
Run = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class Written:
    """What an engine is to write.

    Args:
        model: the classifier, in evaluation mode, on the CPU and without gradients.
        precision (`str`): one of the engine's.
        criterion (`str`, *optional*): the criterion whose score is part of the graphs.
        samples (sequence of mappings): batches of tokens, by the names that the first layer takes, for static scales.
    """

    model: Any
    precision: str
    criterion: str | None
    samples: Sequence[Mapping[str, Tensor]]


class Engine(ABC):
    """One engine. Subclasses give names, `write` and `block`, and are registered by `register_engine`.

    Args:
        folder (`Path`): what `write` has filled.
        config: of the model.
        precision (`str`): that it was written in.
        threads (`int`): threads of one call.
        device (`str`): where it runs.

    Raises:
        ImportError: a package that it needs is not installed.
        ValueError: a device that the engine does not have, or that is not there.
    """

    name: ClassVar[str]
    # What it imports, and the extra of this package that installs it.
    modules: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = ""
    precisions: ClassVar[tuple[str, ...]]
    # Precisions that need texts to take scales from.
    calibrated: ClassVar[tuple[str, ...]] = ("int8",)
    # Kinds of devices that it runs on, and further arguments of its own that `from_pretrained` hands on.
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    options: ClassVar[tuple[str, ...]] = ()

    def __init__(self, folder: Path, config: Any, precision: str, threads: int, device: str = "cpu") -> None:
        self.require()
        self.folder, self.config, self.precision = folder, config, precision
        self.threads, self.device = threads, self.checked_device(device)

    @classmethod
    def require(cls) -> None:
        """Raises `ImportError` unless all that the engine needs is installed."""
        for module in cls.modules:
            try:
                importlib.import_module(module)
            except ImportError as error:
                raise ImportError(
                    f"`engine`={cls.name!r} needs the package {module!r}, which is not installed: "
                    f"pip install 'transformers-cee[{cls.extra}]'."
                ) from error

    @classmethod
    def check_precision(cls, precision: str) -> None:
        """Raises `ValueError` for a precision that the engine does not have."""
        if precision not in cls.precisions:
            raise ValueError(
                f"`precision`={precision!r} is none of the engine {cls.name!r}; accepted are "
                f"{', '.join(map(repr, cls.precisions))}."
            )

    @classmethod
    def checked_device(cls, device: str) -> str:
        """A device by its full name; raises `ValueError` for one that the engine does not have."""
        if device.split(":")[0] not in cls.devices:
            raise ValueError(
                f"`device`={device!r} is none of the engine {cls.name!r}; accepted are "
                f"{', '.join(map(repr, cls.devices))}."
            )
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"`device`={device!r}: torch finds no GPU here; accepted is 'cpu'.")
        return str(torch.empty(0, device=device).device)

    @classmethod
    @abstractmethod
    def write(cls, written: Written, folder: Path) -> None:
        """Fills an empty folder with all that `block` needs; no pickle."""

    @abstractmethod
    def block(self, cut: Cut) -> Run:
        """A block, ready to run. It takes what `block_inputs` names and gives what `cut.gives` names; tensors that it
        gives are its caller's to keep."""


ENGINES: Registry[type[Engine]] = Registry("engine", "register_engine", Engine)
register_engine = ENGINES.register
