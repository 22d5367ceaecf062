# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Exits that learned from texts beside exits that learned from labels: same classifier, same texts, same promise."""

from __future__ import annotations

import csv
import json

import added_exits
import pytest
import run_add_exits
import torch
from tiny_models import WORDS, tiny_tokenizer
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from transformers_cee.files import read_json


QUIET = ["--use_cpu", "--disable_tqdm=True", "--report_to=none", "--save_strategy=no"]


@pytest.fixture
def made(tmp_path):
    """A folder with a classifier, its exits, and the options that they were made with."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, num_labels=2,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with (tmp_path / "train.csv").open("w", newline="") as file:
        rows = [(f"{WORDS[number % 7]} {WORDS[(3 * number) % 11]}", "ab"[number % 7 > 3]) for number in range(200)]
        csv.writer(file).writerows([("sentence", "label"), *rows])
    run_add_exits.main(
        [
            f"--model_name_or_path={tmp_path / 'model'}", f"--train_file={tmp_path / 'train.csv'}", "--texts=80",
            f"--output_dir={tmp_path / 'exits'}", "--agreement", "0.6", "0.5", "--num_train_epochs=1", "--seed=3",
            *QUIET,
        ]
    )  # fmt: skip
    return tmp_path


def test_both_are_certified_on_the_same_texts(made, monkeypatch, capsys):
    more = {"disable_tqdm": True, "policy_num_train_epochs": 2}
    monkeypatch.setattr(added_exits, "TRAINING", added_exits.TRAINING | more)
    words = ["--plain", str(made / "exits-plain"), "--added", str(made / "exits"), "--output", str(made / "beside")]
    added_exits.main([*words, "--agreement", "0.6", "0.5"])
    found = json.loads((made / "beside" / "results.json").read_text())
    before = json.loads((made / "exits" / "results.json").read_text())
    assert found["texts"]["full"] == pytest.approx(before["accuracy"]) == found["labels"]["full"]
    for speed in before["speeds"]:
        for criterion, depth in speed["alone"].items():
            assert found["texts"][f"{speed['promised']:g}"][criterion]["depth"] == pytest.approx(depth)
    assert set(found["labels"]["0.6"]) == {"policy", "max_probability", "calibrated_probability"}
    # Layers that were there before stay as they are.
    plain = AutoModelForSequenceClassification.from_pretrained(made / "exits-plain").state_dict()
    labelled = AutoModelForSequenceClassification.from_pretrained(made / "beside" / "model").state_dict()
    assert all(torch.equal(labelled[name], value) for name, value in plain.items())
    assert "| labels" in capsys.readouterr().out

    monkeypatch.setattr(added_exits, "ConsistentEETrainer", lambda *given, **named: pytest.fail("trained again"))
    added_exits.main(words)
    assert set(read_json(made / "beside" / "results.json", "")["labels"]) == {"full", "0.99", "0.97"}
    about = read_json(made / "exits-plain" / "made_by.json", "")
    (made / "exits-plain" / "made_by.json").write_text(json.dumps(about | {"texts": 70}))
    with pytest.raises(ValueError, match=r"`--output`=.* has exits of another classifier"):
        added_exits.main(words)


def test_a_classifier_of_another_origin(tmp_path, capsys):
    with pytest.raises(SystemExit):
        added_exits.main(["--plain", str(tmp_path), "--added", str(tmp_path), "--output", str(tmp_path / "out")])
    assert "there is no made_by.json" in capsys.readouterr().err
