# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Attention masks are truth values: what is not 0 is a token, whatever number and dtype say so."""

from __future__ import annotations

import pytest
import reference
import torch
from tiny import pad, random_rows, tiny_llama, tiny_model
from transformers import DynamicCache

from transformers_cee.exits.heads import first_token, mean_token
from transformers_cee.generation.cache import EarlyExitCache


TRUTHS = {
    "bytes": lambda mask: mask.to(torch.uint8) * 255,
    "bool": lambda mask: mask.bool(),
    "float": lambda mask: mask.float(),
    "twos": lambda mask: mask * 2,
    "segments": lambda mask: mask * torch.arange(1, mask.shape[1] + 1),
    "negative": lambda mask: -mask,
    "fractions": lambda mask: mask.half() / 4,
}
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
IDS = torch.randint(3, 60, MASK.shape, generator=torch.Generator().manual_seed(3))
# What stands before the first token is not to predict it.
LABELS = IDS.masked_fill(MASK.cumsum(1) <= 1, -100)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(params=TRUTHS)
def truth(request):
    return TRUTHS[request.param]


class TestEncoder:
    @pytest.mark.parametrize("pooling", ["cls", "mean"])
    @pytest.mark.parametrize("side", ["left", "right"])
    @torch.no_grad()
    def test_same_logits(self, truth, side, pooling):
        model, rows = tiny_model(exit_pooling=pooling), random_rows(12, 3)
        batch, spread = pad(rows, side, extra=1), reference.spreading_thresholds(model, rows, "policy")
        other = {**batch, "attention_mask": truth(batch["attention_mask"])}
        for threshold in (1.0, spread):
            expected, output = (model(**one, exit_threshold=threshold) for one in (batch, other))
            assert output.exit_layers.tolist() == expected.exit_layers.tolist()
            torch.testing.assert_close(output.logits, expected.logits, **CLOSE)
        assert len(expected.exit_layers.unique()) >= 3

    def test_pooling(self, truth):
        states = torch.randn(*MASK.shape, 4)
        for pool in (first_token, mean_token):
            torch.testing.assert_close(pool(states, truth(MASK)), pool(states, MASK))

    @torch.no_grad()
    def test_token_hash(self, truth):
        model = tiny_model(exit_estimators=["token_hash"])
        model.exit_estimators["token_hash"].exits.random_(0, 6)
        batch = pad(random_rows(6, 3))
        options = {"exit_criterion": "token_hash", "exit_threshold": 0.99}
        expected = model(**batch, **options)
        output = model(**{**batch, "attention_mask": truth(batch["attention_mask"])}, **options)
        assert output.exit_layers.tolist() == expected.exit_layers.tolist()

    def test_other_shapes_are_refused(self):
        mask = MASK[:, None, None].expand(3, 1, 6, 6)
        with pytest.raises(ValueError, match=r"`attention_mask` of shape \(3, 1, 6, 6\) must be \(batch, time\)"):
            tiny_model()(IDS, attention_mask=mask)


class TestDecoder:
    @pytest.mark.parametrize("options", [{}, {"exit_threshold": 0.5}, {"output_all_exits": True}])
    @torch.no_grad()
    def test_known_text(self, truth, options):
        model = tiny_llama()
        expected = model(IDS, attention_mask=MASK, labels=LABELS, **options)
        output = model(IDS, attention_mask=truth(MASK), labels=LABELS, **options)
        for name in ("loss", "logits", "exit_layers", "all_exit_losses", "may_exit"):
            if expected.get(name) is not None:
                torch.testing.assert_close(output[name], expected[name], msg=name, **CLOSE)

    @pytest.mark.parametrize(
        "options", [{}, {"exit_threshold": 0.5}, {"exit_threshold": 0.5, "skipped_kv": "deferred"}]
    )
    def test_generation(self, truth, options):
        model = tiny_llama()
        options |= {"max_new_tokens": 6, "eos_token_id": None, "output_logits": True, "return_dict_in_generate": True}
        expected = model.generate(IDS, attention_mask=MASK, **options)
        output = model.generate(IDS, attention_mask=truth(MASK), **options)
        assert output.sequences.tolist() == expected.sequences.tolist()
        assert output.exit_layers.tolist() == expected.exit_layers.tolist()
        torch.testing.assert_close(torch.stack(output.logits), torch.stack(expected.logits), **CLOSE)

    @pytest.mark.parametrize("options", [{}, {"exit_threshold": 0.5}, {"output_all_exits": True}])
    @pytest.mark.parametrize("additive", [False, True])
    @torch.no_grad()
    def test_masks_of_four_dimensions(self, additive, options):
        """What attention itself takes, on known text: as the mask of two dimensions that says the same."""
        model = tiny_llama()
        mask = torch.ones(6, 6, dtype=torch.bool).tril() & (MASK != 0)[:, None, None]
        if additive:
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        expected = model(IDS, attention_mask=MASK, labels=LABELS, **options)
        output = model(IDS, attention_mask=mask, labels=LABELS, **options)
        torch.testing.assert_close(output.loss, expected.loss, **CLOSE)
        if options:
            assert output.may_exit.tolist() == expected.may_exit.tolist()
            assert output.exit_layers.tolist() == expected.exit_layers.tolist()

    @torch.no_grad()
    def test_masks_of_four_dimensions_in_a_decode_step(self):
        model, cache = tiny_llama(), DynamicCache()
        model(IDS, past_key_values=cache)
        cache = EarlyExitCache.from_cache(cache, 4)
        mask = torch.ones(3, 1, 1, 7, dtype=torch.bool)
        with pytest.raises(ValueError, match=r"`attention_mask` of shape \(3, 1, 1, 7\) must be \(batch, past \+ 1\)"):
            model(IDS[:, :1], attention_mask=mask, past_key_values=cache, exit_threshold=0.5)
        assert cache.get_seq_length() == 6
