# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A classifier gets exits from texts alone: it stays what it was, and early answers are its own as often as is
promised."""

from __future__ import annotations

import csv
import hashlib
import json
import logging

import families
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from bulk_reference import draw_texts, tokenizer_for, word_tokenizer
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, pipeline

from transformers_cee import add_exits
from transformers_cee.adding import run
from transformers_cee.adding.data import GivenTexts, class_ids, read_texts
from transformers_cee.cli import main
from transformers_cee.evaluation.report import method_name


# Of a word or two: early layers of a random model know little of longer ones.
TEXTS = 600
SHORT = [" ".join(text.split()[: 1 + number % 8 // 7]) for number, text in enumerate(draw_texts(TEXTS))]
QUIET = {"disable_tqdm": True}
TABLE = Dataset.from_dict({"text": draw_texts(60), "label": [number % 3 for number in range(60)]})


def fine_tuned(model_type: str, folder, **fields):
    """A stock classifier whose answers differ from text to text, and are nearly what early layers tell."""
    stock = families.stock_model(model_type, **fields).eval()
    tokenizer = word_tokenizer(families.FAMILIES[model_type].padding)
    texts = draw_texts(80, seed=9)
    linear = [module for module in stock.modules() if isinstance(module, torch.nn.Linear)]
    head = next(module for module in linear if module.out_features == stock.config.num_labels)
    with torch.no_grad():
        head.weight.mul_(4)
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        head.bias.sub_(stock(batch["input_ids"], batch["attention_mask"]).logits.mean(0))
    stock.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return stock


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    return folder, fine_tuned("bert_cee", folder)


@pytest.fixture(scope="module")
def added(base, tmp_path_factory):
    output = tmp_path_factory.mktemp("exits") / "made"
    before = digest(base[0])
    found = add_exits(base[0], SHORT, output, agreement=[0.8, 0.5], exit_layers=[1, 2, 3, 4], **QUIET)
    assert digest(base[0]) == before, "the classifier was changed"
    return output, found


def digest(folder) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def batch_of(folder, texts: list[str]):
    return AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")


@torch.no_grad()
def test_full_depth_is_the_classifier(base, added):
    folder, stock = base
    model = AutoModelForSequenceClassification.from_pretrained(added[0]).eval()
    inputs = batch_of(folder, draw_texts(60, seed=4))
    expected = stock(**inputs).logits
    assert len(expected.argmax(-1).unique()) > 1
    found = model(**inputs, exit_criterion="policy", exit_threshold=1.0)
    assert float((found.logits - expected).abs().max()) <= 1e-6
    assert found.exit_layers.unique().tolist() == [4]


@torch.no_grad()
def test_promise_is_what_the_certifying_texts_do(base, added):
    """Row by row, without a batch: depth and agreement of the texts that nothing has learned from."""
    (folder, stock), (output, found) = base, added
    model = AutoModelForSequenceClassification.from_pretrained(output).eval()
    order = torch.randperm(TEXTS, generator=torch.Generator().manual_seed(42))
    certifying = sorted(order[: TEXTS // 2].tolist())
    assert (found.learning, found.certifying) == (300, 300)
    depths = []
    for speed in found.speeds:
        assert speed.reason is None
        layers, same = [], 0
        for row in certifying:
            inputs = batch_of(folder, [SHORT[row]])
            early = model(**inputs, exit_threshold=speed.name)
            layers.append(int(early.exit_layers))
            same += int(early.logits.argmax()) == int(stock(**inputs).logits.argmax())
        assert same / 300 == pytest.approx(speed.agreement) and same / 300 > speed.promised
        assert sum(layers) / 300 == pytest.approx(speed.depth)
        assert speed.criterion in speed.alone and min(speed.alone.values()) <= speed.depth + 1e-6
        depths.append(speed.depth)
    assert depths[1] <= depths[0] and depths[1] < 4, "a smaller promise goes no deeper"


@torch.no_grad()
def test_what_the_model_does_by_default(base, added):
    model = AutoModelForSequenceClassification.from_pretrained(added[0]).eval()
    assert model.config.exit_threshold == "agreement-0.8" and model.config.exit_criterion == "policy"
    inputs = batch_of(base[0], draw_texts(20, seed=5))
    assert torch.equal(model(**inputs).exit_layers, model(**inputs, exit_threshold="agreement-0.8").exit_layers)


def test_folder(base, added):
    output, found = added
    names = {path.name for path in output.iterdir()}
    assert {"config.json", "exits.safetensors", "README.md", "results.json"} <= names
    assert "model.safetensors" not in names
    results = json.loads((output / "results.json").read_text())
    assert results["base"] == str(base[0]) and [one["promised"] for one in results["speeds"]] == [0.8, 0.5]
    assert set(results["speeds"][0]["speedups"]) == {"1", "32"} and results["seconds"]["pass"] > 0
    card = (output / "README.md").read_text()
    for speed in found.speeds:
        assert f"{speed.depth:.2f}" in card and f"{speed.agreement:.4f}" in card
    assert "300 texts without labels" in card and "`agreement-0.8`" in card


@pytest.mark.parametrize("model_type", families.of_kind("encoder"))
@torch.no_grad()
def test_every_family(model_type, tmp_path):
    stock = fine_tuned(model_type, tmp_path / "base")
    found = add_exits(tmp_path / "base", draw_texts(160), tmp_path / "exits", agreement=0.6, exit_layers=2, **QUIET)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "exits").eval()
    texts = draw_texts(20, seed=3)
    inputs = tokenizer_for(model)(texts, padding=True, return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    expected = stock(**inputs).logits
    torch.testing.assert_close(model(**inputs, exit_criterion="policy", exit_threshold=1.0).logits, expected)
    assert found.speeds[0].reason is None and found.speeds[0].depth <= 4


def test_labels_are_reported_and_learned_from_by_nothing(base, tmp_path):
    folder, stock = base
    texts = draw_texts(120)
    with torch.no_grad():
        said = stock(**batch_of(folder, texts)).logits.argmax(-1)
    names = [stock.config.id2label[int(one)] for one in said]
    labels = [name if number % 2 else stock.config.id2label[2] for number, name in enumerate(names)]
    path = tmp_path / "texts.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("sentence", "label"), *zip(texts, labels, strict=True)])
    asked = {"agreement": 0.5, "text_column": "sentence", **QUIET}
    plain = add_exits(folder, path, tmp_path / "plain", **asked)
    found = add_exits(folder, path, tmp_path / "labels", label_column="label", **asked)
    held_out = torch.randperm(120, generator=torch.Generator().manual_seed(42))[:60].tolist()
    right = sum(labels[row] == names[row] for row in held_out) / 60
    assert found.accuracy == pytest.approx(right) and plain.accuracy is None
    assert found.speeds[0].depth == plain.speeds[0].depth and 0 < found.speeds[0].accuracy <= 1
    weights = [(tmp_path / name / "exits.safetensors").read_bytes() for name in ("plain", "labels")]
    assert weights[0] == weights[1]
    assert f"{right:.4f}" in (tmp_path / "labels" / "README.md").read_text()


def test_many_labels_per_text(tmp_path):
    fine_tuned("bert_cee", tmp_path / "base", problem_type="multi_label_classification")
    found = add_exits(tmp_path / "base", draw_texts(160), tmp_path / "exits", agreement=0.5, **QUIET)
    assert found.speeds[0].reason is None
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "exits")
    assert model.config.problem_type == "multi_label_classification"


@pytest.mark.parametrize("better", ["policy", "max_probability"])
def test_the_shallower_of_both_criteria_decides(better, base, tmp_path, monkeypatch):
    """Each gets half the risk, since it is picked on the texts that certify it."""
    asked = []

    def certified(criterion, real):
        def found(*given, delta=None, **more):
            if delta is None:
                *given, delta = given
            asked.append(delta)
            # The other criterion hears of a promise that lets nothing out.
            epsilon = given[-1] if criterion == better else 1e-9
            return real(*given[:-1], epsilon, delta=delta, **more)

        return found

    monkeypatch.setattr(run, "calibrate_price", certified("policy", run.calibrate_price))
    monkeypatch.setattr(run, "calibrate_agreement", certified("max_probability", run.calibrate_agreement))
    found = add_exits(base[0], SHORT, tmp_path / "exits", agreement=0.6, risk=0.1, **QUIET).speeds[0]
    assert found.criterion == better and found.depth < 4 and found.reason is None
    assert set(found.alone) == {"policy", "max_probability"} and max(found.alone.values()) == 4
    assert asked == [0.05, 0.05, 0.1, 0.1]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "exits").eval()
    saved = model.config.exit_operating_points["agreement-0.6"]
    assert saved["criterion"] == better and saved["levels"]["delta"] == 0.1, "picked, it has the whole risk"
    assert method_name(better) in (tmp_path / "exits" / "README.md").read_text()


def test_too_few_texts_for_the_promise(base, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        found = add_exits(base[0], draw_texts(60), tmp_path / "exits", agreement=[0.99, 0.5], **QUIET)
    assert "Exits are off at 'agreement-0.99': 30 calibration rows are too few" in caplog.text
    # log(0.05 / 2) / log(0.99): either criterion has half the risk.
    assert "it takes at least 368" in caplog.text
    assert found.speeds[0].reason and found.speeds[0].depth == 4 and found.speeds[1].reason is None
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "exits")
    assert model.config.exit_threshold is None
    assert "`agreement-0.99` is off" in (tmp_path / "exits" / "README.md").read_text()


def test_data_sets_and_lists_give_the_same(base, tmp_path):
    texts = draw_texts(80)
    sources = {
        "list": texts,
        "dataset": Dataset.from_dict({"text": texts}),
        "stream": Dataset.from_dict({"text": texts}).to_iterable_dataset(),
    }
    for name, source in sources.items():
        add_exits(base[0], source, tmp_path / name, agreement=0.5, **QUIET)
    weights = {(tmp_path / name / "exits.safetensors").read_bytes() for name in sources}
    assert len(weights) == 1


def test_command(base, tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("\n".join(draw_texts(80)) + "\n")
    asked = ["--texts", str(tmp_path / "texts.txt"), "--output", str(tmp_path / "exits"), "--agreement", "0.5"]
    assert main(["add-exits", str(base[0]), *asked, "--exit_layers", "2", "4", "--disable_tqdm"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["speeds"][0]["name"] == "agreement-0.5" and found["certifying"] == 40
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "exits")
    assert model.layer_numbers == [2, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"agreement": 1.0}, "`agreement`=1.0 must be a number strictly between 0 and 1"),
        ({"agreement": [0.9, "high"]}, "`agreement`"),
        ({"agreement": []}, "`agreement`"),
        ({"risk": 0}, "`risk`=0 must be a number strictly between 0 and 1"),
        ({"texts": ["w10"] * 20}, "`texts` holds 20 texts; exits learn from at least 40"),
        ({"texts": [*draw_texts(60), " "]}, "Row 61 of `texts` is empty"),
        ({"texts": "no.txt"}, "there is no such file"),
        ({"exit_layers": [4]}, r"`exit_layers`=\[4\] has no exit before the last layer"),
        ({"exit_layers": [9]}, "exit_layers"),
        ({"agreement": [0.9999999, 0.99999999]}, "must be numbers that differ in their first six digits"),
        ({"label_column": "label"}, "`label_column`='label' is of a data set, or of a file with columns"),
        (
            {"label_column": "kind", "texts": TABLE},
            "`label_column`='kind' is no column of the data set; its columns are 'text', 'label'",
        ),
        ({"label_column": "label", "texts": TABLE.to_iterable_dataset()}, "is a stream"),
        ({"batch_size": 0}, "`batch_size`=0"),
    ],
)
def test_mistakes_are_told_before_anything_runs(base, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr("transformers_cee.adding.run.collect_exits", lambda *_, **__: pytest.fail("the model has run"))
    asked = {"texts": draw_texts(60), "output": tmp_path / "exits", **QUIET, **change}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        add_exits(base[0], **asked)
    assert not (tmp_path / "exits").exists()


def test_other_checkpoints_are_refused(base, added, tmp_path):
    asked = {"texts": draw_texts(60), "output": tmp_path / "exits", **QUIET}
    with pytest.raises(ValueError, match="has exits already"):
        add_exits(added[0], **asked)
    base[1].bert.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="is no fine-tuned classifier: it lacks"):
        add_exits(tmp_path / "bare", **asked)
    fine_tuned("bert_cee", tmp_path / "regression", num_labels=1)
    with pytest.raises(ValueError, match="is a regression"):
        add_exits(tmp_path / "regression", **asked)


def test_states_are_in_the_precision_of_the_model(base, tmp_path, monkeypatch):
    """Whatever other trainers of the process have asked for."""
    texts = draw_texts(80)
    alone = add_exits(base[0], texts, tmp_path / "alone", agreement=0.5, **QUIET)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state(True)
    try:
        assert Accelerator(cpu=True).mixed_precision == "bf16"
        again = add_exits(base[0], texts, tmp_path / "again", agreement=0.5, **QUIET)
    finally:
        AcceleratorState._reset_state(True)
    assert again.speeds[0].depth == alone.speeds[0].depth
    weights = [(tmp_path / name / "exits.safetensors").read_bytes() for name in ("alone", "again")]
    assert weights[0] == weights[1]


def test_folders_are_not_written_over(base, added, tmp_path):
    with pytest.raises(ValueError, match="exists and is no empty folder"):
        add_exits(base[0], draw_texts(60), added[0], **QUIET)


def test_a_base_is_found_from_everywhere(base, tmp_path, monkeypatch):
    monkeypatch.chdir(base[0].parent)
    add_exits(base[0].name, draw_texts(60), tmp_path / "exits", agreement=0.5, **QUIET)
    monkeypatch.chdir(tmp_path)
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "exits")


@pytest.mark.parametrize(
    ("given", "names", "expected"),
    [
        (["b", "a"], {0: "a", 1: "b"}, [1, 0]),
        (["1", "0"], {0: "a", 1: "b"}, [1, 0]),
        ([1, 0], {0: "a", 1: "b"}, [1, 0]),
        # Texts are names, numbers count classes.
        (["1", "2"], {0: "1", 1: "2", 2: "3"}, [0, 1]),
        ([1, 2], {0: "1", 1: "2", 2: "3"}, [1, 2]),
    ],
)
def test_labels_are_names_or_numbers_of_classes(given, names, expected):
    texts = GivenTexts(["a text"] * len(given), [*range(1, len(given) + 1)], given)
    assert class_ids(texts, BertConfig(id2label=names), "label").tolist() == expected


@pytest.mark.parametrize("kind", ["list", "iterator", "csv"])
def test_of_many_texts_some_are_drawn(kind, tmp_path):
    """Each as likely as any other, in their order, and with their labels."""
    texts = [f"text {number}" for number in range(1, 201)]
    path = tmp_path / "texts.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *((text, text[5:]) for text in texts)])
    source = {"list": lambda: texts, "iterator": lambda: iter(texts), "csv": lambda: path}[kind]
    label_column = "label" if kind == "csv" else None
    counts = torch.zeros(200)
    for seed in range(200):
        given = read_texts(source(), "text", label_column, 50, seed)
        assert len(given) == 50 and given.numbers == sorted(set(given.numbers))
        assert given.texts == [texts[number - 1] for number in given.numbers]
        assert given.labels == (None if label_column is None else [str(number) for number in given.numbers])
        counts[torch.tensor(given.numbers) - 1] += 1
    # Fifty times each, ± √(200 · ¼ · ¾) = 6.1.
    assert counts.sum() == 200 * 50 and counts.std() < 8 and counts.min() > 20
    whole = read_texts(source(), "text", label_column, 200, 0)
    assert whole.texts == texts and whole.numbers == [*range(1, 201)]


def test_a_row_is_named_by_its_place_among_all(base, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "MOST_LEARNING", 40)
    monkeypatch.setattr(run, "MOST_CERTIFYING", 40)
    data = Dataset.from_dict({"text": draw_texts(200), "label": [f"none {number}" for number in range(1, 201)]})
    with pytest.raises(ValueError, match=r"Row (\d+) of `texts` has the label 'none \1'"):
        add_exits(base[0], data, tmp_path / "exits", label_column="label", **QUIET)


def test_unknown_labels(base, tmp_path):
    data = Dataset.from_dict({"text": draw_texts(60), "label": ["LABEL_0"] * 59 + ["nothing"]})
    with pytest.raises(ValueError, match="Row 60 of `texts` has the label 'nothing'; the model has 'LABEL_0'"):
        add_exits(base[0], data, tmp_path / "exits", label_column="label", **QUIET)


def test_pipelines_find_the_tokenizer(added):
    classify = pipeline("early-exit-text-classification", model=str(added[0]))
    assert {"label", "score"} <= set(classify("w1 w2")[0])


def test_the_tokenizer_is_that_of_the_base(base, added):
    """It cuts no more texts than the base's does."""
    files = [json.loads((folder / "tokenizer.json").read_text()) for folder in (base[0], added[0])]
    assert files[0] == files[1]


def test_stopped_while_time_is_taken(base, tmp_path, monkeypatch):
    """The exits are there, with their tokenizer."""
    monkeypatch.setattr(run, "_time", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        add_exits(base[0], draw_texts(60), tmp_path / "exits", agreement=0.5, **QUIET)
    classify = pipeline("early-exit-text-classification", model=str(tmp_path / "exits"))
    assert {"label", "score"} <= set(classify("w1 w2")[0])


def test_too_few_texts_for_a_promise_are_told_before_anything_runs(base, tmp_path, caplog, monkeypatch):
    def stop(*given):
        raise InterruptedError

    monkeypatch.setattr(run, "_stored", stop)
    with caplog.at_level(logging.WARNING), pytest.raises(InterruptedError):
        add_exits(base[0], draw_texts(60), tmp_path / "exits", agreement=[0.99, 0.9], **QUIET)
    said = [one.getMessage() for one in caplog.records if "texts that certify" in one.getMessage()]
    # log(0.025) / log(0.99) = 367.04, and 35.01.
    assert "`agreement`=0.99 takes 368 texts that certify" in said[0] and "there are 30" in said[0]
    assert "`agreement`=0.9 takes 36 texts" in said[1] and len(said) == 2
