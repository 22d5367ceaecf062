# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What layers give is noted where transformers does not do it; batches keep what lies between columns."""

import pytest
import torch

from transformers_cee.exits.recording import recorded
from transformers_cee.exits.row_batch import RowBatch


STATES = torch.arange(6.0).view(1, 3, 2)


def double(batch):
    return (batch.hidden_states * 2,)


def add_one(batch):
    return batch.hidden_states + 1, batch.hidden_states.sum()


def plain(batch):
    return batch.hidden_states - 3


def walk(layers):
    hidden_states = STATES
    for layer in layers:
        hidden_states = layer(RowBatch(hidden_states))
    return hidden_states


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("attentions", [False, True])
def test_recorded(states, attentions):
    wanted = {"output_hidden_states": states, "output_attentions": attentions}
    found = recorded(walk, [double, add_one, plain], wanted)
    assert torch.equal(found["run"], STATES * 2 + 1 - 3)
    assert set(found) == {"run", *(["hidden_states"] * states), *(["attentions"] * attentions)}
    if states:
        for one, other in zip(
            found["hidden_states"], (STATES, STATES * 2, STATES * 2 + 1, STATES * 2 - 2), strict=True
        ):
            assert torch.equal(one, other)
    if attentions:
        assert found["attentions"] == (None, (STATES * 2).sum(), None)


def test_what_lies_between_columns_follows_them():
    distance = torch.arange(5)[:, None] - torch.arange(5)
    batch = RowBatch(torch.zeros(3, 5, 2), relative=distance[None])
    for dense in (False, True):
        kept = batch.select(torch.tensor([0, 2]), slice(1, 4), dense)
        assert torch.equal(kept.relative, distance[None, :3, :3])
