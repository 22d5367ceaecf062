# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Rows and tokens of a batch in one shape."""

from __future__ import annotations

import pytest
import torch
from tiny import VOCABULARY, pad, random_rows, tiny_llama, tiny_model

from transformers_cee.exits.policy import all_features


KIND = "single_label_classification"


@torch.no_grad()
@pytest.mark.parametrize("inputs", ["state", "both"])
def test_rows(inputs):
    model, labels = tiny_model(policy_inputs=inputs), torch.tensor([1, 0, 2])
    output = model(**pad(random_rows(3, seed=1)), output_all_exits=True)
    entries = model.entries(output, labels, KIND)
    assert entries.rows.tolist() == [0, 1, 2] and entries.may_exit.tolist() == [True] * 3
    assert entries.states is output.all_exit_states and entries.logits is output.all_exit_logits
    assert entries.labels is labels and entries.token_losses is None and entries.predictions is None
    if inputs == "state":
        assert entries.features is None
    else:
        assert torch.equal(entries.features, all_features(output.all_exit_logits))
    assert model.entries(output, None, KIND).labels.isnan().tolist() == [True] * 3
    assert model.count_items(labels).tolist() == [1, 1, 1]


@torch.no_grad()
@pytest.mark.parametrize("inputs", ["state", "both"])
def test_tokens(inputs):
    model, ids = tiny_llama(policy_inputs=inputs), torch.arange(10).view(2, 5) % (VOCABULARY - 3) + 3
    labels = torch.tensor([[-100, -100, 5, 6, -100], [-100, 8, 9, 10, 11]])
    output = model(ids, labels=labels, output_all_exits=True)
    entries = model.entries(output, labels, KIND)
    assert model.count_items(labels).tolist() == [2, 4]
    assert entries.rows.tolist() == [0, 0, 1, 1, 1, 1] and entries.labels.tolist() == [5, 6, 8, 9, 10, 11]
    # The last token of each prompt runs at full depth.
    assert entries.may_exit.tolist() == [False, True, False, True, True, True]
    assert entries.states.shape == (6, 4, 32) and entries.logits is None
    wanted = torch.stack([model.exit_logits(entries.states[:, index], index) for index in range(4)], dim=1)
    assert torch.equal(entries.predictions, wanted.argmax(-1))
    losses = -wanted.log_softmax(-1).gather(-1, entries.labels.view(-1, 1, 1).expand(-1, 4, 1)).squeeze(-1)
    torch.testing.assert_close(entries.token_losses, losses)
    assert (entries.features is None) == (inputs == "state")
