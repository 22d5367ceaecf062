# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Exits without their base over HTTP, with the real huggingface_hub client against a hub on the loopback interface."""

from __future__ import annotations

import json

import pytest
from tiny_models import run_python


PUBLISH = """
import json, sys
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM
from transformers_cee import BertForConsistentEE, LlamaForConsistentEECausalLM

kind, base, exits, folder = sys.argv[1:]
sizes = dict(vocab_size=60, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48)
torch.manual_seed(0)
if kind == "encoder":
    stock, ours, fields = BertForSequenceClassification(BertConfig(**sizes, num_labels=3)), BertForConsistentEE, {}
else:
    stock, ours, fields = LlamaForCausalLM(LlamaConfig(**sizes)), LlamaForConsistentEECausalLM, {"exit_head": "untied"}
stock.push_to_hub(base)
model = ours.from_pretrained(base, exit_layers=2, exit_threshold=0.5, **fields)
model.save_pretrained(folder)
model.push_exits_to_hub(exits)
stock.save_pretrained(folder + "/stock")
try:
    model.push_exits_to_hub(exits, base=folder + "/stock")
except ValueError as error:
    print(error)
"""

LOAD = """
import json, sys
import torch
import transformers_cee
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers_cee import load_exits

kind, base, exits, folder = sys.argv[1:]
auto = AutoModelForSequenceClassification if kind == "encoder" else AutoModelForCausalLM
whole = auto.from_pretrained(folder).eval().state_dict()
loaded = auto.from_pretrained(exits, dtype=torch.float32, token="hf_dummy")
models = [loaded, load_exits(auto.from_pretrained(base), exits), load_exits(base, exits, revision="main"),
          auto.from_pretrained(exits, local_files_only=True)]
print(json.dumps({
    "same": [all(torch.equal(whole[name], value) for name, value in model.state_dict().items()) for model in models],
    "classes": sorted({type(model).__name__ for model in models}),
    "name": loaded.name_or_path,
}))
"""

# Without the import, and after the base has moved on.
REMOTE = """
import json, sys
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

kind, exits = sys.argv[1:]
auto = AutoModelForSequenceClassification if kind == "encoder" else AutoModelForCausalLM
print(json.dumps([type(auto.from_pretrained(exits, trust_remote_code=True)).__name__,
                  type(AutoModel.from_pretrained(exits, trust_remote_code=True)).__name__]))
"""
CLASSES = {"encoder": "BertForConsistentEE", "decoder": "LlamaForConsistentEECausalLM"}


def client(hub, home, code, *arguments):
    done = run_python(code, *map(str, arguments), environment=hub.environment(home), cwd=home)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module", params=["encoder", pytest.param("decoder", marks=pytest.mark.slow)])
def published(request, hub, tmp_path_factory):
    """Task, names of a base and of exits on the hub, the folder of the whole model, and a refusal."""
    home = tmp_path_factory.mktemp("publisher")
    names = (request.param, f"org/{request.param}", f"org/{request.param}-exits", home / "whole")
    return *names, client(hub, home, PUBLISH, *names)


def test_what_is_published(published, hub):
    _, base, exits, _, refusal = published
    files = hub.files[exits]
    assert set(files) == {"README.md", "config.json", "exits.safetensors", "modeling_cee.py"}
    record = json.loads(files["config.json"])["exits_of"]
    assert (record["base"], record["revision"]) == (base, hub.commit_hash(base))
    card = files["README.md"].decode()
    assert f"base_model: {base}\n" in card and f"from_pretrained('{exits}')" in card
    assert sum(map(len, files.values())) < len(hub.files[base]["model.safetensors"])
    assert "is a folder of this machine" in refusal


def test_loading(published, hub, tmp_path):
    kind, base, exits, folder, _ = published
    loaded = json.loads(client(hub, tmp_path, LOAD, kind, base, exits, folder))
    assert loaded == {"same": [True] * 4, "classes": [CLASSES[kind]], "name": base}
    asked = [path for _, path in hub.requests]
    assert any(path.startswith(f"/{base}/resolve/{hub.commit_hash(base)}/") for path in asked)
    assert json.loads(client(hub, tmp_path, REMOTE, kind, exits)) == [CLASSES[kind]] * 2
