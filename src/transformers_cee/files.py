# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Files that a kill or a full disk must not destroy: written beside the old one, then put in its place in one move."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


# What a saved folder hands out the package's classes with, see `modeling.remote_code`.
REMOTE_CODE_FILE = "modeling_cee.py"


PART = ".part"


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a path beside `path` to write to. What was written takes the place of `path` at the end; after an error,
    `path` is what it was.

    Args:
        path (`str` or `os.PathLike`): the file to replace; its folder is made when missing.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays the last one: some writers choose the format by it.
    beside = target.with_name(f"{target.stem}{PART}-{os.getpid()}{target.suffix}")
    try:
        yield beside
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replaces the content of a text file (UTF-8)."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Replaces the content of a JSON file.

    Raises:
        ValueError: the value holds NaN or an infinity, which JSON has no word for.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str], way_out: str) -> Any:
    """The content of a JSON file.

    Args:
        way_out (`str`): what to do about a file that cannot be read; a sentence for the error.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, cut off, no JSON, or nested too deep.
    """
    try:
        return json.loads(Path(path).read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)} cannot be read as JSON ({error}). {way_out}") from error
