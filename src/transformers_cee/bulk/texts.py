# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Texts from lists, iterators, data sets and files, one after the other, each with a name for errors."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any


# Number of a row in its source, and what stands there.
Numbered = Iterator[tuple[int, Any]]

# Halves of characters, which no tokenizer takes; the JSON of texts that were cut may spell them.
_HALVES = re.compile("[\ud800-\udfff]")
# Characters of a field of a CSV file, of which Python reads 131,072 by default.
_LONGEST_FIELD = 2**31 - 1


@dataclass
class Texts:
    """Texts of one source.

    Args:
        name (`str`): of the source, in errors.
        unit (`str`): what its rows are, in errors: `"line"` or `"row"`, both counted from 1.
        read (`Callable`): gives what stands in the rows, with their numbers.
        is_lasting (`bool`): can `read` be called again?
    """

    name: str
    unit: str
    read: Callable[[], Numbered]
    is_lasting: bool = True

    def checked(self, takes_blanks: bool = True) -> Iterator[str]:
        """The texts.

        Args:
            takes_blanks (`bool`): may texts be without a word?

        Raises:
            ValueError: a row that holds no text.
        """
        for number, text in self.read():
            if not isinstance(text, str):
                raise ValueError(
                    f"{self.place(number)} holds {text!r} of type {type(text).__name__}; every row must be a text."
                )
            if not text.isascii() and _HALVES.search(text):
                raise ValueError(f"{self.place(number)} holds half of a character (a lone surrogate): {text[:40]!r}.")
            if not takes_blanks and not text.strip():
                raise ValueError(f"{self.place(number)} is empty; every row must have a word.")
            yield text

    def place(self, number: int) -> str:
        """Where a row stands, in words that begin a sentence."""
        return f"{self.unit.capitalize()} {number} of {self.name}"

    def windows(self, size: int, takes_blanks: bool = True) -> Iterator[list[str]]:
        """The texts, `size` at a time."""
        texts = self.checked(takes_blanks)
        while window := list(islice(texts, size)):
            yield window


@dataclass(frozen=True)
class Column:
    """A column or field.

    Args:
        name (`str`): of the column.
        argument (`str`): by which a caller names it, in errors.
    """

    name: str
    argument: str


def find_texts(texts: Any, text_column: str, argument: str = "text_column") -> Texts:
    """The texts that a caller means.

    Args:
        texts (iterable of `str`, data set, `str` or `os.PathLike`): see [`classify`].
        text_column (`str`): column or field that holds them, of data sets, .csv and .jsonl.
        argument (`str`): what the caller calls it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file of another kind, or a data set without the column.
        TypeError: no texts.
    """
    column = Column(text_column, argument)
    if isinstance(texts, (str, os.PathLike)):
        return _of_file(Path(texts), column)
    if hasattr(texts, "select_columns"):
        names = texts.column_names
        if names is not None and text_column not in names:
            raise ValueError(_no_column(column, "the data set", names))
        # A stream is read once: it may come from far away.
        return Texts("the data set", "row", partial(_of_dataset, texts, column), hasattr(texts, "__len__"))
    if hasattr(texts, "iloc"):
        raise TypeError(
            f"`texts` of type {type(texts).__name__} is a table, whose texts are in one of its columns: give "
            f"`texts[{text_column!r}].tolist()`."
        )
    if not isinstance(texts, Iterable) or isinstance(texts, (bytes, dict)):
        raise TypeError(
            f"`texts` of type {type(texts).__name__} must be texts, a data set, or the path of a file of them "
            f"({', '.join(READERS)})."
        )
    lasting = not isinstance(texts, Iterator)
    return Texts("`texts`", "row", lambda: enumerate(texts, start=1), lasting)


def _of_file(path: Path, column: Column) -> Texts:
    if path.suffix.lower() not in READERS:
        raise ValueError(
            f"`texts`={os.fspath(path)!r} must be a file of {', '.join(READERS)}; single texts are given as a list."
        )
    if not path.is_file():
        raise FileNotFoundError(f"`texts`={os.fspath(path)!r}: there is no such file.")
    return Texts(os.fspath(path), "line", partial(READERS[path.suffix.lower()], path, column))


def _of_dataset(dataset: Any, column: Column) -> Numbered:
    number = 0
    if dataset.column_names is not None:
        dataset = dataset.select_columns(column.name)
    for some in dataset.iter(batch_size=1000):
        if column.name not in some:
            raise ValueError(_no_column(column, "the data set", some))
        for text in some[column.name]:
            number += 1
            yield number, text


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a file in UTF-8, with their ends."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"Line {number} of {path} is no UTF-8: {error}.") from error


def _of_txt(path: Path, column: Column) -> Numbered:
    for number, line in _lines(path):
        yield number, line.rstrip("\r\n")


def _of_jsonl(path: Path, column: Column) -> Numbered:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"Line {number} of {path} cannot be read as JSON: {error}.") from error
        if not isinstance(row, dict):
            raise ValueError(f"Line {number} of {path} must be an object with the field {column.name!r}; got {row!r}.")
        if column.name not in row:
            raise ValueError(_no_column(column, f"line {number} of {path}", row))
        yield number, row[column.name]


def _of_csv(path: Path, column: Column) -> Numbered:
    # Of the process: others read fields that are longer than they asked for, and none shorter.
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_FIELD))
    rows = csv.reader((line for _, line in _lines(path)), strict=True)
    try:
        header = next(rows, [])
        if column.name not in header:
            raise ValueError(_no_column(column, os.fspath(path), header))
        place = header.index(column.name)
        for row in rows:
            if row and len(row) != len(header):
                raise ValueError(
                    f"Line {rows.line_num} of {path} has {len(row)} fields where the header has {len(header)}."
                )
            if row:
                yield rows.line_num, row[place]
    except csv.Error as error:
        raise ValueError(f"Line {rows.line_num} of {path} cannot be read as CSV: {error}.") from error


def _no_column(column: Column, where: str, names: Iterable[str]) -> str:
    known = ", ".join(map(repr, names)) or "none"
    return f"`{column.argument}`={column.name!r} is no column of {where}; its columns are {known}."


READERS: dict[str, Callable[[Path, Column], Numbered]] = {".txt": _of_txt, ".csv": _of_csv, ".jsonl": _of_jsonl}
