# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Rouge against figures computed by hand; BERTScore's wiring with a stand-in for the library."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from transformers_cee.evaluation import text_metrics as module
from transformers_cee.evaluation.text_metrics import bert_score, rouge, text_metrics


def test_rouge_by_hand():
    pytest.importorskip("rouge_score")
    # Words: 2 of 3 and 2 of 4 shared. Pairs: 1 of 2 and 1 of 3. Longest common subsequence: the cat.
    figures = rouge(["the cat sat"], ["the cat ran fast"])
    assert figures == pytest.approx({"rouge1": 4 / 7, "rouge2": 2 / 5, "rougeL": 4 / 7})
    # Stems are compared, and texts are averaged.
    assert rouge(["running", "a dog"], ["runs", "no match"])["rouge1"] == pytest.approx(0.5)
    # Order counts for the subsequence only.
    assert rouge(["b a"], ["a b"]) == pytest.approx({"rouge1": 1.0, "rouge2": 0.0, "rougeL": 0.5})


def test_bert_score_is_asked_with_the_last_layer(tmp_path, monkeypatch):
    from transformers import BertConfig

    BertConfig(num_hidden_layers=3).save_pretrained(tmp_path)
    calls = []

    def score(answers, references, **options):
        calls.append((answers, references, options))
        return None, None, torch.tensor([0.5, 1.0])

    fake = ModuleType("bert_score")
    fake.score = score
    monkeypatch.setitem(sys.modules, "bert_score", fake)
    assert bert_score(("a", "b"), ("c", "d"), str(tmp_path)) == {"bertscore": 0.75}
    assert calls[0][:2] == (["a", "b"], ["c", "d"])
    assert calls[0][2]["num_layers"] == 3
    bert_score(("a", "b"), ("c", "d"), str(tmp_path), num_layers=2)
    assert calls[1][2]["num_layers"] == 2
    pytest.importorskip("rouge_score")
    assert set(text_metrics(str(tmp_path))(["a", "b"], ["c", "d"])) == {"rouge1", "rouge2", "rougeL", "bertscore"}


def test_missing_libraries_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bert_score", None)
    with pytest.raises(ImportError, match=r"BERTScore needs bert-score.*transformers-cee\[generation\]"):
        bert_score(["a"], ["a"], "anything")
    monkeypatch.setattr(module, "rouge", lambda answers, references: {})
    with pytest.raises(ImportError, match="BERTScore needs bert-score"):
        text_metrics("anything")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ImportError, match="Rouge needs rouge-score"):
        rouge(["a"], ["a"])


def test_texts_must_match():
    with pytest.raises(ValueError, match=r"`answers` \(0\) and `references` \(0\)"):
        rouge([], [])
    with pytest.raises(ValueError, match=r"`answers` \(1\) and `references` \(2\)"):
        bert_score(["a"], ["a", "b"], "anything")
