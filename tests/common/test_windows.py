# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Decoders whose layers look at a window of tokens: caches, ours and those of transformers, which forget."""

from __future__ import annotations

import copy

import by_hand
import families
import pytest
import torch
from clocks import layer_clock
from transformers import DynamicCache

from transformers_cee import EarlyExitCache, measured_exit_costs
from transformers_cee.evaluation.timing import Timer
from transformers_cee.exits.cache_name import CACHE_NAME


FAMILIES = [one for one in families.of_kind("decoder") if families.FAMILIES[one].window]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
NEW_TOKENS = 7
# Longer than a window of 6 and shorter.
LENGTHS = (12, 4, 9)
WAYS = pytest.mark.parametrize("skipped_kv", ["copy", "deferred"])
OPTIONS = {"max_new_tokens": NEW_TOKENS, "eos_token_id": None, "return_dict_in_generate": True, "output_logits": True}


@pytest.fixture(params=FAMILIES, scope="module")
def made(request):
    """Model, stock model, thresholds, and prompts padded on the left."""
    model = families.model(request.param)
    stock = families.twin(model)
    rows = families.rows(request.param, 3, lengths=LENGTHS)
    with torch.no_grad():
        walks = [walk for row in rows for walk in by_hand.token_walks(model, stock, row["input_ids"][0], [], range(4))]
    # About every other token leaves.
    middle = torch.tensor([by_hand.scores(model, walk, "policy") for walk in walks]).median(0).values
    return model, stock, [*(middle + 1e-3).tolist(), 1.0], families.batch(request.param, rows, "left")


def check(model, output, texts, prompt_length):
    """What was generated is what was written by hand, row by row."""
    for number, text in enumerate(texts):
        assert output.exit_layers[number].tolist() == text.layers, number
        assert output.sequences[number, prompt_length:].tolist() == text.tokens[-NEW_TOKENS:], number
        for step, logits in enumerate(text.logits):
            torch.testing.assert_close(output.logits[step][number], logits, **CLOSE)
    assert len(output.exit_layers.unique()) >= 2


def by_hand_texts(made, batch, skipped_kv, left=None):
    model, stock, thresholds, _ = made
    texts = []
    for number, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
        before = () if left is None else left[number]
        texts.append(
            by_hand.generate(model, stock, ids[mask.bool()], thresholds, skipped_kv, "policy", NEW_TOKENS, before)
        )
        assert by_hand.slack(texts[-1].scores, thresholds) > 1e-5
    return texts


@torch.no_grad()
def stock_cache(stock, batch, columns):
    """What transformers' own model keeps of the first columns."""
    cache = DynamicCache(config=stock.config)
    mask = batch["attention_mask"][:, :columns]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    stock(batch["input_ids"][:, :columns], attention_mask=mask, position_ids=positions, **{CACHE_NAME: cache})
    return cache


@WAYS
@pytest.mark.parametrize("columns", [3, 9, 11])
def test_prompts_of_stock_caches(made, skipped_kv, columns):
    """A prefix that the stock model has run: within a window, and longer."""
    model, stock, thresholds, batch = made
    cache = stock_cache(stock, batch, columns)
    kept = {layer.keys.shape[-2] for layer in cache.layers}
    assert min(kept) == min(columns, 5)
    output = model.generate(
        **batch, **OPTIONS, exit_threshold=thresholds, skipped_kv=skipped_kv, **{CACHE_NAME: cache}
    )
    check(model, output, by_hand_texts(made, batch, skipped_kv), batch["input_ids"].shape[1])


@WAYS
def test_two_turns(made, skipped_kv):
    """The cache of a first turn, its tokens wherever they left, and more of the text."""
    model, _, thresholds, batch = made
    options = {**OPTIONS, "exit_threshold": thresholds, "skipped_kv": skipped_kv}
    first = model.generate(**batch, **options)
    more = torch.randint(3, families.VOCABULARY, (3, 4), generator=torch.Generator().manual_seed(4))
    turn = {
        "input_ids": torch.cat((first.sequences, more), 1),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, NEW_TOKENS + 4), value=1),
    }
    second = model.generate(**turn, **options, **{CACHE_NAME: first[CACHE_NAME]})
    # The first new token came from the prompt's pass, and the last one has not been run.
    depth = model.config.num_hidden_layers
    left = [
        [*[depth] * int(mask.sum()), *layers[1:].tolist()]
        for mask, layers in zip(batch["attention_mask"], first.exit_layers, strict=True)
    ]
    check(model, second, by_hand_texts(made, turn, skipped_kv, left), turn["input_ids"].shape[1])
    # All tokens but the last one have been run.
    for number, (before, after) in enumerate(zip(left, second.exit_layers[:, 1:].tolist(), strict=True)):
        kept = second[CACHE_NAME].exit_layers[number, turn["attention_mask"][number].argmax() :].tolist()
        assert kept == [*before, *[depth] * 5, *after]


@WAYS
def test_cropped(made, skipped_kv):
    """Tokens are taken back, down to less than a window, and others follow."""
    model, _, thresholds, batch = made
    options = {**OPTIONS, "exit_threshold": thresholds, "skipped_kv": skipped_kv}
    for kept in (15, 5):
        cache = model.generate(**batch, **options)[CACHE_NAME]
        cache.crop(kept - cache.get_seq_length())
        whole = model.generate(**batch, **options)
        layers = whole.exit_layers[:, 1 : 1 + max(0, kept - 12)].tolist()
        depth = model.config.num_hidden_layers
        ids = torch.cat((whole.sequences[:, :kept], batch["input_ids"].flip(1)[:, :3]), 1)
        mask = torch.nn.functional.pad(batch["attention_mask"], (0, NEW_TOKENS), value=1)[:, :kept]
        turn = {"input_ids": ids, "attention_mask": torch.nn.functional.pad(mask, (0, 3), value=1)}
        # What stood before the first token of a row is no text.
        ids[:, kept:] = ids[:, kept:].masked_fill(ids[:, kept:] == 7, 9)
        output = model.generate(**turn, **options, **{CACHE_NAME: cache})
        left = [[*[depth] * int(one[:12].sum()), *found] for one, found in zip(mask, layers, strict=True)]
        check(model, output, by_hand_texts(made, turn, skipped_kv, left), ids.shape[1])


def test_forgotten_tokens_cannot_be_cropped_away(made):
    model, stock, thresholds, batch = made
    cache = EarlyExitCache.from_cache(stock_cache(stock, batch, 12), 4, model.layer_types)
    before = [layer.keys.clone() for layer in cache.layers]
    with pytest.raises(ValueError, match=r"cannot be cropped to 11 tokens.* a cache of 12 tokens"):
        cache.crop(-1)
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True))
    # What came later goes.
    turn = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    turn = {name: torch.nn.functional.pad(one, (0, 1), value=1) for name, one in turn.items()}
    for skipped_kv in ("copy", "deferred"):
        options = {**OPTIONS, "exit_threshold": thresholds, "skipped_kv": skipped_kv}
        one = model.generate(**turn, **options, **{CACHE_NAME: cache})
        cache.crop(12 - cache.get_seq_length())
        assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True))
        other = model.generate(**turn, **options)
        assert torch.equal(one.sequences, other.sequences) and torch.equal(one.exit_layers, other.exit_layers)
    # A reset cache has forgotten nothing.
    cache.reset()
    cache = model.generate(**turn, **options, **{CACHE_NAME: cache})[CACHE_NAME]
    cache.crop(-10)
    assert cache.get_seq_length() == 13 + NEW_TOKENS - 1 - 10


@torch.no_grad()
def test_known_text_behind_a_cache(made):
    """Tokens that leave in one pass, behind a prefix that the stock cache or ours has kept, as in one pass without."""
    model, stock, thresholds, batch = made
    text = torch.randint(3, families.VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(4))
    ids, mask = (
        torch.cat((batch["input_ids"], text), 1),
        torch.nn.functional.pad(batch["attention_mask"], (0, 8), value=1),
    )
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < 12, -100)
    whole = model(ids, attention_mask=mask, position_ids=positions, labels=labels, exit_threshold=thresholds)
    assert len(whole.exit_layers.unique()) >= 3
    caches = [
        stock_cache(stock, batch, 12),
        EarlyExitCache.from_cache(stock_cache(stock, batch, 12), 4, model.layer_types),
    ]
    for cache in caches:
        output = model(
            text, attention_mask=mask, position_ids=positions[:, 12:], exit_threshold=thresholds, **{CACHE_NAME: cache}
        )
        assert torch.equal(output.exit_layers, whole.exit_layers[:, 12:])
        if isinstance(cache, EarlyExitCache):
            assert torch.equal(cache.exit_layers[:, 12:], whole.exit_layers[:, 12:])
            assert cache.exit_layers[:, :12].unique().tolist() == [4]
        torch.testing.assert_close(output.logits, whole.logits[:, 12:], **CLOSE)


@torch.no_grad()
def test_full_depth_behind_a_cache_that_was_taken_over(made):
    model, stock, _, batch = made
    text = torch.randint(3, families.VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(4))
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 8), value=1)
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1)[:, 12:]}
    cache = stock_cache(stock, batch, 12)
    expected = stock(text, **inputs, **{CACHE_NAME: copy.deepcopy(cache)}).logits
    own = EarlyExitCache.from_cache(cache, 4, model.layer_types)
    torch.testing.assert_close(model(text, **inputs, **{CACHE_NAME: own}).logits, expected, **CLOSE)


def test_windows_of_layers_that_look_at_everything_are_refused():
    """Such a cache lacks what they look at."""
    mixed = families.model("qwen3_cee")
    cache = DynamicCache(config=families.stock_config("mistral_cee"))
    ids = torch.randint(3, families.VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(4))
    with pytest.raises(ValueError, match="of layers DynamicSlidingWindowLayer cannot hold tokens that leave early"):
        mixed.generate(ids, **OPTIONS, exit_threshold=0.5, **{CACHE_NAME: cache})


def test_costs_of_a_step(made):
    """A step behind the cache of a prompt at full depth, which is the stock model's, and one that is counted: products
    of queries with keys outside of a window are not."""
    model, _, _, batch = made
    size, sliding = model.layers[0].self_attn.head_dim, model.layer_types.count("sliding_attention")
    more = [model.item_flops(length).layers for length in (6, 9)]
    assert sum(more[1]) - sum(more[0]) == (4 - sliding) * 3 * 4 * 4 * size
    timer, rows = Timer(clock=layer_clock(model.layers)), len(batch["input_ids"])
    costs = measured_exit_costs(model, [batch], timer, disable_tqdm=True)
    assert costs == [1000 * layer / rows for layer in (1, 2, 3, 4)]
