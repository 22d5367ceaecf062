# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Texts from everywhere to dictionaries and files, with memory for a window."""

from __future__ import annotations

import csv
import json
import signal

import pandas
import pytest
from bulk_reference import thresholds_of
from datasets import Dataset
from tiny_models import run_python
from transformers import pipeline

from transformers_cee import BulkSummary, classify
from transformers_cee.bulk.texts import find_texts


@pytest.fixture(scope="module")
def asked(model, tokenizer, texts):
    return {"exit_threshold": thresholds_of(model, tokenizer, texts, "policy", 0.9999), "disable_tqdm": True}


@pytest.fixture(scope="module")
def expected(model, tokenizer, texts, asked):
    """What the pipeline says of each text."""
    classifier = pipeline("early-exit-text-classification", model=model, tokenizer=tokenizer)
    return [classifier(text, exit_threshold=asked["exit_threshold"])[0] for text in texts]


def same(found, expected):
    found = list(found)
    assert [(one["label"], one["exit_layer"]) for one in found] == [
        (one["label"], one["exit_layer"]) for one in expected
    ]
    assert [one["score"] for one in found] == pytest.approx([one["score"] for one in expected], abs=1e-4)


def write(texts, folder):
    (folder / "texts.txt").write_bytes("".join(f"{text}\r\n" for text in texts).encode())
    with open(folder / "texts.csv", "w", newline="") as file:
        csv.writer(file).writerows([["id", "text"], *([str(number), text] for number, text in enumerate(texts))])
    lines = [json.dumps({"text": text, "id": number}) for number, text in enumerate(texts)]
    (folder / "texts.jsonl").write_text("\n\n".join(lines), encoding="utf-8")


@pytest.mark.parametrize("kind", ["list", "iterator", "dataset", "stream", "texts.txt", "texts.csv", "texts.jsonl"])
def test_any_source(kind, model, tokenizer, texts, asked, expected, tmp_path):
    write(texts, tmp_path)
    data = Dataset.from_dict({"id": range(len(texts)), "text": texts})
    sources = {"list": texts, "iterator": iter(texts), "dataset": data, "stream": data.to_iterable_dataset()}
    source = sources.get(kind, tmp_path / kind)
    same(classify(model, source, tokenizer, batch_size=4, window=16, **asked), expected)


@pytest.mark.parametrize("name", ["out.jsonl", "new/out.csv"])
def test_to_a_file(name, model, tokenizer, texts, asked, expected, tmp_path):
    summary = classify(model, texts, tokenizer, output=tmp_path / name, batch_size=4, window=16, **asked)
    with open(tmp_path / name, newline="") as file:
        if name.endswith("csv"):
            rows = [
                {"label": row["label"], "score": float(row["score"]), "exit_layer": int(row["exit_layer"])}
                for row in csv.DictReader(file)
            ]
        else:
            rows = [json.loads(line) for line in file]
    same(rows, expected)
    assert isinstance(summary, BulkSummary) and summary.rows == len(texts)
    assert summary.output == str(tmp_path / name)
    assert summary.depth == pytest.approx(sum(one["exit_layer"] for one in expected) / len(texts))
    assert summary.rows_per_second == pytest.approx(summary.rows / summary.seconds)
    assert len(list((tmp_path / name).parent.iterdir())) == 1


def test_no_texts(model, tokenizer, tmp_path):
    assert list(classify(model, [], tokenizer, disable_tqdm=True)) == []
    summary = classify(model, iter([]), tokenizer, output=tmp_path / "out.csv", disable_tqdm=True)
    assert (summary.rows, summary.rows_per_second, summary.depth) == (0, 0.0, 0.0)
    assert (tmp_path / "out.csv").read_text().split() == ["label,score,exit_layer"]


def test_no_more_than_a_window_is_held(model, tokenizer, texts, asked):
    read = 0

    def stream():
        nonlocal read
        for text in texts:
            read += 1
            yield text

    found = classify(model, stream(), tokenizer, batch_size=4, window=8, **asked)
    assert read == 0
    for number, _ in enumerate(found):
        assert read == min(len(texts), 8 * (number // 8 + 1))


def test_the_tokenizer_of_the_checkpoint(model, tokenizer, texts, asked, expected, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    same(classify(type(model).from_pretrained(tmp_path), texts, **asked), expected)


def test_texts_are_cut(model, tokenizer, texts):
    long = ["w11 " * 100, texts[0]]
    cut = ["w11 " * 40, texts[0]]
    found, wanted = (list(classify(model, some, tokenizer, disable_tqdm=True)) for some in (long, cut))
    same(found, wanted)
    cut = [" ".join(text.split()[:3]) for text in long]
    found = list(classify(model, long, tokenizer, max_length=3, disable_tqdm=True))
    same(found, list(classify(model, cut, tokenizer, disable_tqdm=True)))


def test_long_fields_of_a_table(model, tokenizer, tmp_path):
    """They are cut as any long text."""
    (tmp_path / "a.csv").write_text('id,text\n1,"' + "w11 " * 50_000 + '"\n2,w12\n')
    found = list(classify(model, tmp_path / "a.csv", tokenizer, disable_tqdm=True))
    same(found, list(classify(model, ["w11 " * 50_000, "w12"], tokenizer, disable_tqdm=True)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"w11\n\nw12\n", "Line 2 of .*a.txt is empty"),
        ("a.txt", b"w11\n\xff\n", "Line 2 of .*a.txt is no UTF-8"),
        ("a.csv", b"id,words\n1,w11\n", "`text_column`='text' is no column of .*a.csv; its columns are 'id', 'words'"),
        ("a.csv", b"", "`text_column`='text' is no column of .*a.csv; its columns are none"),
        ("a.csv", b"id,text\n1,w11\n2\n", "Line 3 of .*a.csv has 1 fields where the header has 2"),
        ("a.csv", b'id,text\n1,w11\n2,"w1"1\n', "Line 3 of .*a.csv cannot be read as CSV"),
        ("a.csv", b"id,text\n1,w11\n2, \n", "Line 3 of .*a.csv is empty"),
        ("a.jsonl", b'{"text": "w11"}\n{"text": \n', "Line 2 of .*a.jsonl cannot be read as JSON"),
        ("a.jsonl", b'{"text": "w11"}\n["w11"]\n', "Line 2 of .*a.jsonl must be an object with the field 'text'"),
        ("a.jsonl", b'{"text": "w11"}\n{"words": ""}\n', "no column of line 2 of .*a.jsonl; its columns are 'words'"),
        ("a.jsonl", b'{"text": "w11"}\n{"text": 3}\n', "Line 2 of .*a.jsonl holds 3 of type int"),
        ("a.jsonl", b'{"text": "w11"}\n{"text": "w\\ud83d"}\n', "Line 2 of .*a.jsonl holds half of a character"),
        ("a.parquet", b"", "a.parquet' must be a file of .txt, .csv, .jsonl"),
    ],
)
def test_bad_rows_are_named_before_any_work(name, content, message, model, tokenizer, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        classify(model, tmp_path / name, tokenizer, window=1, disable_tqdm=True)


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        (["w11", None], ValueError, "Row 2 of `texts` holds None"),
        (["w\U0001f600", "w\ude00"], ValueError, "Row 2 of `texts` holds half of a character"),
        (Dataset.from_dict({"text": ["w11", None]}), ValueError, "Row 2 of the data set holds None"),
        (Dataset.from_dict({"words": ["w11"]}), ValueError, "`text_column`='text' is no column of the data set"),
        (3, TypeError, "`texts` of type int must be texts"),
        ({"text": ["w11"]}, TypeError, "`texts` of type dict"),
        ("no/such/file.txt", FileNotFoundError, "there is no such file"),
        ("a single text", ValueError, "single texts are given as a list"),
    ],
)
def test_bad_sources(texts, error, message, model, tokenizer):
    with pytest.raises(error, match=message):
        classify(model, texts, tokenizer, disable_tqdm=True)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("out.txt", "must be a file of .jsonl, .csv"),
        ("folder.csv", "is a folder"),
        ("texts.jsonl", "is the file of `texts`"),
    ],
)
def test_bad_outputs(output, message, model, tokenizer, tmp_path):
    (tmp_path / "folder.csv").mkdir()
    write(["w11"], tmp_path)
    with pytest.raises(ValueError, match=message):
        classify(model, tmp_path / "texts.jsonl", tokenizer, output=tmp_path / output)


def test_an_error_in_the_middle_leaves_no_file(model, tokenizer, texts, tmp_path):
    with pytest.raises(ValueError, match="Row 41 of `texts` holds 3"):
        classify(model, iter([*texts, 3]), tokenizer, output=tmp_path / "out.csv", window=8, disable_tqdm=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_kill_leaves_nothing_under_the_name(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    code = """
import os, signal
from transformers_cee import BertForConsistentEE, classify
def texts():
    for _ in range(3):
        yield from ["w11 w12"] * 8
    os.kill(os.getpid(), signal.SIGKILL)
classify(BertForConsistentEE.from_pretrained("model"), texts(), output="out/some.csv", window=8, disable_tqdm=True)
"""
    assert run_python(code, cwd=tmp_path).returncode == -signal.SIGKILL
    assert "some.csv" not in {path.name for path in (tmp_path / "out").iterdir()}


def test_a_table_is_no_list_of_texts():
    table = pandas.DataFrame({"text": ["w1", "w2"], "label": [0, 1]})
    with pytest.raises(TypeError, match=r"texts\['text'\].tolist"):
        find_texts(table, "text")
