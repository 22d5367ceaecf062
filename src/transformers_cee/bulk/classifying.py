# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Many texts in, a label and an exit layer for each out, with memory for a window of them."""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from transformers_cee.bulk.texts import Texts, find_texts
from transformers_cee.bulk.windows import ClassifiedTexts, WindowClassifier, checked_model
from transformers_cee.exits.fields import check_field, whole
from transformers_cee.files import replacing
from transformers_cee.tokenizing import tokenizer_of


@dataclass(frozen=True)
class BulkSummary:
    """What [`classify`] has done.

    Args:
        output (`str`): the file that it wrote.
        rows (`int`): texts.
        seconds (`float`): from the first text read to the file in its place.
        rows_per_second (`float`): texts per second; 0 without texts.
        depth (`float`): mean exit layer (1-based); 0 without texts.
    """

    output: str
    rows: int
    seconds: float
    rows_per_second: float
    depth: float


def classify(
    model: Any,
    texts: Any,
    processing_class: Any = None,
    *,
    output: str | os.PathLike[str] | None = None,
    text_column: str = "text",
    batch_size: int = 32,
    window: int = 4096,
    max_length: int | None = None,
    exit_threshold: float | list[float] | str | None = None,
    exit_criterion: str | None = None,
    exit_budget: float | None = None,
    min_exit_layer: int | None = None,
    disable_tqdm: bool = False,
) -> Iterator[dict[str, Any]] | BulkSummary:
    """Classifies any number of texts, each leaving at its own layer.

    Texts are read, sorted by length, classified and put back into order a window at a time, so that memory does not
    grow with their number. Those of different batches that stay behind an exit run deeper layers together, in full
    batches; where a criterion other than the policy remembers earlier exits, each batch runs on its own.

    Args:
        model ([`EarlyExitSequenceClassifier`] or [`ExportedSequenceClassifier`]): classifies texts.
        texts (iterable of `str`, `datasets.Dataset`, `datasets.IterableDataset`, `str` or `os.PathLike`):
            The texts, or the path of a file in UTF-8: .txt with one text per line, .csv with a header, or .jsonl.
        processing_class (*optional*): the tokenizer; by default that of the checkpoint the model came from.
        output (`str` or `os.PathLike`, *optional*):
            File for the results, .jsonl or .csv. It is written beside, and in its place when all is done.
        text_column (`str`, *optional*, defaults to `"text"`): column or field of the texts, where there are several.
        batch_size (`int`, *optional*, defaults to 32): rows per batch.
        window (`int`, *optional*, defaults to 4096): texts that are held at once.
        max_length (`int`, *optional*): tokens that a text is cut to; by default, and at most, what tokenizer
            and model read.
        exit_threshold, exit_criterion, exit_budget, min_exit_layer (*optional*): as in the model's call.
        disable_tqdm (`bool`, *optional*, defaults to `False`): show no progress.

    Returns:
        Without `output`, an iterator of dictionaries in the order of the texts: `label`, `score` and `exit_layer`
        (1-based). With it, a [`BulkSummary`] once the file holds the same.

    Raises:
        TypeError: a model that classifies no texts or has no exits, or something that is no texts.
        FileNotFoundError: there is no such file.
        ValueError: a row that holds no text, which is named, or an argument that is not accepted. Nothing has been
            classified by then, unless texts come from an iterator, whose rows are seen one after the other.
    """
    check_field("window", window, whole(1))
    if processing_class is None:
        processing_class = tokenizer_of(checked_model(model), "`texts`")
    windows = WindowClassifier(
        model, processing_class, batch_size=batch_size, max_length=max_length, exit_threshold=exit_threshold,
        exit_criterion=exit_criterion, exit_budget=exit_budget, min_exit_layer=min_exit_layer,
    )  # fmt: skip
    source = find_texts(texts, text_column)
    target = None if output is None else checked_output(output, texts)
    takes_blanks, count = windows.takes_blanks, None
    if source.is_lasting:
        count = sum(1 for _ in source.checked(takes_blanks))
    found = _classified(source, windows, window, takes_blanks, tqdm(total=count, unit="texts", disable=disable_tqdm))
    names = windows.model.config.id2label
    if target is None:
        return (row for some in found for row in rows_of(some, names))
    return written(found, names, target)


def checked_output(output: str | os.PathLike[str], texts: Any = None) -> Path:
    """The file for results.

    Raises:
        ValueError: it is of no known format, a folder, or the file of the texts.
    """
    path = Path(output)
    if path.suffix.lower() not in WRITERS:
        raise ValueError(f"`output`={os.fspath(output)!r} must be a file of {', '.join(WRITERS)}.")
    if path.is_dir():
        raise ValueError(f"`output`={os.fspath(output)!r} is a folder; give the name of a file.")
    if isinstance(texts, (str, os.PathLike)) and path.exists() and path.samefile(texts):
        raise ValueError(f"`output`={os.fspath(output)!r} is the file of `texts`, which it would replace.")
    return path


def rows_of(some: ClassifiedTexts, names: dict[int, str]) -> Iterator[dict[str, Any]]:
    """Results as dictionaries.

    Args:
        names (`dict[int, str]`): of the classes.
    """
    for one, score, layer in zip(some.classes.tolist(), some.scores.tolist(), some.exit_layers.tolist(), strict=True):
        yield {"label": names[one], "score": score, "exit_layer": layer}


def written(found: Iterator[ClassifiedTexts], names: dict[int, str], target: Path) -> BulkSummary:
    """Writes results to a file, which takes its place when all are there.

    Args:
        names (`dict[int, str]`): of the classes.
        target (`Path`): what `checked_output` gave.
    """
    rows, layers, start = 0, 0, time.perf_counter()

    def counted() -> Generator[dict[str, Any], None, None]:
        nonlocal rows, layers
        for some in found:
            rows, layers = rows + len(some.exit_layers), layers + int(some.exit_layers.sum())
            yield from rows_of(some, names)

    with closing(counted()) as made, replacing(target) as beside:
        WRITERS[target.suffix.lower()](beside, made)
    seconds = time.perf_counter() - start
    return BulkSummary(os.fspath(target), rows, seconds, rows / seconds, layers / max(rows, 1))


def _classified(
    source: Texts, classifier: WindowClassifier, window: int, takes_blanks: bool, progress: tqdm
) -> Iterator[ClassifiedTexts]:
    with progress:
        for texts in source.windows(window, takes_blanks):
            yield classifier(texts)
            progress.update(len(texts))


def _jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _csv(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ("label", "score", "exit_layer"))
        writer.writeheader()
        writer.writerows(rows)


WRITERS: dict[str, Callable[[Path, Iterable[dict[str, Any]]], None]] = {".jsonl": _jsonl, ".csv": _csv}
