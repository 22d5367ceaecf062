# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Hidden states and attentions of decode steps with exits."""

import pytest
import torch
from slow_llama import prompts, spreading
from tiny import tiny_llama

from transformers_cee.exits.cache_name import CACHE_NAME


NEW = 7


@pytest.fixture(scope="module")
def model():
    return tiny_llama(attn_implementation="eager", eos_token_id=None).eval()


def generate(model, threshold, batch, **options):
    flags = {"output_hidden_states": True, "output_attentions": True, "return_dict_in_generate": True}
    return model.generate(**batch, exit_threshold=threshold, max_new_tokens=NEW, **flags, **options)


def steps(output, start=1):
    layers = output.exit_layers
    for number in range(start, NEW):
        yield number, layers[:, number], output.hidden_states[number], output.attentions[number]


@pytest.mark.parametrize("skipped_kv", ["copy", "deferred"])
def test_rows_keep_their_places(model, skipped_kv):
    """What a row's layers gave in a batch is what they give when the row is alone; NaN behind its exit."""
    batch, thresholds = prompts([4, 2, 5]), spreading(model)
    output = generate(model, thresholds, batch, skipped_kv=skipped_kv)
    assert len(output.exit_layers[:, 1:].unique()) >= 3
    alone = [
        generate(
            model, thresholds, {name: value[row : row + 1] for name, value in batch.items()}, skipped_kv=skipped_kv
        )
        for row in range(3)
    ]
    for number, layers, states, attentions in steps(output):
        assert len(states) == 5 and len(attentions) == 4
        assert {tuple(one.shape) for one in states} == {(3, 1, 32)}
        assert {tuple(one.shape[2:]) for one in attentions} == {(1, 5 + number)}
        for row, layer in enumerate(layers.tolist()):
            for index, one in enumerate(states):
                assert one[row].isnan().all() if index > layer else one[row].isfinite().all()
                other = alone[row].hidden_states[number][index][0]
                torch.testing.assert_close(one[row], other, equal_nan=True, rtol=1e-4, atol=1e-5)
            for index, one in enumerate(attentions, start=1):
                other = alone[row].attentions[number][index - 1][0]
                torch.testing.assert_close(one[row], other, equal_nan=True, rtol=1e-4, atol=1e-5)
                if index <= layer:
                    torch.testing.assert_close(one[row].sum(-1), torch.ones_like(one[row].sum(-1)))


def test_exact_where_nothing_is_copied(model):
    """With exact keys and values the states are those of the whole model on the same text, up to the exit."""
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])}
    output = generate(model, spreading(model), batch, skipped_kv="deferred")
    with torch.no_grad():
        whole = model(output.sequences, output_hidden_states=True, output_attentions=True)
    for number, layers, states, attentions in steps(output):
        place = 4 + number - 1
        for row, layer in enumerate(layers.tolist()):
            for index in range(layer + 1):
                expected = whole.hidden_states[index][row, place : place + 1]
                torch.testing.assert_close(states[index][row], expected, rtol=1e-4, atol=1e-5)
            for index in range(layer):
                expected = whole.attentions[index][row, :, place : place + 1, : place + 1]
                torch.testing.assert_close(attentions[index][row], expected, rtol=1e-4, atol=1e-5)


def test_a_step_without_an_exit_is_the_stock_step(model):
    batch = prompts([4, 2])
    ours = generate(model, [1.0, 1.0, 1.0 - 1e-7, 1.0], batch)
    stock = generate(model, 1.0, batch)
    assert set(ours.exit_layers.flatten().tolist()) == {4}
    for mine, theirs in zip(ours.hidden_states[1:], stock.hidden_states[1:], strict=True):
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_only_when_asked(model):
    output = model.generate(
        **prompts([4]), exit_threshold=0.0, max_new_tokens=3, return_dict_in_generate=True, output_hidden_states=True
    )
    assert output.attentions is None and [len(one) for one in output.hidden_states] == [5] * 3
    with torch.no_grad():
        cache = output[CACHE_NAME]
        step = model(torch.tensor([[7]]), exit_threshold=0.0, **{CACHE_NAME: cache})
    assert step.hidden_states is None and step.attentions is None


def test_nothing_is_noted_twice():
    """Full depth, known text and decode steps on one model, in any order."""
    model, ids = tiny_llama().eval(), torch.tensor([[5, 6, 7]])
    for threshold in (None, 0.5, None, 0.5):
        with torch.no_grad():
            assert len(model(ids, exit_threshold=threshold, output_hidden_states=True).hidden_states) == 5
