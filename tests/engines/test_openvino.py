# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
import multiprocessing

import pytest
from tiny_models import run_python


pytest.importorskip("openvino")


def test_no_statistics_are_sent(make_model, tokenizer, texts, tmp_path, monkeypatch):
    started = []
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(multiprocessing.Process, "start", lambda self: started.append(self))
    options = {"calibration_texts": texts[:8], "processing_class": tokenizer, "measure": False}
    make_model(num_hidden_layers=1).export(tmp_path / "out", precision="int8", **options)
    assert not started


SIGNALLED = """
import faulthandler
import gc
import os
import signal
import sys

# Handlers get a stack of their own, which OpenVINO replaces by one of its own.
faulthandler.enable()
seen = []
signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
import torch
from transformers_cee import BertForConsistentEE

models = [BertForConsistentEE.from_pretrained(sys.argv[1]) for _ in range(3)]
for model in models:
    model(input_ids=torch.ones(1, 4, dtype=torch.long))
del model
while models:
    # The oldest goes first.
    del models[0]
    gc.collect()
    os.kill(os.getpid(), signal.SIGUSR1)
print(len(seen))
"""


def test_a_process_that_has_let_go_of_models_gets_signals(make_model, tokenizer, tmp_path):
    make_model(num_hidden_layers=2).export(
        tmp_path / "out", precision="float32", processing_class=tokenizer, measure=False
    )
    done = run_python(SIGNALLED, str(tmp_path / "out"))
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    assert done.stdout.split() == ["3"]
