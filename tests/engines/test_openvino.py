# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
import multiprocessing

import pytest


pytest.importorskip("openvino")


def test_no_statistics_are_sent(make_model, tokenizer, texts, tmp_path, monkeypatch):
    started = []
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(multiprocessing.Process, "start", lambda self: started.append(self))
    options = {"calibration_texts": texts[:8], "processing_class": tokenizer, "measure": False}
    make_model(num_hidden_layers=1).export(tmp_path / "out", precision="int8", **options)
    assert not started
