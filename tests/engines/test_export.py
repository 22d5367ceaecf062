# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
import pytest
import torch
from transformers import AutoModelForSequenceClassification, pipeline

from transformers_cee.engines import ENGINES


FLOATS = [name for name, engine in ENGINES.items() if "float32" in engine.precisions]


def batch_of(tokenizer, texts, rows=12, side="right"):
    return tokenizer(texts[:rows], padding=True, return_tensors="pt", padding_side=side)


def agree(mine, theirs, tolerance=1e-5):
    assert mine.exit_layers.tolist() == theirs.exit_layers.tolist()
    torch.testing.assert_close(mine.logits, theirs.logits, rtol=tolerance, atol=tolerance)


def between(scores):
    """A threshold far from all scores (rows,) of an exit: in the widest gap of their middle half."""
    ordered = scores[~scores.isnan()].sort().values
    inner = ordered[len(ordered) // 4 : -(len(ordered) // 4)]
    place = int(inner.diff().argmax())
    return float(inner[place : place + 2].mean())


@pytest.fixture(scope="module", params=FLOATS)
def engine(request):
    return request.param


@pytest.mark.parametrize(
    "fields",
    [{}, {"policy_inputs": "both", "policy_condition": "film", "exit_norm": "layer_norm", "exit_layers": [1, 3]}],
    ids=["state", "both"],
)
@torch.no_grad()
def test_float32_walks_as_the_model_does(engine, fields, make_model, tokenizer, texts, tmp_path):
    model = make_model(**fields)
    exported = model.export(tmp_path / "out", engine=engine, precision="float32")
    for side in ("right", "left"):
        batch = batch_of(tokenizer, texts, side=side)
        mine, theirs = exported(**batch, output_all_exits=True), model(**batch, output_all_exits=True)
        torch.testing.assert_close(mine.all_exit_logits, theirs.all_exit_logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mine.all_exit_states, theirs.all_exit_states, rtol=1e-5, atol=1e-5)
        agree(exported(**batch), model(**batch))
        for criterion in ("policy", "max_probability", "patience"):
            middle = 1.0
            if criterion != "patience":
                scores = model(**batch, exit_criterion=criterion, exit_threshold=0.9999).exit_probabilities
                middle = between(scores[:, 0])
            asked = {"exit_criterion": criterion, "exit_threshold": middle}
            found = model(**batch, **asked)
            assert len(found.exit_layers.unique()) > 1
            agree(exported(**batch, **asked), found)
            agree(exported(**batch, **asked, min_exit_layer=3), model(**batch, **asked, min_exit_layer=3))


@torch.no_grad()
def test_loads_without_the_original(make_model, tokenizer, texts, tmp_path):
    model = make_model()
    # Without costs, by which exits that would not pay here are not asked.
    asked = {"calibration_texts": texts, "processing_class": tokenizer, "measure": False}
    model.export(tmp_path / "out", precision="float32", **asked)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    batch = batch_of(tokenizer, texts)
    agree(again(**batch, exit_threshold=0.5), model(**batch, exit_threshold=0.5))
    classify = pipeline("text-classification", model=again, tokenizer=tokenizer)
    label = model.config.id2label[int(model(**batch_of(tokenizer, texts, 1)).logits.argmax())]
    assert classify(texts[0], exit_threshold=1.0)[0]["label"] == label


def test_refusals(make_model, tmp_path):
    model = make_model()
    with pytest.raises(ValueError, match=r"`engine`='nothing' is unknown"):
        model.export(tmp_path / "out", engine="nothing")
    with pytest.raises(ValueError, match=r"`precision`='int4' is none of the engine 'openvino'"):
        model.export(tmp_path / "out", precision="int4")
    with pytest.raises(ValueError, match="`calibration_texts`=None"):
        model.export(tmp_path / "out")
    with pytest.raises(ValueError, match="'patience' cannot be part of a graph"):
        model.export(tmp_path / "out", precision="float32", exit_criterion="patience")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(ValueError, match="is no empty folder"):
        model.export(tmp_path / "full", precision="float32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_cannot_be_trained(make_model, tmp_path):
    exported = make_model().export(tmp_path / "out", precision="float32")
    with pytest.raises(ValueError, match="cannot be trained"):
        exported.train()
    with pytest.raises(ValueError, match="`output_hidden_states`=True"):
        exported(torch.ones(1, 3, dtype=torch.long), output_hidden_states=True)


@torch.no_grad()
def test_policies_that_remember_indicators_of_labels(make_model, tokenizer, texts, tmp_path):
    model = make_model(policy_inputs="both", problem_type="multi_label_classification")
    exported = model.export(tmp_path / "out", precision="float32")
    batch = batch_of(tokenizer, texts)
    # Near where exits are closed: every exit is asked, and remembers those before it.
    asked = {"exit_criterion": "policy", "exit_threshold": 0.999999}
    mine, theirs = exported(**batch, **asked), model(**batch, **asked)
    assert len(theirs.exit_probabilities[:, 2].unique()) > 1
    torch.testing.assert_close(mine.exit_probabilities, theirs.exit_probabilities, equal_nan=True)
    agree(mine, theirs)
