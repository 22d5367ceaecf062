# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Losses, errors and problem types against torch's own functions, row by row and exit by exit."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from transformers_cee.exits.losses import check_labels, exit_errors, exit_losses, layer_weighted, resolve_problem_type


SINGLE, MULTI, VALUES = "single_label_classification", "multi_label_classification", "regression"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
class TestAgainstTorch:
    def logits(self, labels, dtype):
        return torch.randn(5, 3, labels, generator=torch.Generator().manual_seed(0)).to(dtype)

    def compare(self, logits, labels, problem_type, loss, error):
        losses, errors = exit_losses(logits, labels, problem_type), exit_errors(logits, labels, problem_type)
        assert losses.dtype == torch.float32 and losses.shape == errors.shape == (5, 3)
        for row in range(5):
            for index in range(3):
                one = logits[row, index].float()
                torch.testing.assert_close(losses[row, index], loss(one, labels[row]))
                assert float(errors[row, index]) == pytest.approx(float(error(one, labels[row])))
        torch.testing.assert_close(exit_losses(logits[:, 1], labels, problem_type), losses[:, 1])
        torch.testing.assert_close(exit_errors(logits[:, 1], labels, problem_type), errors[:, 1])

    def test_single_label(self, dtype):
        self.compare(
            self.logits(4, dtype),
            torch.tensor([0, 3, 1, 2, 0]),
            SINGLE,
            lambda one, label: F.cross_entropy(one[None], label[None]),
            lambda one, label: float(one.argmax() != label),
        )

    @pytest.mark.parametrize("kind", [torch.float32, torch.long])
    def test_multi_label(self, dtype, kind):
        labels = torch.tensor([[0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0]]).to(kind)
        self.compare(
            self.logits(3, dtype),
            labels,
            MULTI,
            lambda one, label: F.binary_cross_entropy_with_logits(one, label.float()),
            lambda one, label: sum(bool(a > 0) != bool(b) for a, b in zip(one, label, strict=True)) / 3,
        )

    @pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 2)])
    def test_regression(self, dtype, shape):
        width = shape[1] if len(shape) == 2 else 1
        labels = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
        self.compare(
            self.logits(width, dtype),
            labels,
            VALUES,
            lambda one, label: F.mse_loss(one, label.reshape(width)),
            lambda one, label: (one - label.reshape(width)).abs().mean(),
        )


def test_layer_weighted():
    losses = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 9.0]])
    assert float(layer_weighted(losses)) == pytest.approx(((1 + 4 + 9) / 6 + (4 + 10 + 27) / 6) / 2)
    assert float(layer_weighted(losses[:, :1])) == pytest.approx(2.5)


@pytest.mark.parametrize(
    "named,num_labels,labels,expected",
    [
        (None, 1, None, VALUES),
        (None, 1, torch.tensor([1]), VALUES),
        (None, 3, None, SINGLE),
        (None, 3, torch.tensor([1]), SINGLE),
        (None, 3, torch.zeros(1, 3), MULTI),
        (VALUES, 3, torch.tensor([1]), VALUES),
        (MULTI, 3, None, MULTI),
        (SINGLE, 1, None, SINGLE),
    ],
)
def test_problem_type_as_transformers_infers_it(named, num_labels, labels, expected):
    assert resolve_problem_type(named, num_labels, labels) == expected


def test_unknown_problem_type():
    with pytest.raises(ValueError, match=r"`problem_type`='guess'.*regression"):
        resolve_problem_type("guess", 2)


@pytest.mark.parametrize(
    "labels,num_labels,problem_type,message",
    [
        (torch.tensor([0, 1]), 2, SINGLE, "2 rows.*3"),
        (torch.tensor([0, 1, 2]), 2, SINGLE, "0..1"),
        (torch.tensor([0, -100, 1]), 2, SINGLE, "0..1"),
        (torch.zeros(3, 1, dtype=torch.long), 2, SINGLE, r"\(3, 1\)"),
        (torch.zeros(3), 2, SINGLE, "float32.*integers"),
        (torch.zeros(3, 3), 2, MULTI, r"\(3, 3\).*\(3, 2\)"),
        (torch.zeros(3), 2, VALUES, r"\(3,\).*\(3, 2\)"),
    ],
)
def test_labels_that_do_not_fit(labels, num_labels, problem_type, message):
    with pytest.raises(ValueError, match=message):
        check_labels(labels, 3, num_labels, problem_type)


def test_labels_that_fit():
    check_labels(torch.tensor([0, 1, 1]), 3, 2, SINGLE)
    check_labels(torch.zeros(3, 2), 3, 2, MULTI)
    check_labels(torch.zeros(3), 3, 1, VALUES)
    check_labels(torch.zeros(3, 1), 3, 1, VALUES)
