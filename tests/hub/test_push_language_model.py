# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A language model with exits, published and loaded over HTTP: the real huggingface_hub client, a hub of our own."""

from __future__ import annotations

import json

import pytest
from tiny import tiny_llama
from tiny_models import run_python, tiny_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from transformers_cee.auto import MODELS
from transformers_cee.files import REMOTE_CODE_FILE
from transformers_cee.modeling.remote_code import remote_auto_map, write_remote_code


REPO, ADAPTER = "org/llama-cee", "org/llama-cee-lora"

PUBLISH = """
import sys
from huggingface_hub import upload_file
from transformers import AutoTokenizer
from transformers_cee import LlamaForConsistentEECausalLM
from transformers_cee.evaluation.generation import GenerationPoint
from transformers_cee.hub.generation_card import GenerationCard

folder, repo = sys.argv[1:]
model = LlamaForConsistentEECausalLM.from_pretrained(folder)
model.generation_config.exit_threshold = 0.0
AutoTokenizer.from_pretrained(folder).push_to_hub(repo)
point = GenerationPoint(
    "policy", 0.5, depth=2.0, saved_layers=0.5, layer_speedup=2.0, metrics={"agreement": 0.9}, speeds={}
)
card = GenerationCard(
    model_name="llama-cee",
    repo_id=repo,
    num_layers=4,
    dataset_name="some text",
    metric_name="agreement",
    curves={"policy": [point]},
    prompt="the film",
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
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

folder, repo = sys.argv[1:]
local = transformers_cee.LlamaForConsistentEECausalLM.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(repo).eval()
state = local.state_dict()
tokenizer = AutoTokenizer.from_pretrained(repo)
output = model.generate(**tokenizer("the film", return_tensors="pt"), max_new_tokens=4, return_dict_in_generate=True)
print(json.dumps({
    "classes": [type(AutoConfig.from_pretrained(repo)).__name__, type(AutoModel.from_pretrained(repo)).__name__,
                type(model).__name__],
    "same_weights": list(state) == list(model.state_dict())
                    and all(torch.equal(state[name], value) for name, value in model.state_dict().items()),
    "card": ModelCard.load(repo).data.to_dict(),
    "exit_layers": output.exit_layers.tolist(),
}))
"""

PIPELINE = """
import json, sys
import transformers_cee
from transformers import pipeline

generator = pipeline(model=sys.argv[1])
layers = []
for layer in generator.model.model.layers:
    layer.register_forward_hook(lambda *_: layers.append(1))
results = []
for threshold in (0.0, 1.0):
    layers.clear()
    text = generator("the film", max_new_tokens=4, do_sample=False, eos_token_id=-1, exit_threshold=threshold)
    results.append([len(layers), text[0]["generated_text"].startswith("the film")])
print(json.dumps({"class": type(generator).__name__, "results": results}))
"""

REMOTE = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer

name, again = sys.argv[1:]
before = "transformers_cee" in sys.modules
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True).eval()
inputs = tokenizer("the film", return_tensors="pt")
output = model.generate(
    **inputs, max_new_tokens=3, eos_token_id=-1, exit_threshold=0.0, return_dict_in_generate=True
)
model.save_pretrained(again)
print(json.dumps({
    "before": before,
    "class": f"{type(model).__module__}.{type(model).__name__}",
    "exit_layers": output.exit_layers.tolist(),
    "depth": len(model.layer_numbers),
}))
"""

PUBLISH_ADAPTER = """
import sys
import torch
from peft import get_peft_model
from transformers_cee import LlamaForConsistentEECausalLM, exit_lora_config

base, repo = sys.argv[1:]
model = get_peft_model(LlamaForConsistentEECausalLM.from_pretrained(base), exit_lora_config())
with torch.no_grad():
    for network in model.get_base_model().exit_policies.modules_to_save["default"].networks:
        network[-1].weight.zero_()
        network[-1].bias.fill_(9.0)
model.push_to_hub(repo)
"""

LOAD_ADAPTER = """
import json, sys
import transformers_cee
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1]).eval()
inputs = AutoTokenizer.from_pretrained(sys.argv[2])("the film", return_tensors="pt")
options = {"max_new_tokens": 3, "eos_token_id": -1, "return_dict_in_generate": True, "exit_threshold": 0.9}
with_adapter = model.generate(**inputs, **options).exit_layers.tolist()
print(json.dumps({"class": type(model.get_base_model()).__name__, "exit_layers": with_adapter}))
"""


def client(hub, home, code, *arguments):
    done = run_python(code, *map(str, arguments), environment=hub.environment(home), cwd=home)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else None


def word_tokenizer():
    """A tokenizer of words, without the token types of BERT."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer().backend_tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny language model and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "llama-cee"
    tiny_llama(exit_head="low_rank", exit_head_rank=2, exit_layers=[1, 2]).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def published(hub, folder, tmp_path_factory):
    """Model, tokenizer and card, in `REPO` of the hub."""
    client(hub, tmp_path_factory.mktemp("publisher"), PUBLISH, folder, REPO)
    return hub


def test_push_sends_everything_that_loading_needs(published):
    files = published.files[REPO]
    wanted = {"README.md", "config.json", "generation_config.json", "model.safetensors", "modeling_cee.py"}
    assert wanted | {"tokenizer.json"} <= set(files)
    assert not [name for name in files if name.endswith((".bin", ".pkl", ".pt"))]
    auto_map = json.loads(files["config.json"])["auto_map"]
    assert auto_map["AutoModelForCausalLM"] == "modeling_cee.LlamaForConsistentEECausalLM"
    assert json.loads(files["generation_config.json"])["exit_threshold"] == 0.0


def test_round_trip_through_the_auto_classes(published, folder, tmp_path):
    loaded = client(published, tmp_path, LOAD, folder, REPO)
    assert loaded["classes"] == ["LlamaCeeConfig", *["LlamaForConsistentEECausalLM"] * 2]
    assert loaded["same_weights"]
    assert loaded["card"]["pipeline_tag"] == "text-generation" and loaded["card"]["library_name"] == "transformers"
    assert {"early-exit", "tiny"} <= set(loaded["card"]["tags"])
    # The threshold of the published generation config.
    assert loaded["exit_layers"][0][:2] == [4, 1]


@pytest.mark.slow
def test_pipeline_from_the_hub(published, tmp_path):
    """The task comes from the card; the threshold reaches the layers."""
    found = client(published, tmp_path, PIPELINE, REPO)
    assert found["class"] == "TextGenerationPipeline"
    assert found["results"] == [[4 + 3, True], [4 * 4, True]]


@pytest.mark.slow
def test_remote_code_needs_no_import(published, tmp_path):
    again = tmp_path / "again"
    loaded = client(published, tmp_path, REMOTE, REPO, again)
    assert loaded["before"] is False
    assert loaded["class"] == "transformers_cee.models.llama_cee.modeling_llama_cee.LlamaForConsistentEECausalLM"
    assert loaded["exit_layers"] == [[4, 1, 1]] and loaded["depth"] == 3
    assert sorted(path.name for path in again.glob("*.py")) == ["modeling_cee.py"]
    assert json.loads((again / "config.json").read_text())["auto_map"]["AutoConfig"] == "modeling_cee.LlamaCeeConfig"


@pytest.mark.slow
def test_adapter_over_the_hub(published, tmp_path):
    """Adapter and base model each from their own repository."""
    client(published, tmp_path, PUBLISH_ADAPTER, REPO, ADAPTER)
    files = set(published.files[ADAPTER])
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= files
    assert "model.safetensors" not in files
    assert json.loads(published.files[ADAPTER]["adapter_config.json"])["base_model_name_or_path"] == REPO
    loaded = client(published, tmp_path, LOAD_ADAPTER, ADAPTER, REPO)
    assert loaded == {"class": "LlamaForConsistentEECausalLM", "exit_layers": [[4, 1, 1]]}


def test_remote_code_of_every_model(tmp_path):
    for model_type, entry in MODELS.items():
        path = write_remote_code(tmp_path / model_type, model_type)
        assert path.name == REMOTE_CODE_FILE
        names = {}
        exec(path.read_text(), names)
        assert names[entry.model.rpartition(".")[2]].config_class is names[entry.config.rpartition(".")[2]]
        assert set(remote_auto_map(model_type)) == {"AutoConfig", "AutoModel", *entry.auto_classes}


def test_local_classes_win_over_the_file(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__ == "transformers_cee.models.llama_cee.modeling_llama_cee"
