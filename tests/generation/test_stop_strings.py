# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""`generate` with a tokenizer: texts end at strings, with exits, without, and verified."""

from __future__ import annotations

import string

import pytest
import torch
from slow_llama import prompts, stock
from tiny import tiny_llama
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast


NEW = 12


def letters():
    """A tokenizer whose tokens are letters, as many as the tiny models know."""
    words = {letter: number for number, letter in enumerate((string.ascii_letters + string.digits)[:60])}
    made = Tokenizer(models.BPE(words, merges=[]))
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize("asked", [{}, {"exit_threshold": 0.5}, {"exit_verify": True, "prompt_lookup_num_tokens": 4}])
def test_stop_strings(asked):
    """Texts end where the stock model's do, whose own text says what they are to end with."""
    model, tokenizer = tiny_llama().eval(), letters()
    batch = prompts([4, 2, 5])
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    reference = model if "exit_threshold" in asked else stock(model)
    rest = {name: value for name, value in asked.items() if name == "exit_threshold"}
    whole = reference.generate(**batch, **options, **rest)
    ends = [tokenizer.convert_ids_to_tokens(int(whole[row, column])) for row, column in ((0, 9), (1, 7), (2, 11))]
    expected = reference.generate(**batch, **options, **rest, stop_strings=ends, tokenizer=tokenizer)
    found = model.generate(**batch, **options, **asked, stop_strings=ends, tokenizer=tokenizer)
    assert torch.equal(found, expected) and not torch.equal(found, whole)


def test_token_healing_is_refused():
    with pytest.raises(ValueError, match="`token_healing` and `exit_verify` exclude each other"):
        tiny_llama().generate(**prompts([3]), exit_verify=True, token_healing=True, tokenizer=letters())
