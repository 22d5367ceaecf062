# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Publishing and loading over HTTP, with the real huggingface_hub client against a hub on the loopback interface."""

from __future__ import annotations

import json

import pytest
from tiny_models import run_python


REPO = "org/bert-cee-sst2"
SENTENCES = ["a film with heart", "not a single joke lands and the plot is worse"]

PUBLISH = """
import sys
from huggingface_hub import upload_file
from transformers import AutoTokenizer
from transformers_cee import BertForConsistentEE, OperatingPoint
from transformers_cee.hub.model_card import EarlyExitCard

folder, repo = sys.argv[1:]
model = BertForConsistentEE.from_pretrained(folder)
AutoTokenizer.from_pretrained(folder).push_to_hub(repo)
point = OperatingPoint("policy", 0.5, depth=2.0, saved_layers=0.5, layer_speedup=2.0, metrics={"accuracy": 0.9})
card = EarlyExitCard(
    model_name="bert-cee-sst2", num_layers=4, dataset_name="SST-2", metric_name="accuracy", curves={"policy": [point]}
)
# `ModelCard.push_to_hub` of older clients has the card checked by the real hub.
upload_file(path_or_fileobj=str(card.render()).encode(), path_in_repo="README.md", repo_id=repo)
model.push_to_hub(repo, tags=["tiny"])
"""

LOAD = """
import json, sys
import torch
import transformers_cee
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

folder, repo = sys.argv[1:]
local = transformers_cee.BertForConsistentEE.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(repo)
state = local.state_dict()
print(json.dumps({
    "classes": [type(AutoConfig.from_pretrained(repo)).__name__, type(AutoModel.from_pretrained(repo)).__name__,
                type(model).__name__],
    "same_keys": list(state) == list(model.state_dict()),
    "same_weights": all(torch.equal(state[name], value) for name, value in model.state_dict().items()),
    "same_tokens": AutoTokenizer.from_pretrained(repo)("a film with heart").input_ids
                   == AutoTokenizer.from_pretrained(folder)("a film with heart").input_ids,
    "card": ModelCard.load(repo).data.to_dict(),
}))
"""

PIPELINES = """
import json, sys
import transformers_cee
from transformers import pipeline

repo, *sentences = sys.argv[1:]
inferred = pipeline(model=repo)
exits = pipeline("early-exit-text-classification", model=repo, exit_threshold=0.0)
print(json.dumps({
    "inferred": inferred(sentences, batch_size=2), "class": type(inferred).__name__, "exits": exits(sentences)
}))
"""

REMOTE = """
import json, sys
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

name, again = sys.argv[1:]
before = "transformers_cee" in sys.modules
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
model = AutoModelForSequenceClassification.from_pretrained(name, trust_remote_code=True).eval()
output = model(**tokenizer(["a film with heart"], return_tensors="pt"), exit_threshold=0.0)
model.save_pretrained(again)
print(json.dumps({
    "before": before,
    "tokenizer": type(tokenizer).__name__,
    "classes": [f"{type(model).__module__}.{type(model).__name__}",
                type(AutoModel.from_pretrained(name, trust_remote_code=True)).__name__],
    "exit_layers": output.exit_layers.tolist(),
}))
"""

# Stands in for an environment without the package.
WITHOUT_PACKAGE = """
import sys

class Missing:
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] == "transformers_cee":
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)

sys.meta_path.insert(0, Missing())
from transformers import AutoModelForSequenceClassification

AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=sys.argv[2] == "True")
"""


def client(hub, home, code, *arguments):
    done = run_python(code, *map(str, arguments), environment=hub.environment(home), cwd=home)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else None


@pytest.fixture(scope="module")
def published(hub, saved, tmp_path_factory):
    """The tiny model, its tokenizer and its card, in `REPO` of the hub."""
    client(hub, tmp_path_factory.mktemp("publisher"), PUBLISH, saved, REPO)
    return hub


def test_push_sends_everything_that_loading_needs(published):
    files = published.files[REPO]
    assert {"README.md", "config.json", "model.safetensors", "modeling_cee.py", "tokenizer.json"} <= set(files)
    assert not [name for name in files if name.endswith(".py") and name != "modeling_cee.py"]
    auto_map = json.loads(files["config.json"])["auto_map"]
    assert auto_map["AutoModelForSequenceClassification"] == "modeling_cee.BertForConsistentEE"
    assert ("POST", f"/api/models/{REPO}/commit/main") in published.requests


def test_round_trip_through_the_auto_classes(published, saved, tmp_path):
    loaded = client(published, tmp_path, LOAD, saved, REPO)
    assert loaded["classes"] == ["BertCeeConfig", "BertForConsistentEE", "BertForConsistentEE"]
    assert loaded["same_keys"] and loaded["same_weights"] and loaded["same_tokens"]
    assert loaded["card"]["pipeline_tag"] == "text-classification"
    assert loaded["card"]["library_name"] == "transformers"
    assert {"early-exit", "tiny"} <= set(loaded["card"]["tags"])


def test_pipelines_from_the_hub(published, tmp_path):
    results = client(published, tmp_path, PIPELINES, REPO, *SENTENCES)
    assert results["class"] == "ExitTextClassificationPipeline"
    assert [set(result) for result in results["inferred"]] == [{"label", "score"}] * 2
    assert [result["exit_layer"] for result in results["exits"]] == [1, 1]
    assert {result["label"] for result in results["exits"]} <= {"negative", "positive"}


def test_remote_code_needs_no_import(published, tmp_path):
    again = tmp_path / "again"
    loaded = client(published, tmp_path, REMOTE, REPO, again)
    assert loaded["before"] is False
    assert loaded["tokenizer"].startswith("BertTokenizer")
    assert loaded["classes"] == [
        "transformers_cee.models.bert_cee.modeling_bert_cee.BertForConsistentEE",
        "BertForConsistentEE",
    ]
    assert loaded["exit_layers"] == [1]
    # A model loaded that way saves as any other: no copies of this package's source, no reference to the hub.
    assert sorted(path.name for path in again.glob("*.py")) == ["modeling_cee.py"]
    assert json.loads((again / "config.json").read_text())["auto_map"]["AutoConfig"] == "modeling_cee.BertCeeConfig"


def test_missing_package_is_named(published, tmp_path):
    done = run_python(WITHOUT_PACKAGE, REPO, "True", environment=published.environment(tmp_path), cwd=tmp_path)
    assert done.returncode != 0
    assert "ImportError: This checkpoint is an early-exit model of the package transformers-cee" in done.stderr
    assert "pip install transformers-cee" in done.stderr


def test_remote_code_is_not_run_without_trust(published, tmp_path):
    done = run_python(WITHOUT_PACKAGE, REPO, "False", environment=published.environment(tmp_path), cwd=tmp_path)
    assert done.returncode != 0
    assert "trust_remote_code=True" in done.stderr
    assert "transformers-cee, which is not installed" not in done.stderr
