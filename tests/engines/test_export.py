# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
import os
from pathlib import Path

import families
import pytest
import torch
from transformers import AutoModelForSequenceClassification, pipeline

from transformers_cee.engines import ENGINES, exporting


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


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime", "torch"])
@torch.no_grad()
def test_what_no_table_holds_is_refused(engine, make_model, tmp_path):
    """Engines may read beyond a table without an error, and answer all the same."""
    model = make_model(max_position_embeddings=16).export(tmp_path / "out", engine=engine, precision="float32")
    fits = torch.full((2, 16), 59)
    assert model(fits, torch.ones_like(fits)).logits.shape == (2, 3)
    with pytest.raises(ValueError, match="`input_ids` has 17 tokens in a row, and the model reads 16 at most"):
        model(torch.full((1, 17), 5))
    for wrong in (60, -1):
        with pytest.raises(ValueError, match=f"`input_ids` holds {wrong}, and the model knows the tokens 0 to 59"):
            model(torch.tensor([[5, wrong, 6]]))


@pytest.mark.parametrize("model_type", families.of_kind("encoder"))
@torch.no_grad()
def test_long_texts_are_read_where_the_original_reads_them(model_type, tmp_path):
    model = families.model(model_type)
    exported = model.export(tmp_path / "out", engine="torch", precision="float32")
    columns = model.most_tokens + 1
    ids = torch.full((1, columns), 7)
    try:
        expected = model(ids, torch.ones_like(ids)).logits
    except (IndexError, RuntimeError):
        with pytest.raises(ValueError, match=f"has {columns} tokens in a row"):
            exported(ids, torch.ones_like(ids))
    else:
        found = exported(ids, torch.ones_like(ids)).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_choice_that_cannot_be_made_is_refused(make_model, tokenizer, texts, tmp_path):
    options = {"precision": "float32", "calibration_texts": texts, "processing_class": tokenizer}
    choice = {**options, "exit_layers": "auto"}
    with pytest.raises(ValueError, match="needs a criterion in the graphs, which 'patience' cannot be"):
        make_model(exit_criterion="patience").export(tmp_path / "out", **choice)
    with pytest.raises(ValueError, match="the model has no internal exits"):
        make_model(exit_layers=[4]).export(tmp_path / "out", **choice)
    with pytest.raises(ValueError, match="`batch_size`=0"):
        make_model().export(tmp_path / "out", **options, batch_size=0)
    assert not list(tmp_path.iterdir())


def test_a_choice_that_leaves_no_exits_is_told(make_model, tokenizer, texts, tmp_path):
    options = {"precision": "float32", "calibration_texts": texts, "processing_class": tokenizer}
    with pytest.warns(UserWarning, match="Exits are off at 'agreement-0.99': 60 calibration rows.* 598"):
        made = make_model(exit_criterion="max_probability").export(tmp_path / "out", **options, exit_layers="auto")
    assert made.layer_numbers == [4]


def test_nothing_is_certified_on_texts_that_set_the_scales(make_model, tokenizer, tmp_path, monkeypatch):
    certifying, scales = [], []
    exits_of, samples = exporting.exits_of, exporting._samples
    monkeypatch.setattr(
        exporting,
        "exits_of",
        lambda model, rows, *more: certifying.append(rows["input_ids"]) or exits_of(model, rows, *more),
    )
    monkeypatch.setattr(exporting, "_samples", lambda rows, *more: scales.append(samples(rows, *more)) or scales[-1])
    # Each text is another.
    texts = [" ".join(["w1"] * (1 + number // 7) + [f"w{number % 7 + 10}"]) for number in range(60)]
    for engine, precision, count in (("openvino", "int8", 30), ("torch", "int8", 30), ("openvino", "float32", 60)):
        certifying.clear(), scales.clear()
        make_model().export(
            tmp_path / f"{engine}-{precision}", engine=engine, precision=precision, calibration_texts=texts,
            processing_class=tokenizer, measure=False,
        )  # fmt: skip
        seen = {tuple(ids) for ids in certifying[0]}
        took = {
            tuple(ids[mask].tolist())
            for batch in scales[0]
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        }
        assert len(seen) == count and len(took) == 30 and (precision == "float32" or not seen & took)


def test_an_empty_folder_is_filled_and_not_replaced(make_model, tmp_path, monkeypatch):
    """It may be all that may be written to, or where a disk is mounted."""
    target = tmp_path / "out"
    target.mkdir()
    before, moved, replace = target.stat().st_ino, [], os.replace
    monkeypatch.setattr(os, "replace", lambda source, to: moved.append(Path(to).name) or replace(source, to))
    make_model().export(target, precision="float32")
    assert target.stat().st_ino == before and [path.name for path in tmp_path.iterdir()] == ["out"]
    assert moved[-1] == "config.json" and not [path for path in target.iterdir() if path.name.startswith(".")]
    (tmp_path / "failed").mkdir()
    monkeypatch.setattr(exporting, "fit_promises", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_model().export(tmp_path / "failed", precision="float32")
    assert not list((tmp_path / "failed").iterdir())
