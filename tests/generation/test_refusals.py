# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What `generate` with exits refuses, before any layer has run, and with words that help."""

from __future__ import annotations

import pytest
import torch
from slow_llama import prompts
from tiny import tiny_llama
from transformers import DynamicCache, GenerationConfig, GenerationMixin, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from transformers_cee.exits.cache_name import CACHE_NAME


@pytest.fixture
def model():
    """A model none of whose layers may run."""
    model = tiny_llama()
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda *_: pytest.fail("a layer has run"))
    return model


def sliding_cache(model):
    cache = DynamicCache()
    cache.layers = [DynamicSlidingWindowLayer(sliding_window=4) for _ in range(4)]
    return cache


def foreign_cache(model):
    cache = DynamicCache()
    cache.layers = [type("QuantizedLayer", (type(DynamicCache(config=model.config).layers[0]),), {})()]
    return cache


BAD_VALUES = {
    "threshold above 1": ({"exit_threshold": 1.5}, r"`exit_threshold`=1.5.*'policy'.*\[0, 1\]"),
    "threshold not a number": ({"exit_threshold": "low"}, r"`exit_threshold`='low'.*number"),
    "too few thresholds": ({"exit_threshold": [0.5, 0.5]}, r"`exit_threshold` has 2 values.*\(4\)"),
    "threshold of another criterion": (
        {"exit_threshold": 0.5, "exit_criterion": "patience"},
        r"`exit_threshold`=0.5.*'patience'.*at least 1",
    ),
    "criterion": ({"exit_threshold": 0.5, "exit_criterion": "mood"}, r"`exit_criterion`='mood'.*margin.*policy"),
    "criterion with exits off": ({"exit_criterion": "mood"}, r"`exit_criterion`='mood'"),
    "skipped_kv": (
        {"exit_threshold": 0.5, "skipped_kv": "recompute"},
        r"`skipped_kv`='recompute'.*'copy', 'deferred'",
    ),
    "min_exit_layer 0": ({"exit_threshold": 0.5, "min_exit_layer": 0}, r"`min_exit_layer`=0.*1\.\.4"),
    "min_exit_layer 5": ({"exit_threshold": 0.5, "min_exit_layer": 5}, r"`min_exit_layer`=5.*1\.\.4"),
    **{
        f"decay {value}": (
            {"exit_threshold": 0.5, "exit_threshold_decay": value},
            r"`exit_threshold_decay`=.*at least 0",
        )
        for value in (-0.5, "fast", True, float("nan"), float("inf"))
    },
    "decay of entropy": (
        {"exit_threshold": 0.5, "exit_threshold_decay": 1.0, "exit_criterion": "entropy"},
        r"`exit_threshold_decay`.*`exit_criterion`='entropy'",
    ),
    "decay of patience": (
        {"exit_threshold": 2, "exit_threshold_decay": 1.0, "exit_criterion": "patience"},
        r"`exit_threshold_decay`.*`exit_criterion`='patience'",
    ),
}

WAYS = {
    "static": ({"cache_implementation": "static"}, r"`cache_implementation`='static'.*`exit_threshold`=1.0"),
    "quantized": ({"cache_implementation": "quantized"}, r"`cache_implementation`='quantized'"),
    "offloaded": ({"cache_implementation": "offloaded"}, r"`cache_implementation`='offloaded'"),
    "paged": ({"cache_implementation": "paged"}, r"`cache_implementation`='paged'"),
    "no cache": ({"use_cache": False}, r"`use_cache`=False.*`exit_threshold`=1.0"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, r"`prompt_lookup_num_tokens`.*`exit_threshold`=1.0"),
    "assistant_early_exit": ({"assistant_early_exit": 2}, r"`assistant_early_exit`"),
    "assistant": (lambda model: {"assistant_model": tiny_llama(1)}, r"`assistant_model`.*`exit_threshold`=1.0"),
    "StaticCache": (
        lambda model: {"past_key_values": StaticCache(config=model.config, max_cache_len=32)},
        rf"`{CACHE_NAME}` of layers StaticLayer.*`exit_threshold`=1.0",
    ),
    "offloaded cache": (lambda model: {"past_key_values": DynamicCache(offloading=True)}, f"`{CACHE_NAME}`"),
    "sliding cache": (lambda model: {"past_key_values": sliding_cache(model)}, r"DynamicSlidingWindowLayer"),
    "quantized cache": (lambda model: {"past_key_values": foreign_cache(model)}, r"QuantizedLayer"),
}


def refuse(model, message, **options):
    with pytest.raises(ValueError, match=message):
        model.generate(**prompts([4]), max_new_tokens=4, **options)


@pytest.mark.parametrize("case", BAD_VALUES)
def test_bad_values(model, case):
    options, message = BAD_VALUES[case]
    refuse(model, message, **options)
    refuse(model, message, generation_config=GenerationConfig(max_new_tokens=4, **options))
    for name, value in options.items():
        setattr(model.generation_config, name, value)
    refuse(model, message)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", WAYS)
def test_ways_to_generate_that_exits_do_not_go_with(model, case):
    options, message = WAYS[case]
    options = options(model) if callable(options) else options
    refuse(model, message, exit_threshold=0.5, **options)
    model.config.exit_threshold = [1.0, 0.5, 1.0, 1.0]
    refuse(model, message, **options)


CALLS = {
    "generate_batch": lambda model, *args, **kwargs: model.generate_batch([[3, 4]], *args, **kwargs),
    "init": lambda model, *args, **kwargs: model.init_continuous_batching(*args, **kwargs),
    "context": lambda model, *args, **kwargs: model.continuous_batching_context_manager(*args, **kwargs).__enter__(),
}


class TestContinuousBatching:
    """It packs all requests into one row, and would leave exit arguments aside without a word."""

    @pytest.mark.parametrize("call", CALLS)
    def test_refused(self, model, call):
        run, message = CALLS[call], r"`exit_threshold`=0.4 has no effect in continuous batching.*1\.0"
        given = GenerationConfig(exit_threshold=0.4, max_new_tokens=2)
        for args, kwargs in (((given,), {}), ((), {"generation_config": given})):
            with pytest.raises(ValueError, match=message):
                run(model, *args, **kwargs)
        if call == "generate_batch":
            with pytest.raises(ValueError, match=message):
                run(model, exit_threshold=0.4)
        model.generation_config.exit_threshold = 0.4
        for args in ((), (GenerationConfig(max_new_tokens=2),)):
            with pytest.raises(ValueError, match=message):
                run(model, *args)
        model.generation_config.exit_threshold = None
        model.config.exit_threshold = 0.4
        with pytest.raises(ValueError, match=message):
            run(model)

    def test_allowed_with_exits_off(self, model, monkeypatch):
        seen = []
        for name in ("generate_batch", "init_continuous_batching"):
            monkeypatch.setattr(
                GenerationMixin, name, lambda self, *args, name=name, **kwargs: seen.append((name, args, kwargs))
            )
        given = GenerationConfig(exit_threshold=1.0)
        model.config.exit_threshold = 0.4
        model.generate_batch([[3]], given, exit_threshold=1.0, max_new_tokens=2)
        model.init_continuous_batching(generation_config=given)
        assert seen == [
            ("generate_batch", ([[3]], given), {"max_new_tokens": 2}),
            ("init_continuous_batching", (given,), {}),
        ]


def test_typos_are_still_found(model):
    with pytest.raises(ValueError, match=r"exit_treshold"):
        model.generate(**prompts([4]), max_new_tokens=4, exit_treshold=0.5)


def test_a_call_that_failed_does_not_change_the_next():
    model, batch = tiny_llama(eos_token_id=None), prompts([4])
    expected = model.generate(**batch, max_new_tokens=4)
    with pytest.raises(ValueError):
        model.generate(**batch, max_new_tokens=4, exit_threshold=0.0, use_cache=False)
    output = model.generate(**batch, max_new_tokens=4, return_dict_in_generate=True)
    assert torch.equal(output.sequences, expected)
    assert output.exit_layers.tolist() == [[4] * 4]
