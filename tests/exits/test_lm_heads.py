# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Norms and heads of a language model's internal exits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from transformers_cee import LlamaCeeConfig
from transformers_cee.exits.lm_heads import LM_EXIT_HEADS, LMExitHead, LMExitHeads, LMExitNorms, LowRankAdapter


def made(kind, internal=(2, 4, 5)):
    config = LlamaCeeConfig(hidden_size=8, num_attention_heads=2, vocab_size=11, exit_head=kind, exit_head_rank=2)
    return LMExitNorms(internal, config, lambda: nn.RMSNorm(8)), LMExitHeads(internal, config)


@pytest.mark.parametrize(
    "kind,norm,norms,head,heads",
    [
        ("shared", None, 0, None, 0),
        ("norm", nn.RMSNorm, 3, None, 0),
        ("low_rank", nn.RMSNorm, 3, LowRankAdapter, 3),
        ("untied", nn.RMSNorm, 3, nn.Linear, 3),
        ("layernorm_linear", nn.LayerNorm, 3, nn.Linear, 3),
    ],
)
def test_parts(kind, norm, norms, head, heads):
    exit_norms, exit_heads = made(kind)
    assert len(exit_norms.norms) == norms and len(exit_heads.heads) == heads
    assert exit_norms.is_shared is (kind == "shared")
    assert all(type(one) is norm for one in exit_norms.norms) and all(type(one) is head for one in exit_heads.heads)
    if head is nn.Linear:
        assert (exit_heads.heads[0].bias is not None) is (kind == "layernorm_linear")
        assert exit_heads.heads[0].weight.shape == (11, 8)


@pytest.mark.parametrize("kind", LM_EXIT_HEADS)
def test_logits(kind):
    exit_norms, exit_heads = made(kind)
    lm_head, state = nn.Linear(8, 11, bias=False), torch.randn(4, 2, 8)
    for index in range(3):
        logits = exit_heads(state, index, lm_head)
        assert logits.shape == (4, 2, 11)
        if kind in ("shared", "norm"):
            expected = state @ lm_head.weight.T
        elif kind == "low_rank":
            head = exit_heads.heads[index]
            expected = (state + state @ head.down.weight.T @ head.up.weight.T) @ lm_head.weight.T
        else:
            head = exit_heads.heads[index]
            expected = state @ head.weight.T + (0 if head.bias is None else head.bias)
        torch.testing.assert_close(logits, expected)
        assert exit_heads.share_head is (kind in ("shared", "norm", "low_rank"))
        if exit_heads.share_head:
            torch.testing.assert_close(lm_head(exit_heads.head_state(state, index)), logits)
        if kind != "shared":
            torch.testing.assert_close(exit_norms(state, index), exit_norms.norms[index](state))


def test_a_kind_without_logits_is_refused(monkeypatch):
    monkeypatch.setitem(LM_EXIT_HEADS, "none", type("Kind", (LMExitHead,), {"name": "none", "shares_lm_head": False}))
    with pytest.raises(ValueError, match=r"`exit_head`='none' makes 0 heads for 3 exits; accepted are one for each"):
        made("none")


@pytest.mark.parametrize("kind", LM_EXIT_HEADS)
def test_no_internal_exit(kind):
    exit_norms, exit_heads = made(kind, internal=())
    assert not list(exit_norms.parameters()) and not list(exit_heads.parameters())
