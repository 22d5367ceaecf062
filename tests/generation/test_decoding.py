# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Decode steps: what is executed and what is not, by hand and inside of `generate`."""

from __future__ import annotations

import random
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_llama import SlowModel, SlowRow, check_against_slow, prompts, spreading
from tiny import tiny_llama
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from transformers_cee import EarlyExitCache
from transformers_cee.exits.cache_name import CACHE_NAME
from transformers_cee.exits.criteria import CRITERIA, ExitCriterion, register_criterion
from transformers_cee.generation import decoding


@contextmanager
def planned(steps):
    """Registers a criterion under which row i leaves in step s at exit `steps[s][i]` (0-based); gives its name."""
    plans = iter(steps)

    class Planned(ExitCriterion):
        name = "planned"
        plan = None

        def score(self, step):
            if step.index == 0:
                self.plan = torch.tensor(next(plans))
            assert len(self.plan) == len(step.state), "the criterion's memory does not follow the rows"
            return (self.plan == step.index).float()

        def select(self, kept):
            self.plan = self.plan[kept]

    register_criterion(Planned)
    try:
        yield "planned"
    finally:
        del CRITERIA["planned"]


@contextmanager
def layer_calls(model):
    """Collects (layer, rows, columns) of every call of a layer, layers counted from 1."""
    calls = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, number=number: calls.append((number, *inputs[0].shape[:2])))
        for number, layer in enumerate(model.model.layers, start=1)
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def generate(model, steps, skipped_kv, rows=3, **options):
    """Layer calls of the decode steps, and the output."""
    with planned(steps) as name, layer_calls(model) as calls:
        output = model.generate(
            **prompts([4] * rows),
            max_new_tokens=len(steps) + 1,
            exit_criterion=name,
            exit_threshold=0.5,
            skipped_kv=skipped_kv,
            eos_token_id=None,
            **options,
        )
    assert calls[:4] == [(layer, rows, 4) for layer in range(1, 5)]
    return calls[4:], output


@pytest.fixture
def dropping(monkeypatch):
    """Rows that left are dropped at once."""
    monkeypatch.setattr(decoding, "drop_pays", lambda *_: True)


class TestWhatRuns:
    @pytest.mark.parametrize("skipped_kv", ["copy", "deferred"])
    @pytest.mark.parametrize("exit_number", [0, 1, 2, 3])
    def test_only_layers_up_to_the_exit(self, skipped_kv, exit_number):
        calls, _ = generate(tiny_llama(), [[exit_number] * 3] * 4, skipped_kv)
        assert calls == [(layer, 3, 1) for layer in range(1, exit_number + 2)] * 4

    @pytest.mark.parametrize("plan", [[0, 2, 1], [3, 0, 0], [1, 1, 3], [2, 2, 0]])
    def test_rows_that_left_stay_while_others_go_on(self, plan):
        calls, _ = generate(tiny_llama(), [plan] * 3, "copy")
        assert calls == [(layer, 3, 1) for layer in range(1, max(plan) + 2)] * 3

    def test_what_would_wait_goes_along(self):
        """However few go on: the same work would be done later."""
        steps = [[0, 0, 0, 0, 0, 3], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 2, 0]]
        assert decoding.drop_pays("cpu", "copy", 6, 1) and not decoding.drop_pays("cpu", "deferred", 6, 1)
        calls, output = generate(tiny_llama(), steps, "deferred", rows=6, return_dict_in_generate=True)
        step = [[(layer, 6, 1) for layer in range(1, deepest + 2)] for deepest in (3, 1, 0)]
        assert calls[:7] == step[0] + step[1] + [(1, 6, 1)]
        # The last step comes to layer 2 with what left before it in the step before, and to layer 3 with both.
        assert output.exit_layers[0, 1:].tolist() == [1, 2, 1] and output.past_key_values.waiting is None

    @pytest.mark.parametrize("plan", [[0, 2, 1], [3, 0, 0], [1, 1, 3], [2, 2, 0]])
    def test_rows_that_left_are_gone(self, dropping, plan):
        calls, _ = generate(tiny_llama(), [plan] * 3, "copy")
        step = [(layer, rows, 1) for layer in range(1, 5) if (rows := sum(exit >= layer - 1 for exit in plan))]
        assert calls == step * 3

    def test_exits_between_layers_only(self, dropping):
        calls, _ = generate(tiny_llama(exit_layers=[2]), [[0, 1, 0]] * 2, "copy")
        assert calls == [(1, 3, 1), (2, 3, 1), (3, 1, 1), (4, 1, 1)] * 2

    def test_waiting_tokens_come_along(self, dropping):
        """Row 0 waits three times at layer 2 and then goes to the end; row 1 never waits; row 2 goes on with it."""
        steps = [[0, 3, 1], [0, 3, 1], [0, 3, 2], [3, 3, 3]]
        calls, _ = generate(tiny_llama(), steps, "deferred")
        assert calls == [
            *[(1, 3, 1), (2, 2, 1), (3, 1, 1), (4, 1, 1)] * 2,
            # Row 2 reaches layer 3, where two of its tokens wait; row 1 is computed along.
            *[(1, 3, 1), (2, 2, 1), (3, 2, 3), (4, 1, 1)],
            # Layer 2 has waited for three tokens of row 0. Then it has caught up, and layer 4 for all waits for three.
            *[(1, 3, 1), (2, 3, 4), (3, 3, 4), (4, 3, 4)],
        ]

    def test_returned_caches_are_completed(self, dropping):
        """What still waits at the end runs once, and only if somebody gets the cache."""
        steps = [[0, 1, 3]] * 3
        calls, _ = generate(tiny_llama(), steps, "deferred")
        assert calls == [(1, 3, 1), (2, 2, 1), (3, 1, 1), (4, 1, 1)] * 3
        calls, output = generate(tiny_llama(), steps, "deferred", return_dict_in_generate=True)
        assert calls[12:] == [(2, 3, 3), (3, 3, 3), (4, 3, 3)]
        assert output.past_key_values.waiting is None
        calls, _ = generate(tiny_llama(), steps, "deferred", past_key_values=DynamicCache())
        assert len(calls) == 15
        calls, output = generate(tiny_llama(), steps, "copy", return_dict_in_generate=True)
        assert len(calls) == 12

    def test_closed_exits_are_not_looked_at(self):
        """At exits that nobody may leave at, neither policies nor heads run."""
        model, seen = tiny_llama(), []
        for index, network in enumerate(model.exit_policies.networks):
            network[0].register_forward_hook(lambda *_, index=index: seen.append(index))
        batch = prompts([4])
        model.generate(**batch, max_new_tokens=2, exit_threshold=0.999, min_exit_layer=3, eos_token_id=None)
        assert seen == [2]
        model.generate(**batch, max_new_tokens=2, exit_threshold=[1.0, 0.999, 1.0, 0.0], eos_token_id=None)
        assert seen == [2, 1]

    def test_heads_run_for_rows_that_leave(self):
        model, seen = tiny_llama(exit_head="untied"), []
        for index, head in enumerate((*model.exit_heads.heads, model.lm_head)):
            head.register_forward_hook(lambda _, inputs, output, index=index: seen.append((index, len(inputs[0]))))
        generate(model, [[0, 2, 2], [3, 3, 3]], "copy")
        assert seen == [(3, 3), (0, 1), (2, 2), (3, 3)]


@pytest.mark.parametrize("skipped_kv", ["copy", "deferred"])
@settings(max_examples=25)
@given(data=st.data(), rows=st.integers(2, 5), head=st.sampled_from(["shared", "untied"]))
def test_whether_rows_are_dropped_is_not_seen(skipped_kv, data, rows, head):
    """Tokens, exits, states, keys and values are the same whichever rows layers run for."""
    steps = data.draw(st.lists(st.lists(st.integers(0, 3), min_size=rows, max_size=rows), min_size=1, max_size=6))
    lengths = data.draw(st.lists(st.integers(1, 4), min_size=rows, max_size=rows))
    model = tiny_llama(exit_head=head, eos_token_id=None)
    choices = random.Random(rows)
    outputs = []
    for drop_pays in (lambda *_: True, lambda *_: False, lambda *_: choices.random() < 0.5):
        with planned(steps) as name, mock.patch.object(decoding, "drop_pays", drop_pays):
            outputs.append(
                model.generate(
                    **prompts(lengths),
                    max_new_tokens=len(steps) + 1,
                    exit_criterion=name,
                    exit_threshold=0.5,
                    skipped_kv=skipped_kv,
                    return_dict_in_generate=True,
                    output_logits=True,
                    output_hidden_states=True,
                )
            )
    first, *others = outputs
    assert first.exit_layers[:, 1:].T.tolist() == [[exit + 1 for exit in step] for step in steps]
    for other in others:
        assert torch.equal(other.sequences, first.sequences)
        assert torch.equal(other.exit_layers, first.exit_layers)
        torch.testing.assert_close(other.logits, first.logits, rtol=1e-4, atol=1e-4)
        for one, same in zip(other.hidden_states, first.hidden_states, strict=True):
            torch.testing.assert_close(one, same, rtol=1e-4, atol=1e-4, equal_nan=True)
        real = prompts(lengths)["attention_mask"].bool()
        for layer, same in zip(other.past_key_values.layers, first.past_key_values.layers, strict=True):
            for one, like in ((layer.keys, same.keys), (layer.values, same.values)):
                assert one.shape[2] == real.shape[1] + len(steps)
                tokens = torch.nn.functional.pad(real, (0, len(steps)), value=True)
                one, like = one.transpose(1, 2)[tokens], like.transpose(1, 2)[tokens]
                torch.testing.assert_close(one, like, rtol=1e-4, atol=1e-4)


class TestSharedHead:
    """Where all exits end in the model's own head and no score asks for logits, it runs once per step."""

    @pytest.mark.parametrize("kind", ["shared", "norm", "low_rank"])
    @pytest.mark.parametrize("skipped_kv", ["copy", "deferred"])
    def test_once_per_step(self, kind, skipped_kv):
        model, seen = tiny_llama(exit_head=kind), []
        thresholds = spreading(model)
        model.lm_head.register_forward_hook(lambda _, inputs, output: seen.append(len(inputs[0])))
        output = model.generate(
            **prompts([4, 2, 3]),
            max_new_tokens=6,
            eos_token_id=None,
            return_dict_in_generate=True,
            exit_threshold=thresholds,
            skipped_kv=skipped_kv,
        )
        assert len(output.exit_layers.unique()) >= 3 and seen == [3] * 6

    @pytest.mark.parametrize("kind", ["shared", "low_rank", "untied"])
    def test_rules_of_ones_own_see_logits(self, kind):
        model, shapes = tiny_llama(exit_head=kind), []

        class Largest(ExitCriterion):
            """Leaves where the largest logit is."""

            name = "largest"

            def score(self, step):
                shapes.append(step.logits.shape[1])
                return (step.logits.amax(-1) > 1.0).float()

        register_criterion(Largest)
        try:
            batch = prompts([4, 2])
            output = model.generate(**batch, max_new_tokens=6, exit_criterion="largest", exit_threshold=0.5)
        finally:
            del CRITERIA["largest"]
        assert set(shapes) == {60} and output.shape[0] == 2


class TestByHand:
    """The model without `generate`."""

    @torch.no_grad()
    @pytest.mark.parametrize("skipped_kv", ["copy", "deferred"])
    def test_step_by_step(self, skipped_kv):
        model = tiny_llama()
        thresholds = spreading(model)
        tokens = torch.randint(3, 60, (1, 12), generator=torch.Generator().manual_seed(2))
        cache, slow = EarlyExitCache(4), SlowRow(model, thresholds, skipped_kv)
        prefill = model(tokens[:, :4], past_key_values=cache)
        for column in range(4):
            logits, layer = slow.feed(int(tokens[0, column]), may_exit=False)
        torch.testing.assert_close(prefill.logits[0, -1], logits, rtol=1e-4, atol=1e-4)
        seen = set()
        for column in range(4, 12):
            output = model(
                tokens[:, column : column + 1],
                past_key_values=cache,
                exit_threshold=thresholds,
                skipped_kv=skipped_kv,
            )
            logits, layer = slow.feed(int(tokens[0, column]), may_exit=True)
            assert output.exit_layers.tolist() == [[layer]] and output.past_key_values is cache
            assert output.logits.shape == (1, 1, 60) and output.exit_probabilities.shape == (1, 1, 4)
            asked = min(layer, 3)
            assert output.exit_probabilities[0, 0, :asked].isfinite().all()
            assert output.exit_probabilities[0, 0, asked:].isnan().all()
            torch.testing.assert_close(output.logits[0, 0], logits, rtol=1e-4, atol=1e-4)
            seen.add(layer)
        assert len(seen) >= 3

    @torch.no_grad()
    @pytest.mark.parametrize("then", ["full depth", "known text", "copy"])
    def test_what_waits_is_completed_first(self, then):
        """After deferred steps the cache serves any other way to run."""
        model = tiny_llama()
        tokens = torch.randint(3, 60, (2, 10), generator=torch.Generator().manual_seed(1))
        cache = EarlyExitCache(4)
        model(tokens[:, :3], past_key_values=cache)
        for column in range(3, 7):
            model(
                tokens[:, column : column + 1],
                past_key_values=cache,
                exit_threshold=[0, 0, 0, 0],
                skipped_kv="deferred",
            )
        assert len(cache.waiting) == 4
        if then == "copy":
            model(tokens[:, 7:8], past_key_values=cache, exit_threshold=1.0)
        else:
            model(tokens[:, 7:], past_key_values=cache, exit_threshold=1.0 if then == "known text" else None)
        assert cache.waiting is None
        plain = DynamicCache(config=model.config)
        model(tokens[:, : 8 if then == "copy" else 10], past_key_values=plain)
        for ours, theirs in zip(cache.layers, plain.layers, strict=True):
            torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(ours.values, theirs.values, rtol=1e-4, atol=1e-4)

    def test_refusals(self):
        model, token = tiny_llama(), torch.tensor([[3]])
        with pytest.raises(ValueError, match=rf"`{CACHE_NAME}` of type DynamicCache.*EarlyExitCache.from_cache"):
            model(token, past_key_values=DynamicCache(), exit_threshold=0.5)
        with pytest.raises(ValueError, match=f"`{CACHE_NAME}` is empty"):
            model(token, past_key_values=EarlyExitCache(4), exit_threshold=0.5)
        with pytest.raises(ValueError, match=r"`skipped_kv`='deferred' with several tokens"):
            cache = EarlyExitCache(4)
            model(token, past_key_values=cache)
            model(torch.tensor([[3, 4]]), past_key_values=cache, exit_threshold=0.5, skipped_kv="deferred")
        with pytest.raises(ValueError, match=r"`skipped_kv`='later'"):
            model(token, past_key_values=cache, exit_threshold=0.5, skipped_kv="later")


def attention_with_row_masks(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Attention that takes masks as flash attention does: (rows, keys) or none, the last query at the last key."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    allowed = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(scores.shape[-1] - scores.shape[-2])[None, None]
    if attention_mask is not None:
        assert attention_mask.shape == (len(query), key.shape[2])
        allowed = allowed & attention_mask[:, None, None].bool()
    # A column that is all padding attends to nothing.
    weights = scores.masked_fill(~allowed, -1e9).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("skipped_kv", ["copy", "deferred"])
@pytest.mark.parametrize("lengths", [(4, 4), (2, 5, 1)])
def test_masks_of_rows_and_keys(skipped_kv, lengths):
    AttentionInterface.register("tiny_flash", attention_with_row_masks)
    AttentionMaskInterface.register("tiny_flash", flash_attention_mask)
    model, batch = tiny_llama(eos_token_id=None), prompts(lengths)
    thresholds = spreading(model)
    model.config._attn_implementation = "tiny_flash"
    options = {"max_new_tokens": 7, "return_dict_in_generate": True}
    output = model.generate(**batch, exit_threshold=thresholds, skipped_kv=skipped_kv, **options)
    model.config._attn_implementation = "sdpa"
    slow = SlowModel(model, max(lengths), threshold=thresholds, skipped_kv=skipped_kv)
    assert torch.equal(output.sequences, slow.generate(**batch, use_cache=False, **options).sequences)
    check_against_slow(model, batch, slow, output)
    assert len(output.exit_layers.unique()) >= 3


@pytest.mark.parametrize("skipped_kv", ["copy", "deferred"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(skipped_kv, dtype):
    model, batch = tiny_llama(eos_token_id=None, policy_inputs="both").to(dtype), prompts([4, 2])
    options = {"max_new_tokens": 7, "return_dict_in_generate": True, "skipped_kv": skipped_kv}
    output = model.generate(**batch, exit_threshold=spreading(model), **options)
    assert len(output.exit_layers.unique()) >= 3
    for layer in output.past_key_values.layers:
        assert layer.keys.dtype == layer.values.dtype == dtype and layer.keys.shape[2] == 10
        assert layer.keys.isfinite().all()
