# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Hidden states and attentions where rows and tokens leave: everyone's own, in everyone's place."""

from __future__ import annotations

import pytest
import reference
import torch
from tiny import VOCABULARY, collate_text, instructions, pad, random_rows, tiny_llama, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertModel, LlamaForCausalLM, PreTrainedTokenizerFast, pipeline

import transformers_cee  # noqa: F401


CLOSE = {"rtol": 1e-4, "atol": 2e-5}
ROWS = random_rows(10, 6, pairs=True)


def spread_model(rows=ROWS, **fields):
    model = tiny_model(**fields)
    return model, reference.spreading_thresholds(model, rows, "policy")


class TestEncoder:
    @pytest.mark.parametrize("side,extra", [("right", 0), ("left", 2)])
    @torch.no_grad()
    def test_hidden_states(self, side, extra):
        """Of each row those of the layers that ran for it, as alone and without padding."""
        model, thresholds = spread_model()
        batch = pad(ROWS, side, extra)
        output = model(**batch, exit_threshold=thresholds, output_hidden_states=True)
        assert len(output.exit_layers.unique()) >= 3
        assert [tuple(one.shape) for one in output.hidden_states] == [(*batch["input_ids"].shape, 32)] * 7
        for number, row in enumerate(ROWS):
            alone = reference.layer_states(model, row["input_ids"], row["token_type_ids"])
            columns, leaves = batch["attention_mask"][number].bool(), int(output.exit_layers[number])
            for layer in range(1, 7):
                found = output.hidden_states[layer][number]
                if layer <= leaves:
                    torch.testing.assert_close(found[columns], alone[layer - 1], **CLOSE)
                    assert found.isfinite().all()
                else:
                    assert found.isnan().all(), f"layer {layer} has not run for row {number}"

    @pytest.mark.parametrize("side,extra", [("right", 0), ("left", 2)])
    @torch.no_grad()
    def test_attentions(self, side, extra):
        model, thresholds = spread_model(attn_implementation="eager")
        stock = BertModel._from_config(model.config, attn_implementation="eager").eval()
        stock.load_state_dict(model.bert.state_dict())
        batch = pad(ROWS, side, extra)
        output = model(**batch, exit_threshold=thresholds, output_attentions=True)
        time = batch["input_ids"].shape[1]
        assert [tuple(one.shape) for one in output.attentions] == [(10, 4, time, time)] * 6
        assert output.hidden_states is None
        for number, row in enumerate(ROWS):
            alone = stock(**{name: values[None] for name, values in row.items()}, output_attentions=True).attentions
            columns, leaves = batch["attention_mask"][number].bool(), int(output.exit_layers[number])
            for layer in range(1, 7):
                found = output.attentions[layer - 1][number]
                if layer <= leaves:
                    torch.testing.assert_close(found[:, columns][:, :, columns], alone[layer - 1][0], **CLOSE)
                    assert found[:, :, ~columns].abs().max() < 1e-6 if (~columns).any() else True
                else:
                    assert found.isnan().all()

    @pytest.mark.parametrize(
        "options", [{"exit_threshold": 1.0}, {"output_all_exits": True}, {"exit_threshold": [0.0] * 6}]
    )
    @torch.no_grad()
    def test_layers_that_ran_are_the_stock_models(self, options):
        model, batch = tiny_model(), pad(ROWS)
        stock = BertModel._from_config(model.config).eval()
        stock.load_state_dict(model.bert.state_dict())
        expected = stock(**batch, output_hidden_states=True).hidden_states
        found = model(**batch, **options, output_hidden_states=True).hidden_states
        assert len(found) == 7
        for layer, (left, right) in enumerate(zip(found, expected, strict=True)):
            if options["exit_threshold"] == [0.0] * 6 if "exit_threshold" in options else False:
                if layer > 1:
                    assert left.isnan().all() and left.shape == right.shape
                    continue
            torch.testing.assert_close(left, right, **CLOSE)

    def test_gradients(self):
        """A loss on the states of the layers that ran reaches what made them."""
        model, thresholds = spread_model()
        batch = pad(ROWS)
        output = model(**batch, exit_threshold=thresholds, output_hidden_states=True)
        torch.stack(output.hidden_states).nan_to_num().square().mean().backward()
        assert model.bert.encoder.layer[2].output.dense.weight.grad.any()

    @pytest.mark.parametrize("task", ["text-classification", "early-exit-text-classification"])
    @pytest.mark.parametrize("batch_size", [1, 4])
    def test_pipelines_with_the_configs_flag(self, task, batch_size):
        words = [f"w{number}" for number in range(VOCABULARY - 2)]
        vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *words])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
        texts = [" ".join(words[start : start + 2 + start % 5]) for start in range(8)]
        results = {}
        for flag in (False, True):
            model, thresholds = spread_model()
            model.config.exit_threshold, model.config.output_hidden_states = thresholds, flag
            classify = pipeline(task, model=model, tokenizer=tokenizer, device="cpu")
            results[flag] = classify(texts, batch_size=batch_size)
        assert [one["label"] for one in results[True]] == [one["label"] for one in results[False]]
        assert [one["score"] for one in results[True]] == pytest.approx([one["score"] for one in results[False]])


class TestDecoder:
    batch = collate_text(list(instructions(5, 1)))

    def stock(self, model, **options):
        twin = LlamaForCausalLM._from_config(model.config, attn_implementation=model.config._attn_implementation)
        twin.load_state_dict({name: one for name, one in model.state_dict().items() if not name.startswith("exit_")})
        return twin.eval()(**self.batch, output_hidden_states=True, **options)

    @pytest.mark.parametrize("options", [{}, {"output_all_exits": True}, {"exit_threshold": 1.0}])
    @torch.no_grad()
    def test_at_full_depth(self, options):
        model = tiny_llama(attn_implementation="eager").train(not options)
        expected = self.stock(model, output_attentions=True)
        output = model(**self.batch, output_hidden_states=True, output_attentions=True, **options)
        for name in ("hidden_states", "attentions"):
            assert len(output[name]) == len(expected[name])
            for left, right in zip(output[name], expected[name], strict=True):
                torch.testing.assert_close(left, right, **CLOSE)

    @torch.no_grad()
    def test_known_text(self):
        """Each token's state at its own exit gives its logits; behind that there is nothing."""
        model = tiny_llama(attn_implementation="eager")
        options = {"exit_threshold": 0.5, "output_hidden_states": True, "output_attentions": True}
        output = model(**self.batch, **options)
        layers = output.exit_layers
        assert len(layers.unique()) >= 3 and len(output.hidden_states) == 5 and len(output.attentions) == 4
        for layer in range(5):
            states = output.hidden_states[layer]
            assert torch.equal(states.isnan().all(-1), layers < layer) and torch.equal(
                states.isnan().any(-1), layers < layer
            )
            if layer:
                assert torch.equal(output.attentions[layer - 1].isnan().all(-1).all(1), layers < layer)
        for layer in range(1, 5):
            mine = layers == layer
            states = output.hidden_states[layer][mine]
            normed = states if layer == 4 else model.exit_norms(states, layer - 1)
            torch.testing.assert_close(model.lm_head(normed), output.logits[mine], **CLOSE)
