# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The harnesses of speed: peers decide as the methods that they stand for, and scripts run from end to end."""

from __future__ import annotations

import json

import bulk
import families
import pytest
import speed
import speed_tasks
import tiny_bert
import torch
from bulk_reference import draw_texts, tokenizer_for
from speed_peers import SingleRows, by_entropy, by_patience
from transformers import AutoTokenizer

from transformers_cee import BertForConsistentEE


@pytest.mark.parametrize(
    ("criterion", "threshold", "rule"),
    [("entropy", 0.9, by_entropy), ("entropy", 0.8, by_entropy), ("patience", 1.0, by_patience)],
)
def test_loops_of_single_rows_leave_where_batches_do(criterion, threshold, rule):
    model = families.model("bert_cee")
    texts = draw_texts(30)
    batch = dict(tokenizer_for(model)(texts, padding=True, return_tensors="pt"))
    found = SingleRows(model, rule(threshold))(**batch)
    with torch.no_grad():
        expected = model(**batch, exit_criterion=criterion, exit_threshold=threshold)
    assert found.exit_layers.tolist() == expected.exit_layers.tolist() and len(found.exit_layers.unique()) > 1
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", families.of_kind("encoder"))
def test_loops_of_single_rows_take_any_family(model_type):
    model = families.model(model_type)
    batch = dict(tokenizer_for(model)(draw_texts(4), padding=True, return_tensors="pt"))
    with torch.no_grad():
        expected = model(**batch, exit_criterion="entropy", exit_threshold=0.9)
    found = SingleRows(model, by_entropy(0.9))(**batch)
    assert found.exit_layers.tolist() == expected.exit_layers.tolist()
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)


def test_patience_counts_repeated_predictions():
    seen = [[0], [0, 0], [0, 0, 0], [0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 1]]
    assert [by_patience(2)(predictions, []) for predictions in seen] == [False, False, True, False, True, False]


@pytest.fixture
def trained(tmp_path):
    checkpoint = tiny_bert.save_checkpoint(tmp_path / "checkpoint")
    names = sorted(tiny_bert.QUESTIONS)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: place for place, name in enumerate(names)}}
    torch.manual_seed(0)
    BertForConsistentEE.from_pretrained(checkpoint, **labels).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
def test_tasks(trained, tmp_path, capsys):
    train = tiny_bert.write_questions(tmp_path / "train.csv")
    words = ["--model", str(trained), "--train_file", str(train), "--output", str(tmp_path / "out"), "--rounds", "3"]
    speed_tasks.main([*words, "--engines", "torch:float32", "--batch_sizes", "1", "4", "--timed_rows", "4"])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [one["batch_size"] for one in results["sizes"]] == [1, 4]
    for one in results["sizes"]:
        variants = one["variants"]
        whole = variants["torch float32, without exits"]
        assert whole["accuracy"] == variants["torch:float32, without exits"]["accuracy"]
        assert whole["accuracy"] == pytest.approx(results["full"])
        assert whole["depth"] == 3 and ("loop of single rows as PABEE" in variants) == (one["batch_size"] == 1)
    assert (tmp_path / "out" / "table.md").read_text() in capsys.readouterr().out + "\n"
    assert (tmp_path / "out" / "speed.png").stat().st_size > 0


def test_a_promise_out_of_range_is_named_before_any_work(tmp_path):
    with pytest.raises(ValueError, match=r"`agreement`=1\.5"):
        speed_tasks.SpeedArguments(model="nowhere", output=str(tmp_path / "out"), agreement=1.5)
    assert not (tmp_path / "out").exists()


def test_engines(tmp_path, capsys, monkeypatch):
    words = ["speed.py", "--random", "tiny", "--quick", "--no-peers", "--engines", "torch:float32", "openvino:float32"]
    monkeypatch.setattr("sys.argv", [*words, "--output", str(tmp_path)])
    speed.main()
    results = json.loads((tmp_path / "results.json").read_text())
    assert [(one["batch_size"], one["length"]) for one in results["sizes"]] == [(1, 16), (8, 16)]
    ways = ["without exits", "half", "open"]
    names = [f"{engine}, {way}" for engine in ("torch:float32", "openvino:float32") for way in ways]
    for one in results["sizes"]:
        variants = {entry["variant"]: entry for entry in one["variants"]}
        assert list(variants) == ["stock torch float32", *names]
        for name, entry in variants.items():
            assert ("over_engine" in entry) == name.endswith(("half", "open"))
            if "share" in entry:
                # Everybody leaves at the sixth of twelve layers.
                assert entry["share"] == pytest.approx(entry["over_engine"]["value"] / 2)
    table = (tmp_path / "table.md").read_text()
    assert table.strip() in capsys.readouterr().out and table.count("\n| 8 × 16 ") == 2


@pytest.mark.slow
def test_long_files(trained, tmp_path, monkeypatch):
    (tmp_path / "texts.txt").write_text("\n".join(text for text, _ in tiny_bert.questions()))
    monkeypatch.setattr(bulk, "INTERVAL", 0.05)
    words = ["bulk.py", "--model", str(trained), "--texts", str(tmp_path / "texts.txt"), "--rows", "3000"]
    monkeypatch.setattr("sys.argv", [*words, "--output", str(tmp_path / "out")])
    bulk.main()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["rows"] == 3000 == len((tmp_path / "out" / "labels.jsonl").read_text().splitlines())
    assert results["peak_megabytes"] > 0 and not results["killed_a_worker"]
