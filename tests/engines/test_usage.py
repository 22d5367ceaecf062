# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""An exported model is used as any other: pipelines, trainers, calibration, saving."""

import copy
import json
import pickle
import shutil

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from tiny import training_arguments
from transformers import AutoModel, AutoModelForSequenceClassification, DataCollatorWithPadding, pipeline

from transformers_cee import (
    BertForConsistentEE,
    ConsistentEETrainer,
    calibrate_budget,
    collect_exits,
    score_store,
)
from transformers_cee.engines.model import ExportedSequenceClassifier
from transformers_cee.hub.publishing import published_files


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(exit_criterion="max_probability")


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    made = tmp_path_factory.mktemp("exported") / "model"
    model.export(made, precision="float32", processing_class=tokenizer)
    return made


@pytest.fixture(scope="module")
def exported(folder):
    return BertForConsistentEE.from_pretrained(folder)


@pytest.fixture(scope="module")
def rows(tokenizer, texts):
    return Dataset.from_dict({**tokenizer(texts), "labels": [number % 3 for number in range(len(texts))]})


def test_loads_as_any_model(folder):
    for load in (BertForConsistentEE, AutoModelForSequenceClassification, AutoModel):
        made = load.from_pretrained(folder, exit_threshold=0.75)
        assert type(made) is ExportedSequenceClassifier and made.config.exit_threshold == 0.75
        assert made.to("cpu").eval() is made and not made.training
    assert made.config.architectures == ["BertForConsistentEE"]


def test_pipelines(folder, model, tokenizer, texts):
    asked = {"exit_threshold": 0.5, "batch_size": 4}
    for task in ("text-classification", "early-exit-text-classification"):
        mine = pipeline(task, model=str(folder))(texts[:8], **asked)
        theirs = pipeline(task, model=model, tokenizer=tokenizer)(texts[:8], **asked)
        assert [one["label"] for one in mine] == [one["label"] for one in theirs]
        assert [one["score"] for one in mine] == pytest.approx([one["score"] for one in theirs], abs=1e-5)
        assert [one.get("exit_layer") for one in mine] == [one.get("exit_layer") for one in theirs]


def test_trainers_evaluate_and_predict(exported, model, rows, tokenizer, tmp_path):
    def trainer(of):
        args = training_arguments(tmp_path, per_device_eval_batch_size=8)
        return ConsistentEETrainer(model=of, args=args, eval_dataset=rows, processing_class=tokenizer)

    mine, theirs = trainer(exported).evaluate(), trainer(model).evaluate()
    same = [name for name in theirs if not any(word in name for word in ("time", "second", "flops"))]
    assert {name: mine[name] for name in same} == pytest.approx({name: theirs[name] for name in same}, abs=1e-4)
    predicted = trainer(exported).predict(rows).predictions
    expected = trainer(model).predict(rows).predictions
    torch.testing.assert_close(torch.tensor(predicted), torch.tensor(expected), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_saved_with_what_was_fitted_on_it(exported, rows, tokenizer, texts, tmp_path):
    options = {"problem_type": "single_label_classification", "disable_tqdm": True}
    store = collect_exits(exported, rows, DataCollatorWithPadding(tokenizer), Accelerator(cpu=True), **options)
    made = copy.deepcopy(exported)
    calibrate_budget(score_store(store, "max_probability", made), 3.0).save_to(made, "fast")
    assert "fast" not in exported.config.exit_operating_points
    made.save_pretrained(tmp_path / "again")
    shutil.copytree(tmp_path / "again", tmp_path / "moved")
    shutil.rmtree(tmp_path / "again")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "moved")
    batch = tokenizer(texts[:12], padding=True, return_tensors="pt")
    mine, theirs = again(**batch, exit_threshold="fast"), made(**batch, exit_threshold="fast")
    assert mine.exit_layers.tolist() == theirs.exit_layers.tolist()
    torch.testing.assert_close(mine.logits, theirs.logits)
    # Into its own folder.
    again.config.exit_threshold = "fast"
    again.save_pretrained(tmp_path / "moved")
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "moved")
    assert found(**batch).exit_layers.tolist() == theirs.exit_layers.tolist()
    fewer = BertForConsistentEE.from_pretrained(tmp_path / "moved", exit_layers=[2])
    fewer.save_pretrained(tmp_path / "fewer")
    assert BertForConsistentEE.from_pretrained(tmp_path / "fewer").layer_numbers == [2, 4]


def test_is_not_pickled(exported):
    with pytest.raises(TypeError, match="Load it by its folder in the other"):
        pickle.dumps(exported)


def test_what_is_published(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "out")
    (tmp_path / "out" / "optimizer.pt").write_text("")
    (tmp_path / "out" / "engine" / "notes.txt").write_text("")
    files = published_files(tmp_path / "out")
    record = json.loads((folder / "config.json").read_text())["exit_engine"]
    assert {"config.json", "exits.safetensors", "tokenizer.json", "modeling_cee.py", *record["files"]} <= {*files}
    assert "engine/layers.bin" in files and not {"optimizer.pt", "engine/notes.txt"} & {*files}


HOSTILE = [
    "../x",
    "engine/../../x",
    "/etc/passwd",
    "engine//x",
    "engine\\x",
    "..",
    "",
    "engine/",
    "a/b",
    "engine/x\0",
    3,
]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_no_ways_out_of_the_folder(name, folder, tmp_path):
    record = {"engine": "openvino", "precision": "float32", "criterion": None, "most_tokens": 32, "files": [name]}
    assert_refused(record, folder, tmp_path, "exit_engine.files")


@pytest.mark.parametrize(
    "record,words",
    [
        (None, "`exit_engine`=None must be a dictionary"),
        ([1], "must be a dictionary"),
        ({}, "`exit_engine` lacks"),
        ({"engine": "nothing"}, "'nothing' is unknown"),
        ({"engine": 3}, "exit_engine.engine"),
        ({"precision": "int3"}, "`precision`='int3'"),
        ({"precision": None}, "exit_engine.precision"),
        ({"criterion": "luck"}, "exit_engine.criterion"),
        ({"most_tokens": 0}, "exit_engine.most_tokens"),
        ({"files": "engine"}, "exit_engine.files"),
        ({"more": 1}, "unknown fields"),
    ],
)
def test_damaged_records(record, words, folder, tmp_path):
    whole = {"engine": "openvino", "precision": "float32", "criterion": None, "most_tokens": None, "files": []}
    assert_refused({**whole, **record} if isinstance(record, dict) and record else record, folder, tmp_path, words)


def assert_refused(record, folder, tmp_path, words):
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "exit_engine": record}))
    # No engine has been started: there are no graphs.
    with pytest.raises(ValueError, match=words):
        BertForConsistentEE.from_pretrained(tmp_path)
    assert published_files(tmp_path) == ["config.json"]


def test_files_that_are_damaged_or_missing(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "out")
    (tmp_path / "out" / "exits.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"exits.safetensors of .* is damaged"):
        BertForConsistentEE.from_pretrained(tmp_path / "out")
    (tmp_path / "out" / "engine" / "layers.bin").unlink()
    with pytest.raises(OSError, match=r"layers\.bin"):
        BertForConsistentEE.from_pretrained(tmp_path / "out")
