# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Rows of csv, tsv, json, jsonl and txt files, one reader for all scripts.

Nothing is guessed: a cell of a table is the text that stands there, a value of JSON what JSON says. (The readers of
`datasets` make numbers of "007", missing values of "NA" and timestamps of texts that look like a date.) What is
damaged is refused with the file and the row; rows are counted from 1, the header of a table not among them.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value
from datasets.exceptions import DatasetGenerationError


BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# How files start that are no text in UTF-8, whatever their name ends in.
OTHER_KINDS = {
    b"\x1f\x8b": "compressed by gzip",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"PK\x03\x04": "a zip archive or a spreadsheet",
    b"PAR1": "a parquet file",
    b"ARROW1": "an Arrow file",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
}
# Longest cell of a table, in characters.
LONGEST_CELL = 2**31 - 1

Row = tuple[int, dict[str, Any]]


def read_rows(
    path: Path, *, suffix: str | None = None, header: Sequence[str] | None = None, broken: list[int] | None = None
) -> Iterator[Row]:
    """The rows of a file one by one, each with its number: cells by column of a table, an object of JSON, or a line of
    text as `{"text": line}`.

    Args:
        path: `.csv`, `.tsv` (quotation marks are ordinary characters there), `.json` (a list of objects, or one per
            line), `.jsonl` or `.txt`; in UTF-8, with or without a byte order mark.
        suffix: reads the file as one of these, whatever its own is.
        header: columns of a table that has no header line.
        broken: gets the numbers of a table's rows that have more or fewer cells than the header, and which are left
            out; None refuses them.

    Raises:
        ValueError: the file is no text in UTF-8, or a row cannot be read; the message names file and row.
    """
    suffix = suffix or path.suffix
    if suffix == ".txt":
        return ((number, {"text": line.rstrip("\r\n")}) for number, line in _lines(path))
    if suffix in (".json", ".jsonl"):
        return _objects(path)
    return _cells(path, "\t" if suffix == ".tsv" else ",", header, broken)


def column_names(path: Path) -> list[str]:
    """The columns of a file's rows in the order in which they first come; walks, and so checks, the whole file."""
    names: dict[str, None] = {}
    is_empty = True
    for _, row in read_rows(path):
        is_empty = False
        names.update(dict.fromkeys(row))
    if is_empty:
        raise ValueError(f"{path}: no rows.")
    return list(names)


def cell_text(path: Path, number: int, column: str, value: Any) -> str | None:
    """A cell as text; None where there is nothing: no such key, null or NaN.

    Raises:
        ValueError: the cell holds a list or an object.
    """
    if isinstance(value, list | dict):
        kind = "a list" if isinstance(value, list) else "an object"
        raise ValueError(
            f"{path}: row {number} has {kind} in {column!r}; accepted are texts and numbers: {_short(value)}."
        )
    return None if value is None or value != value else str(value)


def read_texts(path: Path, columns: Sequence[str]) -> Dataset:
    """Columns of a file as a data set of texts, which lies in the cache of `datasets` and not in memory.

    Args:
        path: as in `read_rows`.
        columns: those to keep. A row without one of them has None there.

    Raises:
        ValueError: as `read_rows` and `cell_text`.
    """
    stat = path.stat()
    # What the cache knows the file by.
    stamp = {"size": stat.st_size, "changed": stat.st_mtime_ns}
    features = Features({name: Value("string") for name in columns})
    options = {"path": str(path), "columns": tuple(columns), "stamp": stamp}
    try:
        return Dataset.from_generator(_texts, features=features, gen_kwargs=options)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None
        raise


def _texts(path: str, columns: Sequence[str], stamp: dict[str, int]) -> Iterator[dict[str, str | None]]:
    for number, row in read_rows(Path(path)):
        yield {name: cell_text(Path(path), number, name, row.get(name)) for name in columns}


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their ends, numbered from 1. Lines end at a line feed and nowhere else: JSON may hold U+2028."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if number == 1:
                for start, kind in OTHER_KINDS.items():
                    if raw.startswith(start):
                        raise ValueError(f"{path}: the file is {kind}; accepted is text in UTF-8.")
                raw = raw.removeprefix(BYTE_ORDER_MARK)
            if b"\0" in raw:
                raise ValueError(
                    f"{path}: line {number} holds a NUL byte; accepted is text in UTF-8 (is this UTF-16?)."
                )
            try:
                yield number, raw.decode("utf-8")
            except UnicodeDecodeError as error:
                byte = f"0x{raw[error.start]:02x} at character {error.start + 1}"
                raise ValueError(f"{path}: line {number} is not in UTF-8 ({byte}); save the file as UTF-8.") from error


def _cells(path: Path, delimiter: str, header: Sequence[str] | None, broken: list[int] | None) -> Iterator[Row]:
    """Rows of a table."""
    csv.field_size_limit(LONGEST_CELL)
    lines = (line for _, line in _lines(path))
    if delimiter == "\t":
        reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        # Strict: a quotation mark that is never closed would make one cell of the rest of the file.
        reader = csv.reader(lines, strict=True)
    number = 0
    try:
        names = next(reader, []) if header is None else list(header)
        twice = next((name for name in names if name and names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"{path}: the header names {twice!r} twice; columns need names of their own.")
        for cells in reader:
            if not cells:
                continue
            number += 1
            if len(cells) == len(names):
                yield number, dict(zip(names, cells, strict=True))
            elif broken is None:
                way_out = "a cell that holds the delimiter needs quotation marks" if len(cells) > len(names) else ""
                way_out = way_out or f"no cell for {names[len(cells)]!r}"
                raise ValueError(
                    f"{path}: row {number} (line {reader.line_num}) has {len(cells)} cells, {_short(cells, 200)}, but "
                    f"the header {len(names)} ({', '.join(names)}): {way_out}."
                )
            else:
                broken.append(number)
    except csv.Error as error:
        raise ValueError(f"{path}: row {number + 1} (line {reader.line_num}) cannot be read: {error}.") from error


def _objects(path: Path) -> Iterator[Row]:
    """Objects of JSON: one per line, or the items of one list."""
    lines = _lines(path)
    for number, line in lines:
        if not line.strip():
            continue
        if line.lstrip().startswith("["):
            yield from _items(path, "\n" * (number - 1) + line + "".join(other for _, other in lines))
        else:
            yield number, _object(path, number, line, 0)[0]


def _items(path: Path, text: str) -> Iterator[Row]:
    """Items of a list that is the whole file, one by one, so that a damaged one is known by its number."""
    position, number = text.index("[") + 1, 0
    while True:
        position = _after_space(text, position)
        if number == 0 and text[position : position + 1] == "]":
            break
        number += 1
        value, position = _object(path, number, text, position)
        yield number, value
        position = _after_space(text, position)
        mark = text[position : position + 1]
        if mark == "]":
            break
        if mark != ",":
            raise ValueError(f"{path}: row {number} is followed by {mark or 'the end'!r}; accepted are ',' and ']'.")
        position += 1
    rest = text[position + 1 :].strip()
    if rest:
        raise ValueError(f"{path}: the list ends after row {number}, but more follows: {_short(rest)}.")


def _short(value: Any, length: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= length else text[: length - 3] + "..."


def _after_space(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\t", "\r", "\n"):
        position += 1
    return position


_DECODER = json.JSONDecoder()


def _object(path: Path, number: int, text: str, position: int) -> tuple[dict[str, Any], int]:
    """One object that starts at a position of a text, and where it ends; a line holds one and nothing else."""
    try:
        value, end = _DECODER.raw_decode(text, _after_space(text, position))
        if position == 0 and text[end:].strip():
            raise ValueError(f"more follows: {_short(text[end:].strip())}")
        if "\\u" in text[position:end]:
            # Half of a pair of surrogates is no character.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise ValueError(f"{path}: row {number} is nested too deep.") from error
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise ValueError(f"{path}: row {number} holds {half}, which is no character by itself.") from error
    except ValueError as error:
        raise ValueError(
            f"{path}: row {number} cannot be read ({error}); neither a json list of objects nor one object per line."
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: row {number} is {_short(value)}; accepted are objects: names with values.")
    return value, end
