# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Formatting, masking, cutting and splitting of text for language models."""

from __future__ import annotations

import csv
import json

import clm_data
import pytest
from clm_data import TextArguments, encode_pair, find_columns, fit_prompt, load_text_corpus, prompt_ids
from tiny_lm import instructions, word_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture
def alpaca(tmp_path):
    """40 rows in a json list, as Alpaca comes."""
    path = tmp_path / "alpaca.json"
    path.write_text(json.dumps(instructions(40)))
    return path


def test_answers_follow_prompts_and_end(tokenizer):
    row = encode_pair([7, 8, 9], [11, 12], eos=2, max_length=10, loss_on_prompt=False)
    assert row == {"input_ids": [7, 8, 9, 11, 12, 2], "labels": [-100] * 3 + [11, 12, 2], "prompt_length": 3}


def test_an_answer_that_is_cut_does_not_end():
    row = encode_pair([7, 8, 9], [11, 12, 13], eos=2, max_length=5, loss_on_prompt=False)
    assert row["input_ids"] == [7, 8, 9, 11, 12]
    assert row["labels"] == [-100, -100, -100, 11, 12]


def test_prompts_are_learned_on_request():
    row = encode_pair([7, 8], [11, 2], eos=2, max_length=10, loss_on_prompt=True)
    assert row["labels"] == row["input_ids"] == [7, 8, 11, 2]


def test_chat_prompts_end_where_the_answer_starts(tokenizer):
    ids = prompt_ids(tokenizer, "chat", "name two cats .", "red cats")
    assert tokenizer.convert_ids_to_tokens(ids) == [
        "<user>", "name", "two", "cats", ".", "red", "cats", "<end>", "<assistant>",
    ]  # fmt: skip


def test_alpaca_prompts_have_an_input_only_where_there_is_one(tokenizer, monkeypatch):
    seen = []
    monkeypatch.setattr(clm_data, "_tokens", lambda tokenizer, text: seen.append(text) or [1])
    prompt_ids(tokenizer, "alpaca", "Add.", "1 and 2")
    prompt_ids(tokenizer, "alpaca", "Sing.")
    assert seen[0].endswith("### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n")
    assert "### Input" not in seen[1]
    assert seen[1].endswith("### Instruction:\nSing.\n\n### Response:\n")


def test_tokenizers_that_end_every_text_do_not_end_prompts(tokenizer):
    class Ending:
        eos_token_id = 2

        def __call__(self, text):
            return {"input_ids": [5, 6, 2]}

    assert prompt_ids(Ending(), "plain", "anything") == [5, 6]


def test_long_prompts_lose_the_end_of_their_input(tokenizer):
    whole = prompt_ids(tokenizer, "chat", "name two .", "red cats that run")
    ids, cut = fit_prompt(tokenizer, "chat", "name two .", "red cats that run", len(whole) - 2)
    assert cut
    assert ids == prompt_ids(tokenizer, "chat", "name two .", "red cats")
    assert fit_prompt(tokenizer, "chat", "name two .", "red cats that run", len(whole)) == (whole, False)
    ids, cut = fit_prompt(tokenizer, "chat", "name two red cats", "", 5)
    assert tokenizer.convert_ids_to_tokens(ids) == ["<user>", "name", "two", "<end>", "<assistant>"]
    with pytest.raises(ValueError, match=r"`max_prompt_length` 3 is too small: the prompt format 'chat'"):
        fit_prompt(tokenizer, "chat", "name", "red", 3)


def test_corpus_of_instructions(tokenizer, alpaca):
    args = TextArguments(train_file=str(alpaca), validation_split=0.1, test_split=0.2, max_seq_length=32)
    corpus = load_text_corpus(args, tokenizer)
    assert corpus.prompt_format == "chat"
    assert {name: len(rows) for name, rows in corpus.splits.items()} == {"train": 28, "validation": 4, "test": 8}
    assert corpus.notes == [
        "no test split: 8 of 40 training rows (20%) taken for it, seed 42.",
        "no validation split: 4 of 40 training rows (10%) taken for it, seed 43.",
    ]
    for row in corpus.splits["train"]:
        length = row["prompt_length"]
        assert row["labels"] == [-100] * length + row["input_ids"][length:]
        assert row["input_ids"][length - 1] == tokenizer.convert_tokens_to_ids("<assistant>")
        assert row["labels"][-1] == tokenizer.eos_token_id
    prompts, answers = corpus.prompts_and_answers("test", 3)
    assert len(prompts) == len(answers) == 3
    assert tokenizer.decode(answers[0], skip_special_tokens=True).startswith("the ")


def test_splits_are_the_same_every_time(tokenizer, alpaca):
    def rows(**options):
        args = TextArguments(train_file=str(alpaca), test_split=0.2, max_seq_length=32, **options)
        corpus = load_text_corpus(args, tokenizer)
        return {name: part["input_ids"][:] for name, part in corpus.splits.items()}

    once = rows()
    assert rows() == once
    assert rows(split_seed=7)["test"] != once["test"]
    # A smaller training sample leaves the test split alone.
    smaller = rows(max_train_samples=5)
    assert smaller["test"] == once["test"]
    assert len(smaller["train"]) == 5


def test_what_is_cut_is_noted(tokenizer, alpaca):
    args = TextArguments(train_file=str(alpaca), max_seq_length=11, max_prompt_length=8)
    notes = load_text_corpus(args, tokenizer).notes
    assert any(note.startswith("train: ") and "prompts cut to 8 tokens" in note for note in notes)
    assert any("answers cut to 11 tokens, prompt included" in note for note in notes)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["instruction", "input", "output"], ("instruction", "input", "output")),
        (["instruction", "context", "response", "category"], ("instruction", "context", "response")),
        (["prompt", "answer"], ("prompt", None, "answer")),
        (["article", "highlights", "id"], (None, "article", "highlights")),
        (["document", "summary"], (None, "document", "summary")),
    ],
)
def test_known_columns(columns, expected):
    found = find_columns(columns)
    assert (found.prompt, found.input, found.answer) == expected


def test_summaries_and_named_columns_from_csv(tokenizer, tmp_path):
    path = tmp_path / "train.csv"
    with path.open("w", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow(["body", "short"])
        writer.writerows([["red cats that run", "cats run"]] * 12 + [["blue fish", ""]])
    args = TextArguments(
        train_file=str(path), input_column="body", answer_column="short", instruction="short text :", max_seq_length=24
    )
    corpus = load_text_corpus(args, tokenizer)
    assert corpus.notes[0] == "train: 1 rows without 'short' were dropped."
    row = corpus.splits["train"][0]
    assert tokenizer.decode(row["input_ids"][:4]).split() == ["<user>", "short", "text", ":"]
    assert tokenizer.decode(row["input_ids"][row["prompt_length"] :]).split() == ["cats", "run", "<end>"]


def test_plain_text_is_cut_into_stretches(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    line = " ".join(["red", "cats", "run", "."] * 6)
    path.write_text(f"{line}\n\n" * 10)
    args = TextArguments(train_file=str(path), max_seq_length=10, text_prompt_length=4, test_split=0.1)
    corpus = load_text_corpus(args, tokenizer)
    assert corpus.is_plain
    assert corpus.prompt_format is None
    # 24 tokens a line: two stretches of 10, and 4 tokens that are no longer than a prompt.
    assert {name: len(rows) for name, rows in corpus.splits.items()} == {"train": 16, "validation": 2, "test": 2}
    row = corpus.splits["train"][0]
    assert len(row["input_ids"]) == 10
    assert row["labels"] == row["input_ids"]
    prompts, answers = corpus.prompts_and_answers("test")
    assert [len(prompts[0]), len(answers[0])] == [4, 6]


def test_given_splits_are_kept(tokenizer, tmp_path):
    paths = {}
    for name, count in (("train", 6), ("validation", 3), ("test", 2)):
        paths[f"{name}_file"] = str(tmp_path / f"{name}.jsonl")
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, instructions(count))))
    corpus = load_text_corpus(TextArguments(**paths, max_seq_length=32), tokenizer)
    assert {name: len(rows) for name, rows in corpus.splits.items()} == {"train": 6, "validation": 3, "test": 2}
    assert corpus.notes == []


def test_data_sets_of_the_hub(tokenizer, monkeypatch):
    from datasets import Dataset, DatasetDict

    calls = []
    raw = DatasetDict({"train": Dataset.from_list(instructions(20)), "extra": Dataset.from_list(instructions(2))})
    monkeypatch.setattr(clm_data, "load_dataset", lambda *names: calls.append(names) or raw)
    corpus = load_text_corpus(TextArguments(dataset_name="someone/alpaca", max_seq_length=32), tokenizer)
    assert calls == [("someone/alpaca", None)]
    assert corpus.name == "someone/alpaca"
    assert set(corpus.splits) == {"train", "validation", "test"}


def test_tokenizers_without_a_template_get_the_alpaca_prompt():
    tokenizer = word_tokenizer(chat=False)
    assert clm_data.choose_format(None, tokenizer) == "alpaca"
    with pytest.raises(ValueError, match="`prompt_format` 'chat' needs a tokenizer with a chat template"):
        clm_data.choose_format("chat", tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Give either `dataset_name` or `train_file`; got neither"),
        ({"dataset_name": "a/b", "train_file": "x.txt"}, "`dataset_name` and `train_file` exclude each other"),
        ({"train_file": "missing.json"}, "`train_file` must be an existing file; got 'missing.json'"),
        ({"train_file": "rows.parquet"}, "`train_file` must end in one of"),
        ({"dataset_name": "a/b", "prompt_format": "poem"}, "`prompt_format` must be among chat, alpaca, plain"),
        ({"dataset_name": "a/b", "max_seq_length": 1}, "`max_seq_length` must be at least 2; got 1"),
        ({"dataset_name": "a/b", "max_prompt_length": 600}, r"`max_prompt_length` must lie in 1..511 .*; got 600"),
        ({"dataset_name": "a/b", "test_split": 0.6}, "`test_split` must lie between 0 and 0.5"),
        ({"dataset_name": "a/b", "max_train_samples": 0}, "`max_train_samples` must be at least 1; got 0"),
        ({"dataset_name": "a/b", "prompt_column": "q"}, "`prompt_column` and `input_column` need `answer_column`"),
        ({"dataset_name": "a/b", "text_column": "t", "answer_column": "a"}, "`text_column` and `answer_column` excl"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TextArguments(**options)


def test_files_of_different_types(tmp_path):
    for name in ("a.txt", "b.json"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="`train_file` and its siblings must be of one type"):
        TextArguments(train_file=str(tmp_path / "a.txt"), test_file=str(tmp_path / "b.json"))


def test_columns_that_are_not_there(tokenizer, alpaca):
    with pytest.raises(ValueError, match="No column 'answer'; the columns are instruction, input, output"):
        load_text_corpus(TextArguments(train_file=str(alpaca), answer_column="answer"), tokenizer)
    with pytest.raises(ValueError, match="None of the known sets of columns is among a, b"):
        find_columns(["a", "b"])


def test_text_that_is_too_short(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("red cats\n" * 10)
    with pytest.raises(ValueError, match="The split 'train' has no row left"):
        load_text_corpus(TextArguments(train_file=str(path), text_prompt_length=8), tokenizer)
    with pytest.raises(ValueError, match="`text_prompt_length` must be below `max_seq_length` 512; got 512"):
        load_text_corpus(TextArguments(train_file=str(path), text_prompt_length=512), tokenizer)
    path.write_text("red cats\n")
    with pytest.raises(ValueError, match="Cannot take 1 of 1 training rows for test"):
        load_text_corpus(TextArguments(train_file=str(path)), tokenizer)


def test_tokenizers_need_an_end(tokenizer, alpaca):
    endless = word_tokenizer()
    endless.eos_token = None
    with pytest.raises(ValueError, match="has no end-of-sequence token"):
        load_text_corpus(TextArguments(train_file=str(alpaca)), endless)
