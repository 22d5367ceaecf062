# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""From stock LLaMA checkpoints and GGUF files to ours, and back from disk."""

from __future__ import annotations

import json
import os

import pytest
import torch
from gguf_files import write_gguf
from tiny import tiny_llama, tiny_llama_config, weights
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from transformers_cee import LlamaCeeConfig, LlamaForConsistentEECausalLM


KINDS = ("shared", "norm", "low_rank", "untied", "layernorm_linear")
IDS = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(0))


def stock_config(**fields):
    mine = tiny_llama_config().to_dict()
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names += ("intermediate_size", "max_position_embeddings", "initializer_range", "pad_token_id", "eos_token_id")
    return LlamaConfig(**{**{name: mine[name] for name in names}, **fields})


def stock_model(**fields):
    """A stock model, its norms drawn so that copies of them can be told."""
    torch.manual_seed(3)
    model = LlamaForCausalLM(stock_config(**fields)).eval()
    nn.init.normal_(model.model.norm.weight, 1.0, 0.3)
    model.generation_config.temperature, model.generation_config.do_sample = 0.7, True
    return model


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def stock(request, tmp_path_factory):
    """A stock model with or without tied embeddings, and the folder it was saved in."""
    model, folder = stock_model(tie_word_embeddings=request.param), tmp_path_factory.mktemp("stock")
    model.save_pretrained(folder)
    return model, folder


class TestStockCheckpoints:
    @pytest.mark.parametrize("kind", KINDS)
    def test_weights_and_what_is_new(self, stock, kind):
        model, folder = stock
        ours, info = LlamaForConsistentEECausalLM.from_pretrained(
            folder, exit_head=kind, exit_head_rank=3, output_loading_info=True
        )
        loaded = ours.state_dict()
        for name, value in model.state_dict().items():
            assert torch.equal(loaded[name], value), name
        assert all(name.startswith("exit_") for name in info["missing_keys"])
        assert not info["unexpected_keys"] and not info["mismatched_keys"]
        self.check_new_parts(ours, kind)
        assert type(ours.config) is LlamaCeeConfig and ours.config.model_type == "llama_cee"
        assert ours.config.exit_threshold is None and ours.generation_config.temperature == 0.7
        ours.eval()
        torch.testing.assert_close(ours(IDS).logits, model(IDS).logits)

    @staticmethod
    def check_new_parts(ours, kind):
        assert len(ours.exit_norms.norms) == (0 if kind == "shared" else 3)
        assert len(ours.exit_heads.heads) == (3 if kind in ("low_rank", "untied", "layernorm_linear") else 0)
        for norm in ours.exit_norms.norms:
            if kind == "layernorm_linear":
                assert (norm.weight == 1).all() and (norm.bias == 0).all()
            else:
                assert torch.equal(norm.weight, ours.model.norm.weight)
                assert norm.weight.data_ptr() != ours.model.norm.weight.data_ptr()
        for head in ours.exit_heads.heads:
            if kind == "untied":
                assert torch.equal(head.weight, ours.lm_head.weight)
                assert head.weight.data_ptr() != ours.lm_head.weight.data_ptr()
            elif kind == "low_rank":
                assert not head.up.weight.any() and 0.1 < head.down.weight.std() < 0.2
            else:
                assert 0.1 < head.weight.std() < 0.2 and not head.bias.any()
        for widen, _, narrow in ours.exit_policies.networks:
            assert 0.1 < widen.weight.std() < 0.2 and not widen.bias.any() and not narrow.bias.any()
        first, second = ours.exit_policies.networks[0][0].weight, ours.exit_policies.networks[1][0].weight
        assert not torch.equal(first, second)

    @pytest.mark.parametrize("kind", ["shared", "norm", "low_rank", "untied"])
    @torch.no_grad()
    def test_exits_start_as_the_models_own_head(self, stock, kind):
        model, folder = stock
        ours = LlamaForConsistentEECausalLM.from_pretrained(folder, exit_head=kind).eval()
        hidden = model(IDS, output_hidden_states=True).hidden_states
        for layer in (1, 2, 3):
            output = ours(IDS, exit_threshold=[1.0] * (layer - 1) + [0.0] * (5 - layer))
            first = model.lm_head(model.model.norm(hidden[layer][:, :1]))
            torch.testing.assert_close(output.logits[:, :1], first, rtol=1e-5, atol=1e-5)

    def test_dtype(self, stock):
        _, folder = stock
        ours = LlamaForConsistentEECausalLM.from_pretrained(folder, exit_head="untied", dtype=torch.bfloat16)
        assert {one.dtype for one in ours.parameters()} == {torch.bfloat16}
        assert torch.equal(ours.exit_heads.heads[0].weight, ours.lm_head.weight)

    def test_fields_given_on_loading_are_checked(self, stock):
        _, folder = stock
        for fields, message in (
            ({"exit_head": "mine"}, r"`exit_head`='mine'.*layernorm_linear"),
            ({"exit_layers": [5]}, r"`exit_layers`=\[5\].*1\.\.4"),
            ({"skipped_kv": "guess"}, r"`skipped_kv`='guess'"),
            ({"min_exit_layer": 9}, r"`min_exit_layer`=9"),
            ({"exit_threshold": 3.0}, r"`exit_threshold`=3.0"),
        ):
            with pytest.raises(ValueError, match=message):
                LlamaForConsistentEECausalLM.from_pretrained(folder, **fields)

    def test_another_task(self, tmp_path):
        """A checkpoint without a language model's head: it is new, as with the stock class."""
        LlamaForSequenceClassification(stock_config()).save_pretrained(tmp_path)
        _, info = LlamaForConsistentEECausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert "lm_head.weight" in info["missing_keys"] and set(info["unexpected_keys"]) == {"score.weight"}


class TestOwnCheckpoints:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("tied", [False, True])
    def test_round_trip(self, tmp_path, kind, tied):
        model = tiny_llama(
            exit_head=kind,
            exit_head_rank=3,
            tie_word_embeddings=tied,
            exit_layers=[1, 3],
            policy_inputs="both",
            skipped_kv="deferred",
            min_exit_layer=2,
            exit_threshold=0.25,
        )
        model.save_pretrained(tmp_path)
        assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors", ".py"}
        for load in (LlamaForConsistentEECausalLM, AutoModelForCausalLM):
            loaded, info = load.from_pretrained(tmp_path, output_loading_info=True)
            assert type(loaded) is LlamaForConsistentEECausalLM
            assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
            before, after = weights(model), weights(loaded)
            assert before.keys() == after.keys()
            assert all(torch.equal(before[name], after[name]) for name in before)
            assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
            ours, theirs = model.config.to_dict(), loaded.config.to_dict()
            for name in ("auto_map", "_name_or_path", "architectures", "dtype", "transformers_version"):
                ours.pop(name, None), theirs.pop(name, None)
            assert ours == theirs
        assert type(AutoConfig.from_pretrained(tmp_path)) is LlamaCeeConfig
        saved = json.loads((tmp_path / "config.json").read_text())
        assert saved["architectures"] == ["LlamaForConsistentEECausalLM"] and saved["model_type"] == "llama_cee"

    def test_in_shards(self, tmp_path):
        model = tiny_llama(exit_head="untied")
        model.save_pretrained(tmp_path, max_shard_size="40KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
        loaded = weights(LlamaForConsistentEECausalLM.from_pretrained(tmp_path))
        assert all(torch.equal(value, loaded[name]) for name, value in weights(model).items())

    def test_from_config(self):
        config = tiny_llama_config(exit_head="untied", tie_word_embeddings=True)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        assert type(model) is LlamaForConsistentEECausalLM
        TestStockCheckpoints.check_new_parts(model, "untied")


class TestMoreTokens:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("tied", [False, True])
    def test_resized(self, kind, tied):
        """New tokens at all exits; what exits say of the old ones stays."""
        model = tiny_llama(exit_head=kind, tie_word_embeddings=tied)
        with torch.no_grad():
            before = model(IDS, exit_threshold=0.0)
        model.resize_token_embeddings(70, mean_resizing=False)
        after = model(IDS, exit_threshold=0.0)
        assert after.logits.shape[-1] == model.config.vocab_size == 70
        torch.testing.assert_close(after.logits[..., :60], before.logits)
        ids = torch.tensor([[3, 65, 69, 61]])
        output = model(ids, labels=ids, output_all_exits=True)
        assert output.all_exit_losses.isfinite().all()
        output.loss.backward()
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
        model.resize_token_embeddings(50, mean_resizing=False)
        assert model.generate(IDS % 50, max_new_tokens=3, exit_threshold=0.5).max() < 50


@pytest.mark.filterwarnings("ignore::UserWarning")
class TestGGUF:
    @pytest.fixture(scope="class", params=[False, True], ids=["untied", "tied"])
    def file(self, request, tmp_path_factory):
        model = stock_model(tie_word_embeddings=request.param)
        path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
        write_gguf(model, path)
        return model, path

    @pytest.mark.parametrize("kind", KINDS)
    def test_loads(self, file, kind, tmp_path):
        model, path = file
        options = {"exit_head": kind, "exit_head_rank": 3, "exit_layers": [1, 2, 3], "exit_threshold": 0.75}
        # What GGUF does not name.
        config = LlamaCeeConfig(**options, initializer_range=0.15)
        torch.manual_seed(0)
        ours = LlamaForConsistentEECausalLM.from_pretrained(path.parent, gguf_file=path.name, **options)
        assert type(ours.config) is LlamaCeeConfig and ours.config.model_type == "llama_cee" and not ours.training
        assert ours.config.exit_layer_numbers == [1, 2, 3, 4] and ours.config.exit_threshold == 0.75
        loaded = ours.state_dict()
        for name, value in model.state_dict().items():
            torch.testing.assert_close(loaded[name], value, rtol=0, atol=0, msg=name)
        for norm in ours.exit_norms.norms if kind != "layernorm_linear" else ():
            assert torch.equal(norm.weight, ours.model.norm.weight)
        for head in ours.exit_heads.heads if kind == "untied" else ():
            assert torch.equal(head.weight, ours.lm_head.weight)
        torch.testing.assert_close(ours(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
        given = LlamaForConsistentEECausalLM.from_pretrained(path.parent, gguf_file=path.name, config=config)
        assert (given.config.exit_head, given.config.exit_threshold) == (kind, 0.75)
        assert len(given.exit_norms.norms) == len(ours.exit_norms.norms)
        ours.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(again) is LlamaForConsistentEECausalLM
        assert all(torch.equal(value, weights(again)[name]) for name, value in weights(ours).items())

    def test_options(self, file):
        _, path = file
        ours = LlamaForConsistentEECausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.bfloat16, attn_implementation="eager"
        )
        assert {one.dtype for one in ours.parameters()} == {torch.bfloat16}
        assert ours.config._attn_implementation == "eager"
        assert type(ours.generation_config) is GenerationConfig
        output = ours.generate(IDS, max_new_tokens=4, exit_threshold=0.0, return_dict_in_generate=True)
        assert set(output.exit_layers.flatten().tolist()) <= {0, 1, 4}

    def test_a_real_file(self):
        path = os.environ.get("TRANSFORMERS_CEE_TEST_GGUF")
        if not path:
            pytest.skip("TRANSFORMERS_CEE_TEST_GGUF names no GGUF file of a LLaMA")
        folder, name = os.path.split(path)
        stock = LlamaForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
        ours = LlamaForConsistentEECausalLM.from_pretrained(folder, gguf_file=name, exit_layers=10)
        with torch.no_grad():
            torch.testing.assert_close(ours(IDS).logits, stock(IDS).logits)
        output = ours.generate(IDS, max_new_tokens=4, exit_threshold=0.0, return_dict_in_generate=True)
        assert output.exit_layers[:, 1:].unique().tolist() == [ours.layer_numbers[0]]
