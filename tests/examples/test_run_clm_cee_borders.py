# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The language model script where files, criteria and what is installed differ from the usual."""

from __future__ import annotations

import json
import sys

import pytest
import run_clm_cee
from clm_data import TextArguments, load_text_corpus
from test_run_clm_cee import make_options, words
from tiny_lm import instructions, save_checkpoint, word_tokenizer


pytest.importorskip("rouge_score")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "tiny.json"
    path.write_text(json.dumps(instructions(40)))
    return path


def evaluation(checkpoint, rows, output, **more):
    options = make_options(checkpoint, rows, output) | {
        "do_train": False, "criteria": ["margin"], "eval_depths": [3], "max_new_tokens": 2, "eval_batch_sizes": [1],
    }  # fmt: skip
    return words(options | more)


class TestCriteria:
    def test_those_that_need_it_are_fitted(self, checkpoint, rows, tmp_path):
        criteria = ["state_classifier", "learning_to_exit", "state_similarity"]
        results = run_clm_cee.main(evaluation(checkpoint, rows, tmp_path, criteria=criteria))
        assert set(results["curves"]) == set(criteria)

    @pytest.mark.parametrize("criterion", ["consistency", "calibrated_probability"])
    def test_those_that_cannot_be_fitted_are_refused_before_anything_is_read(
        self, checkpoint, rows, tmp_path, criterion, monkeypatch
    ):
        monkeypatch.setattr(run_clm_cee, "load_text_corpus", None)
        with pytest.raises(ValueError, match=f"`criteria` has '{criterion}', whose estimator this checkpoint lacks"):
            run_clm_cee.main(evaluation(checkpoint, rows, tmp_path, criteria=["margin", criterion]))

    @pytest.mark.parametrize("criterion", ["oracle", "token_hash"])
    def test_those_that_generation_cannot_ask(self, checkpoint, rows, tmp_path, criterion):
        with pytest.raises(ValueError, match=f"`criteria` must be among .*; got '{criterion}'"):
            run_clm_cee.main(evaluation(checkpoint, rows, tmp_path, criteria=[criterion]))

    def test_depths_beyond_the_model_are_refused_before_anything_is_read(
        self, checkpoint, rows, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(run_clm_cee, "load_text_corpus", None)
        with pytest.raises(ValueError, match=r"`eval_depths` must lie in 1\.\.4"):
            run_clm_cee.main(evaluation(checkpoint, rows, tmp_path, eval_depths=[9]))


class TestRecords:
    def test_without_matplotlib_everything_else_is_there(self, checkpoint, rows, tmp_path, capsys, monkeypatch):
        for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        run_clm_cee.main(evaluation(checkpoint, rows, tmp_path))
        told = capsys.readouterr().out
        assert told.index("No pictures will be drawn: matplotlib is missing") < told.index("rows {'train': 24")
        assert json.loads((tmp_path / "results.json").read_text())["curves"].keys() == {"margin"}
        card = (tmp_path / "README.md").read_text()
        assert "curve.png" not in card
        assert "language:" not in card

    def test_results_and_card_come_first(self, checkpoint, rows, tmp_path, monkeypatch):
        def fail(*arguments, **options):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(run_clm_cee, "plot_generation", fail)
        with pytest.raises(OSError, match="No space left"):
            run_clm_cee.main(evaluation(checkpoint, rows, tmp_path, language="en"))
        assert json.loads((tmp_path / "results.json").read_text())["curves"]
        assert "language: en" in (tmp_path / "README.md").read_text()

    def test_a_full_disk_leaves_the_records_as_they_were(self, checkpoint, rows, tmp_path, monkeypatch):
        run_clm_cee.main(evaluation(checkpoint, rows, tmp_path))
        before = {name: (tmp_path / name).read_bytes() for name in ("results.json", "answers.jsonl")}
        decode = run_clm_cee.GenerationBenchmark.measure

        class Full(list):
            def __iter__(self):
                yield self[0]
                raise OSError(28, "No space left on device")

        def measure(self, *arguments, **options):
            point = decode(self, *arguments, **options)
            self.references = Full(self.references)
            return point

        monkeypatch.setattr(run_clm_cee.GenerationBenchmark, "measure", measure)
        with pytest.raises(OSError, match="No space left"):
            run_clm_cee.main(evaluation(checkpoint, rows, tmp_path))
        assert (tmp_path / "answers.jsonl").read_bytes() == before["answers.jsonl"]
        assert not list(tmp_path.glob("*.part*"))

    @pytest.mark.parametrize("content", ["", '{"train"', "[" * 100_000])
    def test_a_damaged_record_is_written_anew(self, checkpoint, rows, tmp_path, content, capsys):
        (tmp_path / "results.json").write_text(content)
        run_clm_cee.main(evaluation(checkpoint, rows, tmp_path))
        assert "results.json cannot be read as JSON" in capsys.readouterr().out
        assert json.loads((tmp_path / "results.json").read_text())["curves"]


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


class TestText:
    def load(self, path, tokenizer, **options):
        return load_text_corpus(TextArguments(train_file=str(path), max_seq_length=32, **options), tokenizer)

    def test_more_tokens_than_positions(self, checkpoint, rows, tmp_path, capsys):
        run_clm_cee.main(evaluation(checkpoint, rows, tmp_path, max_seq_length=4096))
        assert "--max_seq_length 4096 is more than the model's 128 positions; 128 is used." in capsys.readouterr().out

    def test_prompts_keep_their_share(self):
        args = TextArguments(dataset_name="a/b", max_seq_length=4096)
        args.limit_lengths(128)
        assert (args.max_seq_length, args.max_prompt_length) == (128, 96)
        args = TextArguments(dataset_name="a/b", max_seq_length=4096, max_prompt_length=256)
        with pytest.raises(ValueError, match=r"`max_prompt_length` must lie in 1\.\.127"):
            args.limit_lengths(128)

    def test_other_line_ends_and_dates_stay_in_the_text(self, tokenizer, tmp_path):
        path = tmp_path / "rows.jsonl"
        texts = ["red\u2028cats", "2020-01-01", "blue\x85fish"]
        path.write_text(
            "\n".join(
                json.dumps({"prompt": "name", "answer": texts[index % 3]}, ensure_ascii=False) for index in range(30)
            ),
            encoding="utf-8",
        )
        seen = []
        original = tokenizer.__class__.__call__

        def spy(self, text, *arguments, **options):
            seen.append(text)
            return original(self, text, *arguments, **options)

        tokenizer_class = type("Spy", (tokenizer.__class__,), {"__call__": spy})
        spied = word_tokenizer()
        spied.__class__ = tokenizer_class
        corpus = self.load(path, spied)
        assert sum(map(len, corpus.splits.values())) == 30
        assert set(texts) <= {text for text in seen if isinstance(text, str)}

    def test_numbers_are_answers_too(self, tokenizer, tmp_path):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(json.dumps({"question": "name", "answer": index % 2}) for index in range(30)))
        corpus = self.load(path, tokenizer)
        assert corpus.notes[0].startswith("no test split: "), "0 is an answer"

    def test_rows_without_anything_to_answer_are_dropped_and_counted(self, tokenizer, tmp_path):
        rows = instructions(30)
        del rows[1]["output"], rows[2]["input"], rows[3]["instruction"], rows[3]["input"]
        rows[4]["output"] = None
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        notes = self.load(path, tokenizer).notes
        assert notes[:2] == [
            "train: 2 rows without 'output' were dropped.",
            "train: 1 rows without 'instruction' and 'input' were dropped.",
        ]

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("rows.jsonl", '{"prompt": "a", "answer": "b"}\n{"prompt": "a", "answer"', "row 2 cannot be read"),
            ("rows.jsonl", '{"prompt": "a", "answer": "b"}\n7\n', "row 2 is 7; accepted are objects"),
            ("rows.json", '[{"prompt": "a", "answer": "b"}, ["a"]]', r"row 2 is \['a'\]; accepted are objects"),
            ("rows.csv", "prompt,answer\na,b\na\n", r"row 2 .* has 1 cells"),
            ("rows.csv", "prompt,answer\na,b\na,b,c\n", r"row 2 .* has 3 cells"),
            ("rows.txt", b"one\n\xff\xfe\n", "line 2 is not in UTF-8"),
            ("rows.jsonl", "", "no rows"),
        ],
    )
    def test_damaged_files(self, tokenizer, tmp_path, name, content, message):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ValueError, match=rf"{name}: {message}"):
            self.load(path, tokenizer)

    def test_lists_are_no_text(self, tokenizer, tmp_path):
        path = tmp_path / "rows.jsonl"
        path.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": ["a"], "answer": "b"}\n')
        with pytest.raises(ValueError, match=r"rows\.jsonl: row 2 has a list in 'prompt'"):
            self.load(path, tokenizer)

    def test_a_test_file_without_the_column(self, tokenizer, tmp_path):
        for name, key in (("train", "answer"), ("test", "reply")):
            (tmp_path / f"{name}.jsonl").write_text("\n".join([json.dumps({"prompt": "a", key: "b"})] * 30))
        with pytest.raises(ValueError, match=r"test\.jsonl: No column 'answer'; the columns are prompt, reply"):
            self.load(tmp_path / "train.jsonl", tokenizer, test_file=str(tmp_path / "test.jsonl"))
