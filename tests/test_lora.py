# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Adapters: what they train and save, and that generation with them leaves early as without."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch
import transformers
from packaging.version import Version
from peft import AutoPeftModelForCausalLM, IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from slow_llama import SlowModel, check_against_slow, prompts, spreading
from tiny import collate_text, instructions, pad, random_rows, tiny_llama, tiny_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.integrations.peft import MIN_PEFT_VERSION

from transformers_cee import BertForConsistentEE, EarlyExitCache, LlamaForConsistentEECausalLM, exit_lora_config


KINDS = ("shared", "norm", "low_rank", "untied", "layernorm_linear")
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj"]
THRESHOLDS = [0.6, 0.5, 0.5, 1.0]


def adapted(kind="norm", seed=0, targets=TARGETS, **fields):
    """A model whose adapter is far from doing nothing, exits included."""
    model = get_peft_model(tiny_llama(seed, exit_head=kind, **fields), exit_lora_config(target_modules=targets)).eval()
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.2)
            elif "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def generate(model, batch=None, **options):
    return model.generate(
        **(prompts([4, 2]) if batch is None else batch),
        **{
            "max_new_tokens": 8,
            "eos_token_id": None,
            "return_dict_in_generate": True,
            "exit_threshold": THRESHOLDS,
            **options,
        },
    )


def same(ours, theirs):
    assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.equal(ours.exit_layers, theirs.exit_layers)


class TestConfig:
    def test_what_it_saves(self):
        config = exit_lora_config()
        assert isinstance(config, LoraConfig) and config.task_type == "CAUSAL_LM" and config.target_modules is None
        assert config.modules_to_save == ["exit_heads", "exit_norms", "exit_policies"]
        config = exit_lora_config("SEQ_CLS", ["pooler"], r=4, target_modules=["query"])
        assert config.task_type == "SEQ_CLS" and config.r == 4 and config.target_modules == {"query"}
        assert config.modules_to_save == ["exit_heads", "exit_norms", "exit_policies", "pooler", "head"]

    @pytest.mark.parametrize("config", [LoraConfig(task_type="CAUSAL_LM"), exit_lora_config()])
    def test_default_targets_are_the_stock_models(self, config):
        model = get_peft_model(tiny_llama(), config)
        wrapped = {name.split(".")[-4] for name, _ in model.named_parameters() if "lora_A" in name}
        assert wrapped == {"q_proj", "v_proj"}
        twin = LlamaForCausalLM(tiny_llama().config)
        twin.config.model_type = "llama"
        theirs = get_peft_model(twin, LoraConfig(task_type="CAUSAL_LM"))
        assert {name for name, _ in theirs.named_parameters() if "lora_" in name} == {
            name for name, _ in model.named_parameters() if "lora_" in name
        }

    def test_other_methods(self):
        model = get_peft_model(tiny_llama(), IA3Config(task_type="CAUSAL_LM")).eval()
        assert any("ia3" in name for name, _ in model.named_parameters())
        same(generate(model), generate(tiny_llama()))

    def test_what_trains(self):
        model = get_peft_model(tiny_llama(exit_head="untied"), exit_lora_config())
        names = {name for name, one in model.named_parameters() if one.requires_grad}
        assert all("lora_" in name or "modules_to_save" in name for name in names)
        for part in ("exit_norms", "exit_heads", "exit_policies"):
            assert any(part in name for name in names)
        model.train()
        batch = collate_text(list(instructions(4, 1)))
        model(**batch).loss.backward()
        grads = {name for name, one in model.named_parameters() if one.grad is not None}
        assert grads == {name for name in names if "exit_policies" not in name}


@pytest.mark.parametrize("kind", KINDS)
class TestAdapters:
    def test_new_adapters_change_nothing(self, kind):
        model = get_peft_model(tiny_llama(exit_head=kind), exit_lora_config(target_modules=TARGETS)).eval()
        same(generate(model), generate(tiny_llama(exit_head=kind)))

    @pytest.mark.parametrize("skipped_kv", ["copy", "deferred"])
    def test_merged(self, kind, skipped_kv, tmp_path):
        model = adapted(kind)
        options = {"skipped_kv": skipped_kv, "exit_threshold": spreading(model)}
        before, plain = generate(model, **options), generate(tiny_llama(exit_head=kind), **options)
        assert len(before.exit_layers.unique()) >= 3
        assert not torch.equal(before.sequences, plain.sequences)
        with model.disable_adapter():
            same(generate(model, **options), plain)
        same(generate(model, **options), before)
        merged = model.merge_and_unload()
        assert type(merged) is LlamaForConsistentEECausalLM
        assert not any("lora" in name or "modules_to_save" in name for name in merged.state_dict())
        same(generate(merged, **options), before)
        merged.save_pretrained(tmp_path)
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is LlamaForConsistentEECausalLM
        assert not info["missing_keys"] and not info["unexpected_keys"]
        same(generate(loaded.eval(), **options), before)

    def test_saved(self, kind, tmp_path):
        base = tiny_llama(exit_head=kind)
        base.save_pretrained(tmp_path / "base")
        model = adapted(kind)
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        model.save_pretrained(tmp_path / "adapter")
        files = {path.name for path in (tmp_path / "adapter").iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors"} <= files
        before = generate(model)
        loads = [
            lambda: PeftModel.from_pretrained(tiny_llama(exit_head=kind), tmp_path / "adapter"),
            lambda: AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        ]
        if Version(transformers.__version__) >= Version("5.23"):
            # Older ones (seen in 5.8) do not restore modules that an adapter saves in full.
            loads.append(lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"))
        for load in loads:
            loaded = load().eval()
            assert type(getattr(loaded, "get_base_model", lambda one=loaded: one)()) is LlamaForConsistentEECausalLM
            same(generate(loaded), before)

    def test_known_text_and_all_exits(self, kind):
        model, batch = adapted(kind), collate_text(list(instructions(4, 1)))
        expected = [
            model(**batch, output_all_exits=True),
            model(**batch, exit_threshold=THRESHOLDS),
        ]
        merged = model.merge_and_unload()
        torch.testing.assert_close(
            merged(**batch, output_all_exits=True).all_exit_losses, expected[0].all_exit_losses, rtol=1e-4, atol=1e-4
        )
        known = merged(**batch, exit_threshold=THRESHOLDS)
        assert torch.equal(known.exit_layers, expected[1].exit_layers)
        torch.testing.assert_close(known.loss, expected[1].loss, rtol=1e-4, atol=1e-4)


class TestAgainstOthers:
    def test_merged_model_is_the_slow_one(self):
        """Generation through the adapter against the slow model with the merged weights, states copied by the layers'
        adapted projections."""
        model, batch = adapted(), prompts([4, 2, 5])
        merged = adapted().merge_and_unload()
        thresholds = spreading(merged)
        output = generate(model, batch, exit_threshold=thresholds)
        slow = SlowModel(merged, 5, threshold=thresholds)
        expected = slow.generate(**batch, max_new_tokens=8, eos_token_id=None, use_cache=False)
        assert torch.equal(output.sequences, expected)
        check_against_slow(merged, batch, slow, output)
        assert len(output.exit_layers.unique()) >= 3

    @pytest.mark.parametrize("target", ["k_proj", "v_proj"])
    @torch.no_grad()
    def test_copied_states_go_through_the_adapter(self, target):
        """The token leaves at layer 1, which has no adapter: what changes at deeper layers was copied there."""
        config = exit_lora_config(target_modules=[target], layers_to_transform=[1, 2, 3])
        model, caches = get_peft_model(tiny_llama(), config).eval(), []
        for scale in (0.0, 0.3):
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, 0.0, scale)
            cache = EarlyExitCache(4)
            model(torch.tensor([[5, 9]]), past_key_values=cache)
            output = model(torch.tensor([[7]]), past_key_values=cache, exit_threshold=0.0)
            assert output.exit_layers.tolist() == [[1]]
            caches.append([(layer.keys[:, :, -1], layer.values[:, :, -1]) for layer in cache.layers])
        changed = [
            [not torch.equal(plain, adapted) for plain, adapted in zip(*both, strict=True)]
            for both in zip(*caches, strict=True)
        ]
        assert changed == [[False, False], *[[target == "k_proj", target == "v_proj"]] * 3]

    def test_exits_off_is_the_stock_model_with_the_same_adapter(self):
        model, batch = adapted(), prompts([4, 2])
        stock = LlamaForCausalLM(tiny_llama().config)
        base = tiny_llama().state_dict()
        stock.load_state_dict({name: value for name, value in base.items() if not name.startswith("exit_")})
        twin = get_peft_model(stock, LoraConfig(task_type="CAUSAL_LM", target_modules=TARGETS)).eval()
        lora = {name: value for name, value in model.state_dict().items() if "lora_" in name}
        twin.load_state_dict(lora, strict=False)
        options = {"max_new_tokens": 8, "return_dict_in_generate": True, "output_logits": True}
        for merge in (False, True):
            if merge:
                model, twin = model.merge_and_unload(), twin.merge_and_unload()
            output, expected = (one.generate(**batch, **options) for one in (model, twin))
            assert torch.equal(output.sequences, expected.sequences)
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(output.logits, expected.logits, strict=True))
            assert set(output.exit_layers.flatten().tolist()) <= {0, 4}

    @pytest.mark.parametrize("options", [{"num_beams": 2}, {"exit_threshold_decay": 2.0}, {"prefill_chunk_size": 3}])
    @pytest.mark.parametrize("inputs", ["state", "both"])
    def test_options_reach_the_model(self, options, inputs):
        model = adapted(policy_inputs=inputs)
        before = generate(model, **options)
        same(before, generate(model.merge_and_unload(), **options))

    def test_refusals_reach_the_user(self):
        model = adapted()
        with pytest.raises(ValueError, match=r"`exit_threshold`=3"):
            model.generate(**prompts([4]), max_new_tokens=2, exit_threshold=3)

    @pytest.mark.skipif(
        Version(version("peft")) < Version(MIN_PEFT_VERSION), reason="transformers asks for a newer PEFT"
    )
    def test_adapters_of_transformers(self, tmp_path):
        """`add_adapter` of the model itself."""
        model = tiny_llama()
        model.add_adapter(LoraConfig(target_modules=TARGETS, modules_to_save=["exit_policies"]))
        same(generate(model), generate(tiny_llama()))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, 0.0, 0.2)
        before = generate(model)
        model.save_pretrained(tmp_path)
        loaded = tiny_llama()
        try:
            loaded.load_adapter(str(tmp_path))
        except ValueError as error:
            # Older releases pass over what an adapter saves in full, which is refused.
            assert "does not load" in str(error) and Version(version("transformers")) < Version("5.24")
        else:
            same(generate(loaded), before)

    @pytest.mark.filterwarnings("ignore:Position ids are not supported")
    def test_prompts_that_are_learnt(self):
        """Another kind of adapter, which takes over the preparation of inputs."""
        model = get_peft_model(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
        off = generate(model, exit_threshold=1.0, exit_threshold_decay=1.0)
        assert set(off.exit_layers.flatten().tolist()) == {4}
        assert set(generate(model, exit_threshold=0.0).exit_layers[:, 1:].flatten().tolist()) == {1}


@pytest.mark.parametrize("norm", ["none", "layer_norm"])
def test_encoders(norm, tmp_path):
    """The same helper for a classifier; PEFT itself adds the classifier to what is saved."""
    model = get_peft_model(tiny_model(exit_norm=norm), exit_lora_config("SEQ_CLS")).eval()
    assert {name.split(".")[-4] for name, _ in model.named_parameters() if "lora_A" in name} == {"query", "value"}
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    batch = pad(random_rows(6, seed=1))
    scores = model(**batch, exit_threshold=1.0 - 1e-6).exit_probabilities
    thresholds = [*scores[:, :-1].quantile(0.5, dim=0).tolist(), 1.0]
    before = model(**batch, exit_threshold=thresholds)
    assert len(before.exit_layers.unique()) >= 2
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(exit_norm=norm), tmp_path).eval()
    merged = model.merge_and_unload()
    assert type(merged) is BertForConsistentEE
    for other in (loaded, merged):
        output = other(**batch, exit_threshold=thresholds)
        assert torch.equal(output.exit_layers, before.exit_layers)
        torch.testing.assert_close(output.logits, before.logits, rtol=1e-4, atol=1e-4)
