# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""One way to name what can be added from outside: exit criteria, exit heads, objectives, rewards, token losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, TypeVar

from transformers_cee.exits.fields import shown


Entry = TypeVar("Entry")
Given = TypeVar("Given", bound=Callable[..., Any])


class Registry(dict[str, Entry]):
    """Classes or functions of one kind by their names: a dictionary to read, and `register` to add to it.

    A class is named by its attribute `name`, a function by the name it is defined with.

    Args:
        argument (`str`): field or argument that takes a name of the registry.
        decorator (`str`): public name of `register`, for messages.
        base (`type`, *optional*): what entries derive from; by default any class or function will do.
    """

    def __init__(self, argument: str, decorator: str, base: type | None = None) -> None:
        super().__init__()
        self.argument, self.decorator, self.base = argument, decorator, base

    def register(self, entry: Given) -> Given:
        """Decorator that adds a class or function under its name. The same definition, run again, replaces itself.

        Raises:
            TypeError: something of another kind, or a class that lacks a method.
            ValueError: no name, or that of another entry.
        """
        is_class = isinstance(entry, type)
        fits = callable(entry) if self.base is None else isinstance(entry, type) and issubclass(entry, self.base)
        if not fits:
            wanted = "a class or function" if self.base is None else f"a class derived from {self.base.__name__}"
            raise TypeError(f"`{self.decorator}` takes {wanted}; got {shown(entry)}.")
        name = getattr(entry, "name" if is_class else "__name__", None)
        if not isinstance(name, str) or not name or name == "<lambda>":
            needed = "a text, attribute of the class" if is_class else "a function with one of its own"
            raise ValueError(f"`{self.decorator}`: the name of {_place(entry)} is {shown(name)}; needed is {needed}.")
        other: Any = self.get(name)
        if other is not None and _place(other) != _place(entry):
            raise ValueError(
                f"`{self.decorator}`: `{self.argument}`={name!r} is {_place(other)} already; give {_place(entry)} "
                f"another name than {', '.join(sorted(self))}."
            )
        lacks = sorted(getattr(entry, "__abstractmethods__", ()))
        if lacks:
            raise TypeError(f"`{self.decorator}`: {_place(entry)} must define {', '.join(lacks)}.")
        self[name] = entry  # type: ignore[assignment]
        return entry

    def find(self, name: Any, argument: str | None = None) -> Entry:
        """The entry of a name.

        Args:
            name (`str`): what the caller gave.
            argument (`str`, *optional*): which argument took it, for the message; `self.argument` by default.

        Raises:
            ValueError: no name of the registry.
        """
        if not isinstance(name, str) or name not in self:
            raise ValueError(
                f"`{argument or self.argument}`={shown(name)} is unknown; accepted are {', '.join(sorted(self))}, and "
                f"what `{self.decorator}` adds."
            )
        return self[name]

    def make(self, name: str, options: Any = None) -> Any:
        """What a named class makes of its options, the fields of a dataclass; a function is returned as it is.

        Args:
            name (`str`): a name of the registry.
            options (`Mapping[str, float]`, *optional*): by name; what is not named keeps its default.

        Raises:
            ValueError: an unknown name or option, one that is missing, no number or out of its range.
        """
        entry: Any = self.find(name)
        argument = f"{self.argument}_options"
        if options is not None and not isinstance(options, Mapping):
            raise ValueError(f"`{argument}`={shown(options)} must be a dictionary, or JSON of one.")
        known = [one.name for one in fields(entry) if one.init] if is_dataclass(entry) else []
        needed = [one.name for one in fields(entry) if _is_needed(one)] if is_dataclass(entry) else []
        missing = [one for one in needed if one not in (options or {})]
        if missing:
            raise ValueError(f"`{argument}`: {name!r} needs {', '.join(missing)}; got {shown(options)}.")
        for option, value in (options or {}).items():
            if option not in known:
                accepted = ", ".join(known) or "none"
                raise ValueError(f"`{argument}`: {option!r} is unknown to {name!r}; accepted are {accepted}.")
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"`{argument}`: {option!r} must be a number; got {value!r}.")
        if not isinstance(entry, type):
            return entry
        try:
            return entry(**(options or {}))
        except ValueError as error:
            raise ValueError(f"`{argument}` of {name!r}: {error}") from error


def _is_needed(option: Field) -> bool:
    """Has a field of a dataclass no default?"""
    return option.init and option.default is MISSING and option.default_factory is MISSING


def _place(entry: Any) -> str:
    """Where a class or function is defined."""
    return f"{getattr(entry, '__module__', '?')}.{getattr(entry, '__qualname__', type(entry).__name__)}"


__all__ = ["Registry"]
