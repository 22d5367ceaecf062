# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tiny stock checkpoints, exits that were trained on them, and what it means that two models are the same."""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from transformers_cee import BertForConsistentEE, LlamaForConsistentEECausalLM


IDS = torch.randint(3, 60, (6, 7), generator=torch.Generator().manual_seed(0))
SIZES = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 48, "initializer_range": 0.15, "pad_token_id": 0,
}  # fmt: skip
LABELS = {"num_labels": 3, "id2label": {0: "no", 1: "yes", 2: "who"}, "label2id": {"no": 0, "yes": 1, "who": 2}}
OURS = {"encoder": BertForConsistentEE, "decoder": LlamaForConsistentEECausalLM}
STOCK = {"encoder": BertForSequenceClassification, "decoder": LlamaForCausalLM}
AUTO = {"encoder": AutoModelForSequenceClassification, "decoder": AutoModelForCausalLM}
FIELDS = {
    "encoder": {"exit_layers": [1, 3], "exit_norm": "layer_norm", "exit_estimators": ["calibrated_probability"]},
    "decoder": {
        "exit_layers": [1, 3],
        "exit_head": "low_rank",
        "exit_head_rank": 4,
        "exit_estimators": ["token_hash"],
    },
}
OTHER_FIELDS = {
    "encoder": {"exit_layers": [1, 2], "policy_hidden_size": 5, "policy_inputs": "both"},
    "decoder": {"exit_layers": [2], "exit_head": "untied", "policy_condition": "film"},
}


def stock(kind, seed=0, **fields):
    torch.manual_seed(seed)
    if kind == "encoder":
        return BertForSequenceClassification(BertConfig(**{**SIZES, **LABELS, **fields})).eval()
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **fields})).eval()


def trained(kind, folder, seed=1, **fields):
    """A model on a base, its exits drawn as training alone would change them."""
    model = OURS[kind].from_pretrained(folder, **fields).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.startswith("exit_") and value.is_floating_point():
                mean = 1.0 if "exit_norms" in name and name.endswith("weight") else 0.0
                value.copy_(mean + 0.3 * torch.randn(value.shape, generator=generator))
            elif name.startswith("exit_"):
                value.copy_(torch.randint(0, 3, value.shape, generator=generator))
    return model


@torch.no_grad()
def outputs(model, **options):
    found = model(input_ids=IDS, **options)
    return found.logits, found.exit_layers


def same(first, second, **options):
    """Are weights of two models the same bit for bit, and outputs (which depend on where in memory weights lie)?"""
    state, other = first.state_dict(), second.state_dict()
    assert list(state) == list(other)
    assert [name for name in state if not torch.equal(state[name], other[name])] == []
    spread = 0
    for threshold in (0.2, 0.4, 0.5, 0.6, 0.8):
        (logits, layers), (other_logits, other_layers) = (
            outputs(one, **{"exit_threshold": threshold, **options}) for one in (first, second)
        )
        torch.testing.assert_close(logits, other_logits)
        assert torch.equal(layers, other_layers)
        spread = max(spread, len(layers.unique()))
    assert spread > 1
    assert second.layer_numbers == first.layer_numbers == second.config.exit_layer_numbers
    for name in first.config.to_dict():
        if name.startswith(("exit_", "policy_", "id2label", "problem")) and name != "exit_layers":
            assert getattr(second.config, name) == getattr(first.config, name), name
