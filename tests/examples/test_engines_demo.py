# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The last step of the demo: a model on an engine, on tiny files."""

import json

import engines_demo
import pytest
import tiny_bert
import torch
from transformers import AutoTokenizer

from transformers_cee import BertForConsistentEE


pytest.importorskip("openvino")


def test_torch_and_engine_side_by_side(tmp_path, capsys):
    checkpoint = tiny_bert.save_checkpoint(tmp_path / "checkpoint")
    names = sorted(tiny_bert.QUESTIONS)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: place for place, name in enumerate(names)}}
    torch.manual_seed(0)
    model = BertForConsistentEE.from_pretrained(checkpoint, exit_pooling="mean", **labels)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for name in ("validation", "test"):
        tiny_bert.write_questions(tmp_path / "data" / f"{name}.csv")
    words = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data"), "--output", str(tmp_path / "out")]
    engines_demo.main([*words, "--batch_sizes", "8", "--timed_rows", "16"])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results["variants"]) == {engines_demo.TORCH, engines_demo.WITHOUT, engines_demo.WITH}
    assert results["variants"][engines_demo.WITHOUT]["depth"] == 3 == results["variants"][engines_demo.TORCH]["depth"]
    assert (tmp_path / "out" / "engines.png").stat().st_size > 0
    assert "OpenVINO int8, with exits" in capsys.readouterr().out
