# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""An exported model over HTTP, with the real huggingface_hub client against a hub on the loopback interface."""

from __future__ import annotations

import json

from tiny_models import run_python


REPO = "org/bert-cee-openvino"

PUBLISH = """
import sys
from transformers_cee import BertForConsistentEE

folder, made, repo = sys.argv[1:]
BertForConsistentEE.from_pretrained(folder).export(made, precision="float32").push_to_hub(repo)
"""

LOAD = """
import json, sys
import torch
from transformers import AutoModelForSequenceClassification
from transformers_cee import BertForConsistentEE

folder, repo = sys.argv[1:]
ids = torch.tensor([[2, 5, 7, 8, 3], [2, 9, 6, 4, 3]])
with torch.no_grad():
    stock = BertForConsistentEE.from_pretrained(folder).eval()(ids, exit_threshold=0.5)
    mine = AutoModelForSequenceClassification.from_pretrained(repo)(ids, exit_threshold=0.5)
print(json.dumps([torch.allclose(mine.logits, stock.logits, atol=1e-5),
                  mine.exit_layers.tolist() == stock.exit_layers.tolist()]))
"""


def client(hub, home, code, *arguments):
    done = run_python(code, *map(str, arguments), environment=hub.environment(home), cwd=home)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()


def test_published_and_loaded(hub, saved, tmp_path):
    client(hub, tmp_path, PUBLISH, saved, tmp_path / "made", REPO)
    record = json.loads(hub.files[REPO]["config.json"])["exit_engine"]
    assert {"exits.safetensors", "modeling_cee.py", *record["files"]} <= set(hub.files[REPO])
    assert json.loads(client(hub, tmp_path, LOAD, saved, REPO)[-1]) == [True, True]
