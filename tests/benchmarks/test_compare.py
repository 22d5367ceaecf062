# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The comparison of methods: which runs there are, their commands, what is repeated, and one evaluated for real."""

from __future__ import annotations

import json
import math
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import compare
import pytest
import run_glue_cee
import torch
import yaml
from clocks import steady_clock
from tiny_models import WORDS, tiny_tokenizer
from transformers import BertConfig, BertModel

from transformers_cee.exits.criteria import CRITERIA


CONFIG = {
    "options": {"learning_rate": 1e-3, "num_train_epochs": 1},
    "tasks": {
        "questions": {"seeds": [1, 2], "options": {"train_file": "questions/train.csv", "num_train_epochs": 3}},
        "pairs": {"seeds": [1], "options": {"task_name": "mrpc", "data_dir": "glue/MRPC"}},
    },
    "objectives": {
        "consistentee": {"start": "layer_weighted", "options": {"phases": ["consistent"], "learning_rate": 1e-4}},
        "layer_weighted": {"options": {"phases": ["heads", "policy"]}},
    },
}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    return path


def arguments(config, *words, stage="train"):
    return compare.parse_arguments([stage, str(config), *words])


def names(config, *words):
    return [run.name for run in compare.read_runs(arguments(config, *words))]


def test_runs_of_the_configuration(config):
    tasks = ["questions-{}-1", "questions-{}-2", "pairs-{}-1"]
    wanted = {task.format(objective) for task in tasks for objective in CONFIG["objectives"]}
    assert len(names(config)) == 6
    assert set(names(config)) == wanted


def test_some_runs(config):
    assert names(config, "--tasks", "pairs") == ["pairs-consistentee-1", "pairs-layer_weighted-1"]
    assert names(config, "--objectives", "layer_weighted", "--seeds", "2") == ["questions-layer_weighted-2"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "pairs", "poems"], r"`tasks`=\['poems'\] unknown; accepted are questions, pairs"),
        (["--objectives", "luck"], r"`objectives`=\['luck'\] unknown; accepted are consistentee, layer_weighted"),
        (["--seeds", "1", "9"], r"`seeds`=\[9\] unknown; accepted are 1, 2"),
    ],
)
def test_unknown_names(config, words, message):
    with pytest.raises(ValueError, match=message):
        compare.read_runs(arguments(config, *words))


def test_command_of_a_run_that_starts_anew(config, tmp_path):
    run = compare.read_runs(arguments(config, "--objectives", "layer_weighted"))[1]
    words = run.command("bert", tmp_path / "data", tmp_path / "runs")
    assert words[:2] == [sys.executable, str(compare.SCRIPT)]
    assert compare.SCRIPT.is_file()
    assert "--seed=2" in words
    assert "--model_name_or_path=bert" in words
    assert f"--output_dir={tmp_path / 'runs' / 'questions-layer_weighted-2'}" in words
    assert f"--train_file={tmp_path / 'data' / 'questions' / 'train.csv'}" in words
    assert words[words.index("--phases") :][:3] == ["--phases", "heads", "policy"]
    # The task's options stand above the common ones, the objective's above both.
    assert "--num_train_epochs=3" in words
    assert "--learning_rate=0.001" in words


def test_command_of_a_run_that_continues_another(config, tmp_path):
    (run,) = compare.read_runs(arguments(config, "--objectives", "consistentee", "--tasks", "pairs"))
    words = run.command("bert", tmp_path / "data", tmp_path / "runs")
    assert f"--model_name_or_path={tmp_path / 'runs' / 'pairs-layer_weighted-1'}" in words
    assert not any(word.endswith("=bert") for word in words)
    assert f"--data_dir={tmp_path / 'data' / 'glue' / 'MRPC'}" in words
    assert "--learning_rate=0.0001" in words


@pytest.fixture
def trained(config, tmp_path, monkeypatch):
    """`train` with a subprocess that only notes its name; `trained(fails=...)` returns the names in order."""

    def run(*words, fails=()):
        called = []

        def fake(command, stdout, stderr, env):
            (output,) = [word.split("=")[1] for word in command if word.startswith("--output_dir=")]
            name = output.rsplit("/", 1)[1]
            called.append(name)
            assert env["OMP_NUM_THREADS"] == "1"
            if name in fails:
                return SimpleNamespace(returncode=1)
            folder = tmp_path / "runs" / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "exits-test.safetensors").touch()
            return SimpleNamespace(returncode=0)

        monkeypatch.setattr(compare.subprocess, "run", fake)
        options = ["--model", "bert", "--data", str(tmp_path), "--runs", str(tmp_path / "runs")]
        with pytest.raises(SystemExit, match=f"No model of {', '.join(fails)};") if fails else nullcontext():
            compare.main(["train", str(config), *options, *words])
        return called

    return run


def test_models_that_others_continue_come_first(trained):
    called = trained()
    assert len(called) == 6
    assert all("layer_weighted" in name for name in called[:3])
    assert all("consistentee" in name for name in called[3:])


def test_trained_runs_are_not_repeated(trained):
    assert len(trained("--tasks", "questions")) == 4
    assert trained() == ["pairs-layer_weighted-1", "pairs-consistentee-1"]
    assert trained() == []


def test_a_failure_is_reported_and_stops_nothing(trained, capsys, tmp_path):
    assert len(trained(fails=["questions-layer_weighted-1"])) == 6
    lines = capsys.readouterr().out.splitlines()
    failed = [line for line in lines if "FAILED" in line]
    assert len(lines) == 6
    assert len(failed) == 1
    assert failed[0].startswith("questions-layer_weighted-1: FAILED, see ")
    assert str(tmp_path / "runs" / "questions-layer_weighted-1.log") in failed[0]
    assert trained() == ["questions-layer_weighted-1"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train"], "`train` needs `--model` and `--data`; got None"),
        (["train", "--data", "data"], "`train` needs `--model`; got None"),
        (["evaluate"], "`evaluate` needs `--data`; got None"),
    ],
)
def test_what_a_stage_needs(config, tmp_path, words, message):
    stage, *others = words
    with pytest.raises(ValueError, match=message):
        compare.main([stage, str(config), "--results", str(tmp_path / "results"), *others])
    assert not (tmp_path / "results").exists()


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A tiny model of 4 layers, trained and evaluated: (root, words of `evaluate`, its JSON file)."""
    root = tmp_path_factory.mktemp("compare")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **sizes)).save_pretrained(root / "bert")
    tiny_tokenizer().save_pretrained(root / "bert")
    words = WORDS[5:]
    rows = [f"{words[index % 11]} is {words[index % 7]},{'no' if index % 3 else 'yes'}" for index in range(72)]
    (root / "train.csv").write_text("\n".join(["sentence,label", *rows]) + "\n")
    options = {
        "validation_split": 0.3, "test_split": 0.3, "learning_rate": 1e-2, "num_train_epochs": 1,
        "policy_num_train_epochs": 2, "policy_inputs": "confidence", "policy_condition": "film",
        "reward_loss": "error", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    config = {
        "options": options,
        "tasks": {"films": {"seeds": [3], "options": {"train_file": "train.csv"}}},
        "objectives": {
            "layer_weighted": {
                "options": {"phases": ["heads", "hardness", "policy"]},
                "policies_at": [0.01, 0.1],
            },
        },
    }
    path = root / "compare.yaml"
    path.write_text(yaml.safe_dump(config))
    (run,) = compare.read_runs(arguments(path))
    run_glue_cee.main(run.command(str(root / "bert"), root, root / "runs")[2:])
    stage = ["evaluate", str(path), "--data", str(root), "--runs", str(root / "runs"), "--results", str(root / "out")]
    with pytest.MonkeyPatch.context() as patch:
        steady_clock(patch)
        compare.main(stage)
    return root, stage, root / "out" / "films-layer_weighted-3.json"


def test_every_criterion_is_evaluated(evaluated):
    found = json.loads(evaluated[2].read_text())
    assert (found["task"], found["objective"], found["seed"], found["metric"]) == (
        "films", "layer_weighted", 3, "accuracy",
    )  # fmt: skip
    assert found["num_layers"] == len(found["exits"]) == len(found["calibration_error"]) == 4
    assert found["rows"] == {"train": 28, "validation": 22, "test": 22}
    criteria = (set(CRITERIA) - {"oracle"}) | {"policies_by_alpha"}
    assert set(found["at_speedup"]) == set(found["curves"]) == criteria
    for values in found["at_speedup"].values():
        assert set(values) == {"1.2", "1.5", "2.0", "3.0", "4.0"}
        assert all(0 <= value <= 1 for value in values.values())
    assert set(found["on_dev"]) == criteria - {"policies_by_alpha"}
    for values in found["on_dev"].values():
        assert set(values) == {"1.2", "1.5", "2.0", "3.0", "4.0"}
        # Of each half of 22 rows, in the mean.
        assert math.isclose(22 * values["4.0"], round(22 * values["4.0"]))
    assert math.isclose(22 * found["full_on_dev"], round(22 * found["full_on_dev"]))
    # Four times as fast is the first layer for everybody.
    assert {values["4.0"] for values in found["at_speedup"].values()} == {found["exits"][0]}


def test_evaluated_figures_are_shares_and_depths(evaluated):
    found = json.loads(evaluated[2].read_text())
    for curve in found["curves"].values():
        assert curve
        assert [depth for depth, _ in curve] == sorted({depth for depth, _ in curve})
        # Shares of 22 rows.
        assert all(1 <= depth <= 4 and math.isclose(value * 22, round(value * 22)) for depth, value in curve)
    assert found["full"] == found["exits"][-1]
    assert found["oracle"]["metric"] == found["overthinking"]["oracle_accuracy"] >= max(found["exits"])
    assert found["oracle"]["depth"] == pytest.approx(found["overthinking"]["oracle_depth"])
    assert all(0 <= error <= 1 for error in found["calibration_error"].values())
    assert all(math.isfinite(loss) for loss in found["estimators"].values())


def test_evaluated_criteria_are_timed(evaluated):
    timed = json.loads(evaluated[2].read_text())["timed"]
    assert set(timed) == {"policy", "max_probability"}
    for by_batch in timed.values():
        assert set(by_batch) == {"1", "32"}
        # What a row does must not depend on its batch.
        assert by_batch["1"]["layers"] == pytest.approx(by_batch["32"]["layers"])
        assert all(1 <= found["layers"] <= 4 and found["wall_clock"] == 1.0 for found in by_batch.values())


def test_models_of_which_no_criterion_is_asked(evaluated):
    root, stage, path = evaluated
    config = yaml.safe_load((root / "compare.yaml").read_text())
    config["objectives"]["layer_weighted"] |= {"criteria": [], "policies_at": []}
    (root / "plain.yaml").write_text(yaml.safe_dump(config))
    compare.main(["evaluate", str(root / "plain.yaml"), *stage[2:-1], str(root / "plain")])
    plain, found = (json.loads((folder / path.name).read_text()) for folder in (root / "plain", path.parent))
    for name in ("at_speedup", "on_dev", "curves", "timed", "estimators"):
        assert plain[name] == {}
    assert all(plain[name] == found[name] for name in ("full", "full_on_dev", "oracle", "exits", "overthinking"))


def test_evaluated_runs_are_not_repeated(evaluated, capsys):
    _, stage, path = evaluated
    before = path.stat().st_mtime_ns
    compare.main(stage)
    assert path.stat().st_mtime_ns == before
    assert capsys.readouterr().out == ""


def test_the_report_reads_what_evaluation_writes(evaluated):
    root, _, path = evaluated
    page = root / "page.md"
    compare.main(["report", str(root / "compare.yaml"), "--results", str(path.parent), "--output", str(page)])
    full = json.loads(path.read_text())["full"]
    assert f"| layer-weighted | {100 * full:.1f} |" in page.read_text().replace("  ", "")
    assert (root / "page" / "films.png").read_bytes().startswith(b"\x89PNG")
