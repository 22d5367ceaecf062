# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A classifier is fine-tuned, gets exits, and is not fine-tuned again on what are its texts now."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import run_add_exits
from tiny_bert import WORDS, save_checkpoint, words


def options(folder, **more):
    asked = {
        "model_name_or_path": folder / "model", "train_file": folder / "train.csv", "output_dir": folder / "exits",
        "texts": 60, "agreement": [0.6, 0.5], "num_train_epochs": 1, "per_device_train_batch_size": 8,
        "license": "mit", "data_license": "Drawn here.", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
        "report_to": "none", **more,
    }  # fmt: skip
    return words({name: str(value) if isinstance(value, Path) else value for name, value in asked.items()})


@pytest.fixture
def folder(tmp_path):
    save_checkpoint(tmp_path / "model")
    with (tmp_path / "train.csv").open("w", newline="") as file:
        rows = [(f"{WORDS[number % 7]} {WORDS[(3 * number) % 11]}", "ab"[number % 7 > 3]) for number in range(160)]
        csv.writer(file).writerows([("sentence", "label"), *rows])
    return tmp_path


def test_a_run_and_another_one(folder, monkeypatch):
    added = run_add_exits.main(options(folder))
    assert added.base == f"{folder}/exits-plain" and added.accuracy is not None
    assert (added.learning, added.certifying) == (30, 30)
    results = json.loads((folder / "exits" / "results.json").read_text())
    assert [speed["promised"] for speed in results["speeds"]] == [0.6, 0.5]
    card = (folder / "exits" / "README.md").read_text()
    assert "Licence of the base model: mit. Licence of the data: Drawn here." in card

    monkeypatch.setattr(run_add_exits, "fine_tune", lambda *given: pytest.fail("fine-tuned again"))
    (folder / "exits").rename(folder / "first")
    assert run_add_exits.main(options(folder, agreement=[0.4])).base == added.base
    with pytest.raises(ValueError, match="was fine-tuned with another texts: remove it"):
        run_add_exits.main(options(folder, texts=50))
