# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The command that counts how often promises are kept, on synthetic files."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from populations import population
from safetensors.torch import save_file

from transformers_cee.calibration.budget import calibrate_budget


@pytest.fixture(scope="module")
def command():
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "calibration_coverage.py"
    spec = importlib.util.spec_from_file_location("calibration_coverage", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(command, path, criterion="max_probability", rows=400, name=""):
    made = population(rows, criterion=criterion, seed=5)
    # Which class a disagreement is does not matter.
    command.write_scores(path, criterion, made.scores, made.disagrees.long(), made.losses == 0, made.layers, name)
    return made


def test_files_round_trip(command, tmp_path):
    made = write(command, tmp_path / "exits.safetensors", name="synthetic")
    name, read = command.read_scores(tmp_path / "exits.safetensors")
    assert name == "synthetic"
    for field in ("scores", "disagrees", "losses", "layers"):
        assert torch.equal(getattr(read, field), getattr(made, field))


def test_table(command, tmp_path, capsys):
    for folder, criterion in (("one", "max_probability"), ("two", "entropy")):
        (tmp_path / folder).mkdir()
        write(command, tmp_path / folder / "exits.safetensors", criterion)
    files = [str(tmp_path / folder / "exits.safetensors") for folder in ("one", "two")]
    command.main(
        [
            *files,
            "--splits",
            "4",
            "--epsilons",
            "0.2",
            "--budgets",
            "0.05",
            "0.5",
            "--risks",
            "0.1",
            "--output",
            str(tmp_path / "out" / "table.md"),
        ]
    )
    text = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert text.strip() == capsys.readouterr().out.strip()
    records = json.loads((tmp_path / "out" / "table.json").read_text(encoding="utf-8"))
    assert len(records) == 2 * (3 + 2 * 2 + 1) == text.count("\n") - 4
    one, two = records[:8], records[8:]
    assert {record["data"] for record in one} == {"one"} and {record["data"] for record in two} == {"two"}
    # The same scores in the other direction.
    for first, second in zip(one, two, strict=True):
        assert first["accuracy"] == pytest.approx(second["accuracy"])
        assert first["depth"] == pytest.approx(second["depth"])
    first_exit = [record for record in one if record["level"] == "1 layers"]
    assert [record["depth"] for record in first_exit] == [1.0, 1.0]
    everything, used = population(400, seed=5), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        order = torch.randperm(400, generator=generator)
        found = calibrate_budget(everything.select(order[:200]), 4.0)
        used.append(found.check(everything.select(order[200:])).held_out["used_budget"])
    refined = next(record for record in one if record["level"] == "4 layers" and "refined" in record["method"])
    assert refined["used_budget"] == pytest.approx(sum(used) / 4)


def test_errors(command, tmp_path):
    save_file({"scores": torch.zeros(2, 1)}, tmp_path / "bad.safetensors", {"criterion": "margin"})
    with pytest.raises(ValueError, match=r"lacks \['correct', 'layers', 'predictions'\]"):
        command.read_scores(tmp_path / "bad.safetensors")
    with pytest.raises(SystemExit):
        command.parse_arguments(["some", "--splits", "0"])
