# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Every family whose inputs leave as a whole: texts and images."""

from __future__ import annotations

import itertools

import by_hand
import families
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from transformers_cee import load_exits


FAMILIES = families.of_kind("encoder", "image")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def sides(model_type):
    """Where padding may stand."""
    return ("right", "left") if families.kind_of(model_type) == "encoder" else ("none",)


BATCHES = [(model_type, side) for model_type in FAMILIES for side in sides(model_type)]


@torch.no_grad()
def compare(model, model_type, rows, walks, criterion, side):
    """Rows of a mixed batch against each row's own walk."""
    scores = [by_hand.scores(model, walk, criterion) for walk in walks]
    thresholds = by_hand.spreading(scores)
    assert by_hand.slack(scores, thresholds) > 1e-5, "a decision is too close for float32"
    exits = [by_hand.exit_index(mine, thresholds) for mine in scores]
    assert len(set(exits)) >= 3, f"rows leave at exits {set(exits)} only: the test would not see rows that leave"
    batch = families.batch(model_type, rows, side)
    output = model(**batch, exit_criterion=criterion, exit_threshold=thresholds)
    layers = by_hand.exit_layers(model.config)
    assert output.exit_layers.tolist() == [layers[index] for index in exits]
    for number, (walk, index) in enumerate(zip(walks, exits, strict=True)):
        torch.testing.assert_close(output.logits[number], walk.logits[index], **CLOSE)
        asked = min(index + 1, len(layers) - 1)
        given = output.exit_probabilities[number]
        torch.testing.assert_close(given[:asked], torch.tensor(scores[number][:asked]), **CLOSE)
        assert given[asked:].isnan().all(), f"row {number} was asked behind its exit"


@pytest.mark.parametrize(("model_type", "side"), BATCHES)
@torch.no_grad()
def test_rows_in_a_batch_are_rows_by_hand(model_type, side):
    """Internal exits from transformers' own model, one row at a time; the last one from ours, alone."""
    model = families.model(model_type, **families.POOLED[families.kind_of(model_type)])
    stock, rows = families.twin(model), families.rows(model_type, 12)
    walks = [by_hand.pooled_walk(model_type, model, stock, row) for row in rows]
    for walk, row in zip(walks, rows, strict=True):
        alone = by_hand.walk_alone(model, row)
        for ours, theirs in zip(alone.logits[:-1], walk.logits, strict=True):
            torch.testing.assert_close(ours, theirs, **CLOSE)
        for ours, theirs in zip(alone.states[:-1], walk.states, strict=True):
            torch.testing.assert_close(ours, theirs, **CLOSE)
        walk.logits.append(alone.logits[-1])
    for criterion in ("max_probability", "policy"):
        compare(model, model_type, rows, walks, criterion, side)


@pytest.mark.parametrize("model_type", families.of_kind("encoder"))
@torch.no_grad()
def test_internal_mean_leaves_the_last_exit_to_the_stock_head(model_type):
    model = families.model(model_type, exit_pooling="internal_mean")
    stock, rows = families.twin(model), families.rows(model_type, 4)
    output = model(**families.batch(model_type, rows), output_all_exits=True)
    for number, row in enumerate(rows):
        walk = by_hand.pooled_walk(model_type, model, stock, row)
        torch.testing.assert_close(output.all_exit_states[number, :-1], torch.stack(walk.states), **CLOSE)
        torch.testing.assert_close(output.all_exit_logits[number, :-1], torch.stack(walk.logits), **CLOSE)
        torch.testing.assert_close(output.logits[number], stock(**row).logits[0], **CLOSE)


@pytest.mark.parametrize(("model_type", "side"), BATCHES)
@torch.no_grad()
def test_rows_in_a_batch_are_rows_alone(model_type, side):
    """As a stock checkpoint is loaded: the last exit is the stock model's."""
    model = families.model(model_type, exit_layers=[1, 3])
    stock, rows = families.twin(model), families.rows(model_type, 12, seed=2)
    walks = [by_hand.walk_alone(model, row) for row in rows]
    for walk, row in zip(walks, rows, strict=True):
        torch.testing.assert_close(walk.logits[-1], stock(**row).logits[0], **CLOSE)
    compare(model, model_type, rows, walks, "max_probability", side)


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_rows_that_left_are_gone(model_type):
    model, rows, seen = families.model(model_type), families.rows(model_type, 12), []
    for layer in families.layers(model):
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    walks = [by_hand.walk_alone(model, row) for row in rows]
    thresholds = by_hand.spreading([by_hand.scores(model, walk, "policy") for walk in walks])
    seen.clear()
    output = model(**families.batch(model_type, rows), exit_threshold=thresholds)
    last = max(output.exit_layers.tolist())
    assert seen == [int((output.exit_layers >= layer).sum()) for layer in range(1, last + 1)]
    assert len(set(seen)) >= 3
    seen.clear()
    assert model(**families.batch(model_type, rows), exit_threshold=0.0).exit_layers.unique().tolist() == [1]
    assert seen == [12], "layers behind the exit of all have run"


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_full_depth_is_the_stock_model(model_type, tmp_path, record_property):
    stock = families.stock_model(model_type, seed=3)
    stock.save_pretrained(tmp_path)
    model, info = families.classes(model_type)[1].from_pretrained(tmp_path, output_loading_info=True)
    model.eval()
    assert all(name.startswith("exit_") for name in info["missing_keys"])
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    rows = families.rows(model_type, 6)
    inputs = [families.batch(model_type, rows), rows[0]]
    difference = 0.0
    for given in inputs:
        expected = stock(**given).logits
        for options in ({}, {"exit_threshold": 1.0}, {"output_all_exits": True}):
            output = model(**given, **options)
            assert output.exit_layers.tolist() == [model.config.num_hidden_layers] * len(expected)
            difference = max(difference, float((output.logits - expected).abs().max()))
    record_property("difference", difference)
    assert difference <= 1e-6
    labels = torch.arange(6) % 3
    torch.testing.assert_close(model(**inputs[0], labels=labels).loss, stock(**inputs[0], labels=labels).loss)
    if families.FAMILIES[model_type].layers is None:
        # Otherwise the stock model records something else than layers.
        recorded = model(**inputs[0], output_hidden_states=True).hidden_states
        for ours, theirs in zip(recorded, stock(**inputs[0], output_hidden_states=True).hidden_states, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


TEXTS = [
    (model_type, pooling) for model_type in families.of_kind("encoder") for pooling in ("cls", "mean", "internal_mean")
]


@pytest.mark.parametrize(("model_type", "pooling"), TEXTS)
@torch.no_grad()
def test_exits_alone_come_back(model_type, pooling, tmp_path):
    """By name and around a stock model, which goes on as it was; with other labels than the base has, too."""
    model_class, stock = families.classes(model_type)[1], families.stock_model(model_type)
    inputs = families.batch(model_type, families.rows(model_type, 6))
    stock.save_pretrained(tmp_path / "base")
    for labels in (3, 5):
        folder = tmp_path / f"exits-{labels}"
        model = model_class.from_pretrained(
            tmp_path / "base", exit_pooling=pooling, num_labels=labels, ignore_mismatched_sizes=True
        )
        expected = model.eval()(**inputs, output_all_exits=True).all_exit_logits
        model.save_exits(folder)
        loaded = type(stock).from_pretrained(tmp_path / "base").eval()
        for again in (model_class.from_pretrained(folder), load_exits(loaded, folder)):
            found = again.eval()(**inputs, output_all_exits=True).all_exit_logits
            assert found.shape[-1] == labels and torch.equal(found, expected)
        if pooling != "mean":
            # Otherwise a pooler that exits do not use has been taken away.
            torch.testing.assert_close(loaded(**inputs).logits, stock(**inputs).logits)


@pytest.mark.parametrize("model_type", families.of_kind("encoder"))
@torch.no_grad()
def test_layers_cost_what_the_stock_models_compute(model_type):
    """What runs between two layers counts with the one before it."""
    model, length = families.model(model_type), 9
    stock, counter, behind = families.twin(model), FlopCounterMode(display=False), []
    if stock._supports_sdpa:
        # Of the products of fused attention torch may count none.
        stock.set_attn_implementation("eager")
    stock_layers = families.layers(stock)
    for layer in stock_layers:
        layer.register_forward_pre_hook(lambda *_: behind.append(counter.get_total_flops()))
    stock_layers[-1].register_forward_hook(lambda *_: behind.append(counter.get_total_flops()))
    with counter:
        stock(**families.rows(model_type, 1, lengths=(length,))[0])
    counted = [after - before for before, after in itertools.pairwise(behind)]
    assert model.item_flops(length).layers == pytest.approx(counted, rel=0.01)
