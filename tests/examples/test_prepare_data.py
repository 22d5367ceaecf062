# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
from __future__ import annotations

import csv

import numpy as np
import prepare_data
import pytest
from prepare_data import read_trec, stratified_rows


def read(path):
    with path.open(encoding="utf-8", newline="") as rows:
        return list(csv.reader(rows))


def test_trec(tmp_path):
    (tmp_path / "train.txt").write_bytes('DESC:manner Why , "oh" ?\nLOC:city Where is Nîmes\x85 ?\n'.encode("latin-1"))
    (tmp_path / "test.txt").write_bytes(b"5 How far ?\n")
    prepare_data.main(["--format", "trec", "--input", str(tmp_path), "--output", str(tmp_path / "out")])
    assert read(tmp_path / "out" / "train.csv") == [
        ["sentence", "label"], ['Why , "oh" ?', "DESC"], ["Where is Nîmes\x85 ?", "LOC"],
    ]  # fmt: skip
    assert read(tmp_path / "out" / "test.csv")[1:] == [["How far ?", "5"]]


def test_stackoverflow(tmp_path):
    (tmp_path / "title.txt").write_bytes(b"How to page ?\nBest client\n")
    (tmp_path / "label.txt").write_bytes(b"18\n3\n")
    prepare_data.main(["--format", "stackoverflow", "--input", str(tmp_path), "--output", str(tmp_path / "out")])
    assert read(tmp_path / "out" / "train.csv")[1:] == [["How to page ?", "18"], ["Best client", "3"]]


def test_files_of_different_length(tmp_path, capsys):
    (tmp_path / "title.txt").write_text("one\ntwo\n")
    (tmp_path / "label.txt").write_text("1\n")
    with pytest.raises(SystemExit):
        prepare_data.main(["--format", "stackoverflow", "--input", str(tmp_path), "--output", str(tmp_path / "out")])
    assert "title.txt has 2 lines but label.txt has 1" in capsys.readouterr().err


def test_missing_file(tmp_path, capsys):
    with pytest.raises(SystemExit):
        prepare_data.main(["--format", "trec", "--input", str(tmp_path), "--output", str(tmp_path / "out")])
    assert "has no train.txt" in capsys.readouterr().err


def test_line_without_question():
    with pytest.raises(ValueError, match="Line 2 has no question"):
        read_trec(["LOC Where ?", "", "LOC"][::2])


def test_stratified_rows_keep_the_shares():
    labels = [0] * 80 + [1] * 15 + [2] * 5
    rows = stratified_rows(labels, 20, seed=3)
    assert rows == sorted(set(rows))
    assert np.bincount(np.asarray(labels)[rows]).tolist() == [16, 3, 1]
    assert rows == stratified_rows(labels, 20, seed=3) != stratified_rows(labels, 20, seed=4)


def test_stratified_rows_with_fractional_labels():
    assert len(stratified_rows([0.1, 0.2, 0.7, 0.4], 2, seed=0)) == 2
