# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
from __future__ import annotations

import json

import glue_data
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from glue_data import TASKS, DataArguments, load_corpus, make_compute_metrics
from transformers import EvalPrediction


def write(path, lines, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(("\n".join(lines) + "\n").encode(encoding))
    return path


@pytest.fixture
def sst2(tmp_path):
    """20 training and 10 dev rows in SST-2's own layout."""
    for name, count in (("train", 20), ("dev", 10)):
        rows = [f"{name} {index} is fine\t{index % 2}" for index in range(count)]
        write(tmp_path / f"{name}.tsv", ["sentence\tlabel", *rows])
    return tmp_path


@pytest.fixture
def train_csv(tmp_path):
    rows = [f'"question {index}, please",{("LOC", "HUM", "NUM")[index % 3]}' for index in range(60)]
    return write(tmp_path / "toy" / "train.csv", ["sentence,label", *rows])


def test_byte_order_mark_and_quotation_marks_in_tsv(tmp_path):
    header = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"
    rows = ['1\t1\t2\tHe said "no .\tHe refused', '0\t3\t4\t" Yes , "\tShe left', "1\t5\t6\ta\tb", "0\t7\t8\tc\td"]
    for name in ("train.tsv", "dev.tsv", "msr_paraphrase_test.txt"):
        write(tmp_path / name, [header, *rows], "utf-8-sig")
    corpus = load_corpus(DataArguments(task_name="MRPC", data_dir=str(tmp_path)))
    assert corpus.splits["train"][0] == {"sentence1": 'He said "no .', "sentence2": "He refused", "label": 1}
    assert len(corpus.splits["train"]) == len(corpus.splits["test"]) == 4
    assert corpus.notes == ["test: the labelled msr_paraphrase_test.txt of the folder."]
    assert corpus.metrics == ("accuracy", "f1")


def test_labels_by_name(tmp_path):
    rows = [f"{i}\tpremise {i}\tclaim\t{('entailment', 'not_entailment')[i % 2]}" for i in range(10)]
    for name in ("train.tsv", "dev.tsv"):
        write(tmp_path / name, ["index\tsentence1\tsentence2\tlabel", *rows])
    corpus = load_corpus(DataArguments(task_name="rte", data_dir=str(tmp_path)))
    assert corpus.label_names == ["entailment", "not_entailment"]
    assert corpus.splits["train"]["label"][:4] == [0, 1, 0, 1]


def test_cola_has_no_header_and_its_test_file_no_labels(tmp_path):
    rows = [f"gj04\t{index % 2}\t\tSentence {index}." for index in range(8)]
    write(tmp_path / "train.tsv", rows)
    write(tmp_path / "dev.tsv", rows)
    write(tmp_path / "test.tsv", ["index\tsentence", "0\tUnlabelled."])
    corpus = load_corpus(DataArguments(task_name="cola", data_dir=str(tmp_path)))
    assert corpus.splits["train"][1] == {"sentence1": "Sentence 1.", "label": 1}
    assert len(corpus.splits["validation"]) == len(corpus.splits["test"]) == 4
    assert corpus.metrics[0] == "matthews_correlation"


def test_stsb_is_regression(tmp_path):
    rows = [f"{index}\tone\ttwo\t{index / 3:.3f}" for index in range(9)]
    for name in ("train.tsv", "dev.tsv"):
        write(tmp_path / name, ["index\tsentence1\tsentence2\tscore", *rows])
    corpus = load_corpus(DataArguments(task_name="stsb", data_dir=str(tmp_path)))
    assert corpus.is_regression
    assert corpus.splits["train"]["label"][1] == pytest.approx(0.333)


def test_mnli_has_two_dev_files(tmp_path):
    labels = ("entailment", "neutral", "contradiction")
    header = "index\tsentence1\tsentence2\tgold_label"
    rows = [f"{index}\tone\ttwo\t{labels[index % 3]}" for index in range(12)]
    for name in ("train", "dev_matched", "dev_mismatched"):
        write(tmp_path / f"{name}.tsv", [header, *rows])
    corpus = load_corpus(DataArguments(task_name="mnli", data_dir=str(tmp_path)))
    assert {name: len(split) for name, split in corpus.splits.items()} == {
        "train": 12, "validation": 6, "test": 6, "test_mismatched": 12,
    }  # fmt: skip


def test_incomplete_lines_are_dropped_and_counted(sst2):
    with (sst2 / "train.tsv").open("a") as file:
        file.write("no label here\n")
    corpus = load_corpus(DataArguments(task_name="sst2", data_dir=str(sst2)))
    assert len(corpus.splits["train"]) == 20
    assert "train.tsv: 1 of 21 lines have too few or too many cells and were dropped." in corpus.notes


def test_dev_is_halved_without_labelled_test_and_says_so(sst2):
    corpus = load_corpus(DataArguments(task_name="SST-2", data_dir=str(sst2)))
    dev, test = corpus.splits["validation"], corpus.splits["test"]
    assert not set(dev["sentence1"]) & set(test["sentence1"])
    assert len(dev) == len(test) == 5
    assert corpus.notes == [
        "no labelled test split: the dev split (10 rows) was divided into dev (5) and test (5), stratified, seed 42."
    ]


def test_labelled_test_file_leaves_dev_whole(sst2):
    write(sst2 / "test-labeled.tsv", ["sentence\tlabel", "good\t1", "bad\t0"])
    corpus = load_corpus(DataArguments(task_name="sst2", data_dir=str(sst2)))
    assert len(corpus.splits["validation"]) == 10
    assert len(corpus.splits["test"]) == 2


def test_folder_with_dev_only(sst2):
    (sst2 / "train.tsv").unlink()
    corpus = load_corpus(DataArguments(task_name="sst2", data_dir=str(sst2)))
    assert [len(split) for split in corpus.splits.values()] == [8, 1, 1]
    assert corpus.notes[0] == "no train.tsv: dev.tsv serves as the training rows."


def test_hub_task(monkeypatch):
    def fake_load_dataset(path, name):
        assert (path, name) == ("nyu-mll/glue", "qnli")
        features = Features(
            {
                "question": Value("string"),
                "sentence": Value("string"),
                "label": ClassLabel(names=["a", "b"]),
                "idx": Value("int32"),
            }
        )
        rows = {"question": ["q"] * 8, "sentence": ["s"] * 8, "label": [0, 1] * 4, "idx": list(range(8))}
        return DatasetDict({split: Dataset.from_dict(rows, features) for split in ("train", "validation", "test")})

    monkeypatch.setattr(glue_data, "load_dataset", fake_load_dataset)
    corpus = load_corpus(DataArguments(task_name="qnli"))
    assert corpus.splits["train"].column_names == ["sentence1", "sentence2", "label"]
    assert len(corpus.splits["test"]) == 4
    assert "no labelled test split" in corpus.notes[0]


def test_csv_alone_is_split_three_ways(train_csv):
    corpus = load_corpus(DataArguments(train_file=str(train_csv), test_split=0.2))
    assert [len(corpus.splits[name]) for name in ("train", "validation", "test")] == [42, 6, 12]
    assert corpus.name == "toy"
    assert corpus.label_names == ["HUM", "LOC", "NUM"]
    assert np.bincount(corpus.splits["test"]["label"]).tolist() == [4, 4, 4]
    assert corpus.notes[0] == "no test split: 12 of 60 training rows (20%) taken for it, stratified, seed 42."
    texts = [set(split["sentence1"]) for split in corpus.splits.values()]
    assert not (texts[0] & texts[1] or texts[1] & texts[2] or texts[0] & texts[2])


def test_splits_and_samples_follow_the_seed(train_csv):
    def rows(seed):
        arguments = DataArguments(train_file=str(train_csv), split_seed=seed, max_train_samples=9, max_test_samples=3)
        corpus = load_corpus(arguments)
        assert "train: a stratified sample of 9 of 48 rows" in corpus.notes[-2]
        return [tuple(corpus.splits[name]["sentence1"]) for name in ("train", "validation", "test")]

    assert rows(1) == rows(1)
    assert rows(1) != rows(2)
    assert [len(split) for split in rows(1)] == [9, 6, 3]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_json_pairs_with_whole_number_labels(tmp_path, suffix):
    rows = [{"a": f"x{index}", "b": "y", "class": (10, 9, 2)[index % 3]} for index in range(30)]
    lines = [json.dumps(rows)] if suffix == ".json" else [json.dumps(row) for row in rows]
    path = write(tmp_path / f"rows{suffix}", lines)
    corpus = load_corpus(DataArguments(train_file=str(path), text_columns=["a", "b"], label_column="class"))
    assert corpus.label_names == ["2", "9", "10"]
    assert corpus.text_columns == ["sentence1", "sentence2"]


def test_regression_from_files(tmp_path):
    path = write(tmp_path / "train.csv", ["sentence,label", *(f"s{index},{index / 7}" for index in range(20))])
    assert load_corpus(DataArguments(train_file=str(path), regression=True)).metrics == ("pearson", "spearmanr")
    with pytest.raises(ValueError, match=r"fractional numbers; `--regression`"):
        load_corpus(DataArguments(train_file=str(path)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task_name": "sst3"}, r"`task_name` must be one of cola, mnli.*'sst3'"),
        ({}, "either `task_name`.*or `train_file`"),
        ({"task_name": "sst2", "data_dir": "no/such/folder"}, "`data_dir` must be an existing folder"),
        ({"task_name": "sst2", "train_file": "x.csv"}, "`task_name` and `train_file` exclude each other"),
        ({"train_file": "missing.csv"}, "`train_file` must be an existing file; got 'missing.csv'"),
        ({"train_file": "rows.parquet"}, "`train_file` must end in one of .csv, .tsv"),
        ({"task_name": "sst2", "max_train_samples": 0}, "`max_train_samples` must be at least 1; got 0"),
        ({"task_name": "sst2", "validation_split": 0.7}, "`validation_split` must lie between 0 and 0.5"),
        ({"task_name": "sst2", "text_columns": ["a", "b", "c"]}, "`text_columns` must name one or two"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**arguments)


def test_data_dir_needs_a_task(tmp_path):
    with pytest.raises(ValueError, match="`data_dir` needs `task_name`"):
        DataArguments(train_file="x.csv", data_dir=str(tmp_path))


def test_missing_dev_file_names_what_is_there(tmp_path):
    write(tmp_path / "train.tsv", ["sentence\tlabel", "good\t1"])
    with pytest.raises(ValueError, match=r"has no dev\.tsv; it has train\.tsv"):
        load_corpus(DataArguments(task_name="sst2", data_dir=str(tmp_path)))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["sentence,class", "a,1"], "no column 'label'; the columns are sentence, class"),
        (["sentence,label"], "no rows"),
        (["sentence,label", "a,1", "b,1"], "only the label '1'"),
    ],
)
def test_bad_files(tmp_path, lines, message):
    path = write(tmp_path / "train.csv", lines)
    with pytest.raises(ValueError, match=message):
        load_corpus(DataArguments(train_file=str(path)))


def test_label_that_training_does_not_know(train_csv, tmp_path):
    test = write(tmp_path / "test.csv", ["sentence,label", "a,HUM", "b,ABBR"])
    with pytest.raises(ValueError, match=r"test\.csv: row 2 has the label 'ABBR'; accepted: HUM, LOC, NUM"):
        load_corpus(DataArguments(train_file=str(train_csv), test_file=str(test)))


def test_broken_json(tmp_path):
    path = write(tmp_path / "train.jsonl", ['{"sentence": "a", "label": 1}', "{"])
    with pytest.raises(ValueError, match=r"train\.jsonl: row 2 cannot be read .*neither a json list"):
        load_corpus(DataArguments(train_file=str(path)))


def test_too_few_rows_to_split(tmp_path):
    path = write(tmp_path / "train.csv", ["sentence,label", "a,1", "b,0"])
    with pytest.raises(ValueError, match="both parts need at least one row"):
        load_corpus(DataArguments(train_file=str(path)))


def test_metrics_of_every_task():
    labels = np.array([0, 1, 1, 0])
    logits = np.array([[2.0, 1.0], [0.0, 1.0], [1.0, 0.0], [3.0, 0.0]])
    metrics = make_compute_metrics(("accuracy", "f1", "matthews_correlation"))(
        EvalPrediction((logits, labels), labels)
    )
    assert metrics == pytest.approx({"accuracy": 0.75, "f1": 2 / 3, "matthews_correlation": 0.5773502691896258})
    values = make_compute_metrics(("pearson", "spearmanr"))(
        EvalPrediction(np.array([[1.0], [2.0], [4.0]]), np.arange(3.0))
    )
    assert values["spearmanr"] == pytest.approx(1.0)
    assert values["pearson"] == pytest.approx(0.9819805, abs=1e-6)
    for task in TASKS.values():
        make_compute_metrics(task.metrics)
    with pytest.raises(ValueError, match="'bleu'"):
        make_compute_metrics(("bleu",))
