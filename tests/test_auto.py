# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from peft import get_peft_model
from peft.utils import constants
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as LORA_TARGETS
from tiny import tiny_llama
from tiny_models import run_python, tiny_config, tiny_model, tiny_tokenizer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    FeatureExtractionPipeline,
    pipeline,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pipelines import PIPELINE_REGISTRY

import transformers_cee
from transformers_cee import (
    BertCeeConfig,
    BertCeeModel,
    BertForConsistentEE,
    LlamaCeeConfig,
    LlamaCeeModel,
    auto,
    exit_lora_config,
)
from transformers_cee.families import MODELS


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


SIZES = "hidden_size=8, num_hidden_layers=2, num_attention_heads=1, intermediate_size=8, vocab_size=9"
REGISTERED = f"""
import sys
exec(sys.argv[1])
import transformers_cee
exec(sys.argv[2])

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

config = AutoConfig.for_model("bert_cee", {SIZES})
assert type(AutoModelForSequenceClassification.from_config(config)).__name__ == "BertForConsistentEE"
assert type(AutoModel.from_config(config)).__name__ == "BertCeeModel"
config = AutoConfig.for_model("llama_cee", {SIZES})
assert type(AutoModelForCausalLM.from_config(config)).__name__ == "LlamaForConsistentEECausalLM"
assert type(AutoModel.from_config(config)).__name__ == "LlamaCeeModel"

from transformers.pipelines import PIPELINE_REGISTRY

assert "early-exit-text-classification" in PIPELINE_REGISTRY.supported_tasks

from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as targets

assert targets["llama_cee"] == targets["llama"] and targets["bert_cee"] == targets["bert"]
"""
# Each needs a process of its own, which takes seconds to begin.
FIRST = [
    "pass",
    slow("from transformers import AutoConfig"),
    # Loads the Auto classes half-way through the module that our model imports from.
    "from transformers import BertModel",
    slow("from transformers import pipeline"),
    slow("from transformers import Trainer"),
    slow("import peft"),
]


def test_import_loads_what_the_auto_classes_and_peft_load_and_no_model():
    done = run_python(
        """
import sys
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
import peft

for stock in {stocks}:
    CONFIG_MAPPING[stock]
loaded = set(sys.modules)
import transformers_cee

print(*sorted(name for name in set(sys.modules) - loaded if not name.startswith("transformers_cee")))
assert not any(".modeling_" in name for name in sys.modules if name.startswith("transformers_cee"))
""".replace("{stocks}", repr([entry.stock for entry in MODELS.values()]))
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("first", FIRST)
def test_registered_whatever_is_imported_first(first):
    done = run_python(REGISTERED, "pass", first)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_registered_when_others_were_first():
    done = run_python(REGISTERED, "import transformers.pipelines, torch, peft", "pass")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "first", [slow("BertForConsistentEE"), "LlamaForConsistentEECausalLM", slow("exit_lora_config")]
)
def test_registered_when_a_name_of_ours_is_first(first):
    done = run_python(REGISTERED, "pass", f"from transformers_cee import {first}")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


class TestStraightAfterTheImport:
    """Nothing of a family has been touched yet: a folder, or a model, is all there is."""

    @pytest.mark.parametrize(
        "use",
        [
            """
from transformers import pipeline
classify = pipeline("early-exit-text-classification", model=sys.argv[1], device="cpu", exit_threshold=0.0)
assert classify("a film")[0]["exit_layer"] == 1""",
            slow("""
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
assert type(model).__name__ == "BertForConsistentEE"
from transformers import pipeline
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
pipeline("early-exit-text-classification", model=model, tokenizer=tokenizer, device="cpu")"""),
            slow("""
model = transformers_cee.BertForConsistentEE.from_pretrained(sys.argv[1])
from peft import LoraConfig, get_peft_model
assert get_peft_model(model, LoraConfig(task_type="SEQ_CLS")).peft_config["default"].target_modules"""),
        ],
    )
    def test_it_works(self, folder, use):
        done = run_python(f"import sys, transformers_cee\n{use}", folder)
        assert done.returncode == 0, done.stderr


# What a server may import on its first requests; each in a thread of its own.
IMPORTED = """
transformers.AutoModel transformers.AutoTokenizer transformers.pipelines.pipeline transformers.Trainer
transformers.BertModel transformers.LlamaForCausalLM transformers.GenerationConfig transformers.modeling_utils
transformers.generation.utils transformers.modeling_layers transformers.models.auto.modeling_auto peft
transformers_cee.BertForConsistentEE transformers_cee.LlamaForConsistentEECausalLM transformers.TextGenerationPipeline
transformers.AutoModelForSequenceClassification
""".split()
# Of a name, the modules are loaded one by one as `import` does, and the last part is asked for.
THREADS = """
import importlib, os, sys, threading, traceback

import transformers_cee

barrier, failed = threading.Barrier(len(sys.argv) - 1), []

def load(name):
    barrier.wait()
    try:
        module, _, last = name.rpartition(".")
        if module and last not in ("utils", "modeling_utils", "modeling_layers", "modeling_auto"):
            getattr(importlib.import_module(module), last)
        else:
            importlib.import_module(name)
        if last.startswith(("Bert", "Auto")):
            transformers_cee.BertCeeConfig()
    except BaseException:
        failed.append(traceback.format_exc())

threads = [threading.Thread(target=load, args=(name,), daemon=True) for name in sys.argv[1:]]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(*failed)
os._exit(bool(failed))
"""


CHOSEN = {"4": IMPORTED[4:16:3], "16": IMPORTED, "12": [name for name in IMPORTED if "Auto" not in name][:12]}


def import_at_the_same_time(names):
    try:
        done = run_python(THREADS, *names)
    except subprocess.TimeoutExpired:
        pytest.fail(f"threads that import {names} wait for each other")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("count", [slow("4"), "16", slow("12")])
def test_threads_may_import_at_the_same_time(count):
    assert len(CHOSEN[count]) == int(count)
    import_at_the_same_time(CHOSEN[count])


@pytest.mark.slow
@pytest.mark.parametrize("round_", range(5))
@pytest.mark.parametrize("count", CHOSEN)
def test_threads_may_import_in_any_order(count, round_):
    names = list(CHOSEN[count])
    random.Random(round_).shuffle(names)
    import_at_the_same_time(names)


def test_auto_classes_give_the_model_with_its_exits(tmp_path):
    """`AutoModel`, too: exits and heads that were published are loaded. What was saved without them is loaded so."""
    for made, for_task, base in (
        (BertForConsistentEE(tiny_config()), AutoModelForSequenceClassification, BertCeeModel),
        (tiny_llama(), AutoModelForCausalLM, LlamaCeeModel),
    ):
        folder = tmp_path / base.__name__
        made.save_pretrained(folder)
        assert type(AutoConfig.from_pretrained(folder)) is type(made.config)
        for auto_class in (for_task, AutoModel):
            model, report = auto_class.from_pretrained(folder, output_loading_info=True)
            assert type(model) is type(made)
            assert not report["missing_keys"] and not report["unexpected_keys"]
            assert all(torch.equal(value, made.state_dict()[name]) for name, value in model.state_dict().items())
        states, report = base.from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        states.save_pretrained(folder / "states")
        assert type(AutoModel.from_pretrained(folder / "states")) is base


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_features_are_the_states_of_the_last_layer(tmp_path, pooling):
    model, tokenizer = tiny_model(exit_pooling=pooling), tiny_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with torch.no_grad():
        states = model.bert(**tokenizer("a film with heart", return_tensors="pt")).last_hidden_state
    for given in (str(tmp_path), model, get_peft_model(model, exit_lora_config("SEQ_CLS")).eval()):
        extract = pipeline("feature-extraction", model=given, tokenizer=tokenizer, device="cpu")
        torch.testing.assert_close(extract("a film with heart", return_tensors=True), states)


def test_features_of_stock_models_come_from_the_stock_pipeline():
    config, tokenizer = tiny_config(), tiny_tokenizer()
    stock = BertModel(
        BertConfig(vocab_size=config.vocab_size, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    extract = pipeline("feature-extraction", model=stock, tokenizer=tokenizer, device="cpu")
    assert type(extract) is FeatureExtractionPipeline
    assert extract("a film", return_tensors=True).shape[-1] == 8


@pytest.fixture
def registered():
    """What the first config of each family registers."""
    for model_type in auto.MODELS:
        auto.register_family(model_type)


def test_registering_again_changes_nothing(registered):
    task = dict(PIPELINE_REGISTRY.supported_tasks["early-exit-text-classification"])
    auto.register_configs()
    for model_type in auto.MODELS:
        auto.register_models(model_type)
    auto.register_pipelines()
    auto.register_peft()
    assert PIPELINE_REGISTRY.supported_tasks["early-exit-text-classification"] == task
    assert CONFIG_MAPPING["bert_cee"] is BertCeeConfig and CONFIG_MAPPING["llama_cee"] is LlamaCeeConfig


def test_every_class_has_an_entry():
    for entry in auto.MODELS.values():
        for full_name in entry.classes:
            module, _, name = full_name.rpartition(".")
            assert name in transformers_cee.__all__
            assert getattr(transformers_cee, name) is getattr(sys.modules[module], name)


def test_the_readme_lists_every_family():
    text = (Path(__file__).parents[1] / "README.md").read_text()
    for entry in auto.MODELS.values():
        assert f"| `{entry.stock}` | `{entry.class_name}` |" in text


def test_peft_knows_every_method_that_it_knows_for_the_stock_model(registered):
    mappings = [value for name, value in vars(constants).items() if name.endswith("_TARGET_MODULES_MAPPING")]
    assert len(mappings) > 5
    for mapping in mappings:
        for model_type, entry in auto.MODELS.items():
            ours = list(entry.lora_targets) or None if mapping is LORA_TARGETS else None
            assert mapping.get(model_type) == mapping.get(entry.stock, ours)


def test_others_targets_are_left_alone(monkeypatch):
    monkeypatch.setitem(LORA_TARGETS, "llama_cee", ["k_proj"])
    auto.register_peft()
    assert LORA_TARGETS["llama_cee"] == ["k_proj"]


def test_foreign_class_under_our_model_type_is_refused():
    class OtherConfig(BertConfig):
        model_type = "bert_cee"

    AutoConfig.register("bert_cee", OtherConfig, exist_ok=True)
    try:
        with pytest.raises(ValueError, match=r"'bert_cee'.*BertCeeConfig.*OtherConfig"):
            auto.register_configs()
    finally:
        AutoConfig.register("bert_cee", BertCeeConfig, exist_ok=True)
    assert CONFIG_MAPPING["bert_cee"] is BertCeeConfig


def test_task_is_registered_as_transformers_would(caplog):
    task = PIPELINE_REGISTRY.supported_tasks["early-exit-text-classification"]
    assert task["impl"] is transformers_cee.EarlyExitTextClassificationPipeline
    assert task["pt"] == (transformers.AutoModelForSequenceClassification,)
    assert "already registered" not in caplog.text


@pytest.mark.parametrize("model_type", sorted(auto.MODELS))
def test_the_model_class_of_a_checkpoint(model_type, tmp_path):
    """Of a stock checkpoint and of our own, from its config alone."""
    entry = auto.MODELS[model_type]
    for kind in (model_type, entry.stock):
        AutoConfig.for_model(kind).save_pretrained(tmp_path)
        for auto_class in entry.auto_classes:
            found = auto.model_class_of(str(tmp_path), auto_class)
            assert f"{found.__module__}.{found.__name__}" == entry.model
            assert found.config_class.model_type == model_type


def test_a_checkpoint_without_a_family_is_refused(tmp_path):
    accepted = r"accepted are .*'llama' and 'llama_cee' \(LlamaForConsistentEECausalLM\)"
    AutoConfig.for_model("gpt2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"`model_type`='gpt2' of .*{tmp_path.name} has no model .*; {accepted}"):
        auto.model_class_of(str(tmp_path), "AutoModelForCausalLM")
    BertConfig().save_pretrained(tmp_path)
    hint = r"For 'bert' there is BertForConsistentEE \(AutoModelForSequenceClassification\)"
    with pytest.raises(ValueError, match=rf"{accepted}.*\. {hint}\.$"):
        auto.model_class_of(str(tmp_path), "AutoModelForCausalLM")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"`model_type`=None of "):
        auto.model_class_of(str(tmp_path), "AutoModelForCausalLM")
