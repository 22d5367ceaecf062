# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Phi-3 whose rotary embedding is another one for long texts."""

from __future__ import annotations

import by_hand
import families
import pytest
import torch

from transformers_cee import EarlyExitCache
from transformers_cee.exits.cache_name import CACHE_NAME


LIMIT = 16
LONG = {
    "original_max_position_embeddings": LIMIT,
    "sliding_window": None,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "partial_rotary_factor": 1.0,
        "original_max_position_embeddings": LIMIT,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.0, 2.0, 4.0, 8.0],
    },
}
OPTIONS = {"eos_token_id": None, "return_dict_in_generate": True}
THRESHOLDS = [0.55, 0.5, 0.5, 1.0]


@pytest.fixture(scope="module")
def made():
    model = families.model("phi3_cee", **LONG)
    stock = families.stock_model("phi3_cee", **LONG)
    stock.load_state_dict({name: one for name, one in model.state_dict().items() if not name.startswith("exit_")})
    return model, stock


def text(length, rows=2):
    return torch.randint(3, families.VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("length", [10, LIMIT, 20])
def test_without_exits_as_the_stock_model(made, length):
    """All tokens are run again where the text becomes long, and what follows looks at these. Before transformers 5.24,
    the stock model ran the last one alone; without a cache it never did."""
    model, stock = made
    options = {**OPTIONS, "max_new_tokens": 10, "output_logits": True}
    expected = stock.generate(text(length), **options, use_cache=False)
    for exits in ({}, {"exit_threshold": 1.0}):
        output = model.generate(text(length), **options, **exits)
        assert torch.equal(output.sequences, expected.sequences)
        torch.testing.assert_close(torch.stack(output.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("skipped_kv", ["copy", "deferred"])
@pytest.mark.parametrize(("length", "new"), [(9, 7), (18, 8)])
def test_short_texts_and_long_ones_have_exits(made, length, new, skipped_kv):
    model, stock = made
    output = model.generate(
        text(length), max_new_tokens=new, exit_threshold=THRESHOLDS, skipped_kv=skipped_kv, **OPTIONS
    )
    for row in range(2):
        written = by_hand.generate(model, stock, text(length)[row], THRESHOLDS, skipped_kv, "policy", new)
        assert by_hand.slack(written.scores, THRESHOLDS) > 1e-5
        assert output.exit_layers[row].tolist() == written.layers
        assert output.sequences[row].tolist() == written.tokens
    assert len(output.exit_layers.unique()) >= 2


@torch.no_grad()
def test_texts_that_become_long_are_refused(made):
    model, _ = made
    ran = []
    handle = model.layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
    message = r"grows from 10 to 17 tokens cannot have exits: beyond `original_max_position_embeddings`=16"
    with pytest.raises(ValueError, match=message):
        model.generate(text(10), max_new_tokens=7, exit_threshold=0.5)
    assert not ran
    handle.remove()
    cache = EarlyExitCache(4)
    model(text(LIMIT), **{CACHE_NAME: cache})
    for more in (1, 3):
        with pytest.raises(ValueError, match=rf"grows from 16 to {16 + more} tokens cannot have exits"):
            model(text(more), exit_threshold=0.5, **{CACHE_NAME: cache})
    assert cache.get_seq_length() == LIMIT
    # Without a cache, there is one embedding for all.
    assert model(text(20), exit_threshold=0.5).logits.shape[1] == 20


def test_a_second_turn_becomes_long(made):
    """The prompt's pass runs all tokens again; exits follow."""
    model, _ = made
    options = {**OPTIONS, "exit_threshold": THRESHOLDS, "max_new_tokens": 5}
    first = model.generate(text(10), **options)
    turn = torch.cat((first.sequences, text(4)), 1)
    expected = model.generate(turn, **options)
    output = model.generate(turn, **options, **{CACHE_NAME: first[CACHE_NAME]})
    assert torch.equal(output.sequences, expected.sequences)
    assert torch.equal(output.exit_layers, expected.exit_layers)
