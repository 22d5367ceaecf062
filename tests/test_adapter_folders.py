# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Adapter folders: whatever loads one gives the same logits and exit layers, or an error that says what is missing."""

from __future__ import annotations

import inspect
import json
import pickle
import subprocess
import sys

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    get_peft_model,
)
from tiny import tiny_trainer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from transformers.integrations.peft import PeftAdapterMixin

from transformers_cee import BertForConsistentEE, LlamaForConsistentEECausalLM, exit_lora_config


IDS = torch.randint(3, 60, (6, 7), generator=torch.Generator().manual_seed(0))
SIZES = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 48, "initializer_range": 0.15,
}  # fmt: skip
AUTO = {"SEQ_CLS": AutoPeftModelForSequenceClassification, "CAUSAL_LM": AutoPeftModelForCausalLM}
FIELDS = {
    "SEQ_CLS": {"num_labels": 3, "exit_layers": [1, 3], "exit_pooling": "mean", "exit_norm": "layer_norm"},
    "CAUSAL_LM": {"exit_layers": [1, 3], "exit_head": "low_rank", "exit_head_rank": 4},
}
OURS = {"SEQ_CLS": BertForConsistentEE, "CAUSAL_LM": LlamaForConsistentEECausalLM}


@pytest.fixture(params=list(AUTO))
def base(request, tmp_path):
    """Task and folder of a stock checkpoint without a head of its own for the task, if it can."""
    torch.manual_seed(0)
    folder = tmp_path / "base"
    if request.param == "SEQ_CLS":
        BertModel(BertConfig(**SIZES)).save_pretrained(folder)
    else:
        LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
    return request.param, folder


def stock_class(task_type):
    return AutoModelForSequenceClassification if task_type == "SEQ_CLS" else AutoModelForCausalLM


def adapted(task_type, folder, fields=None, **options):
    """A model with LoRA and exits, all drawn so that rows leave everywhere."""
    model = OURS[task_type].from_pretrained(folder, **(FIELDS[task_type] if fields is None else fields))
    model = get_peft_model(model, exit_lora_config(task_type, **options)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(1.0 if "exit_norms" in name and name.endswith("weight") else 0.0, 0.3)
    return model


@torch.no_grad()
def answers(model, **options):
    output = model(input_ids=IDS, **options)
    return output.logits, output.exit_layers


def same(first, second, **options):
    (logits, layers), (other_logits, other_layers) = answers(first, **options), answers(second, **options)
    torch.testing.assert_close(other_logits, logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(layers, other_layers)
    return layers


class TestLoadedAnew:
    def test_over_the_stock_model(self, base, tmp_path):
        task_type, folder = base
        model = adapted(task_type, folder)
        model.save_pretrained(tmp_path / "adapter")
        again = AUTO[task_type].from_pretrained(tmp_path / "adapter").eval()
        assert type(again.get_base_model()) is OURS[task_type]
        assert len(same(model, again, exit_threshold=0.5).unique()) > 1
        same(model, again, exit_threshold=0.0)
        same(model, again, exit_threshold=1.0)

    def test_by_hand(self, base, tmp_path):
        task_type, folder = base
        model = adapted(task_type, folder)
        model.save_pretrained(tmp_path / "adapter")
        right = OURS[task_type].from_pretrained(folder, **FIELDS[task_type])
        same(model, PeftModel.from_pretrained(right, tmp_path / "adapter").eval(), exit_threshold=0.5)

    def test_by_transformers(self, base, tmp_path):
        """Which puts adapters into the model that it is asked for, or that the base folder names."""
        task_type, folder = base
        model = adapted(task_type, folder)
        model.save_pretrained(tmp_path / "adapter")
        if "AuxiliaryTrainingWrapper" in inspect.getsource(PeftAdapterMixin.load_adapter):
            again = OURS[task_type].from_pretrained(tmp_path / "adapter", **FIELDS[task_type]).eval()
            same(model, again, exit_threshold=0.5)
        else:
            # Older releases of transformers pass over what an adapter saves in full.
            with pytest.raises(ValueError, match=r"weights of exits, which this release.*PeftModel\.from_pretrained"):
                OURS[task_type].from_pretrained(tmp_path / "adapter", **FIELDS[task_type])
        stock = stock_class(task_type)
        with pytest.raises(ValueError, match=r"a model with exits, and cannot be put into a .*AutoPeftModelFor"):
            stock.from_pretrained(tmp_path / "adapter")

    def test_forgotten_fields(self, base, tmp_path):
        task_type, folder = base
        adapted(task_type, folder).save_pretrained(tmp_path / "adapter")
        for forgotten in FIELDS[task_type]:
            fields = {name: value for name, value in FIELDS[task_type].items() if name != forgotten}
            wrong = OURS[task_type].from_pretrained(folder, **fields)
            with pytest.raises(ValueError, match=rf"other exits.*{forgotten}="):
                PeftModel.from_pretrained(wrong, tmp_path / "adapter")

    def test_what_was_found_later_comes_along(self, base, tmp_path):
        task_type, folder = base
        model = adapted(task_type, folder)
        point = {"criterion": "policy", "thresholds": [0.5, 0.4, 1.0]}
        model.get_base_model().config.exit_operating_points = {"quick": point}
        model.save_pretrained(tmp_path / "adapter")
        again = AUTO[task_type].from_pretrained(tmp_path / "adapter").eval()
        layers = same(model, again, exit_threshold="quick")
        assert torch.equal(layers, answers(model, exit_threshold=[0.5, 0.4, 1.0])[1])

    def test_estimators_that_stay_behind_are_named(self, base, tmp_path, caplog):
        """An adapter holds none; who has them already is told nothing."""
        task_type, folder = base
        name = "calibrated_probability" if task_type == "SEQ_CLS" else "token_hash"
        fields = {**FIELDS[task_type], "exit_estimators": [name], "exit_criterion": name}
        model = adapted(task_type, folder, fields)
        model.save_pretrained(tmp_path / "adapter")
        caplog.clear()
        again = AUTO[task_type].from_pretrained(tmp_path / "adapter").eval()
        assert f"beside the estimators '{name}', which it does not hold" in caplog.text
        assert again.config.exit_estimators == []
        same(model, again, exit_criterion="policy", exit_threshold=0.5)
        with pytest.raises(ValueError, match=f"'{name}' needs its fitted estimator"):
            answers(again, exit_threshold=0.5)
        caplog.clear()
        right = OURS[task_type].from_pretrained(folder, **fields)
        PeftModel.from_pretrained(right, tmp_path / "adapter")
        assert "does not hold" not in caplog.text

    def test_the_pooler_is_trained_and_saved(self, tmp_path):
        """Of a base without one it is random, and all exits look through it."""
        BertModel(BertConfig(**SIZES), add_pooling_layer=False).save_pretrained(tmp_path / "base")
        model = adapted("SEQ_CLS", tmp_path / "base", {"exit_layers": 2})
        assert any("pooler" in name and one.requires_grad for name, one in model.named_parameters())
        model.save_pretrained(tmp_path / "adapter")
        again = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter").eval()
        same(model, again, exit_threshold=0.5)

    def test_a_trainer_saves_it(self, tmp_path):
        BertModel(BertConfig(**SIZES)).save_pretrained(tmp_path / "base")
        model = adapted("SEQ_CLS", tmp_path / "base")
        trainer = tiny_trainer(tmp_path / "run", model)
        trainer.save_model(str(tmp_path / "adapter"))
        again = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter").eval()
        same(model.eval(), again, exit_threshold=0.5)


def test_a_drafter_that_stays_behind_is_named(tmp_path, caplog):
    """Verified text is the whole model's with and without it."""
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "base")
    model = adapted("CAUSAL_LM", tmp_path / "base", {**FIELDS["CAUSAL_LM"], "drafter_layer": 2})
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert "saved beside a drafter, which it does not hold" in caplog.text
    assert again.get_base_model().exit_drafter is None and again.get_base_model().config.drafter_layer is None
    ids = torch.tensor([[5, 6, 7, 5, 6]])
    texts = [one.eval().generate(input_ids=ids, max_new_tokens=6, exit_verify=True) for one in (model, again)]
    assert torch.equal(*texts)


@pytest.mark.parametrize("first", [pytest.param("peft", marks=pytest.mark.slow), "transformers_cee"])
def test_another_process(first, tmp_path):
    """Whichever of PEFT and this package is imported first, nothing else has to be."""
    BertModel(BertConfig(**SIZES)).save_pretrained(tmp_path / "base")
    adapted("SEQ_CLS", tmp_path / "base").save_pretrained(tmp_path / "adapter")
    code = (
        f"import {first}\n"
        "import sys, torch, transformers_cee\n"
        "from peft import AutoPeftModelForSequenceClassification, PeftModel\n"
        "from transformers import AutoModelForSequenceClassification as Auto\n"
        "try:\n"
        "    Auto.from_pretrained(sys.argv[2])\n"
        "except ValueError as error:\n"
        "    assert 'a model with exits' in str(error)\n"
        "else:\n"
        "    raise AssertionError('a stock model')\n"
        "stock = Auto.from_pretrained(sys.argv[1], num_labels=3)\n"
        "for model in (\n"
        "    PeftModel.from_pretrained(stock, sys.argv[2]),\n"
        "    AutoPeftModelForSequenceClassification.from_pretrained(sys.argv[2]),\n"
        "):\n"
        "    output = model.eval()(torch.tensor([[5, 6, 7]]), exit_threshold=0.0)\n"
        "    assert output.exit_layers.tolist() == [1]\n"
    )
    folders = [str(tmp_path / name) for name in ("base", "adapter")]
    done = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class TestOtherModels:
    def test_another_architecture(self, tmp_path):
        BertModel(BertConfig(**SIZES)).save_pretrained(tmp_path / "base")
        adapted("SEQ_CLS", tmp_path / "base").save_pretrained(tmp_path / "adapter")
        other = RobertaForSequenceClassification(RobertaConfig(**SIZES))
        with pytest.raises(ValueError, match=r"trained on a BertForConsistentEE.*RobertaForSequenceClassification"):
            PeftModel.from_pretrained(other, tmp_path / "adapter")

    def test_without_exits_nothing_changes(self, tmp_path):
        BertForSequenceClassification(BertConfig(**SIZES)).save_pretrained(tmp_path / "base")
        stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
        model = get_peft_model(stock, LoraConfig(task_type="SEQ_CLS")).eval()
        model.save_pretrained(tmp_path / "adapter")
        assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["auto_mapping"] is None
        again = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter").eval()
        assert type(again.get_base_model()) is BertForSequenceClassification
        with torch.no_grad():
            torch.testing.assert_close(again(IDS).logits, model(IDS).logits)


def threshold_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())["auto_mapping"]["early_exit_config"][
        "exit_threshold"
    ]


class TestConfigsThatAreUsedAgain:
    def test_a_config_stays_the_callers(self, base):
        """Whatever it was used for before, a new adapter is one of the model that it is put into."""
        task_type, folder = base
        config = exit_lora_config(task_type)
        first = get_peft_model(OURS[task_type].from_pretrained(folder, exit_threshold=0.3, exit_layers=2), config)
        first.state_dict()
        assert config.auto_mapping is None
        for again in (config, first.peft_config["default"]):
            second = get_peft_model(OURS[task_type].from_pretrained(folder, exit_threshold=0.7), again)
            second.state_dict()
            assert second.config.exit_threshold == 0.7 and first.config.exit_threshold == 0.3
            third = get_peft_model(stock_class(task_type).from_pretrained(folder), again)
            assert not hasattr(third.config, "exit_threshold")

    def test_each_adapter_has_its_thresholds(self, base, tmp_path):
        task_type, folder = base
        model = adapted(task_type, folder)
        for name, threshold in (("first", 0.3), ("second", 0.7)):
            model.config.exit_threshold = threshold
            model.save_pretrained(tmp_path / name)
        model = AUTO[task_type].from_pretrained(tmp_path / "first")
        model.load_adapter(tmp_path / "second", "second")
        assert model.config.exit_threshold == 0.3
        model.config.exit_threshold = 0.4
        model.set_adapter("default")
        assert model.config.exit_threshold == 0.4
        model.set_adapter("second")
        assert model.config.exit_threshold == 0.7
        model.save_pretrained(tmp_path / "both")
        assert threshold_of(tmp_path / "both") == 0.4 and threshold_of(tmp_path / "both" / "second") == 0.7
        model.delete_adapter("second")
        assert model.config.exit_threshold == 0.4

    def test_training_goes_on(self, base, tmp_path):
        task_type, folder = base
        model = adapted(task_type, folder)
        model.config.exit_threshold = 0.4
        model.save_pretrained(tmp_path / "adapter")
        again = AUTO[task_type].from_pretrained(tmp_path / "adapter", is_trainable=True).eval()
        assert len(same(model, again)) and again.config.exit_threshold == 0.4


class TestStockModels:
    @pytest.mark.parametrize("tuner", [IA3Config, LoHaConfig])
    def test_other_tuners(self, tuner, base, tmp_path):
        task_type, folder = base
        model = OURS[task_type].from_pretrained(folder, **FIELDS[task_type])
        targets = ["query", "value"] if task_type == "SEQ_CLS" else ["k_proj", "v_proj"]
        more = {"feedforward_modules": []} if tuner is IA3Config else {}
        saved = exit_lora_config(task_type).modules_to_save
        config = tuner(task_type=task_type, target_modules=targets, modules_to_save=saved, **more)
        model = get_peft_model(model, config).eval()
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.3)
        model.save_pretrained(tmp_path / "adapter")
        again = AUTO[task_type].from_pretrained(tmp_path / "adapter").eval()
        assert type(again.get_base_model()) is OURS[task_type]
        same(model, again, exit_threshold=0.5)

    def test_an_adapter_without_the_exits(self, base, tmp_path):
        task_type, folder = base
        right = OURS[task_type].from_pretrained(folder, **FIELDS[task_type])
        model = get_peft_model(right, LoraConfig(task_type=task_type)).eval()
        model.save_pretrained(tmp_path / "adapter")
        with pytest.raises(ValueError, match=r"holds no exit_heads, exit_norms, exit_policies.*exit_lora_config"):
            AUTO[task_type].from_pretrained(tmp_path / "adapter")
        right = model.unload()
        same(right, PeftModel.from_pretrained(right, tmp_path / "adapter").eval(), exit_threshold=0.5)

    def test_a_second_adapter(self, base, tmp_path):
        task_type, folder = base
        adapted(task_type, folder).save_pretrained(tmp_path / "adapter")
        stock = stock_class(task_type)
        model = get_peft_model(stock.from_pretrained(folder), LoraConfig(task_type=task_type))
        with pytest.raises(ValueError, match=r"a model with exits, and cannot be put into a .*first adapter"):
            model.load_adapter(tmp_path / "adapter", "exits")
        assert list(model.peft_config) == ["default"]

    def test_a_mixed_model(self, base, tmp_path):
        task_type, folder = base
        model = adapted(task_type, folder)
        model.save_pretrained(tmp_path / "adapter")
        stock = stock_class(task_type)
        stock = stock.from_pretrained(folder, **({"num_labels": 3} if task_type == "SEQ_CLS" else {}))
        again = PeftMixedModel.from_pretrained(stock, tmp_path / "adapter").eval()
        same(model, again, exit_threshold=0.5)

    def test_only_the_exits_are_made(self, base, tmp_path, monkeypatch):
        """Everything else is the stock model's; exits come in its dtype."""
        task_type, folder = base
        adapted(task_type, folder).save_pretrained(tmp_path / "adapter")
        stock = stock_class(task_type).from_pretrained(folder, dtype=torch.bfloat16)
        made, build = [], OURS[task_type]._from_config.__func__

        def record(cls, *args, **kwargs):
            model = build(cls, *args, **kwargs)
            made.extend((one.device.type, one.dtype) for one in model.parameters())
            return model

        monkeypatch.setattr(OURS[task_type], "_from_config", classmethod(record))
        body = getattr(stock, stock.base_model_prefix).named_parameters()
        kept = {one.data_ptr() for name, one in body if "pooler" not in name}
        model = PeftModel.from_pretrained(stock, tmp_path / "adapter", autocast_adapter_dtype=False)
        assert set(made) == {("meta", torch.bfloat16)}
        assert {one.dtype for name, one in model.named_parameters() if "lora" not in name} == {torch.bfloat16}
        assert not any(one.is_meta for one in (*model.parameters(), *model.buffers()))
        assert kept <= {one.data_ptr() for one in model.parameters()}


def test_models_with_adapters_are_pickled():
    """As PEFT's own, whatever the model: processes hand them to each other."""
    model = BertForSequenceClassification(BertConfig(**SIZES))
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query"])).eval()
    again = pickle.loads(pickle.dumps(model))
    assert type(again.base_model) is type(model.base_model)
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits)
