# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What only ModernBERT has: a window, two poolings, and a head that other tasks share."""

import by_hand
import families
import pytest
import torch
from transformers import AttentionInterface, ModernBertForMaskedLM
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from transformers_cee import ModernBertForConsistentEE


CLOSE = {"rtol": 1e-4, "atol": 1e-4}
MODEL_TYPE = "modernbert_cee"


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layer", [1, 2, 3])
@torch.no_grad()
def test_texts_longer_than_the_window(layer, attention, side):
    """Short rows leave and long ones stay: first the padding goes, and then, where all that is left is equally long,
    the mask of whole texts; far tokens stay hidden."""
    model = families.model(MODEL_TYPE, attn_implementation=attention)
    rows = families.rows(MODEL_TYPE, 24, seed=5, lengths=(20,) * 8 + (6, 9, 14, 17) * 4)
    walks = [by_hand.walk_alone(model, row) for row in rows]
    scores = [by_hand.scores(model, walk, "max_probability")[layer - 1] for walk in walks]
    thresholds = [1.0] * 4
    thresholds[layer - 1] = sum(sorted(scores[:8])[3:5]) / 2
    picked = [number for number in range(24) if number < 8 or scores[number] > thresholds[layer - 1]]
    batch = families.batch(MODEL_TYPE, [rows[number] for number in picked], side)
    output = model(**batch, exit_criterion="max_probability", exit_threshold=thresholds)
    stay = [row for row, number in enumerate(picked) if scores[number] <= thresholds[layer - 1]]
    assert len(stay) == 4 and len(picked) > 10
    assert output.exit_layers.tolist() == [4 if row in stay else layer for row in range(len(picked))]
    for row, number in enumerate(picked):
        expected = walks[number].logits[3 if row in stay else layer - 1]
        torch.testing.assert_close(output.logits[row], expected, **CLOSE)


def attention_with_row_masks(module, query, key, value, attention_mask, sliding_window=None, scaling=1.0, **kwargs):
    """Attention that takes masks as flash attention does, (rows, keys) or none, and a window that holds its ends."""
    scores = (query @ key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        assert attention_mask.shape == (len(query), key.shape[2])
        scores = scores.masked_fill(~attention_mask.bool()[:, None, None], -1e9)
    if sliding_window is not None:
        columns = torch.arange(key.shape[2])
        scores = scores.masked_fill((columns[:, None] - columns).abs() > sliding_window - 1, -1e9)
    return (scores.softmax(-1) @ value).transpose(1, 2), None


@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_masks_of_flash_attention_follow_the_rows(side):
    AttentionInterface.register("window_flash", attention_with_row_masks)
    AttentionMaskInterface.register("window_flash", flash_attention_mask)
    model = families.model(MODEL_TYPE)
    rows = families.rows(MODEL_TYPE, 12, seed=6, lengths=(20, 9, 14) * 4)
    walks = [by_hand.walk_alone(model, row) for row in rows]
    thresholds = by_hand.spreading([by_hand.scores(model, walk, "policy") for walk in walks])
    model.config._attn_implementation = "window_flash"
    output = model(**families.batch(MODEL_TYPE, rows, side), exit_threshold=thresholds)
    assert len(output.exit_layers.unique()) >= 3
    for number, walk in enumerate(walks):
        torch.testing.assert_close(output.logits[number], walk.logits[int(output.exit_layers[number]) - 1], **CLOSE)


@pytest.mark.parametrize("exit_pooling", ["cls", "mean"])
@pytest.mark.parametrize("classifier_pooling", ["cls", "mean"])
@torch.no_grad()
def test_the_last_exit_pools_as_the_stock_model(classifier_pooling, exit_pooling):
    model = families.model(MODEL_TYPE, classifier_pooling=classifier_pooling, exit_pooling=exit_pooling)
    stock = families.stock_model(MODEL_TYPE, classifier_pooling=classifier_pooling)
    stock.load_state_dict({name: value for name, value in model.state_dict().items() if "exit_" not in name})
    batch = families.batch(MODEL_TYPE, families.rows(MODEL_TYPE, 6))
    expected = stock(**batch, output_hidden_states=True)
    output = model(**batch, output_all_exits=True)
    assert (output.logits - expected.logits).abs().max() <= 1e-6
    for layer in (1, 2, 3):
        normed, mask = stock.model.final_norm(expected.hidden_states[layer]), batch["attention_mask"].unsqueeze(-1)
        by_hand = stock.head(normed[:, 0]) if exit_pooling == "cls" else (normed * mask).sum(1) / mask.sum(1)
        torch.testing.assert_close(output.all_exit_states[:, layer - 1], by_hand, **CLOSE)


@torch.no_grad()
def test_the_head_of_a_language_model_is_kept(tmp_path):
    torch.manual_seed(0)
    stock = ModernBertForMaskedLM(families.stock_config(MODEL_TYPE))
    stock.save_pretrained(tmp_path)
    model, info = ModernBertForConsistentEE.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["mismatched_keys"]
    assert {name.split(".")[0] for name in info["missing_keys"]} == {"classifier", "exit_heads", "exit_policies"}
    assert torch.equal(model.head.dense.weight, stock.head.dense.weight)
