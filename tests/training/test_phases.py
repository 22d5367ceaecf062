# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Bookkeeping of a run on disk."""

from __future__ import annotations

import json

import pytest

from transformers_cee.training.phases import PhaseLog


def test_finished_steps_are_read_again(tmp_path):
    log = PhaseLog(str(tmp_path / "phases"))
    log.finish("heads")
    log.finish("hardness")
    assert json.loads((tmp_path / "phases" / "finished.json").read_text()) == ["heads", "hardness"]
    again = PhaseLog(str(tmp_path / "phases"))
    again.resume()
    assert again.finished == ["heads", "hardness"]


def test_other_processes_write_nothing(tmp_path):
    log = PhaseLog(str(tmp_path / "phases"), writes=False)
    log.finish("heads")
    log.start()
    assert log.finished == ["heads"] and not list(tmp_path.iterdir())


def test_a_new_run_keeps_the_old_one(tmp_path):
    folder = tmp_path / "phases"
    PhaseLog(str(folder)).finish("heads")
    log = PhaseLog(str(folder))
    log.start()
    assert not folder.exists() and log.finished == []
    (aside,) = tmp_path.iterdir()
    assert aside.name.startswith("phases-") and json.loads((aside / "finished.json").read_text()) == ["heads"]


def test_nothing_to_resume(tmp_path):
    with pytest.raises(ValueError, match=r"resume_from_checkpoint.*nowhere"):
        PhaseLog(str(tmp_path / "nowhere")).resume()


def test_a_run_that_finished_nothing_can_be_resumed(tmp_path):
    (tmp_path / "heads").mkdir()
    log = PhaseLog(str(tmp_path))
    log.resume()
    assert log.finished == []


def test_last_checkpoint(tmp_path):
    log = PhaseLog(str(tmp_path))
    assert log.checkpoint("heads") is None
    for number in (2, 10, 9):
        folder = tmp_path / "heads" / f"checkpoint-{number}"
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text("{}")
    # A kill came while this one was written.
    (tmp_path / "heads" / "checkpoint-11").mkdir()
    assert log.checkpoint("heads").endswith("checkpoint-10")
    assert log.checkpoint("policy") is None
