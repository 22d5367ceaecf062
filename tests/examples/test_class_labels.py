# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Labels keep their meaning: from the cells of a file to the classes of a checkpoint."""

from __future__ import annotations

import json

import numpy as np
import pytest
from class_labels import match_labels
from glue_data import DataArguments, load_corpus, make_compute_metrics
from transformers import BertConfig, EvalPrediction


SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"


def config_with(names, problem_type=SINGLE, architecture="BertForSequenceClassification"):
    made = BertConfig(id2label=dict(enumerate(names)), architectures=[architecture], problem_type=problem_type)
    made.label2id = {name: index for index, name in enumerate(names)}
    return made


def load(path, **options):
    return load_corpus(DataArguments(train_file=str(path), validation_split=0.2, test_split=0.2, **options))


def write_json(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


class TestMatching:
    @pytest.mark.parametrize("trains", [True, False])
    @pytest.mark.parametrize("replace_heads", [True, False])
    def test_by_name_in_another_order(self, trains, replace_heads):
        match = match_labels(["a", "b", "c"], SINGLE, config_with(["c", "a", "b"]), trains, replace_heads)
        assert (match.names, match.ids, match.is_new) == (["c", "a", "b"], [1, 2, 0], False)
        assert "a → a (1)" in match.note

    def test_the_same_order_is_nothing_to_tell(self):
        match = match_labels(["a", "b"], SINGLE, config_with(["a", "b"]), True, False)
        assert (match.ids, match.note) == ([0, 1], None)

    def test_by_name_in_other_case(self):
        match = match_labels(["negative", "positive"], SINGLE, config_with(["POSITIVE", "NEGATIVE"]), False, False)
        assert (match.names, match.ids) == (["POSITIVE", "NEGATIVE"], [1, 0])

    def test_data_that_lacks_a_class(self):
        match = match_labels(["a", "c"], SINGLE, config_with(["c", "b", "a"]), False, False)
        assert (match.names, match.ids) == (["c", "b", "a"], [2, 0])

    def test_numbers_are_ids_of_as_many_classes(self):
        match = match_labels(["0", "1"], SINGLE, config_with(["negative", "positive"]), False, False)
        assert (match.names, match.ids) == (["negative", "positive"], [0, 1])
        assert "0 → negative (0)" in match.note

    def test_numbers_as_names_are_names(self):
        match = match_labels(["2", "9", "10"], SINGLE, config_with(["10", "9", "2"]), False, False)
        assert match.ids == [2, 1, 0]

    @pytest.mark.parametrize("names", [["LABEL_0", "LABEL_1"], ["0", "1"]])
    def test_positions_stand_for_names_and_it_is_said(self, names):
        match = match_labels(["negative", "positive"], SINGLE, config_with(names), False, False)
        assert (match.names, match.ids) == (["negative", "positive"], [0, 1])
        assert "stand for those of the data (negative, positive) in this order" in match.note

    def test_other_names_are_not_evaluated(self):
        with pytest.raises(ValueError, match="knows the labels spam, ham; those of the data are a, b"):
            match_labels(["a", "b"], SINGLE, config_with(["spam", "ham"]), False, False)

    def test_other_names_are_learned_and_it_is_said(self):
        match = match_labels(["a", "b"], SINGLE, config_with(["spam", "ham"]), True, False)
        assert (match.names, match.is_new) == (["a", "b"], False)
        assert "(spam, ham) stand for those of the data (a, b)" in match.note

    def test_another_number_of_classes(self):
        checkpoint = config_with(["x", "y"])
        with pytest.raises(
            ValueError, match=r"heads are for x, y, the data has a, b, c\. Pass `--ignore_mismatched_sizes`"
        ):
            match_labels(["a", "b", "c"], SINGLE, checkpoint, True, False)
        with pytest.raises(ValueError, match=r"knows x, y; the data has a, b, c.*`--do_train`"):
            match_labels(["a", "b", "c"], SINGLE, checkpoint, False, True)
        match = match_labels(["a", "b", "c"], SINGLE, checkpoint, True, True)
        assert match.is_new and "start anew, for a, b, c" in match.note

    def test_a_number_and_classes(self):
        score = config_with(["LABEL_0"], REGRESSION)
        assert match_labels([], REGRESSION, score, False, False).note is None
        with pytest.raises(ValueError, match=r"is for regression .*nothing to evaluate"):
            match_labels(["a", "b"], SINGLE, score, False, False)
        with pytest.raises(ValueError, match=r"heads are for a, b, the data has a number"):
            match_labels([], REGRESSION, config_with(["a", "b"]), True, False)
        with pytest.raises(ValueError, match=r"is for single_label_classification .* for multi_label_classification"):
            match_labels(["a", "b"], MULTI, config_with(["a", "b"]), False, False)

    def test_an_encoder_without_a_head_has_no_say(self):
        match = match_labels(["a", "b", "c"], SINGLE, config_with(["x", "y"], None, "BertModel"), True, False)
        assert (match.names, match.is_new, match.note) == (["a", "b", "c"], False, None)


class TestCorpora:
    def test_relabelled_rows_keep_their_names(self, tmp_path):
        rows = [{"text": f"t{index}", "label": "abc"[index % 3]} for index in range(30)]
        corpus = load(write_json(tmp_path / "rows.jsonl", rows))
        before = {row["sentence1"]: "abc"[row["label"]] for split in corpus.splits.values() for row in split}
        corpus.relabel(["c", "z", "b", "a"], [3, 2, 0])
        assert corpus.label_names == ["c", "z", "b", "a"]
        for split in corpus.splits.values():
            assert split.features["label"].names == ["c", "z", "b", "a"]
        assert before == {row["sentence1"]: "czba"[row["label"]] for split in corpus.splits.values() for row in split}

    def test_lists_are_several_labels(self, tmp_path):
        labels = [["a"], ["a", "b"], [], ["c"], ["b", "c"]]
        rows = [{"text": f"t{index}", "label": labels[index % 5]} for index in range(30)]
        corpus = load(write_json(tmp_path / "rows.jsonl", rows))
        assert (corpus.label_names, corpus.problem_type) == (["a", "b", "c"], MULTI)
        assert corpus.metrics == ("f1_micro", "accuracy")
        wanted = {row["text"]: [float(name in row["label"]) for name in "abc"] for row in rows}
        found = {row["sentence1"]: row["label"] for split in corpus.splits.values() for row in split}
        assert found == wanted
        corpus.relabel(["b", "c", "a"], [2, 0, 1])
        found = {row["sentence1"]: row["label"] for split in corpus.splits.values() for row in split}
        assert found == {name: [row[1], row[2], row[0]] for name, row in wanted.items()}

    def test_whole_numbers_in_a_table_of_fractional_ones(self, tmp_path):
        rows = [{"text": f"t{index}", "label": float(index % 2)} for index in range(30)]
        assert load(write_json(tmp_path / "rows.jsonl", rows)).label_names == ["0", "1"]

    @pytest.mark.parametrize("separator", [",", "\t"])
    def test_whole_numbers_as_pandas_writes_them(self, tmp_path, separator):
        """Numbers of a column with a gap; sorted as numbers, and files of both kinds go together."""
        name = "csv" if separator == "," else "tsv"
        train, test = tmp_path / f"train.{name}", tmp_path / f"test.{name}"
        labels = ["2.0", "10.0", "-1.00", "+2.0"]
        rows = [f"t{index}{separator}{labels[index % 4]}" for index in range(40)]
        train.write_text("\n".join([f"text{separator}label", *rows]))
        test.write_text(
            "\n".join([f"text{separator}label", f"a{separator}10.0", f"b{separator}2", f"c{separator}-1.0"])
        )
        corpus = load(train, test_file=str(test))
        assert corpus.label_names == ["-1", "2", "10"]
        assert [row["label"] for row in corpus.splits["test"]] == [2, 1, 0]
        wanted = {f"t{index}": [1, 2, 0, 1][index % 4] for index in range(40)}
        found = {row["sentence1"]: row["label"] for name in ("train", "validation") for row in corpus.splits[name]}
        assert found == wanted

    def test_whole_numbers_written_so_in_one_file_only(self, tmp_path):
        for label in ("{}", "c{}"):
            train, test = tmp_path / "train.csv", tmp_path / "test.csv"
            train.write_text("text,label\n" + "".join(f"t{index},{label.format(index % 2)}\n" for index in range(20)))
            test.write_text("text,label\na,1.0\nb,0.0\n")
            assert [row["label"] for row in load(train, test_file=str(test)).splits["test"]] == [1, 0]
            test.write_text("text,label\na,1.5\n")
            with pytest.raises(ValueError, match=r"test\.csv: row 1 has the label '1\.5'; accepted: c?0, c?1"):
                load(train, test_file=str(test))

    @pytest.mark.parametrize("labels", [["1.0", "1.5"], ["0.5", "1.5"], ["1", "2.5"], ["1e0", "2.0"]])
    def test_fractional_numbers_are_refused(self, tmp_path, labels):
        path = tmp_path / "rows.csv"
        path.write_text("text,label\n" + "".join(f"t{index},{labels[index % 2]}\n" for index in range(20)))
        with pytest.raises(ValueError, match=r"the labels in 'label' are fractional numbers; `--regression`"):
            load(path)

    def test_one_number_written_twice_is_one_label(self, tmp_path):
        path = tmp_path / "rows.csv"
        path.write_text("text,label\n" + "a,1\nb,1.0\n" * 10)
        with pytest.raises(ValueError, match=r"has only the label '1'; two classes"):
            load(path)

    def test_names_that_look_like_numbers_stay(self, tmp_path):
        path = tmp_path / "rows.csv"
        path.write_text("text,label\n" + "a,1.0\nb,none\n" * 10)
        assert load(path).label_names == ["1.0", "none"]

    @pytest.mark.parametrize(
        ("label", "message"),
        [
            ("", "row 3 has no label"),
            ("  ", "row 3 has no label"),
            (None, "row 3 has no label"),
            (float("nan"), "row 3 has the label nan"),
            ({"a": 1}, r"row 3 has the label {'a': 1}"),
            (["a"], r"row 1 has the label 'a'; other rows have lists"),
        ],
    )
    def test_labels_that_are_none(self, tmp_path, label, message):
        rows = [{"text": f"t{index}", "label": label if index == 2 else "ab"[index % 2]} for index in range(30)]
        path = write_json(tmp_path / "rows.jsonl", rows)
        with pytest.raises(ValueError, match=rf"rows\.jsonl: {message}"):
            load(path)

    @pytest.mark.parametrize("labels", [["a", "a"], ["a", ""], ["a", 1.5, None], "a"])
    def test_lists_that_are_none(self, tmp_path, labels):
        rows = [{"text": f"t{index}", "label": labels if index == 4 else ["a", "b"]} for index in range(30)]
        with pytest.raises(ValueError, match=r"rows\.jsonl: row 5 "):
            load(write_json(tmp_path / "rows.jsonl", rows))

    def test_an_empty_cell_of_a_table(self, tmp_path):
        path = tmp_path / "rows.csv"
        path.write_text("text,label\n" + "a,x\nb,y\n" * 10 + "c,\n")
        with pytest.raises(ValueError, match=r"rows\.csv: row 21 has no label"):
            load(path)

    @pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e999", "1e39", "high", "", "--5"])
    def test_targets_that_are_no_finite_number(self, tmp_path, value):
        path = tmp_path / "rows.csv"
        path.write_text("text,label\n" + "a,0.5\n" * 10 + f"b,{value}\n")
        with pytest.raises(ValueError, match=rf"rows\.csv: row 11 has the label '{value}'"):
            load(path, regression=True)

    def test_minus_signs_make_no_number(self, tmp_path):
        path = tmp_path / "rows.csv"
        path.write_text("text,label\n" + "a,--5\nb,-5\n" * 10)
        assert load(path).label_names == ["--5", "-5"]

    def test_a_later_row_without_the_column(self, tmp_path):
        path = write_json(tmp_path / "rows.jsonl", [{"text": "a", "label": "x"}, {"text": "b"}, {"label": "y"}])
        with pytest.raises(ValueError, match=r"rows\.jsonl: row 2 has no 'label'; it has 'text'"):
            load(path)
        path = write_json(tmp_path / "more.jsonl", [{"text": "a", "label": "x"}, {"text": None, "label": "y"}])
        with pytest.raises(ValueError, match=r"more\.jsonl: row 2 has no text in 'text'"):
            load(path)

    def test_an_unknown_label_of_several(self, tmp_path):
        train = write_json(tmp_path / "train.jsonl", [{"text": "t", "label": ["a", "b"]}] * 9)
        test = write_json(tmp_path / "test.jsonl", [{"text": "t", "label": ["a"]}, {"text": "t", "label": ["a", "z"]}])
        with pytest.raises(ValueError, match=r"test\.jsonl: row 2 has the label 'z'; accepted: a, b"):
            load(train, test_file=str(test))


class TestTextColumns:
    @pytest.mark.parametrize(
        ("names", "expected"),
        [
            (["text", "label"], ["text"]),
            (["label", "id", "text"], ["text"]),
            (["id", "sentence", "label"], ["sentence"]),
            (["sentence1", "sentence2", "label", "idx"], ["sentence1", "sentence2"]),
            (["question", "label"], ["question"]),
        ],
    )
    def test_known_columns(self, tmp_path, names, expected):
        rows = [
            {name: "xy"[index % 2] if name == "label" else f"{name} {index}" for name in names} for index in range(9)
        ]
        corpus = load(write_json(tmp_path / "rows.jsonl", rows))
        texts = {row["sentence1"] for split in corpus.splits.values() for row in split}
        assert texts == {f"{expected[0]} {index}" for index in range(9)}
        assert len(corpus.text_columns) == len(expected)

    def test_several_that_could_be_it(self, tmp_path):
        path = write_json(tmp_path / "rows.jsonl", [{"id": "1", "question": "q", "label": "x"}] * 9)
        with pytest.raises(
            ValueError, match="columns are 'id', 'question', 'label'; name those of the texts by `text_c"
        ):
            load(path)


def test_metrics_of_several_labels():
    labels = np.array([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    logits = np.array([[2.0, -1.0, 1.0], [-1.0, -2.0, -3.0], [1.0, 2.0, -1.0]])
    metrics = make_compute_metrics(("f1_micro", "accuracy"))(EvalPrediction(logits, labels))
    assert metrics == pytest.approx({"f1_micro": 2 * 3 / (2 * 3 + 1), "accuracy": 2 / 3})
