# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The cache by its old and its new name, on whatever release is installed."""

import inspect
import warnings

import pytest
import torch
from tiny import tiny_llama
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig, GenerationMixin, LlamaForCausalLM

from transformers_cee.exits.cache_name import CACHE_NAME, named_cache, rename_cache
from transformers_cee.generation.cache import EarlyExitCache
from transformers_cee.generation.mixin import EarlyExitGenerationMixin


NAMES = ("past_key_values", "cache")


@pytest.fixture(autouse=True)
def no_deprecations():
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        yield


def test_name_is_that_of_the_stock_class():
    stock, ours = (inspect.signature(cls.forward).parameters for cls in (LlamaForCausalLM, type(tiny_llama())))
    assert CACHE_NAME in stock and CACHE_NAME in ours
    assert not (set(NAMES) - {CACHE_NAME}) & set(ours)
    shared = [name for name in stock if name != "kwargs"]
    # Positional arguments mean the same.
    assert list(ours)[: len(shared)] == shared


@pytest.mark.parametrize("name", NAMES)
class TestEitherName:
    def test_forward(self, name):
        model, ids = tiny_llama().eval(), torch.tensor([[5, 6, 7, 8]])
        with torch.no_grad():
            whole = model(ids)
            cache = DynamicCache()
            model(ids[:, :3], **{name: cache})
            output = model(ids[:, 3:], **{name: cache})
        assert output[CACHE_NAME] is cache and cache.get_seq_length() == 4
        torch.testing.assert_close(output.logits[:, -1], whole.logits[:, -1])

    def test_decode_step(self, name):
        model, cache = tiny_llama().eval(), EarlyExitCache(4)
        with torch.no_grad():
            model(torch.tensor([[5, 6]]), **{name: cache})
            output = model(torch.tensor([[7]]), exit_threshold=0.0, **{name: cache})
        assert output.exit_layers.tolist() == [[1]] and output[CACHE_NAME] is cache

    def test_generate(self, name):
        model, ids = tiny_llama().eval(), torch.tensor([[5, 6, 7]])
        options = {"max_new_tokens": 4, "do_sample": False}
        for threshold in (1.0, 0.5):
            expected = model.generate(ids, exit_threshold=threshold, **options)
            cache = DynamicCache()
            assert torch.equal(model.generate(ids, exit_threshold=threshold, **{name: cache}, **options), expected)
            assert cache.get_seq_length() == expected.shape[1] - 1

    def test_positional(self, name):
        cache = DynamicCache()
        tiny_llama().eval()(torch.tensor([[5, 6]]), None, None, cache)
        assert cache.get_seq_length() == 2


def test_two_caches_are_refused():
    arguments = {"past_key_values": DynamicCache(), "cache": DynamicCache()}
    with pytest.raises(ValueError, match="`cache` and `past_key_values` are two names"):
        tiny_llama()(torch.tensor([[5]]), **arguments)
    for same in ({"past_key_values": arguments["cache"]}, {"past_key_values": None}, {}):
        given = {"cache": arguments["cache"], "other": 1, **same}
        rename_cache(given)
        assert given == {CACHE_NAME: arguments["cache"], "other": 1}
    given = {"past_key_values": None}
    rename_cache(given)
    assert given == {CACHE_NAME: None}


def test_few_private_hooks_of_transformers_are_overridden():
    """Each of them may be renamed by the next release."""
    private = {name for name in vars(EarlyExitGenerationMixin) if name.startswith("_") and not name.startswith("__")}
    assert {name for name in private if hasattr(GenerationMixin, name)} == {
        "_get_stopping_criteria",
        "_update_model_kwargs_for_generation",
    }


def test_continuous_batching_with_exits_off():
    """Its cache goes to attention by the name `cache` in all releases."""
    model = tiny_llama(eos_token_id=59).eval()
    stock = LlamaForCausalLM(model.config).eval()
    stock.load_state_dict(model.state_dict(), strict=False)
    options = {
        "generation_config": GenerationConfig(max_new_tokens=3, eos_token_id=59, pad_token_id=0, do_sample=False),
        "continuous_batching_config": ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64),
    }
    prompts = [[3, 4, 5], [6, 7]]
    ours, theirs = (
        [(one.generated_tokens, one.error) for one in each.generate_batch(prompts, **options).values()]
        for each in (model, stock)
    )
    assert ours == theirs and all(tokens and error is None for tokens, error in ours)


def test_only_the_cache_of_continuous_batching_goes_to_attention():
    cache = DynamicCache()
    assert named_cache(cache) == {CACHE_NAME: cache}
    assert named_cache(None) == {CACHE_NAME: None}
    assert named_cache(((1, 2),)) == {CACHE_NAME: ((1, 2),)}
