# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Pooling over unmasked tokens, norms and heads of exits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from transformers_cee.exits.heads import ExitHeads, ExitNorms, first_token, mean_token


MASKS = st.integers(1, 6).flatmap(
    lambda time: st.lists(st.lists(st.booleans(), min_size=time, max_size=time).filter(any), min_size=1, max_size=4)
)


class TestPooling:
    @given(MASKS, st.sampled_from([torch.bool, torch.long, torch.float32]), st.integers(0, 99))
    def test_against_row_by_row(self, mask, kind, seed):
        mask = torch.tensor(mask)
        states = torch.randn(*mask.shape, 3, generator=torch.Generator().manual_seed(seed))
        first, mean = first_token(states, mask.to(kind)), mean_token(states, mask.to(kind))
        for row in range(len(mask)):
            tokens = [states[row, column] for column in range(mask.shape[1]) if mask[row, column]]
            assert torch.equal(first[row], tokens[0])
            torch.testing.assert_close(mean[row], sum(tokens) / len(tokens))

    def test_without_a_mask(self):
        states = torch.randn(2, 3, 4)
        assert torch.equal(first_token(states, None), states[:, 0])
        torch.testing.assert_close(mean_token(states, None), (states[:, 0] + states[:, 1] + states[:, 2]) / 3)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_mean_adds_in_float32(self, dtype):
        """4096 ones and one 0.5 would not add up in half precision."""
        states = torch.ones(1, 4096, 1, dtype=dtype)
        mean = mean_token(states, torch.ones(1, 4096, dtype=torch.long))
        assert mean.dtype == dtype and float(mean) == 1.0
        assert float(mean_token(states, None)) == 1.0

    def test_a_row_without_tokens_is_finite(self):
        assert torch.equal(mean_token(torch.ones(1, 2, 3), torch.zeros(1, 2)), torch.zeros(1, 3))


class TestNorms:
    def test_one_per_exit(self):
        norms = ExitNorms("layer_norm", [1, 2, 3], 4, eps=1e-5)
        nn.init.constant_(norms.norms[1].bias, 2.0)
        state = torch.randn(5, 4)
        expected = (state - state.mean(1, keepdim=True)) / (state.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        torch.testing.assert_close(norms(state, 0), expected)
        torch.testing.assert_close(norms(state, 1), expected + 2)

    def test_none(self):
        norms = ExitNorms("none", [1, 2, 3], 4, eps=1e-5)
        state = torch.randn(5, 4)
        assert norms(state, 2) is state and not list(norms.parameters())


class TestHeads:
    def test_untied(self):
        heads = ExitHeads([1, 2], 4, 3, dropout=0.0)
        state = torch.randn(5, 4)
        for index, head in enumerate(heads.heads):
            torch.testing.assert_close(heads(state, index), state @ head.weight.T + head.bias)
        assert not torch.equal(heads.heads[0].weight, heads.heads[1].weight)

    def test_dropout_in_training_only(self):
        heads = ExitHeads([1], 64, 3, dropout=0.5)
        state = torch.randn(2, 64)
        assert not torch.equal(heads(state, 0), heads(state, 0))
        heads.eval()
        assert torch.equal(heads(state, 0), heads(state, 0))
