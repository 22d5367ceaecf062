# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The reader of both scripts: what stands in a file comes out, and what is damaged is refused with file and row."""

from __future__ import annotations

import csv
import gzip
import json
import random
import re

import pytest
from data_files import cell_text, column_names, read_rows, read_texts


def rows_of(path, **options):
    return list(read_rows(path, **options))


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


class TestWhatStandsInAFile:
    @pytest.mark.parametrize(
        "text", ["a\u2028b\u2029c", "a\x85b", "a\x0bb\x0cc\x1cd", 'say "no", he', "a\\n", "tail "]
    )
    @pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json"])
    def test_texts_with_other_line_ends_and_marks(self, tmp_path, text, suffix):
        path = tmp_path / f"rows{suffix}"
        rows = [{"text": text, "label": "x"}, {"text": "plain", "label": "y"}]
        if suffix == ".csv":
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, ["text", "label"])
                writer.writeheader()
                writer.writerows(rows)
        elif suffix == ".jsonl":
            path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
        else:
            path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
        assert rows_of(path) == list(enumerate(rows, start=1))

    def test_nothing_is_guessed(self, tmp_path):
        path = write(tmp_path / "rows.csv", 'a,b\n007,NA\n2020-01-01,"1,5"\nnull,\n')
        assert [row for _, row in rows_of(path)] == [
            {"a": "007", "b": "NA"}, {"a": "2020-01-01", "b": "1,5"}, {"a": "null", "b": ""},
        ]  # fmt: skip
        dates = write(tmp_path / "rows.jsonl", '{"a": "2020-01-01"}\n{"a": "2021-02-03"}\n')
        assert read_texts(dates, ["a"])["a"][:] == ["2020-01-01", "2021-02-03"]

    @pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.jsonl", "rows.json", "rows.txt"])
    def test_byte_order_mark(self, tmp_path, name):
        content = {"csv": "text\nabc\n", "tsv": "text\nabc\n", "txt": "abc\n", "json": '[{"text": "abc"}]'}
        path = write(tmp_path / name, b"\xef\xbb\xbf" + content.get(name[5:], '{"text": "abc"}\n').encode())
        assert rows_of(path) == [(1, {"text": "abc"})]

    def test_line_ends_of_windows(self, tmp_path):
        assert rows_of(write(tmp_path / "a.csv", "a,b\r\n1,2\r\n")) == [(1, {"a": "1", "b": "2"})]
        assert rows_of(write(tmp_path / "a.txt", "one\r\ntwo\r\n")) == [(1, {"text": "one"}), (2, {"text": "two"})]
        assert rows_of(write(tmp_path / "a.jsonl", '{"a": 1}\r\n\r\n{"a": 2}\r\n')) == [(1, {"a": 1}), (3, {"a": 2})]

    def test_long_cells(self, tmp_path):
        (_, row), = rows_of(write(tmp_path / "a.csv", "a,b\n" + "x" * 200_000 + ",1\n"))  # fmt: skip
        assert len(row["a"]) == 200_000

    def test_columns_of_all_rows(self, tmp_path):
        path = write(tmp_path / "a.jsonl", '{"instruction": "i", "output": "o"}\n{"output": "p", "input": "q"}\n')
        assert column_names(path) == ["instruction", "output", "input"]
        texts = read_texts(path, ["instruction", "input"])
        assert texts[:] == {"instruction": ["i", None], "input": [None, "q"]}

    def test_a_file_that_changed_is_read_again(self, tmp_path):
        path = write(tmp_path / "a.txt", "one\n")
        assert read_texts(path, ["text"])["text"][:] == ["one"]
        write(path, "another\n")
        assert read_texts(path, ["text"])["text"][:] == ["another"]

    def test_numbers_are_texts_and_nothing_is_none(self, tmp_path):
        path = tmp_path / "a.jsonl"
        assert [cell_text(path, 1, "a", value) for value in (0, 1.5, True, None, float("nan"), "")] == [
            "0", "1.5", "True", None, None, "",
        ]  # fmt: skip
        with pytest.raises(ValueError, match=r"a\.jsonl: row 3 has a list in 'a'; accepted are texts.*\['x'\]"):
            cell_text(path, 3, "a", ["x"])


DAMAGED = {
    "short.csv": (
        "a,b\n1,2\n3\n",
        r"row 2 \(line 3\) has 1 cells, \['3'\], but the header 2 \(a, b\): no cell for 'b'",
    ),
    "comma.csv": ("a,b\n1,2\nhe said, no,x\n", r"row 2 .* has 3 cells, .* a cell that holds the delimiter needs quot"),
    "open.csv": ('a,b\n"1,2\n3,4\n', r"row 1 .* cannot be read: unexpected end of data"),
    "after.csv": ('a,b\n"1" x,2\n', r"row 1 .* cannot be read"),
    "twice.csv": ("a,a\n1,2\n", "the header names 'a' twice"),
    "nul.csv": (b"a,b\n1,2\n3,\x004\n", "line 3 holds a NUL byte"),
    "latin.csv": ("a,b\n1,2\n3,é\n".encode("latin-1"), r"line 3 is not in UTF-8 \(byte|line 3 is not in UTF-8 \(0xe9"),
    "utf16.csv": ("a,b\n1,2\n".encode("utf-16"), "the file is text in UTF-16; accepted is text in UTF-8"),
    "utf16le.csv": ("a,b\n1,2\n".encode("utf-16-le"), "line 1 holds a NUL byte"),
    "packed.jsonl": (gzip.compress(b'{"a": 1}\n'), "the file is compressed by gzip"),
    "table.json": (b"PAR1\x15\x04", "the file is a parquet file"),
    "sheet.csv": (b"PK\x03\x04rest", "the file is a zip archive or a spreadsheet"),
    "cut.jsonl": ('{"a": 1}\n{"a":\n', "row 2 cannot be read"),
    "two.jsonl": ('{"a": 1} {"a": 2}\n', r"row 1 cannot be read \(more follows: '{\"a\": 2}'"),
    "number.jsonl": ('{"a": 1}\n3\n', "row 2 is 3; accepted are objects"),
    "arrays.jsonl": ("[1, 2]\n[3, 4]\n", "row 1 is 1; accepted are objects"),
    "deep.jsonl": ('{"a": 1}\n{"a": ' + "[" * 100_000 + "\n", "row 2 is nested too deep|row 2 cannot be read"),
    "deep.json": ('[{"a": 1}, {"a": ' + "[" * 100_000, "row 2 is nested too deep|row 2 cannot be read"),
    "half.jsonl": ('{"a": "x\\ud800"}\n', r"row 1 holds \\ud800, which is no character by itself"),
    "long.jsonl": ('{"a": 1}\n{"a": ' + "9" * 5000 + "}\n", "row 2 cannot be read"),
    "open.json": ('[{"a": 1}, {"a": 2}', "row 2 is followed by 'the end'"),
    "comma.json": ('[{"a": 1} {"a": 2}]', "row 1 is followed by '{'"),
    "more.json": ('[{"a": 1}]\n{"a": 2}', "the list ends after row 1, but more follows"),
    "scalar.json": ('[{"a": 1}, null]', "row 2 is None; accepted are objects"),
    "item.json": ('[{"a": 1}, {"a": tru}]', "row 2 cannot be read"),
    "latin.txt": (b"abc\n\xe9\n", "line 2 is not in UTF-8"),
    "empty.csv": ("", "no rows"),
    "header.csv": ("a,b\n", "no rows"),
    "empty.jsonl": ("\n \n", "no rows"),
    "empty.json": ("[]", "no rows"),
    "empty.txt": ("", "no rows"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_told_with_file_and_row(tmp_path, name):
    content, message = DAMAGED[name]
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: (?:{message})"):
        column_names(path)


def test_broken_rows_may_be_left_out_and_are_counted(tmp_path):
    path = write(tmp_path / "dev.txt", "1\t2\n3\n4\t5\t6\n7\t8\n")
    broken = []
    assert rows_of(path, suffix=".tsv", header=("a", "b"), broken=broken) == [
        (1, {"a": "1", "b": "2"}), (4, {"a": "7", "b": "8"}),
    ]  # fmt: skip
    assert broken == [2, 3]


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.json", "rows.jsonl", "rows.txt"])
def test_whatever_happened_to_a_file_the_error_names_it(tmp_path, name):
    """Bytes changed, cut, doubled and thrown in at random places: rows come out, or an error that names the file."""
    rows = [{"text": f'wörd {index}, "quoted"', "label": f"c{index % 3}"} for index in range(8)]
    whole = {
        "rows.csv": "text,label\n" + "".join(f'"wörd {index}",c{index % 3}\n' for index in range(8)),
        "rows.tsv": "text\tlabel\n" + "".join(f"wörd {index}\tc{index % 3}\n" for index in range(8)),
        "rows.json": json.dumps(rows, ensure_ascii=False),
        "rows.jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
        "rows.txt": "\n".join(row["text"] for row in rows),
    }[name].encode()  # fmt: skip
    draw, path = random.Random(0), tmp_path / name
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(damaged) + 1)
            kind = draw.randrange(4)
            if kind == 0:
                damaged[at : at + 1] = bytes([draw.randrange(256)])
            elif kind == 1:
                del damaged[at : at + draw.randint(1, 20)]
            elif kind == 2:
                damaged[at:at] = draw.choice([b"\0", b'"', b"[", b"{", b"\n", b"\xff", b"--5", b"NaN", b",", b"\t"])
            else:
                del damaged[at:]
        path.write_bytes(bytes(damaged))
        try:
            column_names(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ")
            refused += 1
    assert refused > 50
