# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Every family of encoders on an engine, in float32: logits, states and walks are those of the model."""

from __future__ import annotations

import families
import pytest
import torch


# Between two exits lies more than one layer; of ModernBERT's, layers 2 and 3 see a window of four tokens.
EXITS = [1, 3]
SIZES = {"cls": {"num_hidden_layers": 4, "exit_layers": EXITS}, "mean": {"num_hidden_layers": 2}}
SIZES["internal_mean"] = SIZES["mean"]
# Longer than the examples that graphs are traced with, and more rows; the longest is alone in its length.
LENGTHS = (30, 3, 12, 2, 9, 7)
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


PAIRS = [(name, pooling) for name in families.of_kind("encoder") for pooling in SIZES]


def _once(pair):
    """Each family runs by default with the pooling of its stock head; the others take as long again."""
    return pytest.param(pair, id="-".join(pair), marks=[] if pair[1] == "cls" else [pytest.mark.slow])


@pytest.fixture(scope="module", params=[_once(pair) for pair in PAIRS])
def pair(request, tmp_path_factory):
    """Model type, model and exported model."""
    model_type, pooling = request.param
    fields = dict(SIZES[pooling])
    if model_type == "distilbert_cee":
        fields["n_layers"] = fields.pop("num_hidden_layers")
    model = families.model(model_type, exit_pooling=pooling, **fields)
    folder = tmp_path_factory.mktemp("exported") / "model"
    return model_type, model, model.export(folder, engine="openvino", precision="float32")


def same_everywhere(exported, model, **batch):
    mine, theirs = exported(**batch, output_all_exits=True), model(**batch, output_all_exits=True)
    torch.testing.assert_close(mine.all_exit_logits, theirs.all_exit_logits, **TOLERANCE)
    torch.testing.assert_close(mine.all_exit_states, theirs.all_exit_states, **TOLERANCE)


def scores_of(model, batch):
    """Scores (rows, internal exits) of the policy, of all rows at all exits."""
    return model(**batch, exit_threshold=0.999999).exit_probabilities[:, :-1]


def middle(scores):
    """A threshold far from all scores (rows,): in the widest gap between two."""
    ordered = scores.sort().values
    place = int(ordered.diff().argmax())
    return float(ordered[place : place + 2].mean())


@torch.no_grad()
def test_all_exits_are_the_models(pair):
    model_type, model, exported = pair
    for side in ("right", "left"):
        for lengths in (LENGTHS, (4, 1), (8, 8, 5)):
            rows = families.rows(model_type, len(lengths), lengths=lengths)
            same_everywhere(exported, model, **families.batch(model_type, rows, side))
    ids = families.batch(model_type, families.rows(model_type, 3, lengths=(17,) * 3))["input_ids"]
    same_everywhere(exported, model, input_ids=ids)


@torch.no_grad()
def test_rows_leave_at_the_models_layers(pair):
    model_type, model, exported = pair
    rows = families.rows(model_type, len(LENGTHS), lengths=LENGTHS)
    for side in ("right", "left"):
        batch = families.batch(model_type, rows, side)
        threshold = [*(middle(column) for column in scores_of(model, batch).T), 1.0]
        mine, theirs = exported(**batch, exit_threshold=threshold), model(**batch, exit_threshold=threshold)
        assert len(theirs.exit_layers.unique()) > 1
        assert mine.exit_layers.tolist() == theirs.exit_layers.tolist()
        torch.testing.assert_close(mine.logits, theirs.logits, **TOLERANCE)


@torch.no_grad()
def test_the_longest_row_leaves_and_its_columns_with_it(pair):
    model_type, model, exported = pair
    drawn = families.rows(model_type, 14, lengths=(28, 29, 30, 31, 32, 33, 3, 5, 4, 6, 2, 7, 5, 3))
    first = torch.cat([scores_of(model, families.batch(model_type, [row]))[:, 0] for row in drawn])
    longest = int(first[:6].argmax())
    shorter = [place for place in range(6, len(drawn)) if first[place] < first[longest] - 1e-3]
    assert len(shorter) > 1
    threshold = float(first[longest] + first[shorter].max()) / 2
    batch = families.batch(model_type, [drawn[place] for place in (longest, *shorter)])
    asked = {"exit_threshold": [threshold, *[1.0] * (len(model.layer_numbers) - 1)]}
    mine, theirs = exported(**batch, **asked), model(**batch, **asked)
    assert theirs.exit_layers.tolist() == [1] + [model.layer_numbers[-1]] * len(shorter)
    assert mine.exit_layers.tolist() == theirs.exit_layers.tolist()
    torch.testing.assert_close(mine.logits, theirs.logits, **TOLERANCE)
