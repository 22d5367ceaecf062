# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Bookkeeping of a run on disk."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers.trainer_utils import TrainOutput

from transformers_cee.training.phases import PhaseLog


STEPS = ("heads", "hardness", "policy", "consistent-1-model", "consistent-1-policy")
RESULT = TrainOutput(6, 1.25, {"train_loss": 1.25, "train_runtime": 0.5})


def finish(log, step, result=RESULT):
    """A step and the weights that it leaves."""
    if step != "hardness":
        folder = Path(log.weights_folder(step))
        folder.mkdir(parents=True)
        save_file({"weight": torch.ones(2)}, folder / "model.safetensors")
    log.finish(step, None if step == "hardness" else result)


def test_finished_steps_are_read_again(tmp_path):
    log = PhaseLog(str(tmp_path / "phases"))
    finish(log, "heads")
    finish(log, "hardness")
    again = PhaseLog(str(tmp_path / "phases"))
    again.resume(STEPS)
    assert list(again.finished) == ["heads", "hardness"]
    assert again.result("heads") == RESULT and again.result("hardness") is None
    assert again.last_weights == str(tmp_path / "phases" / "heads" / "finished")


def test_figures_that_are_no_numbers_come_back(tmp_path):
    log = PhaseLog(str(tmp_path))
    finish(log, "heads", TrainOutput(6, math.nan, {"train_loss": math.nan, "x": math.inf}))
    again = PhaseLog(str(tmp_path))
    again.resume(STEPS)
    result = again.result("heads")
    assert math.isnan(result.training_loss) and result.metrics["x"] == math.inf


def test_what_was_logged_comes_back(tmp_path):
    """Numbers of all kinds, also of steps without a result; what JSON has no word for stays out."""
    log = PhaseLog(str(tmp_path))
    (tmp_path / "heads").mkdir()
    log.finish("hardness", torch.ones(2), [{"memorized_layer": np.float32(2.5), "step": 0}])
    log.finish("heads", RESULT, [{"loss": math.inf, "epoch": 0.5, "note": "text", "odd": torch.ones(2)}, {"step": 3}])
    again = PhaseLog(str(tmp_path))
    again.finished = json.loads((tmp_path / "finished.json").read_text())
    assert again.history == [
        {"memorized_layer": 2.5, "step": 0, "phase": "hardness"},
        {"loss": math.inf, "epoch": 0.5, "note": "text", "phase": "heads"},
        {"step": 3, "phase": "heads"},
    ]


@pytest.mark.parametrize("history", ["missing", None, 3, {}, [3], [{"loss": [1.0]}], [{"loss": None}]])
@pytest.mark.parametrize("step", ["heads", "hardness"])
def test_a_log_of_another_kind_is_refused(tmp_path, step, history):
    finish(PhaseLog(str(tmp_path)), step)
    path = tmp_path / "finished.json"
    stored = json.loads(path.read_text())
    stored[step].pop("log_history") if history == "missing" else stored[step].update(log_history=history)
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=rf"finished\.json holds no `log_history` of the step '{step}'"):
        PhaseLog(str(tmp_path)).resume(STEPS)


def test_only_the_last_weights_are_kept(tmp_path):
    log = PhaseLog(str(tmp_path))
    for step in ("heads", "hardness", "policy"):
        finish(log, step)
    assert not (tmp_path / "heads" / "finished").exists() and (tmp_path / "policy" / "finished").is_dir()


def test_other_processes_write_nothing(tmp_path):
    log = PhaseLog(str(tmp_path / "phases"), writes=False)
    log.finish("heads", RESULT)
    log.start()
    assert list(log.finished) == ["heads"] and not list(tmp_path.iterdir())


def test_a_new_run_keeps_the_old_one(tmp_path):
    folder = tmp_path / "phases"
    PhaseLog(str(folder)).finish("heads", RESULT)
    log = PhaseLog(str(folder))
    log.start()
    assert not folder.exists() and log.finished == {}
    (aside,) = tmp_path.iterdir()
    assert aside.name.startswith("phases-") and "heads" in json.loads((aside / "finished.json").read_text())


def test_a_run_that_finished_nothing_can_be_resumed(tmp_path):
    (tmp_path / "heads").mkdir()
    log = PhaseLog(str(tmp_path))
    log.resume(STEPS)
    assert log.finished == {}


class TestWhichRun:
    def test_its_own_folder(self, tmp_path):
        for resume in (None, False, True):
            log = PhaseLog.of(str(tmp_path), resume)
            assert (log.directory, log.named) == (str(tmp_path / "phases"), None)

    def test_another_one(self, tmp_path):
        (tmp_path / "phases").mkdir()
        for path in (tmp_path, f"{tmp_path}/"):
            log = PhaseLog.of("elsewhere", path)
            assert (log.directory, log.named) == (str(tmp_path / "phases"), None)

    def test_a_checkpoint(self, tmp_path):
        named = tmp_path / "phases" / "policy" / "checkpoint-3"
        named.mkdir(parents=True)
        log = PhaseLog.of("elsewhere", f"{named}/")
        assert (log.directory, log.named) == (str(tmp_path / "phases"), str(named))

    @pytest.mark.parametrize("name", ["nowhere", "checkpoint-500", "empty"])
    def test_no_run(self, tmp_path, name):
        """A folder that is not there, a checkpoint of no phase, and a folder without phases."""
        (tmp_path / "checkpoint-500").mkdir()
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match=rf"resume_from_checkpoint.*{name}.*`output_dir` of a run"):
            PhaseLog.of("elsewhere", str(tmp_path / name))

    def test_a_checkpoint_of_a_finished_step(self, tmp_path):
        finish(PhaseLog(str(tmp_path / "phases")), "heads")
        (tmp_path / "phases" / "heads" / "checkpoint-3").mkdir()
        with pytest.raises(ValueError, match="checkpoint-3' is of a finished step"):
            PhaseLog.of("elsewhere", str(tmp_path / "phases" / "heads" / "checkpoint-3")).resume(STEPS)


class TestWhatIsReadIsChecked:
    @pytest.mark.parametrize("step", ["../../victim", "/victim", ".", "", "heads/../..", "consistent-1-model/..", "x"])
    def test_steps_are_no_paths(self, tmp_path, step):
        """Weights would be read from there, and the folder deleted after the next step."""
        folder = tmp_path / "run" / "phases"
        victim = tmp_path / "victim" / "finished"
        victim.mkdir(parents=True)
        save_file({"weight": torch.ones(2)}, victim / "model.safetensors")
        folder.mkdir(parents=True)
        stored = {"global_step": 1, "training_loss": 0.0, "metrics": {}, "log_history": []}
        (folder / "finished.json").write_text(json.dumps({step.replace("/victim", f"{tmp_path}/victim"): stored}))
        with pytest.raises(ValueError, match=r"finished.json names .*no step of this run; its steps are heads, "):
            PhaseLog(str(folder)).resume(STEPS)
        assert victim.is_dir()

    @pytest.mark.parametrize(
        "text",
        [
            '["heads"]',
            "3",
            "",
            '{"heads":',
            '{"heads": null}',
            '{"heads": {"metrics": {}, "log_history": []}}',
            '{"heads": [1, 2, {}]}',
        ],
    )
    def test_content(self, tmp_path, text):
        (tmp_path / "finished.json").write_text(text)
        with pytest.raises(ValueError, match=r"finished\.json .*begin anew without `resume_from_checkpoint`"):
            PhaseLog(str(tmp_path)).resume(STEPS)

    @pytest.mark.parametrize("damage", ["folder", "file", "cut"])
    def test_weights_of_the_last_step(self, tmp_path, damage):
        log = PhaseLog(str(tmp_path))
        finish(log, "heads")
        finish(log, "hardness")
        path = tmp_path / "heads" / "finished" / "model.safetensors"
        if damage == "cut":
            path.write_bytes(path.read_bytes()[:-3])
        else:
            path.unlink()
            if damage == "folder":
                path.parent.rmdir()
        with pytest.raises(ValueError, match=r"heads/finished.*finished\.json calls finished.*begin anew"):
            PhaseLog(str(tmp_path)).resume(STEPS)

    def test_of_another_model(self, tmp_path):
        log = PhaseLog(str(tmp_path))
        finish(log, "heads")
        with pytest.raises(ValueError, match=r"heads/finished holds weights of another model(?s:.*)run began with"):
            log.load(torch.nn.Linear(2, 2), lambda folder, model: None)
