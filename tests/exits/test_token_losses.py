# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Losses of single tokens, and that chunks change nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from transformers_cee.exits.policy import all_features
from transformers_cee.exits.token_losses import (
    TOKEN_LOSSES,
    CrossEntropy,
    FinalArgmax,
    FinalDistributionKL,
    taken_exit_losses,
    token_exit_losses,
)


TOKENS, EXITS, HIDDEN, VOCABULARY = 11, 4, 6, 9


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(EXITS, HIDDEN, VOCABULARY, generator=generator, requires_grad=True)
    states = torch.randn(TOKENS, EXITS, HIDDEN, generator=generator, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    return states, weights, labels


class TestLosses:
    def logits(self, seed):
        return torch.randn(5, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2

    def test_registry(self):
        assert TOKEN_LOSSES == {"ce": CrossEntropy, "kl": FinalDistributionKL, "argmax": FinalArgmax}
        for cls in TOKEN_LOSSES.values():
            assert cls() == cls(), "their settings make them equal"

    def test_cross_entropy(self):
        logits, labels = self.logits(0), torch.tensor([0, 3, 6, 1, 1])
        expected = [-math.log(one.softmax(0)[label]) for one, label in zip(logits, labels, strict=True)]
        torch.testing.assert_close(CrossEntropy()(logits, self.logits(1), labels), torch.tensor(expected))

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
    @pytest.mark.parametrize("top_k", [0, 1, 3, 7, 8])
    def test_divergence(self, temperature, top_k):
        ours, final = self.logits(0), self.logits(1)
        losses = FinalDistributionKL(temperature, top_k)(ours, final, None)
        for one, other, loss in zip(ours, final, losses.tolist(), strict=True):
            chosen = other.argsort(descending=True)[: top_k or None]
            p, q = (other[chosen] / temperature).softmax(0), (one[chosen] / temperature).softmax(0)
            assert loss == pytest.approx(temperature**2 * float((p * (p / q).log()).sum()), abs=1e-5)
        assert FinalDistributionKL(temperature, top_k)(final, final, None).abs().max() < 1e-6

    @pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
    def test_argmax_and_entropy(self, weight):
        ours, final = self.logits(0), self.logits(1)
        losses = FinalArgmax(weight)(ours, final, None)
        for one, other, loss in zip(ours, final, losses.tolist(), strict=True):
            shares = one.softmax(0)
            expected = -(1 - weight) * float(shares[other.argmax()].log()) + weight * float(
                (shares * shares.log()).sum()
            )
            assert loss == pytest.approx(expected, abs=1e-5)

    @pytest.mark.parametrize("loss", [CrossEntropy(), FinalDistributionKL(), FinalArgmax(0.5)])
    def test_in_float32(self, loss):
        ours, final = self.logits(0).bfloat16(), self.logits(1).bfloat16()
        labels = torch.tensor([0, 3, 6, 1, 1])
        losses = loss(ours, final, labels)
        assert losses.dtype == torch.float32
        torch.testing.assert_close(losses, loss(ours.float(), final.float(), labels))

    def test_sure_heads_stay_finite(self):
        sure = torch.tensor([[1e4, 0.0, 0.0]], requires_grad=True)
        other = torch.tensor([[0.0, 1e4, 0.0]])
        for loss in (CrossEntropy(), FinalDistributionKL(), FinalArgmax(0.5)):
            found = loss(sure, other, torch.tensor([1]))
            assert found.isfinite().all()
            found.sum().backward()
            assert sure.grad.isfinite().all()

    @pytest.mark.parametrize(
        "make,message",
        [
            (lambda: FinalDistributionKL(temperature=0), r"`temperature`=0 must be positive"),
            (lambda: FinalDistributionKL(temperature=-1.0), r"`temperature`=-1.0"),
            (lambda: FinalDistributionKL(top_k=-1), r"`top_k`=-1 must not be negative"),
            (lambda: FinalArgmax(1.5), r"`entropy_weight`=1.5 must lie in \[0, 1\]"),
            (lambda: FinalArgmax(-0.1), r"`entropy_weight`=-0.1"),
        ],
    )
    def test_refusals(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize("chunk_rows", [1, 4, 5, 8, 20, 999])
@pytest.mark.parametrize("loss", [CrossEntropy(), FinalDistributionKL(2.0, 4), FinalArgmax(0.3)])
def test_all_exits_in_chunks(data, chunk_rows, loss):
    states, weights, labels = data
    sizes = []

    def head(state, index):
        sizes.append(len(state))
        return state @ weights[index]

    found = token_exit_losses(states, labels, head, loss, features=True, chunk_rows=chunk_rows)
    logits = torch.stack([states[:, index] @ weights[index] for index in range(EXITS)], dim=1)
    expected = torch.stack([loss(logits[:, index], logits[:, -1].detach(), labels) for index in range(EXITS)], dim=1)
    torch.testing.assert_close(found.losses, expected)
    assert torch.equal(found.predictions, logits.argmax(-1))
    torch.testing.assert_close(found.features, all_features(logits.detach()))
    assert not found.features.requires_grad
    assert max(sizes) == min(TOKENS, max(1, chunk_rows // EXITS))
    share = torch.rand(TOKENS, EXITS)
    gradients = torch.autograd.grad((found.losses * share).sum(), (states, weights))
    for ours, theirs in zip(gradients, torch.autograd.grad((expected * share).sum(), (states, weights)), strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        again = token_exit_losses(states, labels, head, loss, chunk_rows=chunk_rows)
    torch.testing.assert_close(again.losses, expected.detach())
    assert again.features is None


@pytest.mark.parametrize("chunk_rows", [1, 2, 3, 999])
def test_taken_exits_in_chunks(data, chunk_rows):
    states, weights, labels = data
    exits, sizes = torch.tensor([0, 3, 3, 1, 0, 0, 3, 3, 1, 3, 0]), []

    def head(state, index):
        sizes.append(len(state))
        return state @ weights[index]

    own = states[:, 0]
    losses, predictions = taken_exit_losses(own, exits, labels, head, EXITS, chunk_rows)
    logits = torch.stack([own[token] @ weights[exit] for token, exit in enumerate(exits.tolist())])
    expected = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(losses, expected)
    assert torch.equal(predictions, logits.argmax(-1)) and max(sizes) == min(5, chunk_rows)
    share = torch.rand(TOKENS)
    gradients = torch.autograd.grad((losses * share).sum(), (states, weights))
    for ours, theirs in zip(gradients, torch.autograd.grad((expected * share).sum(), (states, weights)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_no_token():
    head = lambda state, index: state @ torch.ones(HIDDEN, VOCABULARY)  # noqa: E731
    labels = torch.zeros(0, dtype=torch.long)
    found = token_exit_losses(torch.zeros(0, EXITS, HIDDEN), labels, head, CrossEntropy(), features=True)
    assert found.losses.shape == found.predictions.shape == (0, EXITS) and found.features.shape == (0, EXITS - 1, 5)
    losses, predictions = taken_exit_losses(torch.zeros(0, HIDDEN), labels, labels, head, EXITS)
    assert losses.shape == predictions.shape == (0,)


def test_one_exit_has_no_features(data):
    states, weights, labels = data
    found = token_exit_losses(
        states[:, :1], labels, lambda state, index: state @ weights[0], CrossEntropy(), features=True, chunk_rows=4
    )
    assert found.features.shape == (TOKENS, 0, 5)
