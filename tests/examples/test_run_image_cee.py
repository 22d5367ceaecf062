# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The image script end to end, on a few drawn images whose class is a bright stripe."""

from __future__ import annotations

import gzip
import json
import struct

import numpy as np
import pytest
import run_image_cee
import torch
from run_image_cee import IDX_NAMES, geometric, one_threshold, read_idx

from transformers_cee import ConvNextForConsistentEE, ResNetForConsistentEE
from transformers_cee.calibration.scores import ExitScores
from transformers_cee.stores.scoring import exits_taken


def write_idx(path, array):
    head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    opened = gzip.open(path, "wb") if path.suffix == ".gz" else path.open("wb")
    with opened as file:
        file.write(head + array.tobytes())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made, drawn = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, rows in (("train", 96), ("test", 40)):
        labels = drawn.integers(0, 3, rows).astype(np.uint8)
        pixels = drawn.integers(0, 120, (rows, 16, 16)).astype(np.uint8)
        for row, label in enumerate(labels):
            pixels[row, 5 * label : 5 * label + 4] += 90
        suffix = ".gz" if split == "train" else ""
        write_idx(made / f"{IDX_NAMES[split]}-images-idx3-ubyte{suffix}", pixels)
        write_idx(made / f"{IDX_NAMES[split]}-labels-idx1-ubyte{suffix}", labels)
    return made


def options(folder, output, **more):
    asked = {
        "data_dir": folder, "output_dir": output, "do_train": True, "hidden_sizes": [8, 12], "depths": [2, 2],
        "exit_layers": [1, 2], "dev_rows": 32, "budgets": [0.6, 0.8], "num_train_epochs": 2, "learning_rate": 1e-2,
        "per_device_train_batch_size": 16, "policy_num_train_epochs": 2, "phases": ["heads", "hardness", "policy"],
        "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "report_to": "none", **more,
    }  # fmt: skip
    words = []
    for name, value in asked.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


@pytest.mark.parametrize(("model", "kind"), [("resnet", ResNetForConsistentEE), ("convnext", ConvNextForConsistentEE)])
def test_a_run(model, kind, folder, tmp_path):
    results = run_image_cee.main(options(folder, tmp_path, model=model))
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["rows"] == {"train": 64, "dev": 32, "test": 40} and written["layers"] == [1, 2, 4]
    assert written["costs"] == sorted(written["costs"]) and written["costs"][-1] == 1
    ways = {row["way"] for row in results["points"]}
    assert {"EERO as published", "geometric schedule", "one threshold"} <= ways
    for row in results["points"]:
        assert 0 <= row["accuracy"] <= 1 and written["costs"][0] <= row["used"] <= 1
    assert "| EERO refined" in (tmp_path / "table.md").read_text() and (tmp_path / "budgets.png").stat().st_size > 0
    assert type(kind.from_pretrained(tmp_path)) is kind
    # Layers that are saved are not executed: what was counted from stored scores is what happens.
    middle = next(row for row in results["points"] if row["budget"] == 0.8)
    assert results["executed"]["used"] == pytest.approx(middle["used"])
    again = run_image_cee.main(options(folder, tmp_path, model=model, do_train=False))
    assert again["points"] == results["points"]


def test_thresholds_keep_the_budget_on_dev():
    drawn = torch.rand(400, 3, generator=torch.Generator().manual_seed(0))
    no = torch.zeros(400, 4)
    scores = ExitScores("max_probability", drawn, torch.tensor([1, 2, 3, 4]), no.bool(), no)
    costs = [1.0, 2.5, 4.0, 6.0]
    prices = torch.tensor(costs, dtype=torch.double)
    for budget in (2.0, 3.0, 5.0):
        for fit in (geometric, one_threshold):
            exits = exits_taken(scores.criterion, fit(scores, costs, budget), scores.scores)
            assert float(prices[exits].mean()) == pytest.approx(budget, abs=0.1)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\0\0\x0b\1\0\0\0\2ab", "no IDX file of unsigned bytes"), (b"\0\0\x08\1\0\0\0\3ab", "holds 2 bytes; .* 3")],
)
def test_files_that_are_none(content, message, tmp_path):
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_idx(tmp_path / "bad")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"model": "vgg"}, r"`model`='vgg' must be one of resnet, convnext"),
        ({"budgets": [1.5]}, r"`budgets`=\[1.5\] must be shares"),
        ({"data_dir": "nowhere"}, r"`data_dir`='nowhere'"),
        ({"dev_rows": 96}, r"`dev_rows`=96 leave no training images of 96"),
        ({"dataset": "mnist"}, r"`dataset`='mnist' must be one of idx, cifar10"),
    ],
)
def test_refused_before_training(wrong, message, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(run_image_cee, "make_model", lambda *_: pytest.fail("A model was made."))
    with pytest.raises(ValueError, match=message):
        run_image_cee.main(options(folder, tmp_path, **wrong))
