# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""GGUF files of other decoders than LLaMA that transformers reads."""

from __future__ import annotations

import families
import pytest
import torch
from gguf_files import write_gguf


# What a file does not name is as by default.
FIELDS = {"sliding_window": None, "initializer_range": 0.15, "attention_bias": False}
OWN = {
    "phi3_cee": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "qwen2_cee": {"use_sliding_window": False},
    "qwen3_cee": {"use_sliding_window": False, "head_dim": 128},
}


@pytest.mark.parametrize("model_type", OWN)
@torch.no_grad()
def test_loads(model_type, tmp_path):
    stock = families.stock_model(model_type, **{**FIELDS, **OWN[model_type]})
    write_gguf(stock, tmp_path / "tiny.gguf", stock.config.model_type)
    cls = families.classes(model_type)[1]
    ours = cls.from_pretrained(tmp_path, gguf_file="tiny.gguf", exit_layers=[1, 3], exit_threshold=0.5)
    assert ours.config.model_type == model_type and ours.layer_numbers == [1, 3, 4]
    loaded = ours.state_dict()
    for name, value in stock.state_dict().items():
        torch.testing.assert_close(loaded[name], value, rtol=0, atol=0, msg=name)
    ids = families.rows(model_type, 1, lengths=(9,))[0]["input_ids"]
    torch.testing.assert_close(ours(ids).logits, stock(ids).logits, rtol=1e-4, atol=1e-4)
    output = ours.generate(ids, max_new_tokens=3, eos_token_id=None, exit_threshold=0.0, return_dict_in_generate=True)
    assert output.exit_layers.tolist() == [[4, 1, 1]]
    # Half precision of weights is none of the rotary embedding.
    given = {"pretrained_model_name_or_path": tmp_path, "gguf_file": "tiny.gguf", "dtype": torch.bfloat16}
    half, plain = cls.from_pretrained(**given), type(stock).from_pretrained(**given)
    assert {one.dtype for one in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)
    assert torch.equal(half(ids).logits, plain(ids).logits)
