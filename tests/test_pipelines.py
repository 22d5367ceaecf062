# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
from __future__ import annotations

import json

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from transformers import BertConfig, BertForSequenceClassification, pipeline

from transformers_cee import EarlyExitTextClassificationPipeline


TASK = "early-exit-text-classification"
SENTENCES = ["a film with heart", "not a single joke lands and the plot is worse", "the plot is the plot"]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def make(model, tokenizer, **arguments):
    return pipeline(TASK, model=model, tokenizer=tokenizer, device="cpu", **arguments)


@pytest.mark.parametrize(("threshold", "layer"), [(0.0, 1), (1.0, 4)])
def test_threshold_per_call_and_at_construction(model, tokenizer, threshold, layer):
    per_call = make(model, tokenizer)(SENTENCES, exit_threshold=threshold)
    at_construction = make(model, tokenizer, exit_threshold=threshold)(SENTENCES)
    assert per_call == at_construction
    assert [result["exit_layer"] for result in per_call] == [layer] * 3
    assert make(model, tokenizer, exit_threshold=1.0 - threshold)(SENTENCES, exit_threshold=threshold) == per_call


def test_no_threshold_takes_the_models_own(tokenizer):
    results = make(tiny_model(exit_threshold=0.0), tokenizer)(SENTENCES)
    assert [result["exit_layer"] for result in results] == [1, 1, 1]


def test_criterion(model, tokenizer):
    classifier = make(model, tokenizer, exit_criterion="max_probability", exit_threshold=1.0)
    assert [result["exit_layer"] for result in classifier(SENTENCES)] == [4, 4, 4]
    assert [result["exit_layer"] for result in classifier(SENTENCES, exit_threshold=0.0)] == [1, 1, 1]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_same_as_the_model_at_any_batch_size(model, tokenizer, batch_size):
    scores = [
        float(model(**tokenizer(text, return_tensors="pt"), exit_threshold=1.0).exit_layers) for text in SENTENCES
    ]
    assert scores == [4.0] * 3
    thresholds = [0.49, 0.5, 0.51, 0.5]
    results = make(model, tokenizer)(SENTENCES, exit_threshold=thresholds, batch_size=batch_size)
    for text, result in zip(SENTENCES, results, strict=True):
        with torch.no_grad():
            output = model(**tokenizer(text, return_tensors="pt"), exit_threshold=thresholds)
        probabilities = output.logits[0].softmax(-1)
        assert result["label"] == model.config.id2label[int(probabilities.argmax())]
        assert result["score"] == pytest.approx(float(probabilities.max()), abs=1e-5)
        assert result["exit_layer"] == int(output.exit_layers)


def test_all_labels_and_pairs(model, tokenizer):
    classifier = make(model, tokenizer, exit_threshold=0.0)
    both = classifier(SENTENCES[0], top_k=None)
    assert {result["label"] for result in both} == {"negative", "positive"}
    assert [result["exit_layer"] for result in both] == [1, 1]
    pair = classifier({"text": SENTENCES[0], "text_pair": SENTENCES[1]})
    assert pair["exit_layer"] == 1


def test_bad_arguments_are_named(model, tokenizer):
    classifier = make(model, tokenizer)
    with pytest.raises(ValueError, match="exit_threshold"):
        classifier(SENTENCES, exit_threshold=1.5)
    with pytest.raises(ValueError, match="exit_criterion"):
        classifier(SENTENCES, exit_criterion="mood")


def test_model_without_exits_is_refused(tokenizer):
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=30)
    with pytest.raises(ValueError, match="BertForSequenceClassification, which has no exits"):
        make(BertForSequenceClassification(config), tokenizer)


def test_stock_pipeline_works_too(model, tokenizer):
    results = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")(SENTENCES, batch_size=2)
    assert [set(result) for result in results] == [{"label", "score"}] * 3


def test_saved_pipeline_needs_no_remote_code(model, tokenizer, tmp_path):
    make(model, tokenizer).save_pretrained(tmp_path)
    assert "custom_pipelines" not in json.loads((tmp_path / "config.json").read_text())
    loaded = pipeline(TASK, model=str(tmp_path), device="cpu", exit_threshold=0.0)
    assert type(loaded) is EarlyExitTextClassificationPipeline
    assert loaded(SENTENCES[0])[0]["exit_layer"] == 1
