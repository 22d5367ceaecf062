# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What training does differently for rows and for tokens."""

from __future__ import annotations

import pytest
import torch
from tiny import (
    tiny_config,
    tiny_llama,
    tiny_llama_config,
    tiny_model,
    tiny_text_trainer,
    tiny_trainer,
    training_arguments,
)
from torch import nn

from transformers_cee.training.items import ITEMS, items_of


ROWS, TOKENS = ITEMS["row"], ITEMS["token"]


def test_one_for_each_kind(tmp_path):
    assert items_of(tiny_model()) is ROWS and items_of(tiny_llama()) is TOKENS
    encoder, decoder = tiny_trainer(tmp_path), tiny_text_trainer(tmp_path)
    assert not encoder.model_accepts_loss_kwargs and decoder.model_accepts_loss_kwargs


def test_share_of_a_micro_batch():
    """Micro-batches of 1, 3 and 0 counted tokens add up to the mean over 4; of rows, Trainer takes the mean."""
    labels = [torch.tensor([[5, 6]]), torch.tensor([[5, 6, 7, 8]]), torch.tensor([[5, -100]])]
    losses = [torch.tensor(2.0), torch.tensor(4.0), torch.tensor(float("nan"))]
    total = sum(TOKENS.share(loss, some, 4, 1) for loss, some in zip(losses, labels, strict=True))
    assert float(total) == pytest.approx((2.0 + 3 * 4.0) / 4)
    assert float(TOKENS.share(losses[0], labels[0], 4, 2)) == pytest.approx(2 * 2.0 / 4), "gradients are averaged"
    assert TOKENS.share(losses[0], labels[0], None, 2) is losses[0]
    assert ROWS.share(losses[0], torch.tensor([1]), 4, 2) is losses[0]


def test_counted_batches():
    batch = {"labels": torch.tensor([[1, 2, 3]])}
    assert TOKENS.counted_batches([batch])[0]["labels"].tolist() == [[2, 3]] and ROWS.counted_batches([batch]) == [
        batch
    ]


def test_labels_that_leave_nothing():
    one_long = [torch.tensor([[5, 6, -100], [-100, -100, 7]])]
    with pytest.raises(ValueError, match="`rows` has no token that may leave early"):
        TOKENS.check_labels(one_long, "rows")
    TOKENS.check_labels(one_long, "rows", must_leave=False)
    with pytest.raises(ValueError, match="`rows` has no token to predict"):
        TOKENS.check_labels([torch.tensor([[5, -100]])], "rows", must_leave=False)
    asked = (torch.tensor([[5, 6, 7]]) if number == 0 else pytest.fail("one batch is enough") for number in range(2))
    TOKENS.check_labels(asked, "rows")
    ROWS.check_labels(one_long, "rows")


def test_problem_type_asks_for_labels_only_where_it_must():
    assert TOKENS.problem_type(tiny_llama_config(), pytest.fail) == "single_label_classification"
    assert ROWS.problem_type(tiny_config(num_labels=1), pytest.fail) == "regression"
    assert (
        ROWS.problem_type(tiny_config(num_labels=2), lambda: torch.tensor([[0.0, 1.0]]))
        == "multi_label_classification"
    )


def test_sampled_steps_are_one_pass(tmp_path):
    seen = []

    class Model(nn.Module):
        def forward(self, **inputs):
            seen.append(inputs)

    batch = {"input_ids": torch.tensor([[1, 2], [3, 4]])}
    args = training_arguments(tmp_path, consistent_samples=2, consistent_copy_states=False)
    assert ROWS.sampled_step(Model(), batch, args) is None and not seen
    TOKENS.sampled_step(Model(), batch, args)
    assert seen[0]["input_ids"].tolist() == [[1, 2], [3, 4], [1, 2], [3, 4]] and seen[0]["exit_training"].sample_exits
    assert not seen[0]["exit_training"].copy_states
