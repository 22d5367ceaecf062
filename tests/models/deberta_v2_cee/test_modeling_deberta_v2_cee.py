# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What only DeBERTa has: attention by distance, a convolution behind the first layer, and nothing that records."""

import by_hand
import families
import pytest
import torch
from safetensors.torch import save_file

from transformers_cee import DebertaV2CeeModel, DebertaV2ForConsistentEE


CLOSE = {"rtol": 1e-4, "atol": 1e-4}
MODEL_TYPE = "deberta_v2_cee"
KINDS = {
    "v3": {"conv_kernel_size": 0},
    "keys of their own": {"share_att_key": False, "norm_rel_ebd": "none"},
    "content to position alone": {"pos_att_type": "c2p", "position_buckets": -1, "max_relative_positions": 6},
    "no distances": {"relative_attention": False, "pos_att_type": None, "position_biased_input": True},
    "positions and token types": {"position_biased_input": True, "type_vocab_size": 2, "embedding_size": 16},
}
# Distances beyond the buckets that hold one each.
LENGTHS = (20, 9, 20, 4, 13, 20, 7, 26, 2, 20, 11, 20)


def leaving(model, rows, side):
    """The walks of rows alone, and the output of a batch that they leave at thresholds of their middle."""
    walks = [by_hand.walk_alone(model, row) for row in rows]
    scores = [by_hand.scores(model, walk, "max_probability") for walk in walks]
    thresholds = by_hand.spreading(scores)
    assert by_hand.slack(scores, thresholds) > 1e-5
    options = {"exit_criterion": "max_probability", "exit_threshold": thresholds}
    output = model(
        **families.batch(MODEL_TYPE, rows, side), **options, output_hidden_states=True, output_attentions=True
    )
    assert len(output.exit_layers.unique()) >= 3
    return walks, output


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", list(KINDS))
@torch.no_grad()
def test_rows_leave_whatever_attention_looks_at(kind, side):
    model = families.model(MODEL_TYPE, **KINDS[kind])
    rows = families.rows(MODEL_TYPE, 12, seed=7, lengths=LENGTHS)
    walks, output = leaving(model, rows, side)
    stock = families.stock_model(MODEL_TYPE, **KINDS[kind])
    stock.load_state_dict({name: value for name, value in model.state_dict().items() if "exit_" not in name})
    for number, (walk, row) in enumerate(zip(walks, rows, strict=True)):
        torch.testing.assert_close(output.logits[number], walk.logits[int(output.exit_layers[number]) - 1], **CLOSE)
        torch.testing.assert_close(walk.logits[-1], stock(**row).logits[0], **CLOSE)


@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_recorded(side):
    """States, of which those of layer 1 have been through the convolution, and attentions: of the layers that ran."""
    model = families.model(MODEL_TYPE)
    stock = families.twin(model)
    rows = families.rows(MODEL_TYPE, 12, seed=7, lengths=LENGTHS)
    _, output = leaving(model, rows, side)
    mask = families.batch(MODEL_TYPE, rows, side)["attention_mask"].bool()
    assert (len(output.hidden_states), len(output.attentions)) == (5, 4)
    for number, row in enumerate(rows):
        alone = stock(**row, output_hidden_states=True, output_attentions=True)
        columns, leaves = mask[number], int(output.exit_layers[number])
        for layer in range(5):
            found = output.hidden_states[layer][number]
            if layer > leaves:
                assert found.isnan().all() and output.attentions[layer - 1][number].isnan().all()
                continue
            torch.testing.assert_close(found[columns], alone.hidden_states[layer][0], **CLOSE)
            if layer:
                weights = output.attentions[layer - 1][number][:, columns]
                torch.testing.assert_close(weights[:, :, columns], alone.attentions[layer - 1][0], **CLOSE)
                assert not weights[:, :, ~columns].any()


@pytest.mark.parametrize("options", [{}, {"output_all_exits": True}])
@torch.no_grad()
def test_what_the_config_records(options):
    model = families.model(MODEL_TYPE, output_attentions=True)
    stock, row = families.twin(model), families.rows(MODEL_TYPE, 1)[0]
    expected, output = stock(**row, output_attentions=True).attentions, model(**row, **options)
    assert output.hidden_states is None
    for ours, theirs in zip(output.attentions, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@torch.no_grad()
def test_weights_that_nobody_uses_are_passed_over(tmp_path):
    """Published checkpoints hold positions that the config switches off, and heads of their pretraining."""
    stock = families.stock_model(MODEL_TYPE)
    stock.save_pretrained(tmp_path)
    weights = dict(stock.state_dict())
    weights["deberta.embeddings.position_embeddings.weight"] = torch.zeros(64, 32)
    weights["mask_predictions.dense.weight"] = torch.zeros(32, 32)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for load in (DebertaV2ForConsistentEE, DebertaV2CeeModel):
        model, info = load.from_pretrained(tmp_path, output_loading_info=True)
        assert all("exit_" in name for name in info["missing_keys"])
        assert not any("position_embeddings" in name for name in info["unexpected_keys"])
        body = model.base_model
        name = "encoder.layer.1.attention.self.query_proj.weight"
        assert torch.equal(body.state_dict()[name], stock.get_parameter(f"deberta.{name}"))


def test_a_pooler_of_another_size_is_refused():
    message = r"`pooler_hidden_size`=16 .* accepted is `hidden_size`=32, or `exit_pooling`='mean'"
    with pytest.raises(ValueError, match=message):
        families.model(MODEL_TYPE, pooler_hidden_size=16)
    assert families.model(MODEL_TYPE, pooler_hidden_size=16, exit_pooling="mean").classifier.in_features == 32
