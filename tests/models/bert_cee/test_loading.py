# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""From stock BERT checkpoints to ours and back from disk; with exits off, the stock model's logits bit for bit."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import VOCABULARY, pad, random_rows, tiny_config, tiny_model, weights
from transformers import BertConfig, BertForSequenceClassification, BertModel

from transformers_cee import BertCeeConfig, BertForConsistentEE


def stock_config(**fields):
    return BertConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "max_position_embeddings": 48,
            "num_labels": 3,
            "initializer_range": 0.2,
            "id2label": {0: "no", 1: "perhaps", 2: "yes"},
            "label2id": {"no": 0, "perhaps": 1, "yes": 2},
            **fields,
        }
    )


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A stock classifier and the folder it was saved in."""
    torch.manual_seed(3)
    model = BertForSequenceClassification(stock_config()).eval()
    torch.nn.init.normal_(model.classifier.bias)
    folder = tmp_path_factory.mktemp("stock")
    model.save_pretrained(folder)
    return model, folder


class TestStockClassifier:
    def test_classifier_and_pooler_come_from_the_checkpoint(self, stock):
        model, folder = stock
        ours, info = BertForConsistentEE.from_pretrained(folder, output_loading_info=True)
        loaded = ours.state_dict()
        for name, value in model.state_dict().items():
            assert torch.equal(loaded[name], value), name
        assert all(name.startswith(("exit_heads.", "exit_policies.")) for name in info["missing_keys"])
        assert not info["unexpected_keys"] and not info["mismatched_keys"]
        assert ours.config.id2label == {0: "no", 1: "perhaps", 2: "yes"}

    @torch.no_grad()
    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    @pytest.mark.parametrize("padded", ["no mask", "mask of ones", "right", "left"])
    def test_exits_off_is_the_stock_model(self, stock, padded, implementation):
        model, folder = stock
        model = BertForSequenceClassification.from_pretrained(folder, attn_implementation=implementation).eval()
        ours = BertForConsistentEE.from_pretrained(folder, attn_implementation=implementation).eval()
        rows = (
            random_rows(6, seed=1, pairs=True) if padded in ("right", "left") else random_rows(6, 1, 8, 8, pairs=True)
        )
        batch = pad(rows, "left" if padded == "left" else "right")
        if padded == "no mask":
            del batch["attention_mask"]
        if padded == "left":
            # The stock model takes its first column for [CLS] and counts positions from there. Rows that begin in
            # column 0 do so in both models.
            batch = {name: torch.cat((value[:, -1:], value), 1) for name, value in batch.items()}
            batch["attention_mask"][:, 0] = 1
        for inputs in (batch, {**batch, "labels": torch.arange(6) % 3}):
            expected = model(**inputs)
            for options in (
                {"exit_threshold": 1.0},
                {"exit_criterion": "entropy", "exit_threshold": 0.0},
                {"exit_criterion": "patience", "exit_threshold": 4},
                {"output_all_exits": True},
            ):
                output = ours(**inputs, **options)
                torch.testing.assert_close(output.logits, expected.logits)
                assert output.exit_layers.tolist() == [4] * 6
        torch.testing.assert_close(output.loss, expected.loss)
        states = ours(**batch, exit_threshold=1.0, output_hidden_states=True).hidden_states
        for ours_state, state in zip(states, model(**batch, output_hidden_states=True).hidden_states, strict=True):
            assert torch.equal(ours_state, state)

    @torch.no_grad()
    def test_position_ids_are_taken(self, stock):
        model, folder = stock
        ours = BertForConsistentEE.from_pretrained(folder).eval()
        batch = pad(random_rows(5, seed=4), "left")
        batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None].flip(1)
        hidden = model.bert(**batch).last_hidden_state
        first = batch["attention_mask"].argmax(1)
        state = model.bert.pooler(hidden[torch.arange(5), first][:, None])
        torch.testing.assert_close(ours(**batch, exit_threshold=1.0).logits, model.classifier(state))

    def test_mean_pooling_drops_the_pooler(self, stock):
        model, folder = stock
        ours = BertForConsistentEE.from_pretrained(folder, exit_pooling="mean", exit_layers=2, exit_norm="layer_norm")
        assert ours.bert.pooler is None
        assert torch.equal(ours.classifier.weight, model.classifier.weight)
        assert ours.config.exit_layer_numbers == [2, 4]

    def test_other_number_of_labels(self, stock):
        ours = BertForConsistentEE.from_pretrained(stock[1], num_labels=5, ignore_mismatched_sizes=True)
        assert ours(torch.tensor([[5, 6]])).logits.shape == (1, 5)


class TestStockBackbone:
    def test_loads(self, tmp_path):
        torch.manual_seed(4)
        model = BertModel(stock_config()).eval()
        model.save_pretrained(tmp_path)
        ours, info = BertForConsistentEE.from_pretrained(tmp_path, num_labels=2, output_loading_info=True)
        assert torch.equal(ours.bert.pooler.dense.weight, model.pooler.dense.weight)
        for name, value in model.state_dict().items():
            assert torch.equal(ours.bert.state_dict()[name], value), name
        expected = ("exit_heads.", "exit_policies.", "classifier.")
        assert {name.split(".")[0] + "." for name in info["missing_keys"]} == set(expected)
        batch = pad(random_rows(3, seed=1))
        with torch.no_grad():
            pooled = model(**batch).pooler_output
            output = ours.eval()(**batch, exit_threshold=1.0, output_all_exits=True)
        torch.testing.assert_close(output.all_exit_states[:, -1], pooled)

    def test_new_parts_are_initialised(self, tmp_path):
        """As the config says, and not left as memory was."""
        BertModel(stock_config()).save_pretrained(tmp_path)
        ours = BertForConsistentEE.from_pretrained(tmp_path, exit_norm="layer_norm")
        for name, parameter in ours.named_parameters():
            if name.startswith(("exit_heads", "exit_policies", "classifier")):
                if name.endswith("bias"):
                    assert not parameter.any(), name
                else:
                    assert 0.1 < float(parameter.detach().std()) < 0.3, name
            elif name.startswith("exit_norms"):
                assert bool((parameter == (0 if name.endswith("bias") else 1)).all()), name


class TestOwnCheckpoints:
    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"exit_layers": [2, 3], "exit_pooling": "mean", "exit_norm": "layer_norm", "policy_inputs": "both"},
            {
                "exit_layers": 3,
                "exit_threshold": [0.25, 0.5],
                "exit_criterion": "entropy",
                "policy_inputs": "confidence",
                "policy_hidden_size": 5,
                "policy_activation": "relu",
                "reward_alpha": 0.3,
            },
            {"num_labels": 1, "exit_threshold": 0.25},
        ],
    )
    @torch.no_grad()
    def test_round_trip(self, tmp_path, fields):
        model = tiny_model(**fields)
        model.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        assert saved["model_type"] == "bert_cee"
        assert saved["architectures"] == ["BertForConsistentEE"]
        for name, value in fields.items():
            if name != "num_labels":
                assert saved[name] == value, name
        again, info = BertForConsistentEE.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        left, right = weights(model), weights(again)
        assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
        for name, value in fields.items():
            assert getattr(again.config, name) == value
        batch = pad(random_rows(8, seed=1))
        first, second = model(**batch), again.eval()(**batch)
        # Not bit for bit: loaded weights may lie at other addresses, and sums are then vectorised in another order.
        torch.testing.assert_close(first.logits, second.logits, rtol=1e-5, atol=1e-6)
        assert torch.equal(first.exit_layers, second.exit_layers)

    def test_reload_with_another_threshold(self, tmp_path):
        tiny_model().save_pretrained(tmp_path)
        model = BertForConsistentEE.from_pretrained(tmp_path, exit_threshold=0.0)
        assert model(torch.tensor([[5, 6]])).exit_layers.tolist() == [1]

    @pytest.mark.parametrize(
        "field,value",
        [("exit_threshold", 1.5), ("exit_pooling", "max"), ("exit_layers", [9]), ("exit_criterion", "hope")],
    )
    def test_fields_given_on_loading_are_checked(self, tmp_path, field, value):
        tiny_model().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=field):
            BertForConsistentEE.from_pretrained(tmp_path, **{field: value})


class TestConfig:
    def test_defaults(self):
        config = BertCeeConfig()
        assert config.exit_layers is None and config.exit_layer_numbers == list(range(1, 13))
        assert (config.exit_criterion, config.exit_threshold) == ("policy", None)
        assert (config.exit_pooling, config.exit_norm) == ("cls", "none")
        assert (config.policy_hidden_size, config.policy_activation, config.policy_inputs) == (32, "gelu", "state")
        assert config.model_type == "bert_cee"

    @pytest.mark.parametrize(
        "exit_layers,expected",
        [
            (None, [1, 2, 3, 4, 5, 6]),
            (1, [1, 2, 3, 4, 5, 6]),
            (2, [2, 4, 6]),
            (4, [2, 6]),
            (5, [1, 6]),
            (6, [6]),
            ([1, 3], [1, 3, 6]),
            ([6], [6]),
            ([], [6]),
            ([5, 2, 2], [2, 5, 6]),
        ],
    )
    def test_exit_layers(self, exit_layers, expected):
        assert tiny_config(exit_layers=exit_layers).exit_layer_numbers == expected
