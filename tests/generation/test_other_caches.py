# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What users of Transformers do with caches: ours does what a dynamic one does; static ones work with exits off."""

import copy

import pytest
import torch
from slow_llama import prompts
from tiny import tiny_llama
from transformers import DynamicCache, LlamaForCausalLM, StaticCache

from transformers_cee.exits.cache_name import CACHE_NAME
from transformers_cee.generation.cache import EarlyExitCache


@pytest.fixture
def both():
    """One text in either cache."""
    model, ids = tiny_llama().eval(), torch.tensor([[5, 6, 7, 8, 9], [6, 5, 4, 3, 9]])
    caches = EarlyExitCache(4), DynamicCache()
    with torch.no_grad():
        for cache in caches:
            model(ids, **{CACHE_NAME: cache})
    return caches


def same(ours, theirs):
    assert isinstance(ours, DynamicCache) and len(ours) == len(theirs) == 4
    assert ours.get_seq_length() == theirs.get_seq_length()
    for mine, other in zip(ours, theirs, strict=True):
        assert len(mine) == len(other)
        torch.testing.assert_close(mine[0], other[0])
        torch.testing.assert_close(mine[1], other[1])


CHANGES = {
    "nothing": lambda cache: None,
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "repeat": lambda cache: cache.batch_repeat_interleave(3),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1])),
    "crop two": lambda cache: cache.crop(-2),
    "crop all": lambda cache: cache.crop(-5),
}


@pytest.mark.parametrize("change", sorted(CHANGES))
def test_does_what_a_dynamic_cache_does(both, change):
    ours, theirs = both
    for cache in both:
        CHANGES[change](cache)
    same(ours, theirs)
    same(copy.deepcopy(ours), theirs)
    if theirs.get_seq_length():
        same(DynamicCache(ours), theirs)


@pytest.mark.parametrize("amount", [0, 2])
def test_other_crops_mean_what_they_mean_to_the_release(both, amount):
    ours, theirs = both
    try:
        theirs.crop(amount)
    except (ValueError, RuntimeError):
        with pytest.raises(ValueError, match="must be negative"):
            ours.crop(amount)
        assert ours.get_seq_length() == 5
    else:
        ours.crop(amount)
        same(ours, theirs)


class TestStatic:
    def test_generates_as_the_stock_model_with_exits_off(self):
        model, batch = tiny_llama().eval(), prompts([4, 2, 5])
        stock = LlamaForCausalLM(model.config).eval()
        stock.load_state_dict(model.state_dict(), strict=False)
        assert model._can_compile_fullgraph and stock._can_compile_fullgraph
        options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
        expected = stock.generate(**batch, **options)
        assert torch.equal(model.generate(**batch, **options, exit_threshold=1.0), expected)
        with pytest.raises(ValueError, match="`cache_implementation`='static' does not work with exits"):
            model.generate(**batch, **options, exit_threshold=0.5)

    def test_a_step_is_one_graph(self):
        model, ids = tiny_llama().eval(), torch.tensor([[5, 6, 7, 8]])
        cache = StaticCache(config=model.config, max_cache_len=8)
        with torch.no_grad():
            whole = model(ids).logits
            model(ids[:, :3], **{CACHE_NAME: cache})
            step = torch.compile(model.forward, fullgraph=True, backend="eager")
            output = step(ids[:, 3:], position_ids=torch.tensor([[3]]), **{CACHE_NAME: cache})
        torch.testing.assert_close(output.logits[:, -1], whole[:, -1], rtol=1e-4, atol=1e-5)
