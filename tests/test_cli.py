# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The command does what the functions do, and answers mistakes with one line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from bulk_reference import draw_texts, thresholds_of, tokenizer_for
from families import model as tiny
from transformers import AutoModelForSequenceClassification

from transformers_cee import classify
from transformers_cee.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root, model = tmp_path_factory.mktemp("cli"), tiny("bert_cee", num_hidden_layers=2)
    model.save_pretrained(root / "model")
    tokenizer_for(model).save_pretrained(root / "model")
    (root / "texts.txt").write_text("\n".join(draw_texts(20)) + "\n")
    return root


def test_classify(folder, capsys):
    model, texts, out = str(folder / "model"), str(folder / "texts.txt"), folder / "out.jsonl"
    loaded = type(tiny("bert_cee")).from_pretrained(model)
    thresholds = thresholds_of(loaded, tokenizer_for(loaded), draw_texts(20), "policy", 0.9999)
    asked = ["--exit_threshold", ",".join(map(str, thresholds)), "--batch_size", "4", "--disable_tqdm"]
    assert main(["classify", model, texts, "--output", str(out), *asked]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["rows"] == 20 and summary["output"] == str(out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    wanted = list(classify(loaded, folder / "texts.txt", exit_threshold=thresholds, batch_size=4, disable_tqdm=True))
    assert rows == wanted and len({row["exit_layer"] for row in rows}) == 2


def test_export_and_classify(folder, capsys):
    pytest.importorskip("openvino")
    out = str(folder / "exported")
    assert main(["export", str(folder / "model"), out, "--precision", "float32"]) == 0
    assert capsys.readouterr().out.split() == [out]
    # Without texts to calibrate on, an export has no tokenizer.
    tokenizer_for(tiny("bert_cee")).save_pretrained(out)
    results = []
    for model in (str(folder / "model"), out):
        asked = ["--exit_threshold", "0.5", "--device", "cpu", "--disable_tqdm", "--output", str(folder / "one.jsonl")]
        assert main(["classify", model, str(folder / "texts.txt"), *asked]) == 0
        results.append([json.loads(line) for line in (folder / "one.jsonl").read_text().splitlines()])
    assert [row["exit_layer"] for row in results[0]] == [row["exit_layer"] for row in results[1]]


def test_export_takes_what_the_method_takes(folder, capsys):
    """Exits are chosen by cost, or costs are not measured."""
    pytest.importorskip("onnxruntime")
    model, texts = str(folder / "model"), str(folder / "texts.txt")
    found = []
    for out, more in (("chosen", ["--exit_layers", "auto", "--agreement", "0.1"]), ("quick", ["--no-measure"])):
        asked = ["--engine", "onnxruntime", "--precision", "float32", "--calibration_texts", texts, *more]
        assert main(["export", model, str(folder / out), *asked]) == 0
        found.append(AutoModelForSequenceClassification.from_pretrained(folder / out))
    chosen, quick = found
    assert "agreement-0.1" in chosen.config.exit_operating_points and chosen.costs is not None
    assert quick.costs is None and not quick.config.exit_operating_points
    assert main(["export", model, str(folder / "none"), "--exit_layers", "auto", "--precision", "float32"]) == 2
    assert "takes `calibration_texts` and `measure`=True" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["classify", "MODEL", "no.txt", "--output", "o.csv"], "there is no such file"),
        (["classify", "MODEL", "TEXTS", "--output", "o.pdf"], "must be a file of .jsonl, .csv"),
        (["classify", "MODEL", "TEXTS", "--output", "o.csv", "--exit_threshold", "fast"], "`exit_threshold`='fast'"),
        (
            ["classify", "MODEL", "TEXTS", "--output", "o.csv", "--device", "abacus"],
            "`--device`='abacus' is no device",
        ),
        (
            ["classify", "MODEL", "TEXTS", "--output", "o.csv", "--device", "cpu", "--workers", "2"],
            "`--workers`=2 run on",
        ),
        (["export", "MODEL", "FOLDER", "--engine", "nothing"], "`engine`='nothing' is unknown"),
    ],
)
def test_mistakes_are_one_line(arguments, message, folder, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names = {"MODEL": folder / "model", "TEXTS": folder / "texts.txt", "FOLDER": folder / "new"}
    assert main([str(names.get(one, one)) for one in arguments]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("transformers-cee: ") and message in last


def test_help_of_the_module():
    done = subprocess.run(
        [sys.executable, "-m", "transformers_cee", "classify", "--help"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("usage: transformers-cee classify")
