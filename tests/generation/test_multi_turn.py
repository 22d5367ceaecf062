# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Caches that outlive one call of `generate`: turns of a conversation, prefixes, caches made by others."""

from __future__ import annotations

import copy

import pytest
import torch
from slow_llama import SlowModel, prompts, spreading
from tiny import tiny_llama
from transformers import DynamicCache, LlamaForCausalLM

from transformers_cee import EarlyExitCache


OPTIONS = {"max_new_tokens": 6, "return_dict_in_generate": True, "eos_token_id": None}


def next_turn(batch, sequences, tokens=3, seed=9):
    """The conversation so far and some tokens of the user, with its mask."""
    new = torch.randint(3, 60, (len(sequences), tokens), generator=torch.Generator().manual_seed(seed))
    ids = torch.cat((sequences, new), dim=1)
    ones = torch.ones(len(ids), ids.shape[1] - batch["attention_mask"].shape[1], dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.cat((batch["attention_mask"], ones), dim=1)}


def same_caches(ours, theirs, padding=(0,)):
    """Keys and values are equal, but for padding."""
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        assert one.keys.shape == other.keys.shape
        for row, pad in enumerate(padding):
            torch.testing.assert_close(one.keys[row, :, pad:], other.keys[row, :, pad:], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(one.values[row, :, pad:], other.values[row, :, pad:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def full_depth_cache(model, sequences, mask=None):
    """What the stock model puts into its cache for these tokens."""
    stock = LlamaForCausalLM(model.config).eval()
    stock.load_state_dict({name: one for name, one in model.state_dict().items() if not name.startswith("exit_")})
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp_min(0)
    return stock(sequences, attention_mask=mask, position_ids=positions, use_cache=True).past_key_values


@pytest.mark.parametrize("skipped_kv", ["copy", "deferred"])
class TestTurns:
    def test_a_conversation(self, skipped_kv):
        """Two turns with the cache handed on are the slow model's, to which the second turn is more of the text."""
        model, batch = tiny_llama(), prompts([4, 2])
        thresholds = spreading(model)
        options = {**OPTIONS, "exit_threshold": thresholds, "skipped_kv": skipped_kv}
        first = model.generate(**batch, **options)
        turn = next_turn(batch, first.sequences)
        second = model.generate(**turn, **options, past_key_values=first.past_key_values)
        assert second.past_key_values is first.past_key_values
        # Column 9 holds the first turn's last token, which has been chosen but not run.
        slow = SlowModel(model, 4, full_depth=range(9, 13), threshold=thresholds, skipped_kv=skipped_kv)
        expected = slow.generate(**turn, **OPTIONS, use_cache=False)
        assert torch.equal(second.sequences, expected.sequences)
        for row, pad in enumerate((0, 2)):
            tokens = second.sequences[row].tolist()
            walked, _, layers = slow.walk(tokens[:-1], pad)
            assert second.exit_layers[row].tolist() == layers[12 - pad :]
            for ours, keys in zip(second.past_key_values.layers, walked.keys, strict=True):
                torch.testing.assert_close(ours.keys[row, :, pad:], torch.stack(keys, 1), rtol=1e-4, atol=1e-4)
        assert len({*first.exit_layers.unique().tolist(), *second.exit_layers.unique().tolist()}) >= 3

    def test_only_the_new_tokens(self, skipped_kv):
        """The second turn may also be given without what the cache holds."""
        model, batch = tiny_llama(), prompts([4, 2])
        options = {**OPTIONS, "exit_threshold": spreading(model), "skipped_kv": skipped_kv}
        first = model.generate(**batch, **options)
        turn = next_turn(batch, first.sequences)
        kept = copy.deepcopy(first.past_key_values)
        expected = model.generate(**turn, **options, past_key_values=first.past_key_values)
        output = model.generate(
            input_ids=turn["input_ids"][:, 9:], attention_mask=turn["attention_mask"], **options, past_key_values=kept
        )
        assert torch.equal(output.sequences[:, 4:], expected.sequences[:, 13:])
        assert torch.equal(output.exit_layers, expected.exit_layers)
        same_caches(kept, first.past_key_values, (0, 2))

    def test_then_without_exits(self, skipped_kv):
        model, batch = tiny_llama(), prompts([4])
        options = {**OPTIONS, "skipped_kv": skipped_kv}
        first = model.generate(**batch, **options, exit_threshold=spreading(model))
        turn = next_turn(batch, first.sequences)
        second = model.generate(**turn, **options, past_key_values=first.past_key_values)
        assert second.exit_layers.unique().tolist() == [4]
        if skipped_kv == "deferred":
            assert torch.equal(second.sequences, model.generate(**turn, **options).sequences)

    def test_first_without_exits(self, skipped_kv):
        """A cache that the model filled without exits."""
        model, batch = tiny_llama(), prompts([4, 2])
        first = model.generate(**batch, **OPTIONS)
        turn = next_turn(batch, first.sequences)
        options = {**OPTIONS, "exit_threshold": spreading(model), "skipped_kv": skipped_kv}
        expected = model.generate(**turn, **options)
        output = model.generate(**turn, **options, past_key_values=first.past_key_values)
        assert torch.equal(output.sequences, expected.sequences)
        assert torch.equal(output.exit_layers, expected.exit_layers)

    def test_beams(self, skipped_kv):
        model, batch = tiny_llama(), prompts([4, 2])
        options = {**OPTIONS, "exit_threshold": spreading(model), "skipped_kv": skipped_kv, "num_beams": 2}
        prefix = DynamicCache()
        model(batch["input_ids"][:, :1].repeat_interleave(2, 0), past_key_values=prefix)
        plain = {"input_ids": batch["input_ids"]}
        expected = model.generate(**plain, **options)
        output = model.generate(**plain, **options, past_key_values=prefix)
        assert torch.equal(output.sequences, expected.sequences)
        assert torch.equal(output.exit_layers, expected.exit_layers)


class TestDeferred:
    @pytest.mark.parametrize("lengths", [(4,), (5, 2, 3)])
    @pytest.mark.parametrize("options", [{}, {"do_sample": True}])
    def test_the_cache_is_the_full_models(self, lengths, options):
        model, batch = tiny_llama(), prompts(lengths)
        output = model.generate(**batch, **OPTIONS, exit_threshold=spreading(model), skipped_kv="deferred", **options)
        assert len(output.exit_layers.unique()) >= 2
        mask = torch.cat((batch["attention_mask"], torch.ones(len(lengths), 5, dtype=torch.long)), dim=1)
        expected = full_depth_cache(model, output.sequences[:, :-1], mask)
        same_caches(output.past_key_values, expected, [max(lengths) - length for length in lengths])

    def test_the_last_token_in_its_own_words(self):
        """With exact keys and values, forcing the text on the full model gives the logits of tokens that went deep."""
        model, batch = tiny_llama(), prompts([5])
        output = model.generate(
            **batch, **OPTIONS, exit_threshold=spreading(model), skipped_kv="deferred", output_logits=True
        )
        with torch.no_grad():
            logits = model(output.sequences).logits[0, 4:]
        deep = [step for step, layer in enumerate(output.exit_layers[0].tolist()) if layer == 4]
        assert 1 < len(deep) < 6
        for step in deep:
            torch.testing.assert_close(output.logits[step][0], logits[step], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("skipped_kv", ["copy", "deferred"])
class TestGivenCaches:
    @pytest.mark.parametrize("make", [lambda config: DynamicCache(), lambda config: DynamicCache(config=config)])
    def test_filled_too(self, skipped_kv, make):
        """Also when `generate` does not return it, as the stock model does."""
        model, batch = tiny_llama(), prompts([4, 2])
        options = {**OPTIONS, "exit_threshold": spreading(model), "skipped_kv": skipped_kv}
        expected = model.generate(**batch, **options)
        for returned in (True, False):
            cache = make(model.config)
            output = model.generate(**batch, **{**options, "return_dict_in_generate": returned}, past_key_values=cache)
            assert torch.equal(output.sequences if returned else output, expected.sequences)
            assert cache.get_seq_length() == 9
            same_caches(cache, expected.past_key_values, (0, 2))
            cache.crop(-2)
            assert cache.get_seq_length() == 7

    def test_prefix(self, skipped_kv):
        """A prefix that was computed once serves many prompts."""
        model, batch = tiny_llama(), prompts([6])
        prefix = DynamicCache(config=model.config)
        with torch.no_grad():
            model(batch["input_ids"][:, :4], past_key_values=prefix)
        before = [layer.keys.clone() for layer in prefix.layers]
        options = {**OPTIONS, "exit_threshold": spreading(model), "skipped_kv": skipped_kv}
        expected = model.generate(**batch, **options)
        for _ in range(2):
            cache = copy.deepcopy(prefix)
            output = model.generate(**batch, **options, past_key_values=cache)
            assert torch.equal(output.sequences, expected.sequences)
            assert torch.equal(output.exit_layers, expected.exit_layers)
        assert all(torch.equal(layer.keys, keys) for layer, keys in zip(prefix.layers, before, strict=True))

    def test_empty_early_exit_cache(self, skipped_kv):
        model, batch, cache = tiny_llama(), prompts([4]), EarlyExitCache(4)
        options = {**OPTIONS, "exit_threshold": spreading(model), "skipped_kv": skipped_kv}
        output = model.generate(**batch, **options, past_key_values=cache)
        assert output.past_key_values is cache
        assert torch.equal(output.sequences, model.generate(**batch, **options).sequences)
