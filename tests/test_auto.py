# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
from __future__ import annotations

import sys

import pytest
import transformers
from peft.utils import constants
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as LORA_TARGETS
from tiny_models import run_python, tiny_config
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, BertConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pipelines import PIPELINE_REGISTRY

import transformers_cee
from transformers_cee import BertCeeConfig, BertForConsistentEE, LlamaCeeConfig, auto


REGISTERED = """
import sys
import transformers_cee

assert not {"torch", "transformers"} & set(sys.modules), "loaded too early"
exec(sys.argv[1])

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers_cee import auto

config = AutoConfig.for_model(
    "bert_cee", hidden_size=8, num_hidden_layers=2, num_attention_heads=1, intermediate_size=8, vocab_size=9
)
for auto_class in (AutoModel, AutoModelForSequenceClassification):
    assert type(auto_class.from_config(config)).__name__ == "BertForConsistentEE", auto_class

config = AutoConfig.for_model(
    "llama_cee", hidden_size=8, num_hidden_layers=2, num_attention_heads=1, intermediate_size=8, vocab_size=9
)
for auto_class in (AutoModel, AutoModelForCausalLM):
    assert type(auto_class.from_config(config)).__name__ == "LlamaForConsistentEECausalLM", auto_class

from transformers.pipelines import PIPELINE_REGISTRY

assert "early-exit-text-classification" in PIPELINE_REGISTRY.supported_tasks

import peft
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as targets

assert targets["llama_cee"] == targets["llama"] and targets["bert_cee"] == targets["bert"]
assert auto._finder not in sys.meta_path, "still waiting"
"""


def test_import_loads_neither_torch_nor_transformers():
    done = run_python(
        "import sys, transformers_cee; print(*sorted({'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules)))"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(
    "first",
    [
        "from transformers import AutoConfig",
        # Loads the Auto classes half-way through the module that our model imports from.
        "from transformers import BertModel",
        "from transformers import pipeline",
        "from transformers import Trainer",
        "import peft",
        "from transformers_cee import BertForConsistentEE",
        "from transformers_cee import LlamaForConsistentEECausalLM",
        "from transformers_cee import exit_lora_config",
    ],
)
def test_registered_whatever_is_imported_first(first):
    done = run_python(REGISTERED, first)
    assert done.returncode == 0, done.stderr


def test_registered_when_transformers_was_first():
    done = run_python("import transformers.pipelines, torch, peft\n" + REGISTERED.replace("assert not {", "{"), "pass")
    assert done.returncode == 0, done.stderr


def test_auto_classes_give_the_model_with_exits(tmp_path):
    BertForConsistentEE(tiny_config()).save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is BertCeeConfig
    for auto_class in (AutoModel, AutoModelForSequenceClassification):
        model, report = auto_class.from_pretrained(tmp_path, output_loading_info=True)
        assert type(model) is BertForConsistentEE
        assert not report["missing_keys"] and not report["unexpected_keys"]


def test_registering_again_changes_nothing():
    finders = list(sys.meta_path)
    auto.register()
    auto.register_configs()
    auto.register_models()
    auto.register_pipelines()
    auto.register_peft()
    assert sys.meta_path == finders
    assert CONFIG_MAPPING["bert_cee"] is BertCeeConfig and CONFIG_MAPPING["llama_cee"] is LlamaCeeConfig


def test_peft_knows_every_method_that_it_knows_for_the_stock_model():
    mappings = [value for name, value in vars(constants).items() if name.endswith("_TARGET_MODULES_MAPPING")]
    assert len(mappings) > 5
    for mapping in mappings:
        for model_type, entry in auto.MODELS.items():
            assert mapping.get(model_type) == mapping.get(entry.stock)


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
        # A step that failed is tried again.
        auto._done.discard("transformers.models.auto.configuration_auto")
        with pytest.raises(ValueError, match="OtherConfig"):
            auto.register()
    finally:
        AutoConfig.register("bert_cee", BertCeeConfig, exist_ok=True)
        auto.register()
    assert CONFIG_MAPPING["bert_cee"] is BertCeeConfig
    assert auto._finder not in sys.meta_path


def test_failed_import_leaves_no_trace(tmp_path):
    done = run_python(
        """
import sys
import transformers_cee
from transformers_cee import auto

try:
    import transformers.no_such_module
except ModuleNotFoundError:
    pass
try:
    import transformers_cee.no_such_module
except ModuleNotFoundError:
    pass
assert getattr(auto._finder._imports, "depth", 0) == 0
from transformers import AutoConfig

assert AutoConfig.for_model("bert_cee", num_hidden_layers=3).num_hidden_layers == 3
"""
    )
    assert done.returncode == 0, done.stderr


def test_loader_stays_what_it_is():
    import inspect

    assert "class AutoConfig" in inspect.getsource(sys.modules["transformers.models.auto.configuration_auto"])


def test_task_is_registered_once(caplog):
    auto.register_pipelines()
    task = PIPELINE_REGISTRY.supported_tasks["early-exit-text-classification"]
    assert task["impl"] is transformers_cee.EarlyExitTextClassificationPipeline
    assert task["pt"] == (transformers.AutoModelForSequenceClassification,)
    assert "already registered" not in caplog.text
