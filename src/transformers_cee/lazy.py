# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Names of a package whose modules are imported when a name is first asked for (PEP 562)."""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(package: str, modules: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package.

    Args:
        package (`str`): its `__name__`.
        modules (`Mapping[str, str]`): the module, relative to the package, of each public name.
    """

    def getattr_(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{modules[name]}"), name)

    def dir_() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules})

    return getattr_, dir_


def named(full_name: str) -> Any:
    """What a full name stands for, of something that stands above whoever asks for it."""
    module, _, name = full_name.rpartition(".")
    return getattr(importlib.import_module(module), name)


__all__ = ["lazy_names", "named"]
