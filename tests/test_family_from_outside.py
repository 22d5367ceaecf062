# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A family that a user adds from a module of their own, by public names alone."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as LORA_TARGETS
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    ErnieConfig,
    ErnieForSequenceClassification,
)
from transformers.models.auto import configuration_auto, modeling_auto

from transformers_cee import BertForConsistentEE, auto, register_model


FAMILY = """
from torch import nn
from transformers import ErnieConfig, ErnieForSequenceClassification, ErnieModel, ErniePreTrainedModel

from transformers_cee import (
    BodyWithoutExits,
    EarlyExitSequenceClassifier,
    EncoderExitConfigMixin,
    ModelEntry,
    RemoteCodeConfigMixin,
    register_model,
)


class ErnieExitConfig(RemoteCodeConfigMixin, EncoderExitConfigMixin, ErnieConfig):
    model_type = "ernie_exits"


class ErnieWithExits(EarlyExitSequenceClassifier, ErniePreTrainedModel):
    config_class = ErnieExitConfig
    stock_class = ErnieForSequenceClassification
    task_modules = ("classifier", "ernie.pooler")

    def add_stock(self, config):
        self.ernie = ErnieModel(config, add_pooling_layer=config.keeps_stock_pooling)
        self.dropout = nn.Dropout(self.head_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def pool(self, state):
        return self.ernie.pooler(state.unsqueeze(1))

    def classify(self, state):
        return self.classifier(self.dropout(state))


class ErnieBody(BodyWithoutExits, ErnieModel):
    config_class = ErnieExitConfig


register_model(
    "ernie_exits",
    ModelEntry(
        stock="ernie",
        config=f"{__name__}.ErnieExitConfig",
        model=f"{__name__}.ErnieWithExits",
        auto_classes=("AutoModelForSequenceClassification",),
        base=f"{__name__}.ErnieBody",
        lora_targets=("query", "value"),
    ),
)
"""
SIZES = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16,
    "max_position_embeddings": 16, "initializer_range": 0.3, "num_labels": 3,
}  # fmt: skip


@pytest.fixture
def ernie(tmp_path, monkeypatch) -> ModuleType:
    """The family, in a module that can be imported; what it registers is taken back."""
    (tmp_path / "my_ernie.py").write_text(FAMILY)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("my_ernie")
    config_class = sys.modules.pop("my_ernie").ErnieExitConfig
    auto.MODELS.pop("ernie_exits", None)
    auto._registered.discard("ernie_exits")
    configuration_auto.CONFIG_MAPPING._extra_content.pop("ernie_exits", None)
    for mapping in (modeling_auto.MODEL_MAPPING, modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING):
        mapping._extra_content.pop(config_class, None)
    LORA_TARGETS.pop("ernie_exits", None)


@torch.no_grad()
def test_a_family_of_ones_own(ernie, tmp_path):
    """The Auto classes, PEFT's defaults, a stock checkpoint, exits, and a folder that finds the classes again."""
    torch.manual_seed(0)
    stock = ErnieForSequenceClassification(ErnieConfig(**SIZES)).eval()
    stock.save_pretrained(tmp_path / "stock")
    assert auto.model_class_of(str(tmp_path / "stock"), "AutoModelForSequenceClassification") is ernie.ErnieWithExits
    model = ernie.ErnieWithExits.from_pretrained(tmp_path / "stock").eval()
    ids = torch.randint(1, 40, (6, 7))
    torch.testing.assert_close(model(input_ids=ids).logits, stock(input_ids=ids).logits, rtol=0, atol=1e-6)
    exits = model(input_ids=ids, output_all_exits=True).all_exit_logits
    assert [model(input_ids=ids, exit_threshold=t).exit_layers.tolist() for t in (0.0, 1.0)] == [[1] * 6, [3] * 6]
    torch.testing.assert_close(model(input_ids=ids, exit_threshold=0.0).logits, exits[:, 0])
    assert LORA_TARGETS["ernie_exits"] == ["query", "value"]
    model.save_pretrained(tmp_path / "ours")
    assert type(AutoConfig.from_pretrained(tmp_path / "ours")) is ernie.ErnieExitConfig
    for load in (AutoModelForSequenceClassification, AutoModel):
        again = load.from_pretrained(tmp_path / "ours").eval()
        assert type(again) is ernie.ErnieWithExits
        torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert type(AutoModel.from_config(model.config)) is ernie.ErnieBody
    found: dict = {}
    text = (tmp_path / "ours" / "modeling_cee.py").read_text()
    exec(text, found)
    assert found["ErnieWithExits"] is ernie.ErnieWithExits and found["ErnieExitConfig"] is ernie.ErnieExitConfig
    assert 'error.name != "my_ernie"' in text and "the module my_ernie, which is not installed" in text
    hint = r"For 'ernie' there is ErnieWithExits \(AutoModelForSequenceClassification\)\.$"
    with pytest.raises(ValueError, match=rf"accepted are 'bert_cee', 'bert'\. {hint}"):
        BertForConsistentEE.from_pretrained(tmp_path / "stock")


def test_families_that_cannot_be_added(ernie):
    entry = auto.MODELS["ernie_exits"]
    register_model("ernie_exits", entry)
    before = dict(auto.MODELS)
    for changed, model_type, error, message in (
        (
            {},
            "bert_cee",
            ValueError,
            r"`model_type`='bert_cee' is taken by transformers_cee\..*BertCeeConfig; give",
        ),
        ({}, "gpt2", ValueError, r"`model_type`='gpt2' is taken by transformers\..*GPT2Config; give my_ernie"),
        ({"lora_targets": ()}, "ernie_exits", ValueError, r"'ernie_exits' is taken by my_ernie\.ErnieExitConfig"),
        ({}, "another", ValueError, r"`model_type`='another' is not that of my_ernie.*, which is 'ernie_exits'"),
        ({"auto_classes": ("AutoModelForJokes",)}, "another", ValueError, r"`auto_classes`=\('AutoModelForJokes',\)"),
        ({"auto_classes": ()}, "another", ValueError, r"`auto_classes`=\(\) must name Auto classes"),
        ({"config": "__main__.Config"}, "another", ValueError, r"accepted are full names in modules to import"),
        (
            {"config": "transformers.ErnieConfig"},
            "another",
            TypeError,
            r"must derive from RemoteCodeConfigMixin",
        ),
    ):
        with pytest.raises(error, match=message):
            register_model(model_type, replace(entry, **changed))
    with pytest.raises(TypeError, match="`entry` must be a ModelEntry"):
        register_model("another", {"stock": "ernie"})
    assert before == auto.MODELS
    unknown = type("Unknown", (ernie.ErnieExitConfig,), {"model_type": "unknown"})
    with pytest.raises(ValueError, match=r"`model_type`='unknown' is in no table of families; `register_model` adds"):
        unknown()
