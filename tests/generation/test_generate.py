# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""`generate` with exits against a slow LLaMA of its own: tokens, exit layers, keys and values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_llama import SlowModel, check_against_slow, prompts, spreading
from tiny import tiny_llama


KINDS = ("shared", "norm", "low_rank", "untied", "layernorm_linear")
WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3},
    "beams": {"num_beams": 3},
    "beam sampling": {"num_beams": 2, "do_sample": True},
}
LENGTHS = (3, 5, 1, 4)
NEW = 8


def run(model, batch, seed=1, **options):
    torch.manual_seed(seed)
    return model.generate(**batch, max_new_tokens=NEW, return_dict_in_generate=True, **options)


def compare(model, lengths=LENGTHS, way="greedy", seed=1, spread=3, **exit_options):
    """Generates with both models and compares all there is."""
    batch = prompts(lengths, seed)
    exit_options.setdefault("exit_threshold", spreading(model, exit_options.get("exit_criterion", "policy")))
    output = run(model, batch, **WAYS[way], **exit_options)
    slow = SlowModel(
        model,
        batch["input_ids"].shape[1],
        threshold=exit_options["exit_threshold"],
        skipped_kv=exit_options.get("skipped_kv", "copy"),
        min_exit_layer=exit_options.get("min_exit_layer"),
        criterion=exit_options.get("exit_criterion", "policy"),
    )
    expected = run(slow, batch, use_cache=False, **WAYS[way])
    assert torch.equal(output.sequences, expected.sequences)
    check_against_slow(model, batch, slow, output, beams="num_beams" in WAYS[way])
    assert output.exit_layers[:, 0].tolist() == [model.config.num_hidden_layers] * len(output.sequences)
    assert len(output.exit_layers.unique()) >= spread, "exits must spread, or the comparison says little"


@pytest.mark.parametrize("skipped_kv", ["copy", "deferred"])
class TestAgainstSlow:
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("ends", [None, list(range(2, 12))])
    def test_ways_to_generate(self, skipped_kv, way, ends):
        """With many tokens that end a row, rows end at different steps."""
        compare(tiny_llama(num_hidden_layers=5, eos_token_id=ends), way=way, skipped_kv=skipped_kv)

    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    @pytest.mark.parametrize("lengths", [(4,), (1,), (4, 4), (1, 6, 2)])
    def test_padding_and_attention(self, skipped_kv, implementation, lengths):
        model = tiny_llama(1, eos_token_id=None)
        model.set_attn_implementation(implementation)
        compare(model, lengths, skipped_kv=skipped_kv, spread=2)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("tied", [False, True])
    def test_heads(self, skipped_kv, kind, tied):
        compare(tiny_llama(2, exit_head=kind, tie_word_embeddings=tied, exit_head_rank=3), skipped_kv=skipped_kv)

    @pytest.mark.parametrize("criterion", ["max_probability", "margin", "entropy"])
    def test_criteria(self, skipped_kv, criterion):
        compare(tiny_llama(3), exit_criterion=criterion, skipped_kv=skipped_kv)

    @pytest.mark.parametrize("inputs", ["confidence", "both"])
    def test_policy_inputs(self, skipped_kv, inputs):
        """What a policy remembers of earlier exits follows the rows, also past exits at which nobody may leave."""
        model = tiny_llama(4, num_hidden_layers=5, policy_inputs=inputs)
        compare(model, skipped_kv=skipped_kv)
        compare(model, skipped_kv=skipped_kv, min_exit_layer=2)

    @pytest.mark.parametrize("exit_layers,first", [(None, 3), (2, None), ([1, 3], 2), ([2], 4)])
    def test_exit_layers(self, skipped_kv, exit_layers, first):
        model = tiny_llama(5, num_hidden_layers=5, exit_layers=exit_layers)
        compare(model, skipped_kv=skipped_kv, min_exit_layer=first, spread=1 if first == 4 else 2)

    def test_heads_of_attention(self, skipped_kv):
        """As many keys as queries, and head sizes that do not follow from the width."""
        compare(tiny_llama(6, num_key_value_heads=4), skipped_kv=skipped_kv)
        compare(tiny_llama(6, num_key_value_heads=1, head_dim=12), skipped_kv=skipped_kv)

    @settings(max_examples=12)
    @given(
        lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
        thresholds=st.lists(st.sampled_from([0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0]), min_size=4, max_size=4),
        way=st.sampled_from(["greedy", "sampling", "beams"]),
        first=st.integers(1, 4),
        seed=st.integers(0, 99),
    )
    def test_anything(self, skipped_kv, lengths, thresholds, way, first, seed):
        if all(threshold == 1.0 for threshold in thresholds[:-1]):
            thresholds[0] = 0.5
        compare(
            tiny_llama(seed % 5),
            lengths,
            way,
            seed,
            spread=1,
            exit_threshold=thresholds,
            min_exit_layer=first,
            skipped_kv=skipped_kv,
        )
