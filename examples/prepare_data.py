# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Converts corpora that come in their own formats to csv files with the columns `sentence` and `label`.

    python examples/prepare_data.py --format trec --input DIR_WITH_TRAIN_TXT --output data/trec
    python examples/run_glue_cee.py --train_file data/trec/train.csv --test_file data/trec/test.csv ...

Formats:
    trec: `train.txt` and, when present, `test.txt`; latin-1; one question per line, `LABEL question` or
        `COARSE:fine question`, of which the coarse label is kept.
    stackoverflow: `title.txt` and `label.txt`, line by line; latin-1; no official split, so one `train.csv`.
"""

import argparse
import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np


def read_trec(lines: Iterable[str]) -> list[tuple[str, str]]:
    """(question, coarse label) of every non-empty line. Raises ValueError for a line without a question."""
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        label, _, question = line.strip().partition(" ")
        if not question:
            raise ValueError(f"Line {number} has no question after its label: {line!r}.")
        rows.append((question, label.partition(":")[0]))
    return rows


def read_stackoverflow(titles: list[str], labels: list[str]) -> list[tuple[str, str]]:
    """(title, label) line by line. Raises ValueError when the two files differ in length."""
    if len(titles) != len(labels):
        raise ValueError(f"title.txt has {len(titles)} lines but label.txt has {len(labels)}.")
    return [(title.strip(), label.strip()) for title, label in zip(titles, labels, strict=True) if title.strip()]


def write_csv(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    """Writes (sentence, label) rows with a header, UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as output:
        writer = csv.writer(output)
        writer.writerow(("sentence", "label"))
        writer.writerows(rows)


def stratified_rows(labels: Sequence[int | float], count: int, seed: int) -> list[int]:
    """Indices of `count` random rows, ascending, in which every class has about its share of all rows.

    Each row gets its random rank within its class, divided by the class size; the rows with the smallest values are
    taken. Fractional labels (regression) count as one class.
    """
    labels = np.asarray(labels)
    if labels.dtype.kind == "f":
        labels = np.zeros(len(labels), dtype=int)
    order = np.random.default_rng(seed).permutation(len(labels))
    ranks = np.empty(len(labels))
    for label in np.unique(labels):
        members = order[labels[order] == label]
        ranks[members] = (np.arange(len(members)) + 0.5) / len(members)
    taken = order[np.argsort(ranks[order], kind="stable")[:count]]
    return sorted(taken.tolist())


def convert(corpus_format: str, source: Path, target: Path) -> list[Path]:
    """Converts the files of `source` and returns the csv files written below `target`."""
    needed = {"trec": ("train.txt",), "stackoverflow": ("title.txt", "label.txt")}[corpus_format]
    for name in needed:
        if not (source / name).is_file():
            raise ValueError(f"--input {str(source)!r} has no {name}, which --format {corpus_format} needs.")
    if corpus_format == "stackoverflow":
        titles, labels = (_lines(source / name) for name in needed)
        parts = {"train": read_stackoverflow(titles, labels)}
    else:
        present = [name for name in ("train", "test") if (source / f"{name}.txt").is_file()]
        parts = {name: read_trec(_lines(source / f"{name}.txt")) for name in present}
    for name, rows in parts.items():
        write_csv(target / f"{name}.csv", rows)
        print(f"{target / name}.csv: {len(rows)} rows, {len({label for _, label in rows})} labels")
    return [target / f"{name}.csv" for name in parts]


def _lines(path: Path) -> list[str]:
    # Not str.splitlines(): latin-1 text may hold \x85 (an ellipsis in cp1252), which that would take for a line end.
    return path.read_text(encoding="latin-1").removesuffix("\n").split("\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", required=True, choices=("trec", "stackoverflow"), help="what --input holds")
    parser.add_argument("--input", required=True, type=Path, help="folder with the corpus files")
    parser.add_argument("--output", required=True, type=Path, help="folder for train.csv and test.csv")
    args = parser.parse_args(argv)
    try:
        convert(args.format, args.input, args.output)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
