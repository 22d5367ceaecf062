# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Exits that must pay: what the account lets a call spend, and what `generate` makes of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scripted import scripted
from slow_llama import prompts, spreading
from tiny import tiny_llama

from transformers_cee.generation.account import ExitAccount


LAYERS, EXITS = 6, (2, 4)


def spent(layers, account):
    """What a step costs whose rows leave at `layers`, by counting what runs."""
    cost, heads = 0.0, set()
    for layer in range(1, LAYERS + 1):
        if layer > max(layers):
            cost += 0.15
            continue
        cost += 1.0
        if layer in account.open_layers:
            cost += account.asking
        if layer in layers or (account.reads_heads and layer in account.open_layers):
            heads.add(layer)
    return cost + account.head * (1 if account.shares_head and not account.reads_heads else len(heads))


@given(
    steps=st.lists(st.lists(st.sampled_from([*EXITS, LAYERS]), min_size=1, max_size=3), max_size=60),
    head=st.sampled_from([0.1, 1.0, 8.0]),
    asking=st.sampled_from([0.0, 0.1, 0.5]),
    reads_heads=st.booleans(),
    shares_head=st.booleans(),
)
def test_never_more_than_two_steps_and_a_hundredth(steps, head, asking, reads_heads, shares_head):
    account = ExitAccount(EXITS, LAYERS, head, asking, reads_heads, shares_head)
    heads = len(EXITS) if reads_heads or not shares_head else 0
    in_vain = len(EXITS) * asking + heads * head
    cost, full = 0.0, LAYERS + head
    for number, layers in enumerate(steps, start=1):
        is_asked = account.ask()
        # As long as nothing is lost that the call has not been given.
        assert is_asked == (cost - full * (number - 1) < in_vain + 0.01 * full * (number - 1) + 1e-6)
        account.note(torch.tensor(layers))
        cost += spent(layers, account) if is_asked else full
        assert cost <= 1.01 * full * number + 2 * in_vain + 1e-6


def heads_run(model, rows, exits, **options):
    """How often the LM head runs in a call, and its output."""
    calls = []
    handle = model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    with scripted(exits) as name:
        output = model.generate(
            **prompts([4] * rows),
            max_new_tokens=30,
            exit_criterion=name,
            exit_threshold=0.5,
            eos_token_id=None,
            return_dict_in_generate=True,
            **options,
        )
    handle.remove()
    return len(calls), output


@pytest.mark.parametrize("skipped_kv", ["copy", "deferred"])
def test_exits_in_vain_are_soon_left_alone(skipped_kv):
    """The criterion of the test looks at logits, so each exit that is asked runs the LM head."""
    model = tiny_llama(skipped_kv=skipped_kv)
    usual, _ = heads_run(model, 2, [0, 3])
    calls, output = heads_run(model, 2, [0, 3], exits_must_pay=True)
    assert output.exit_layers[0].tolist()[:3] == [4, 1, 1]
    # Row 0 left early in as many steps as were asked; the rest has one call per step.
    asked = int((output.exit_layers[0] == 1).sum())
    assert 2 <= asked < 8 and calls < usual
    assert (output.exit_layers[1] == 4).all()
    full = model.generate(**prompts([4, 4]), max_new_tokens=30, exit_threshold=1.0, eos_token_id=None)
    assert torch.equal(output.sequences[1], full[1])


@pytest.mark.parametrize("skipped_kv", ["copy", "deferred"])
def test_exits_that_pay_are_asked_always(skipped_kv):
    model = tiny_llama(skipped_kv=skipped_kv)
    _, usual = heads_run(model, 3, [0, 1, 0])
    _, output = heads_run(model, 3, [0, 1, 0], exits_must_pay=True)
    assert torch.equal(output.sequences, usual.sequences)
    assert output.exit_layers[:, 1:].tolist() == [[1] * 29, [2] * 29, [1] * 29]


def test_every_call_opens_an_account_of_its_own():
    model, batch = tiny_llama(eos_token_id=None), prompts([4, 2])
    options = {"max_new_tokens": 20, "return_dict_in_generate": True, "exits_must_pay": True}
    first, second = (model.generate(**batch, exit_threshold=spreading(model), **options) for _ in range(2))
    assert torch.equal(first.exit_layers, second.exit_layers) and torch.equal(first.sequences, second.sequences)


def test_a_generation_config_asks_for_it():
    model, exits = tiny_llama(), [0, 3]
    _, asked = heads_run(model, 2, exits, exits_must_pay=True)
    model.generation_config.exits_must_pay = True
    _, output = heads_run(model, 2, exits)
    assert torch.equal(output.exit_layers, asked.exit_layers)


@pytest.mark.parametrize("value", [1, "yes"])
def test_refusals(value):
    with pytest.raises(ValueError, match=f"`exits_must_pay`={value!r} must be True or False"):
        tiny_llama().generate(**prompts([4]), max_new_tokens=2, exit_threshold=0.5, exits_must_pay=value)
