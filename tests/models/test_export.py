# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Graphs of models whose exits are off hold for any batch size and length, as the stock models' do; exits are refused
where which layers run must be known beforehand."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_llama, tiny_model
from torch import distributed, nn
from torch.export import Dim
from transformers import BertModel, DynamicCache

from transformers_cee.generation.cache import EarlyExitCache


class Logits(nn.Module):
    """One graph: token ids and mask to logits."""

    def __init__(self, model, **options):
        super().__init__()
        self.model, self.options = model, options

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **self.options).logits


def batch(rows, time, seed=0):
    ids = torch.randint(3, 60, (rows, time), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, time // 2 + 1 :] = 0
    return ids, mask


MODELS = {
    "cls": lambda **fields: Logits(tiny_model(exit_pooling="cls", **fields), exit_threshold=1.0),
    "mean": lambda **fields: Logits(
        tiny_model(exit_norm="layer_norm", exit_pooling="mean", **fields), exit_threshold=1.0
    ),
    "all exits": lambda **fields: Logits(tiny_model(**fields), output_all_exits=True),
    "decoder": lambda **fields: Logits(tiny_llama(**fields), use_cache=False),
}
ON = {
    "encoder": lambda: Logits(tiny_model(), exit_threshold=0.5),
    "encoder by its config": lambda: Logits(tiny_model(exit_threshold=0.5)),
    "known text": lambda: Logits(tiny_llama(), exit_threshold=0.5, use_cache=False),
}
REFUSED = r"cannot be exported or traced with exits on.*`exit_threshold`=1.0"


def export(model, example):
    rows, time = Dim("rows", min=2, max=64), Dim("time", min=2, max=40)
    shapes = {name: {0: rows, 1: time} for name in ("input_ids", "attention_mask")}
    return torch.export.export(model, example, dynamic_shapes=shapes).module()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_exported_for_any_batch(name, implementation):
    model = MODELS[name](attn_implementation=implementation).eval()
    graph = export(model, batch(3, 7))
    for rows, time in ((3, 7), (5, 11), (2, 4)):
        example = batch(rows, time, seed=rows)
        torch.testing.assert_close(graph(*example), model(*example), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["cls", "mean"])
@torch.no_grad()
def test_traced_for_any_batch(name):
    """What older exporters do."""
    model = MODELS[name]().eval()
    try:
        torch.jit.trace(BertModel(model.model.config).eval(), batch(3, 7), check_trace=False, strict=False)
    except IndexError:
        pytest.skip("the masks of this release of transformers cannot be traced")
    graph = torch.jit.trace(model, batch(3, 7), check_trace=False)
    for rows, time in ((5, 11), (2, 4)):
        example = batch(rows, time, seed=rows)
        torch.testing.assert_close(graph(*example), model(*example), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ON)
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_exits_have_no_graph(name):
    model = ON[name]().eval()
    with pytest.raises(ValueError, match=REFUSED):
        export(model, batch(3, 7))
    with pytest.raises(ValueError, match=REFUSED):
        torch.jit.trace(model, batch(3, 7), check_trace=False)


class Decoding:
    """A decode step behind a prompt."""

    def __init__(self, model):
        self.model, cache = model, DynamicCache()
        model(batch(3, 7)[0], past_key_values=cache)
        self.cache = EarlyExitCache.from_cache(cache, model.config.num_hidden_layers)

    def __call__(self, threshold):
        return self.model(torch.tensor([[5], [6], [7]]), past_key_values=self.cache, exit_threshold=threshold)


class TestFlexAttention:
    message = r"`attn_implementation`='flex_attention'.*'sdpa'.*`exit_threshold`=1.0"

    @torch.no_grad()
    def test_encoder(self):
        model = tiny_model()
        model.config._attn_implementation = "flex_attention"
        with pytest.raises(ValueError, match=self.message):
            model(*batch(3, 7), exit_threshold=0.5)

    @torch.no_grad()
    def test_decode_step(self):
        step = Decoding(tiny_llama())
        step.model.config._attn_implementation = "flex_attention"
        with pytest.raises(ValueError, match=self.message):
            step(0.5)

    def test_generate_says_so_first(self):
        model, calls = tiny_llama(), []
        model.config._attn_implementation = "flex_attention"
        model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
        with pytest.raises(ValueError, match=self.message):
            model.generate(batch(3, 7)[0], exit_threshold=0.5, max_new_tokens=3)
        assert not calls


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="needs gloo")
class TestFullySharded:
    @pytest.fixture(autouse=True)
    def group(self):
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        yield
        distributed.destroy_process_group()

    def shard(self, model, layers):
        mesh = distributed.init_device_mesh("cpu", (1,))
        for layer in layers:
            distributed.fsdp.fully_shard(layer, mesh=mesh)
        return distributed.fsdp.fully_shard(model, mesh=mesh)

    @torch.no_grad()
    def test_layers_one_by_one(self):
        model, expected = tiny_model(), tiny_model()(*batch(3, 7), exit_threshold=1.0)
        self.shard(model, model.bert.encoder.layer)
        with pytest.raises(ValueError, match=r"FSDP shards single layers.*`exit_threshold`=1.0.*as one unit"):
            model(*batch(3, 7), exit_threshold=0.5)
        torch.testing.assert_close(model(*batch(3, 7), exit_threshold=1.0).logits, expected.logits)

    @torch.no_grad()
    def test_layers_of_a_decoder(self):
        model, expected = tiny_llama(), Decoding(tiny_llama())(1.0)
        self.shard(model, model.model.layers)
        step = Decoding(model)
        with pytest.raises(ValueError, match=r"FSDP shards single layers"):
            step(0.5)
        torch.testing.assert_close(step(1.0).logits, expected.logits)

    @torch.no_grad()
    def test_as_one_unit(self):
        expected = tiny_model()(*batch(3, 7), exit_threshold=0.5)
        output = self.shard(tiny_model(), [])(*batch(3, 7), exit_threshold=0.5)
        torch.testing.assert_close(output.logits, expected.logits)
        assert output.exit_layers.tolist() == expected.exit_layers.tolist()


@pytest.mark.parametrize("asked", [{}, {"exit_threshold": 1.0}])
def test_a_forward_with_exits_off_is_one_compiled_graph(asked):
    model, (ids, mask) = tiny_model(exit_threshold=None), batch(3, 6)
    with torch.no_grad():
        expected = model(ids, mask)
        found = torch.compile(model, fullgraph=True, backend="eager")(ids, mask, **asked)
    torch.testing.assert_close(found.logits, expected.logits)
    assert found.exit_layers.tolist() == [6] * 3
