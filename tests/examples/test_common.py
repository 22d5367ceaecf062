# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Options from files and the command line: what is no option, or no configuration, is refused in words."""

from __future__ import annotations

import json
import logging

import pytest
from arguments import parse_arguments
from common import card_language, earlier_training, fitting_length, read_options
from transformers import BertConfig, PreTrainedTokenizerFast

from transformers_cee import ConsistentEETrainingArguments


def bomb(levels: int) -> str:
    """A list of nine times the list before, and so on: 9 ** levels texts in a few hundred bytes."""
    lines = ["a0: &a0 [" + ", ".join(["lol"] * 9) + "]"]
    lines += [f"a{n}: &a{n} [" + ", ".join([f"*a{n - 1}"] * 9) + "]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", bomb(20), r"cannot be read: aliases \(`\*name`\) are not accepted"),
        ("a.yaml", "a: 1\nb: [1, 2\n", "cannot be read: while parsing"),
        ("a.yaml", "a: " + "[" * 500_000, "values are nested more than 16 deep"),
        ("a.yaml", "a: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        ("a.yaml", b"a: \xff\n", "cannot be read"),
        ("a.yaml", "a: \x00\n", "cannot be read"),
        ("a.yaml", "- a\n", "expected `name: value` pairs; got list"),
        ("a.yaml", "", "expected `name: value` pairs; got NoneType"),
        ("a.yaml", "a: " + "x" * 2**20, "a configuration has at most 1048576"),
        ("a.json", '{"a": 1', "cannot be read as JSON"),
        ("a.json", "[" * 100_000, "cannot be read as JSON"),
        ("a.json", "[1]", "expected `name: value` pairs; got list"),
    ],
)
def test_configurations_that_are_none(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"{name}: .*{message}|{name} .*{message}"):
        read_options(path)


def test_unknown_options_get_the_nearest_known_one(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("learning_rat: 1.0e-4\n")
    with pytest.raises(ValueError, match=r"run\.yaml: unknown option 'learning_rat'; did you mean 'learning_rate'\?"):
        parse_arguments([str(path)])
    needed = ["--model_name_or_path", "m", "--task_name", "sst2", "--output_dir", str(tmp_path)]
    with pytest.raises(ValueError, match=r"unknown option 'exit_thresold'; did you mean 'exit_threshold'\?"):
        parse_arguments([*needed, "--exit_thresold", "0.5"])
    with pytest.raises(ValueError, match="Words that belong to no option: stray"):
        parse_arguments(["stray", *needed])
    path.write_text(json.dumps({"exit_layers": [[1], [2]]}))
    with pytest.raises(
        ValueError, match=r"`exit_layers` has \[\[1\], \[2\]\]; accepted are lists of texts and numbers"
    ):
        parse_arguments([str(path), *needed])


def test_rows_are_as_long_as_the_model_has_positions(caplog):
    class Tokenizer:
        model_max_length = 10**30

    logger, config = logging.getLogger("lengths"), BertConfig(max_position_embeddings=64)
    assert fitting_length(64, Tokenizer(), config, logger) == 64
    assert not caplog.records
    assert fitting_length(65, Tokenizer(), config, logger) == 64
    assert "--max_seq_length 65 is more than the model's 64 positions; 64 is used." in caplog.text
    Tokenizer.model_max_length = 32
    assert fitting_length(64, Tokenizer(), config, logger) == 32
    assert PreTrainedTokenizerFast.model_input_names


@pytest.mark.parametrize("content", [b"", b'{"train"', b"\xff", b"[]", b"[" * 100_000])
def test_damaged_records_stop_no_evaluation(tmp_path, content, caplog):
    (tmp_path / "results.json").write_bytes(content)
    args = ConsistentEETrainingArguments(str(tmp_path), use_cpu=True)
    assert earlier_training(args, logging.getLogger("records")) == {}
    assert content == b"[]" or "results.json cannot be read as JSON" in caplog.text


def test_language_of_a_card(tmp_path):
    assert card_language("de", str(tmp_path), "en") == "de"
    assert card_language(None, str(tmp_path), "en") == "en"
    assert card_language(None, str(tmp_path)) is None
    assert card_language(None, "google-bert/bert-base-uncased") is None
    for text, language in (
        ("---\nlanguage: fr\n---\n", "fr"), ("---\nlicense: mit\n---\n", None), ("no card\n", None),
        ("---\nlanguage: [fr\n---\n", None), ("---\n- a\n---\n", None),
    ):  # fmt: skip
        (tmp_path / "README.md").write_text(text)
        assert card_language(None, str(tmp_path)) == language
