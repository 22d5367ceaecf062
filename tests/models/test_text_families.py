# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""RoBERTa, XLM-R, ELECTRA, DistilBERT and MPNet: positions, heads and checkpoints of other tasks, against
transformers' own models."""

from __future__ import annotations

import importlib

import families
import pytest
import torch
from transformers import AutoModelForMaskedLM

from transformers_cee.families import MODELS


COUNTED = ["roberta_cee", "xlm_roberta_cee", "mpnet_cee"]
DENSE = [*COUNTED, "electra_cee"]
ALL = [*DENSE, "distilbert_cee"]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
PAD = 1


def both(model_type, **fields):
    """Our model and transformers' own with its weights."""
    model = families.model(model_type, **fields)
    return model, families.twin(model)


def body_class(model_type):
    module, _, name = MODELS[model_type].base.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("model_type", COUNTED)
@torch.no_grad()
def test_positions_are_those_of_the_stock_model(model_type):
    """Whatever is masked or not: tokens that look like padding within a text, and masked tokens behind its first."""
    model, stock = both(model_type)
    ids = torch.randint(3, families.VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(0))
    ids[0, 3:5] = PAD
    ids[1, 6:] = PAD
    mask = (ids != PAD).long()
    hidden = torch.ones_like(mask)
    hidden[2, 2:4] = 0
    for given in ({}, {"attention_mask": torch.ones_like(mask)}, {"attention_mask": mask}, {"attention_mask": hidden}):
        torch.testing.assert_close(model(ids, **given).logits, stock(ids, **given).logits, **CLOSE)
    embeds = model.get_input_embeddings()(ids)
    for given in ({}, {"attention_mask": hidden}, {"position_ids": torch.arange(8)[None] + 5}):
        torch.testing.assert_close(
            model(inputs_embeds=embeds, **given).logits, stock(inputs_embeds=embeds, **given).logits, **CLOSE
        )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_type", COUNTED)
@torch.no_grad()
def test_padding_of_any_id_and_of_embeddings_leaves_rows_alone(model_type, side):
    """There the stock model counts the padding, and so gives other logits than without it."""
    model, stock = both(model_type)
    rows = families.rows(model_type, 4, lengths=(9, 3, 6, 1))
    alone = torch.cat([stock(**row).logits for row in rows])
    batch = families.batch(model_type, rows, side)
    foreign = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 7)
    mask = batch["attention_mask"]
    for given in ({"input_ids": foreign}, {"inputs_embeds": model.get_input_embeddings()(foreign)}):
        torch.testing.assert_close(model(**given, attention_mask=mask).logits, alone, **CLOSE)
        early = model(**given, attention_mask=mask, exit_threshold=[0.0, 1.0, 1.0, 1.0])
        expected = torch.cat([model(**row, exit_threshold=[0.0, 1.0, 1.0, 1.0]).logits for row in rows])
        torch.testing.assert_close(early.logits, expected, **CLOSE)


@pytest.mark.parametrize("model_type", ALL)
@torch.no_grad()
def test_under_mean_pooling_only_the_last_linear_layer_is_used(model_type, tmp_path):
    families.stock_model(model_type).save_pretrained(tmp_path / "stock")
    model, info = families.classes(model_type)[1].from_pretrained(
        tmp_path / "stock", exit_pooling="mean", output_loading_info=True
    )
    model.eval()
    assert not any("dense" in name for name in model.state_dict() if name.startswith("classifier"))
    assert not any(name.startswith("pre_classifier") for name in model.state_dict())
    assert all(name.startswith("exit_") for name in info["missing_keys"]) and not info["mismatched_keys"]
    last = model.classifier if model_type == "distilbert_cee" else model.classifier.out_proj
    (row,) = families.rows(model_type, 1)
    states = model.body(**row).last_hidden_state
    torch.testing.assert_close(model(**row).logits, last(states.mean(1)), **CLOSE)
    model.save_pretrained(tmp_path / "ours")
    again, info = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(again.eval()(**row).logits, model(**row).logits)


@pytest.mark.parametrize("model_type", ALL)
@torch.no_grad()
def test_exits_share_the_head_in_front_of_its_last_layer(model_type):
    """An exit state is what the stock head makes of the first token behind the exit's layer."""
    model, stock = both(model_type)
    (row,) = families.rows(model_type, 1)
    behind = stock(**row, output_hidden_states=True).hidden_states
    head = stock.classifier
    states = model(**row, output_all_exits=True).all_exit_states[0]
    for number, state in enumerate(states, start=1):
        first = behind[number][0, 0]
        if model_type == "distilbert_cee":
            expected = stock.pre_classifier(first).clamp_min(0)
        elif model_type == "electra_cee":
            expected = torch.nn.functional.gelu(head.dense(first))
        else:
            expected = torch.tanh(head.dense(first))
        torch.testing.assert_close(state, expected, **CLOSE)


@pytest.mark.parametrize("model_type", ["distilbert_cee", "mpnet_cee"])
@torch.no_grad()
def test_families_without_token_types_take_no_notice_of_them(model_type):
    model = families.model(model_type)
    (row,) = families.rows(model_type, 1)
    types = torch.ones_like(row["input_ids"])
    assert torch.equal(model(**row, token_type_ids=types).logits, model(**row).logits)


@pytest.mark.parametrize("model_type", ALL)
@torch.no_grad()
def test_checkpoints_of_a_language_model_have_a_new_head(model_type, tmp_path, caplog):
    """A pretrained encoder: its layers are loaded, its own head is left, and what is new is said."""
    torch.manual_seed(0)
    pretrained = AutoModelForMaskedLM.from_config(families.stock_config(model_type)).eval()
    pretrained.save_pretrained(tmp_path)
    model, info = families.classes(model_type)[1].from_pretrained(tmp_path, output_loading_info=True)
    assert {name.split(".")[0] for name in info["missing_keys"]} >= {"classifier", "exit_heads"}
    assert all(name.startswith(("exit_", "classifier", "pre_classifier")) for name in info["missing_keys"])
    (said,) = [record.message for record in caplog.records if "untrained are" in record.message]
    assert "heads and policies of exits after layers 1 to 3" in said and "`classifier" in said
    (row,) = families.rows(model_type, 1)
    ours, theirs = (one.base_model(**row).last_hidden_state for one in (model.eval(), pretrained))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("model_type", ALL)
@torch.no_grad()
def test_the_body_alone(model_type, tmp_path):
    model = families.model(model_type)
    model.save_pretrained(tmp_path)
    body, info = body_class(model_type).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    (row,) = families.rows(model_type, 1)
    last = model(**row, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(body.eval()(**row).last_hidden_state, last, rtol=0, atol=1e-6)
    with pytest.raises(TypeError, match="exit_threshold"):
        body(**row, exit_threshold=0.5)


@torch.no_grad()
def test_mpnet_records_what_the_stock_model_records():
    """Its layers give tuples and have no hooks; rows that left are NaN behind their exit."""
    model, stock = both("mpnet_cee")
    batch = families.batch("mpnet_cee", families.rows("mpnet_cee", 4, lengths=(9, 3, 6, 4)), "left")
    asked = {"output_attentions": True, "output_hidden_states": True}
    expected = stock(**batch, **asked)
    for given in (model(**batch, **asked), model(**batch, output_all_exits=True, **asked)):
        for name in ("attentions", "hidden_states"):
            for ours, theirs in zip(given[name], expected[name], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    score = model(**batch, exit_threshold=0.0).exit_probabilities[:, 0]
    half = float(score.sort().values[1:3].mean())
    early = model(**batch, exit_threshold=[half, 1.0, 1.0, 1.0], **asked)
    gone = early.exit_layers == 1
    assert gone.sum() == 2
    for ours, theirs in zip(early.attentions[1:], expected.attentions[1:], strict=True):
        assert ours[gone].isnan().all()
        # Columns of padding that nobody needs any more are cut off, and stand there as 0.
        real = batch["attention_mask"][~gone].bool()
        for row, (mine, one) in enumerate(zip(ours[~gone], theirs[~gone], strict=True)):
            torch.testing.assert_close(mine[:, real[row]], one[:, real[row]], rtol=0, atol=1e-5)


@torch.no_grad()
def test_electra_without_a_projection():
    model = families.model("electra_cee", embedding_size=32)
    stock = families.stock_model("electra_cee", embedding_size=32)
    stock.load_state_dict({name: one for name, one in model.state_dict().items() if not name.startswith("exit_")})
    assert not hasattr(model.electra, "embeddings_project")
    (row,) = families.rows("electra_cee", 1)
    torch.testing.assert_close(model(**row).logits, stock(**row).logits, rtol=0, atol=1e-6)
