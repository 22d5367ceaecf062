# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Exits drawn in training, the plain pass at full depth, and what holds for all ways to run."""

from __future__ import annotations

import pytest
import reference
import torch
from slow_llama import SlowRow
from text_reference import row_tokens
from tiny import collate_text, instructions, tiny_llama
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from transformers_cee import LlamaForConsistentEECausalLM
from transformers_cee.exits.cache_name import CACHE_NAME
from transformers_cee.exits.training_options import ExitTraining


CLOSE = {"rtol": 1e-4, "atol": 1e-4}
ROW = {"input_ids": [5, 9, 33, 21, 47], "attention_mask": [1] * 5, "labels": [-100, -100, 33, 21, 47]}
COPIES = 4000


def stock_twin(model):
    twin = LlamaForCausalLM._from_config(model.config, attn_implementation=model.config._attn_implementation)
    twin.load_state_dict({name: one for name, one in model.state_dict().items() if not name.startswith("exit_")})
    return twin.eval()


def text_batch(rows=5, seed=1):
    return collate_text(list(instructions(rows, seed)))


def shares_of(layers, depth=4):
    """Share of each layer."""
    return [float((layers == layer).float().mean()) for layer in range(1, depth + 1)]


def close_to(shares, expected, count=COPIES):
    """Within 5 standard deviations."""
    for share, probability in zip(shares, expected, strict=True):
        assert abs(share - probability) <= 5 * (probability * (1 - probability) / count) ** 0.5 + 1e-6


class Watched(SlowRow):
    """Goes on from another row and notes what it sees at each exit, normed state and logits up to there."""

    def __init__(self, row):
        super().__init__(row.model, min_exit_layer=1)
        self.keys, self.values = [list(one) for one in row.keys], [list(one) for one in row.values]
        self.seen = []

    def _leaves(self, normed, history, index, new_tokens):
        self.seen.append((normed, list(history)))
        return False


class TestSampling:
    @pytest.mark.parametrize("inputs", ["state", "both"])
    @pytest.mark.parametrize("copies", [True, False])
    @pytest.mark.parametrize("first", [None, 2])
    @torch.no_grad()
    def test_frequencies(self, inputs, copies, first):
        """Tokens leave with the probabilities of the exit distribution. Position 1 cannot leave: it is the last of the
        prompt. Position 2 can and sees only full depth before it; position 3 too, unless states are copied."""
        model = tiny_llama(policy_inputs=inputs, min_exit_layer=first)
        batch = {name: values.repeat(COPIES, 1) for name, values in collate_text([ROW]).items()}
        torch.manual_seed(0)
        layers = model(**batch, exit_training=ExitTraining(sample_exits=True, copy_states=copies)).exit_layers
        assert layers[:, :2].unique().tolist() == [4]
        tokens = row_tokens(model, ROW)
        expected = [token.exit_probabilities(model, first or 1) for token in tokens]
        close_to(shares_of(layers[:, 2]), expected[1])
        assert sum(probability > 0.02 for probability in expected[1]) >= 3 - (first == 2)
        if not copies:
            close_to(shares_of(layers[:, 3]), expected[2])
            return
        for layer in (2, 4):
            # What position 3 sees depends on where position 2 left.
            mine = layers[layers[:, 2] == layer, 3]
            close_to(shares_of(mine), self.after(model, layer, first or 1), len(mine))

    def after(self, model, layer, first):
        """Exit distribution of position 3 after position 2 left at `layer`."""
        slow, reached, shares = SlowRow(model), 1.0, []
        for token, forced in zip(ROW["input_ids"][:3], (4, 4, layer), strict=True):
            slow.feed(token, False, forced=forced)
        for number in range(1, 4):
            row = Watched(slow)
            row.feed(ROW["input_ids"][3], True)
            normed, history = row.seen[number - 1]
            score = reference.policy_score(model, normed, history, "single_label_classification", number - 1)
            score = score if number >= first else 0.0
            shares.append(reached * score)
            reached *= 1 - score
        return [*shares, reached]

    @pytest.mark.parametrize("kind", ["shared", "low_rank", "untied", "layernorm_linear"])
    def test_loss_is_that_of_the_exits_drawn(self, kind):
        model, rows = tiny_llama(exit_head=kind, exit_head_rank=3), list(instructions(12, 1))
        batch = collate_text(rows)
        torch.manual_seed(3)
        output = model(**batch, exit_training=ExitTraining(sample_exits=True))
        assert output.logits is None and len(output.exit_layers.unique()) >= 3
        losses, predictions = [], []
        for number, row in enumerate(rows):
            slow, ids = SlowRow(model), row["input_ids"]
            for column, token in enumerate(ids):
                forced = int(output.exit_layers[number, column])
                logits, _ = slow.feed(token, False, forced=forced)
                if column + 1 < len(ids) and row["labels"][column + 1] != -100:
                    losses.append(F.cross_entropy(logits[None], torch.tensor([ids[column + 1]])))
                    predictions.append(int(logits.argmax()))
                if row["labels"][column] == -100 or column == 0:
                    assert forced == 4
        losses = torch.stack(losses)
        torch.testing.assert_close(output.token_losses, losses, **CLOSE)
        torch.testing.assert_close(output.loss, losses.mean(), **CLOSE)
        assert output.token_predictions.tolist() == predictions
        output.loss.backward()
        given = {name: one.grad for name, one in model.named_parameters()}
        model.zero_grad()
        losses.mean().backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is None:
                assert given[name] is None or not given[name].any(), name
            else:
                torch.testing.assert_close(given[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)
        assert not any("exit_policies" in name and grad is not None for name, grad in given.items())
        torch.manual_seed(3)
        items = model(**batch, exit_training=ExitTraining(sample_exits=True), num_items_in_batch=torch.tensor(5))
        torch.testing.assert_close(items.loss, losses.sum() / 5, **CLOSE)

    def test_without_copies_deeper_layers_see_everything(self):
        model, row = tiny_llama(), ROW
        batch = {name: values.repeat(30, 1) for name, values in collate_text([row]).items()}
        torch.manual_seed(0)
        output = model(**batch, exit_training=ExitTraining(sample_exits=True, copy_states=False))
        tokens = row_tokens(model, row)
        expected = [
            tokens[column].losses[layer - 1]
            for layers in output.exit_layers.tolist()
            for column, layer in enumerate(layers[1:4])
        ]
        torch.testing.assert_close(output.token_losses, torch.stack(expected), **CLOSE)

    def test_draws_differ(self):
        model, batch = tiny_llama(), text_batch(12)
        first, second = (model(**batch, exit_training=ExitTraining(sample_exits=True)).exit_layers for _ in range(2))
        assert not torch.equal(first, second)


class TestFullDepth:
    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    @pytest.mark.parametrize("items", [None, 7, torch.tensor(7)])
    @torch.no_grad()
    def test_like_stock(self, implementation, items):
        model = tiny_llama()
        model.set_attn_implementation(implementation)
        batch, stock = text_batch(), stock_twin(model)
        expected, output = stock(**batch, num_items_in_batch=items), model(**batch, num_items_in_batch=items)
        assert torch.equal(output.logits, expected.logits)
        torch.testing.assert_close(output.loss, expected.loss)
        assert output.exit_layers.unique().tolist() == [4] and output.exit_layers.shape == batch["input_ids"].shape
        for keep in (1, 3, torch.tensor([0, 2])):
            ours = model(input_ids=batch["input_ids"], logits_to_keep=keep).logits
            assert torch.equal(ours, stock(input_ids=batch["input_ids"], logits_to_keep=keep).logits)

    @torch.no_grad()
    def test_other_outputs(self):
        model, batch = tiny_llama(), text_batch()
        model.set_attn_implementation("eager")
        stock = stock_twin(model)
        options = {"output_hidden_states": True, "output_attentions": True, "use_cache": True}
        expected, output = stock(**batch, **options), model(**batch, **options)
        for name in ("hidden_states", "attentions"):
            assert len(output[name]) == len(expected[name])
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(output[name], expected[name], strict=True))
        assert torch.equal(output.past_key_values.layers[3].keys, expected.past_key_values.layers[3].keys)
        assert model(**batch, use_cache=False).past_key_values is None
        loss, logits = model(**batch, return_dict=False)[:2]
        torch.testing.assert_close(loss, expected.loss)
        assert torch.equal(logits, expected.logits)

    @torch.no_grad()
    def test_embedded_and_positions(self):
        model, batch = tiny_llama(), text_batch()
        embedded = model.get_input_embeddings()(batch["input_ids"])
        mask, positions = batch["attention_mask"], torch.arange(batch["input_ids"].shape[1])[None] + 3
        expected = model(batch["input_ids"], attention_mask=mask, position_ids=positions)
        output = model(inputs_embeds=embedded, attention_mask=mask, position_ids=positions)
        assert torch.equal(output.logits, expected.logits)

    def test_gradients_like_stock(self):
        """In evaluation mode with labels, the loss is that of the last exit alone."""
        model, batch = tiny_llama(), text_batch()
        stock = stock_twin(model)
        model(**batch).loss.backward()
        stock(**batch).loss.backward()
        for name, parameter in stock.named_parameters():
            torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-6)
        assert all(one.grad is None for name, one in model.named_parameters() if name.startswith("exit_"))


MODES = {
    "all exits": {"output_all_exits": True},
    "sampled": {"exit_training": ExitTraining(sample_exits=True)},
    "full depth": {},
}


LAYERS_MAY_NOT_RUN = {
    "nothing": ({}, r"exactly one of `input_ids` and `inputs_embeds`"),
    "both": ({"input_ids": torch.ones(1, 2).long(), "inputs_embeds": torch.ones(1, 2, 32)}, r"exactly one of"),
    "no rows": ({"input_ids": torch.ones(0, 2).long()}, r"input of shape \(0, 2\) is empty"),
    "no tokens": ({"input_ids": torch.ones(2, 0).long()}, r"input of shape \(2, 0\) is empty"),
    "one dimension": ({"input_ids": torch.ones(3).long()}, r"input of shape \(3,\).*\(batch, time\)"),
    "labels of another length": (
        {"input_ids": torch.ones(2, 3).long(), "labels": torch.ones(2, 4).long()},
        r"`labels` of shape \(2, 4\) must be \(batch, time\) = \(2, 3\)",
    ),
    "all exits without labels": (
        {"input_ids": torch.ones(2, 3).long(), "output_all_exits": True},
        r"`output_all_exits` and `sample_exits` need `labels`",
    ),
    "samples without labels": (
        {"input_ids": torch.ones(2, 3).long(), "exit_training": ExitTraining(sample_exits=True)},
        r"need `labels`",
    ),
    "threshold": ({"input_ids": torch.ones(2, 3).long(), "exit_threshold": 2}, r"`exit_threshold`=2"),
    "thresholds": ({"input_ids": torch.ones(2, 3).long(), "exit_threshold": [0.5]}, r"1 values.*\(4\)"),
    "criterion": (
        {"input_ids": torch.ones(2, 3).long(), "exit_threshold": 0.5, "exit_criterion": "mood"},
        r"`exit_criterion`='mood'",
    ),
    "min_exit_layer": (
        {"input_ids": torch.ones(2, 3).long(), "exit_threshold": 0.5, "min_exit_layer": 7},
        r"`min_exit_layer`=7 must lie in 1\.\.4",
    ),
    "skipped_kv": (
        {"input_ids": torch.ones(2, 3).long(), "exit_threshold": 0.5, "skipped_kv": "never"},
        r"`skipped_kv`='never' is unknown",
    ),
}


class TestAllWays:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing(self, mode, reentrant):
        model, batch = tiny_llama(), text_batch()
        inputs = {name: values for name, values in batch.items() if name != "labels"}
        grads, calls = [], []
        for checkpointed in (False, True):
            if checkpointed:
                # `gradient_checkpointing_enable` is its name in older versions of transformers.
                enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
                enable({"use_reentrant": reentrant})
                model.enable_input_require_grads()
                model.train()
                query = model.model.layers[0].self_attn.q_proj
                query.register_forward_hook(lambda *_: calls.append(1))
            torch.manual_seed(0)
            model.zero_grad()
            if mode == "full depth":
                model(**inputs).logits.square().mean().backward()
            else:
                model(**batch, **MODES[mode]).loss.backward()
            grads.append({name: one.grad for name, one in model.named_parameters() if one.grad is not None})
        assert len(calls) == 2, "the layer must be computed again"
        assert grads[0].keys() == grads[1].keys()
        for name, grad in grads[0].items():
            torch.testing.assert_close(grads[1][name], grad, msg=name)

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("inputs", ["state", "both"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, mode, inputs, dtype):
        model, batch = tiny_llama(policy_inputs=inputs), text_batch()
        torch.manual_seed(0)
        expected = model(**batch, **MODES[mode]).loss
        torch.manual_seed(0)
        output = model.to(dtype)(**batch, **MODES[mode])
        assert output.loss.dtype == torch.float32
        if mode != "sampled":
            torch.testing.assert_close(output.loss, expected, rtol=0.05, atol=0.05)
        output.loss.backward()
        assert all(one.grad is None or one.grad.isfinite().all() for one in model.parameters())

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("inputs", ["state", "both"])
    def test_autocast(self, mode, inputs):
        model, batch = tiny_llama(policy_inputs=inputs), text_batch()
        expected = model(**batch, **MODES[mode]).loss
        with torch.autocast("cpu", torch.bfloat16):
            output = model(**batch, **MODES[mode])
        if mode != "sampled":
            torch.testing.assert_close(output.loss, expected, rtol=0.05, atol=0.05)
        output.loss.backward()

    def test_autocast_generates(self):
        model = tiny_llama(policy_inputs="both")
        with torch.autocast("cpu", torch.bfloat16):
            for skipped_kv in ("copy", "deferred"):
                output = model.generate(
                    torch.tensor([[3, 4], [5, 6]]), max_new_tokens=6, exit_threshold=0.5, skipped_kv=skipped_kv
                )
                assert output.shape[1] <= 8

    @pytest.mark.parametrize("case", LAYERS_MAY_NOT_RUN)
    @pytest.mark.parametrize("training", [False, True])
    def test_refusals(self, case, training):
        model = tiny_llama().train(training)
        for layer in model.model.layers:
            layer.register_forward_pre_hook(lambda *_: pytest.fail("a layer has run"))
        inputs, message = LAYERS_MAY_NOT_RUN[case]
        with pytest.raises(ValueError, match=message):
            model(**inputs)


def test_class_declares_what_trainer_and_compile_ask():
    model = tiny_llama()
    assert model.item == "token" and model._can_compile_fullgraph and model.loss_type == "ForCausalLM"
    assert {"exit_layers", CACHE_NAME, "all_exit_losses"} <= set(model.config.keys_to_ignore_at_inference)
    assert isinstance(model, LlamaForConsistentEECausalLM) and model.get_decoder() is model.model
    assert model.layer_numbers == [1, 2, 3, 4]
