# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The example script end to end, with a tiny random BERT on 60 generated rows."""

from __future__ import annotations

import json

import common
import pytest
import run_glue_cee
import torch
import yaml
from arguments import EvaluationArguments, ModelArguments, parse_arguments
from clocks import steady_clock
from common import read_options
from glue_data import DataArguments
from tiny_bert import QUESTIONS, WORDS, make_options, save_checkpoint, write_questions
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from transformers_cee import ConsistentEETrainingArguments


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return write_questions(tmp_path_factory.mktemp("questions") / "train.csv")


@pytest.fixture(scope="module")
def run(checkpoint, questions, tmp_path_factory):
    """(folder, results.json) of a run of all phases, from a yaml file and an override."""
    output = tmp_path_factory.mktemp("run")
    config = output / "config.yaml"
    config.write_text(yaml.safe_dump(make_options(checkpoint, questions, output) | {"seed": 1}))
    with pytest.MonkeyPatch.context() as patch:
        steady_clock(patch)
        run_glue_cee.main([str(config), "--seed", "2"])
    return output, json.loads((output / "results.json").read_text())


def test_all_phases_run(run):
    _, results = run
    assert list(results["train"]) == ["heads", "policy", "consistent-1-model", "consistent-1-policy"]
    assert results["arguments"]["seed"] == 2
    assert results["train_seconds"] > 0


def test_results_name_the_splits(run):
    _, results = run
    assert results["corpus"]["splits"] == {"train": 36, "validation": 12, "test": 12}
    assert any(note.startswith("no test split: 12 of 60") for note in results["corpus"]["notes"])
    assert results["corpus"]["label_names"] == ["human", "location", "number"]


def test_every_criterion_is_compared_on_test(run):
    _, results = run
    test = results["comparisons"]["test"]
    assert set(test["curves"]) == set(test["matched"]) == {"policy", "max_probability", "entropy", "patience"}
    for curve in test["curves"].values():
        for point in curve:
            assert 1.0 <= point["depth"] <= 3.0
            assert sum(point["exit_histogram"].values()) == 12
            assert (point["wall_clock_speedup"], point["wall_clock_spread"]) == (1.0, 0.0)
    assert 0.5 in [point["exit_threshold"] for point in test["curves"]["policy"]]
    assert test["full"]["depth"] == 3.0
    assert test["oracle"]["metrics"]["accuracy"] >= max(point["metrics"]["accuracy"] for point in test["exits"])
    assert set(results["executed"]) == {"4", "1"}
    assert results["environment"]["device"] == "cpu"
    assert len(results["executed"]["1"]) == len(test["curves"]["policy"])


def test_pictures_and_card(run):
    output, _ = run
    for name in ("curve.png", "exits.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    card = (output / "README.md").read_text()
    assert "a tiny BERT" in card
    assert "ConsistentEE (policy)" in card
    assert "no test split: 12 of 60" in card
    assert "1.00x ± 0.00" in card and "`noise` stands where" in card


def test_saved_folder_loads_through_the_auto_classes(run):
    output, _ = run
    import classify_demo

    model = AutoModelForSequenceClassification.from_pretrained(output).eval()
    tokenizer = AutoTokenizer.from_pretrained(output)
    results = classify_demo.classify(model, tokenizer, ["Who painted the city ?", "Where is the river ?"], 1.0)
    assert [result["exit_layer"] for result in results] == [3, 3]
    assert {result["label"] for result in results} <= set(QUESTIONS)


def test_classify_demo_prints_layers(run, capsys):
    output, _ = run
    import classify_demo

    classify_demo.main(["--model", str(output), "--exit_threshold", "0", "who painted the river ?"])
    printed = capsys.readouterr().out
    assert "[#..] 1/3" in printed
    assert "depth 1.00 of 3 layers" in printed


def test_evaluation_alone(run, questions, tmp_path):
    """Of a model that may leave at the second of three layers only."""
    options = make_options(run[0], questions, tmp_path)
    words = [f"--{name}={value}" for name, value in options.items() if not isinstance(value, list)]
    words = [word for word in words if not word.startswith("--do_train")]
    results = run_glue_cee.main([*words, "--eval_timing_rows=0", "--min_exit_layer=2", "--baselines", "entropy"])
    assert "train" not in results
    assert results["executed"] == {}
    points = [point for curve in results["comparisons"]["test"]["curves"].values() for point in curve]
    assert min(point.depth for point in points) >= 2.0 and all(point.exit_histogram["1"] == 0 for point in points)
    assert results["comparisons"]["test"].keys() >= {"curves", "full"}
    again = run[1]["comparisons"]["test"]["full"]["metrics"]
    assert results["comparisons"]["test"]["full"].metrics == pytest.approx(again)


@pytest.mark.parametrize("name", ["train_file", "data_dir"])
def test_names_that_no_file_can_have(name):
    with pytest.raises(ValueError, match=f"`{name}` must be an existing"):
        DataArguments(**{"task_name": "sst2" if name == "data_dir" else None, name: "x" * 5000 + ".csv"})


class TestWrittenBefore:
    def test_an_evaluation_alone_keeps_what_the_training_wrote(self, run, questions, tmp_path):
        options = make_options(run[0], questions, tmp_path) | {"operating_points": 1}
        words = [f"--{name}={value}" for name, value in options.items() if not isinstance(value, list)]
        words = [word for word in words if not word.startswith("--do_train")]
        (tmp_path / "results.json").write_text(json.dumps({"train": {"heads": {"train_loss": 1.0}}, "old": 1}))
        results = run_glue_cee.main([*words, "--eval_timing_rows=0", "--baselines", "entropy"])
        assert results["train"] == {"heads": {"train_loss": 1.0}} and "old" not in results

    def test_whether_to_resume(self, tmp_path):
        for given, expected in (("true", True), ("True", True), ("false", None), ("runs/a", "runs/a"), (None, None)):
            arguments = ConsistentEETrainingArguments(output_dir=str(tmp_path), resume_from_checkpoint=given)
            assert common.resume_argument(arguments) == expected


def test_matmul_precision_is_for_training_alone(checkpoint, questions, tmp_path, monkeypatch):
    """Exits are collected as the model will serve, between the phases too."""
    seen = {"compute_loss": set(), "collect_exits": set()}
    run = run_glue_cee.ConsistentEETrainer
    for name, levels in seen.items():
        trainer = run if name == "collect_exits" else run.phase_trainer
        original = getattr(trainer, name)

        def spy(*args, original=original, levels=levels, **kwargs):
            levels.add(torch.get_float32_matmul_precision())
            return original(*args, **kwargs)

        monkeypatch.setattr(trainer, name, spy)
    options = make_options(checkpoint, questions, tmp_path) | {"phases": ["heads", "hardness", "policy"]}
    options |= {"do_eval": False, "save_exits": True, "float32_matmul_precision": "medium"}
    config = tmp_path / "config.json"
    config.write_text(json.dumps(options))
    run_glue_cee.main([str(config)])
    assert seen == {"compute_loss": {"medium"}, "collect_exits": {"highest"}}
    assert torch.get_float32_matmul_precision() == "highest"


def test_unknown_matmul_precision():
    message = "`float32_matmul_precision` must be among highest, high, medium; got 'low'"
    with pytest.raises(ValueError, match=message):
        ModelArguments(model_name_or_path="anything", float32_matmul_precision="low")


def test_pairs_and_regression(checkpoint, tmp_path):
    rows = [
        {"one": f"who {WORDS[index % 9]} ?", "two": "where is the river ?", "score": index / 7} for index in range(40)
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    options = make_options(checkpoint, data, tmp_path / "out")
    options |= {"phases": "heads", "regression": True, "label_column": "score", "eval_timing_rows": 0}
    words = [f"--{name}={value}" for name, value in options.items() if not isinstance(value, list)]
    results = run_glue_cee.main([*words, "--text_columns", "one", "two"])
    # Patience looks at predictions; max_probability and entropy need classes.
    assert list(results["comparisons"]["test"]["curves"]) == ["policy", "patience"]
    assert "max_probability, entropy do not apply" in (tmp_path / "out" / "README.md").read_text()
    assert set(results["comparisons"]["test"]["full"].metrics) == {"pearson", "spearmanr"}


def test_yaml_with_overrides(checkpoint, questions, tmp_path):
    config = tmp_path / "run.yaml"
    options = make_options(checkpoint, questions, tmp_path / "a") | {
        "exit_layers": 2,
        "phases": ["heads", "policy"],
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "max_train_samples": None,
        "policy_learning_rate": "1e-4",
    }
    config.write_text(yaml.safe_dump(options))
    model, data, evaluation, training = parse_arguments(
        [str(config), "--output_dir", str(tmp_path / "b"), "--phases", "heads", "--reward", "per_layer"]
    )
    assert training.output_dir == str(tmp_path / "b")
    assert training.phases == ["heads"]
    assert (training.policy_learning_rate, training.reward) == (1e-4, "per_layer")
    assert training.lr_scheduler_kwargs == {"num_cycles": 2}
    assert data.max_train_samples is None
    assert evaluation.timing_batch_sizes == [4, 1]
    assert model.exit_options() == {
        "exit_layers": 2, "exit_pooling": "mean", "exit_norm": "layer_norm",
    }  # fmt: skip


def test_json_configuration(checkpoint, questions, tmp_path):
    config = tmp_path / "run.json"
    config.write_text(json.dumps(make_options(checkpoint, questions, tmp_path) | {"exit_layers": [1, 2]}))
    model, *_ = parse_arguments([str(config)])
    assert model.exit_options()["exit_layers"] == [1, 2]


def test_unknown_option_in_the_file(checkpoint, questions, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(make_options(checkpoint, questions, tmp_path) | {"policy_learning_rat3": 1}))
    with pytest.raises(ValueError, match="policy_learning_rat3"):
        parse_arguments([str(config)])


def test_configuration_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"No such configuration file: .*missing\.yaml"):
        read_options(tmp_path / "missing.yaml")
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    with pytest.raises(ValueError, match="expected `name: value` pairs; got list"):
        read_options(tmp_path / "list.yaml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"baselines": ["luck"]}, "`baselines` must be among calibrated_probability, .*, token_hash; got 'luck'"),
        ({"operating_points": 0}, "`operating_points` must be at least 1"),
        ({"timing_batch_sizes": [0]}, "`timing_batch_sizes` must be numbers of at least 1"),
    ],
)
def test_bad_evaluation_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        EvaluationArguments(**arguments)


def test_target_depths_include_half():
    assert EvaluationArguments(operating_points=6).target_depths(12) == [3.0, 4.5, 6.0, 7.5, 9.0, 10.5]


def test_nothing_to_do(checkpoint, questions, tmp_path):
    words = ["--model_name_or_path", str(checkpoint), "--train_file", str(questions), "--output_dir", str(tmp_path)]
    with pytest.raises(ValueError, match="Nothing to do"):
        run_glue_cee.main(words)
