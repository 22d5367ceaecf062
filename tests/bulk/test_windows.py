# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Labels, scores and exit layers are those of each text alone, whatever runs together."""

from __future__ import annotations

import families
import pytest
import torch
from bulk_reference import alone, thresholds_of, tokenizer_for
from transformers import BertForSequenceClassification

from transformers_cee.bulk.windows import WindowClassifier
from transformers_cee.engines import ENGINES


def agree(model, tokenizer, texts, reference=None, **asked):
    """Compares a window with each text alone; returns the exit layers."""
    batch_size = asked.pop("batch_size", 8)
    classifier = WindowClassifier(model, tokenizer, batch_size=batch_size, **asked)
    found = classifier(texts)
    runs = alone(reference or model, tokenizer, texts, **asked)
    assert found.exit_layers.tolist() == [layer for _, layer, _ in runs]
    scores = torch.stack([logits for logits, *_ in runs]).softmax(-1)
    assert found.classes.tolist() == scores.argmax(1).tolist()
    torch.testing.assert_close(found.scores, scores.amax(1), rtol=1e-4, atol=1e-5)
    return classifier, found.exit_layers


@pytest.mark.parametrize("model_type", families.of_kind("encoder"))
def test_every_family(model_type, texts):
    model = families.model(model_type)
    tokenizer = tokenizer_for(model)
    threshold = thresholds_of(model, tokenizer, texts, "policy", 0.9999)
    classifier, layers = agree(model, tokenizer, texts, exit_threshold=threshold)
    assert classifier.is_pooled and len(layers.unique()) > 2


@pytest.mark.parametrize("size", [1, 7, 40, 100])
def test_any_size_of_batches(model, tokenizer, texts, size):
    threshold = thresholds_of(model, tokenizer, texts, "policy", 0.9999)
    agree(model, tokenizer, texts, exit_threshold=threshold, batch_size=size)


@pytest.mark.parametrize(
    ("criterion", "off", "is_pooled"),
    [
        ("max_probability", 0.9999, True),
        ("entropy", 0.0001, True),
        ("exit_cdf", 0.9999, False),
    ],
)
def test_criteria(model, tokenizer, texts, criterion, off, is_pooled):
    threshold = thresholds_of(model, tokenizer, texts, criterion, off)
    classifier, layers = agree(model, tokenizer, texts, exit_criterion=criterion, exit_threshold=threshold)
    assert classifier.is_pooled == is_pooled and len(layers.unique()) > 1


def test_patience_runs_batch_by_batch(model, tokenizer, texts):
    classifier, layers = agree(model, tokenizer, texts, exit_criterion="patience", exit_threshold=1)
    assert not classifier.is_pooled and len(layers.unique()) > 1


def test_policies_remember_confidences_of_their_own_rows(texts):
    fields = {"policy_inputs": "both", "policy_condition": "film", "exit_norm": "layer_norm"}
    model = families.model("bert_cee", num_hidden_layers=6, **fields)
    tokenizer = tokenizer_for(model)
    threshold = thresholds_of(model, tokenizer, texts, "policy", 0.9999)
    classifier, layers = agree(model, tokenizer, texts, exit_threshold=threshold)
    assert classifier.is_pooled and len(layers.unique()) > 3
    # Exits where nothing may leave are seen all the same.
    agree(model, tokenizer, texts, exit_threshold=[1.0, 1.0, threshold[2], 1.0, threshold[4], 1.0])
    agree(model, tokenizer, texts, exit_threshold=threshold, min_exit_layer=3)


def test_some_exits(texts):
    model = families.model("bert_cee", num_hidden_layers=6, exit_layers=[2, 5])
    tokenizer = tokenizer_for(model)
    threshold = thresholds_of(model, tokenizer, texts, "policy", 0.9999)
    _, layers = agree(model, tokenizer, texts, exit_threshold=threshold)
    assert set(layers.tolist()) == {2, 5, 6}
    assert set(agree(model, tokenizer, texts, exit_threshold=1.0)[1].tolist()) == {6}
    assert set(agree(model, tokenizer, texts, exit_threshold=0.0)[1].tolist()) == {2}
    assert set(agree(model, tokenizer, texts)[1].tolist()) == {6}
    assert not set(agree(model, tokenizer, texts, exit_threshold=threshold, min_exit_layer=4)[1].tolist()) & {2}


@pytest.mark.parametrize("engine", [name for name, one in ENGINES.items() if "float32" in one.precisions])
def test_exported(engine, texts, tmp_path):
    model = families.model("bert_cee", policy_inputs="both", num_hidden_layers=3)
    tokenizer = tokenizer_for(model)
    threshold = thresholds_of(model, tokenizer, texts, "policy", 0.9999)
    exported = model.export(tmp_path / "out", engine=engine, precision="float32")
    classifier, layers = agree(exported, tokenizer, texts, model, exit_threshold=threshold)
    assert classifier.is_pooled and len(layers.unique()) > 2


def test_deep_layers_run_full_batches(model, tokenizer, texts):
    threshold = thresholds_of(model, tokenizer, texts, "policy", 0.9999)
    sizes: dict[int, list[int]] = {}
    handles = [
        layer.register_forward_hook(
            lambda module, given, made, number=number: sizes.setdefault(number, []).append(len(given[0]))
        )
        for number, layer in enumerate(families.layers(model), start=1)
    ]
    same = [text for text in texts if 12 <= len(text.split())]
    found = WindowClassifier(model, tokenizer, batch_size=4, exit_threshold=threshold)(same)
    for handle in handles:
        handle.remove()
    for number, ran in sizes.items():
        remaining = int((found.exit_layers >= number).sum())
        assert ran == [4] * (remaining // 4) + [remaining % 4] * (remaining % 4 > 0)


def test_left_padding_and_training_mode_are_put_back(model, texts):
    tokenizer = tokenizer_for(model)
    tokenizer.padding_side = "left"
    threshold = thresholds_of(model, tokenizer, texts, "policy", 0.9999)
    model.train()
    try:
        found = WindowClassifier(model, tokenizer, batch_size=8, exit_threshold=threshold)(texts)
        assert model.training
    finally:
        model.eval()
    assert found.exit_layers.tolist() == [
        layer for _, layer, _ in alone(model, tokenizer, texts, exit_threshold=threshold)
    ]


@pytest.mark.parametrize(
    ("fields", "link"),
    [
        ({"problem_type": "regression", "num_labels": 1}, lambda logits: logits),
        ({"num_labels": 1}, torch.sigmoid),
        ({"problem_type": "multi_label_classification"}, torch.sigmoid),
    ],
)
def test_scores_are_those_of_pipelines(fields, link, texts):
    model = families.model("bert_cee", **fields)
    tokenizer = tokenizer_for(model)
    found = WindowClassifier(model, tokenizer, exit_threshold=1.0)(texts[:10])
    scores = link(torch.stack([logits for logits, *_ in alone(model, tokenizer, texts[:10])]))
    torch.testing.assert_close(found.scores, scores.amax(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"batch_size": 0}, "`batch_size`=0 must be a whole number"),
        ({"max_length": 0}, "`max_length`=0 must be a whole number"),
        ({"exit_threshold": 2.0}, "`exit_threshold`"),
        ({"exit_criterion": "nothing"}, "`exit_criterion`='nothing'"),
        ({"exit_budget": 0.5}, "no fitted budgets"),
        ({"min_exit_layer": 9}, "`min_exit_layer`=9"),
        ({"exit_criterion": "oracle", "exit_threshold": 0.5}, "needs the true labels"),
        ({"exit_criterion": "learning_to_exit", "exit_threshold": 0.5}, "needs its fitted estimator"),
    ],
)
def test_refused_before_any_work(model, tokenizer, asked, message):
    with pytest.raises(ValueError, match=message):
        WindowClassifier(model, tokenizer, **asked)


def test_other_models_are_refused(tokenizer):
    with pytest.raises(TypeError, match="must be a classifier of texts with exits"):
        WindowClassifier(families.model("llama_cee"), tokenizer)
    with pytest.raises(TypeError, match="BertForSequenceClassification must be"):
        WindowClassifier(BertForSequenceClassification(families.stock_config("bert_cee")), tokenizer)


def test_a_text_without_tokens_is_named(model, tokenizer):
    with pytest.raises(ValueError, match="no token of text 2 of 3: ' '"):
        WindowClassifier(model, tokenizer)(["w10", " ", "w11"])


@pytest.mark.parametrize("model_type", families.of_kind("encoder"))
def test_texts_are_cut_to_what_the_model_reads(model_type):
    """Tokenizers without a length of their own know nothing of the model's."""
    model = families.model(model_type)
    tokenizer = tokenizer_for(model)
    tokenizer.model_max_length = int(1e30)
    words = [f"w{10 + number % 49}" for number in range(100)]
    most = model.most_tokens
    assert most == (62 if families.FAMILIES[model_type].padding == 1 else 64)
    found = WindowClassifier(model, tokenizer)([" ".join(words), "w11 w12"])
    ((logits, layer, _),) = alone(model, tokenizer, [" ".join(words[:most])])
    assert int(found.exit_layers[0]) == layer
    torch.testing.assert_close(found.scores[0], logits.softmax(-1).max(), rtol=1e-4, atol=1e-5)
    assert WindowClassifier(model, tokenizer, max_length=1000).max_length == most
