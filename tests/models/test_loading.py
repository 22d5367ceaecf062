# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Checkpoints into models of both families: exits are found by layer, new ones are said, the rest is refused."""

from __future__ import annotations

import json
import logging
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_config, tiny_llama, tiny_llama_config, tiny_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertModel,
    ElectraConfig,
    ElectraModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaModel,
)

from transformers_cee import BertCeeConfig, BertForConsistentEE, LlamaCeeConfig, LlamaForConsistentEECausalLM
from transformers_cee.exits.estimators import ESTIMATORS


IDS = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(0))
SIZES = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 48,
}  # fmt: skip
POINT = {"criterion": "entropy", "promise": "agreement", "levels": {"epsilon": 0.1}, "method": "scan", "rows": 9}
MAKERS = {
    "bert": lambda **fields: tiny_model(exit_norm="layer_norm", **fields),
    "bert, mean": lambda **fields: tiny_model(exit_pooling="mean", policy_condition="film", **fields),
    "llama, untied": lambda **fields: tiny_llama(num_hidden_layers=6, exit_head="untied", **fields),
    "llama, low rank": lambda **fields: tiny_llama(num_hidden_layers=6, exit_head="low_rank", **fields),
}


@pytest.fixture(scope="module", params=list(MAKERS))
def trained(request, tmp_path_factory):
    """A model with exits after layers 2, 4 and 6, and its folder."""
    model, folder = MAKERS[request.param](exit_layers=[2, 4]), tmp_path_factory.mktemp("trained")
    model.save_pretrained(folder)
    return model, folder


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


class TestExitsBelongToLayers:
    @pytest.mark.parametrize("exit_layers,layers", [([4, 6], [4, 6]), (2, [2, 4, 6]), (4, [2, 6]), ([6], [6])])
    @torch.no_grad()
    def test_a_subset_keeps_its_own(self, trained, exit_layers, layers, caplog):
        """What a kept exit says is what it said, and full depth is bit-identical."""
        model, folder = trained
        some = type(model).from_pretrained(folder, exit_layers=exit_layers).eval()
        assert some.layer_numbers == some.config.exit_layer_numbers == layers
        assert not said(caplog)
        before = model(IDS, exit_threshold=1.0).logits
        assert torch.equal(some(IDS, exit_threshold=1.0).logits, before)
        for index, layer in enumerate(layers[:-1]):
            at = [0.0 if own == layer else 1.0 for own in model.layer_numbers]
            alone = [0.0 if other == index else 1.0 for other in range(len(layers))]
            first, second = model(IDS, exit_threshold=at), some(IDS, exit_threshold=alone)
            assert first.exit_layers.unique().tolist() == second.exit_layers.unique().tolist() == [layer]
            torch.testing.assert_close(second.logits, first.logits, rtol=1e-5, atol=1e-6)
            place = model.layer_numbers.index(layer)
            torch.testing.assert_close(
                second.exit_probabilities[..., index], first.exit_probabilities[..., place], rtol=1e-5, atol=1e-6
            )

    @pytest.mark.parametrize("how", ["config object", "auto", "auto config", "config.json"])
    @torch.no_grad()
    def test_every_way_to_ask(self, how, tmp_path):
        model = tiny_model(exit_layers=[2, 4], exit_norm="layer_norm")
        model.save_pretrained(tmp_path)
        if how == "config object":
            config = BertCeeConfig.from_pretrained(tmp_path)
            config.exit_layers = [4]
            some = BertForConsistentEE.from_pretrained(tmp_path, config=config)
        elif how == "auto":
            some = AutoModelForSequenceClassification.from_pretrained(tmp_path, exit_layers=[4])
        elif how == "auto config":
            config = AutoConfig.from_pretrained(tmp_path, exit_layers=[4])
            some = AutoModelForSequenceClassification.from_pretrained(tmp_path, config=config)
        else:
            change_config(tmp_path, exit_layers=[4])
            some = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        assert some.layer_numbers == [4, 6]
        first = model(IDS, exit_threshold=[1.0, 0.0, 1.0])
        torch.testing.assert_close(some.eval()(IDS, exit_threshold=0.0).logits, first.logits)

    @pytest.mark.parametrize("exit_layers,new", [(None, "1, 3 and 5"), ([3, 4], None), (3, None)])
    @torch.no_grad()
    def test_new_exits_are_announced(self, trained, exit_layers, new, caplog):
        model, folder = trained
        other = type(model).from_pretrained(folder, exit_layers=exit_layers).eval()
        (message,) = said(caplog)
        assert "untrained" in message and (f"exits after layers {new}" if new else "an exit after layer 3") in message
        torch.testing.assert_close(other(IDS, exit_threshold=1.0).logits, model(IDS, exit_threshold=1.0).logits)

    def test_the_config_is_saved_with_what_the_weights_are_of(self, trained, tmp_path, caplog):
        model, folder = trained
        model = type(model).from_pretrained(folder)
        model.config.exit_layers = [4]
        model.save_pretrained(tmp_path)
        assert "was changed after the model was made" in said(caplog)[0]
        again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
        assert again.layer_numbers == [2, 4, 6] and not info["missing_keys"] and not info["unexpected_keys"]

    def test_fewer_layers_have_another_last_exit(self, trained):
        model, folder = trained
        with pytest.raises(ValueError, match=r"`num_hidden_layers`=4.*trained for layer 6.*`exit_layers`"):
            type(model).from_pretrained(folder, num_hidden_layers=4)

    def test_names_by_position(self, trained, tmp_path):
        model, folder = trained
        model.config.save_pretrained(tmp_path)
        tensors = load_file(folder / "model.safetensors")
        renamed = {re.sub(r"layer_(\d)", lambda found: str(int(found[1]) // 2 - 1), name): value
                   for name, value in tensors.items()}  # fmt: skip
        save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match="names its exits by position"):
            type(model).from_pretrained(tmp_path)


class TestWhatWasFitted:
    @pytest.fixture
    def folder(self, tmp_path):
        model = tiny_model(exit_layers=[2, 4], exit_estimators=sorted(ESTIMATORS))
        for name, value in model.exit_estimators["calibrated_probability"].named_parameters():
            value.data.fill_(float(name[-1]))
        model.config.exit_operating_points = {"fast": {**POINT, "thresholds": [0.1, 0.2, 0.3]}}
        model.config.exit_budgets, model.config.exit_threshold = [[0.5, 0.1, 0.5]], "fast"
        model.save_pretrained(tmp_path)
        return tmp_path

    @pytest.mark.parametrize(
        "exit_layers,kept,dropped",
        [
            ([4], ["calibrated_probability", "learning_to_exit", "state_classifier"], ["consistency", "token_hash"]),
            (
                [2, 3],
                ["learning_to_exit"],
                ["consistency", "token_hash", "calibrated_probability", "state_classifier"],
            ),
        ],
    )
    @pytest.mark.parametrize("load", [BertForConsistentEE, AutoModelForSequenceClassification])
    def test_what_does_not_fit_is_dropped_by_name(self, folder, exit_layers, kept, dropped, load, caplog):
        model = load.from_pretrained(folder, exit_layers=exit_layers)
        assert sorted(model.exit_estimators) == sorted(model.config.exit_estimators) == kept
        assert (model.config.exit_operating_points, model.config.exit_budgets) == ({}, [])
        assert not isinstance(model.config.exit_threshold, str)
        (message,) = [one for one in said(caplog) if "dropped" in one]
        for name in ("'fast'", "`exit_budgets`", "`exit_threshold`", *(f"estimator {name!r}" for name in dropped)):
            assert name in message
        assert not any(f"estimator {name!r}" in message for name in kept)
        if "calibrated_probability" in kept:
            assert model.exit_estimators["calibrated_probability"].log_temperatures.tolist() == [4.0]

    def test_what_is_given_stays(self, folder):
        config = BertCeeConfig.from_pretrained(folder, exit_layers=[4], exit_threshold=[0.2, 0.4])
        assert config.exit_threshold == [0.2, 0.4]

    def test_a_changed_config_of_as_many_exits(self, folder, caplog):
        """No count tells: the weights' names do."""
        change_config(folder, exit_layers=[3, 4])
        model = BertForConsistentEE.from_pretrained(folder)
        assert list(model.exit_estimators) == model.config.exit_estimators == ["learning_to_exit"]
        assert (model.config.exit_operating_points, model.config.exit_budgets) == ({}, [])
        dropped, new = said(caplog)
        assert "'fast'" in dropped and "an exit after layer 3" in new and "estimator" not in new

    def test_a_list_of_thresholds(self, tmp_path, caplog):
        tiny_model(exit_layers=[2, 4], exit_threshold=[0.1, 0.2, 0.3]).save_pretrained(tmp_path)
        model = BertForConsistentEE.from_pretrained(tmp_path, exit_layers=[4])
        assert "`exit_threshold`=[0.1, 0.2, 0.3]" in said(caplog)[0]
        assert model(IDS).exit_layers.shape == (3,)


OTHERS = {
    "roberta": (RobertaModel, RobertaConfig), "electra": (ElectraModel, ElectraConfig),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config), "qwen3": (Qwen3ForCausalLM, Qwen3Config),
    "mistral": (MistralForCausalLM, MistralConfig),
}  # fmt: skip
OURS = {"bert": (BertForConsistentEE, BertCeeConfig), "llama": (LlamaForConsistentEECausalLM, LlamaCeeConfig)}


@pytest.fixture(scope="module", params=list(OTHERS))
def other(request, tmp_path_factory):
    """A checkpoint of another architecture."""
    model_class, config_class = OTHERS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    more = {} if request.param in ("roberta", "electra") else {"num_key_value_heads": 2}
    model_class(config_class(**SIZES, **more)).save_pretrained(folder)
    return request.param, folder


class TestOtherArchitectures:
    @pytest.mark.parametrize("family", list(OURS))
    def test_refused(self, other, family):
        name, folder = other
        model_class, config_class = OURS[family]
        message = rf"`model_type`='{name}'.*accepted are '{family}_cee', '{family}'"
        own = config_class(**SIZES)
        auto = AutoModelForSequenceClassification if family == "bert" else AutoModelForCausalLM
        for load in (
            lambda: model_class.from_pretrained(folder),
            lambda: model_class.from_pretrained(folder, config=own),
            lambda: auto.from_pretrained(folder, config=own),
            lambda: config_class.from_pretrained(folder),
            lambda: config_class(**json.loads((folder / "config.json").read_text())),
        ):
            with pytest.raises(ValueError, match=message):
                load()

    def test_weights_without_a_config(self, other, tmp_path):
        """Their names say that they don't fit; where only some are unknown, transformers lists them."""
        name, folder = other
        if name in ("roberta", "electra"):
            tensors = load_file(folder / "model.safetensors")
            tensors = {f"{name}.{key}": value for key, value in tensors.items()}
            save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
            with pytest.raises(ValueError, match=r"lacks .* weights of the layers"):
                BertForConsistentEE.from_pretrained(tmp_path, config=BertCeeConfig(**SIZES))

    @pytest.mark.parametrize("family", list(OURS))
    def test_a_stock_config_object(self, family, tmp_path):
        model_class, config_class = OURS[family]
        stock = (BertConfig if family == "bert" else LlamaConfig)(**SIZES)
        for make in (lambda: model_class(stock), lambda: model_class.from_pretrained(tmp_path, config=stock)):
            with pytest.raises(TypeError, match=rf"`config` of type {type(stock).__name__}.*{config_class.__name__}"):
                make()


class TestHalfACheckpoint:
    @pytest.mark.parametrize("family", list(OURS))
    def test_lacking_weights(self, family, tmp_path):
        model = tiny_model() if family == "bert" else tiny_llama()
        model.save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        part = {name: value for name, value in tensors.items() if ".layer.1." not in name and ".layers.1." not in name}
        save_file(part, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"lacks \d+ weights of the layers.*layers?\.1\."):
            type(model).from_pretrained(tmp_path)

    @pytest.mark.parametrize("own", [False, True], ids=["stock", "own"])
    @pytest.mark.parametrize("family", list(OURS))
    def test_more_layers_than_there_are(self, family, own, tmp_path):
        model_class, config_class = OURS[family]
        stock = BertModel(BertConfig(**SIZES)) if family == "bert" else LlamaForCausalLM(LlamaConfig(**SIZES))
        (model_class(config_class(**SIZES)) if own else stock).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"`num_hidden_layers`=6, but .* the weights of 4 layers"):
            model_class.from_pretrained(tmp_path, num_hidden_layers=6)

    def test_fewer_layers_of_a_stock_checkpoint(self, tmp_path, caplog):
        BertForSequenceClassification(BertConfig(**SIZES)).save_pretrained(tmp_path)
        model = BertForConsistentEE.from_pretrained(tmp_path, num_hidden_layers=2)
        assert len(model.bert.encoder.layer) == 2 and len(said(caplog)) == 1

    def test_a_head_of_another_size(self, tmp_path, caplog):
        BertForSequenceClassification(BertConfig(**SIZES)).save_pretrained(tmp_path)
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            BertForConsistentEE.from_pretrained(tmp_path, num_labels=3)
        caplog.clear()
        BertForConsistentEE.from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
        (message,) = said(caplog)
        assert "`classifier`" in message and "LOAD REPORT" not in message


def no_pooler(config):
    return BertModel(config, add_pooling_layer=False)


class TestAGoodLoadIsQuiet:
    """At most one sentence, and it says what is untrained."""

    @pytest.mark.parametrize(
        "stock,new",
        [
            (BertForSequenceClassification, "heads and policies of exits after layers 1 to 3."),
            (BertForPreTraining, "heads and policies of exits after layers 1 to 3 and `classifier`."),
            (BertForMaskedLM, "heads and policies of exits after layers 1 to 3, `classifier` and `bert.pooler`."),
            (BertModel, "heads and policies of exits after layers 1 to 3 and `classifier`."),
            (no_pooler, "heads and policies of exits after layers 1 to 3, `classifier` and `bert.pooler`."),
        ],
    )
    def test_stock_bert(self, stock, new, tmp_path, caplog, capfd):
        stock(BertConfig(**SIZES)).save_pretrained(tmp_path)
        capfd.readouterr()
        BertForConsistentEE.from_pretrained(tmp_path)
        assert said(caplog) == [f"BertForConsistentEE loaded from {tmp_path}: untrained are {new}"]
        printed = capfd.readouterr()
        assert "[transformers]" not in printed.err + printed.out and "Some weights" not in printed.err

    def test_mean_pooling_needs_no_pooler(self, tmp_path, caplog):
        BertModel(BertConfig(**SIZES)).save_pretrained(tmp_path)
        BertForConsistentEE.from_pretrained(tmp_path, exit_pooling="mean")
        assert len(said(caplog)) == 1 and "pooler" not in said(caplog)[0]

    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("stock", [LlamaForCausalLM, LlamaModel])
    def test_stock_llama(self, stock, tied, tmp_path, caplog):
        stock(LlamaConfig(**SIZES, tie_word_embeddings=tied)).save_pretrained(tmp_path)
        LlamaForConsistentEECausalLM.from_pretrained(tmp_path)
        (message,) = said(caplog)
        head = "" if tied or stock is LlamaForCausalLM else " and `lm_head`"
        assert message.endswith(f"untrained are norms and policies of exits after layers 1 to 3{head}.")

    def test_own(self, trained, caplog, capfd):
        model, folder = trained
        type(model).from_pretrained(folder)
        assert not said(caplog)
        assert "[transformers]" not in capfd.readouterr().err


def test_configs_of_both_families_know_their_stock_type():
    for config in (tiny_config(), tiny_llama_config()):
        own = config.model_type
        assert type(config)(**{**config.to_dict(), "model_type": own.removesuffix("_cee")}).model_type == own
