# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Which checkpoints a training goes on from after kills, and what it reports then."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from tiny import changed, tiny_model, tiny_trainer, weights
from transformers import EarlyStoppingCallback, TrainerCallback

from transformers_cee.training.checkpoints import Needs, damage, newest_readable, random_files


OPTIONS = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2, "policy_num_train_epochs": 4}
LAST = "checkpoint-8"


class Kill(Exception):
    """Stands for a process that is stopped."""


class KillAt(TrainerCallback):
    def __init__(self, phase: str, step: int) -> None:
        self.phase, self.step = phase, step

    def on_step_end(self, args, state, control, **kwargs):
        if args.output_dir.endswith(self.phase) and state.global_step == self.step:
            raise Kill


def run(folder, *callbacks, seed=0, **fields):
    options = {**OPTIONS, "phases": ["heads", "policy"], **fields}
    model = tiny_model(seed, num_hidden_layers=4, hidden_dropout_prob=0.1)
    return tiny_trainer(folder, model, rows=40, trainer={"callbacks": list(callbacks)}, **options)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    trainer = run(tmp_path_factory.mktemp("whole"))
    results = trainer.train()
    return weights(trainer.model), results


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run that was killed in `heads`, one step behind its last checkpoint."""
    folder = tmp_path_factory.mktemp("killed")
    with pytest.raises(Kill):
        run(folder, KillAt("heads", 9)).train()
    return folder


@pytest.fixture
def stopped(killed, tmp_path):
    return shutil.copytree(killed, tmp_path / "run")


@pytest.fixture
def warnings(caplog):
    """Warnings of transformers' loggers, which keep them to themselves."""
    logger = logging.getLogger("transformers_cee")
    logger.addHandler(caplog.handler)
    yield lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    logger.removeHandler(caplog.handler)


def check_same(trainer, results, uninterrupted):
    expected, figures = uninterrupted
    assert not changed(expected, weights(trainer.model))
    assert list(results.phases) == list(figures.phases) and results.global_step == figures.global_step
    for step, result in results.phases.items():
        assert result.global_step == figures.phases[step].global_step
        assert result.training_loss == pytest.approx(figures.phases[step].training_loss)
        assert result.metrics["train_loss"] == result.training_loss


def state_emptied(checkpoint):
    (checkpoint / "trainer_state.json").write_text("")


def state_of_another_kind(checkpoint):
    path = checkpoint / "trainer_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"global_step": "8"}))


def state_with_another_history(checkpoint):
    path = checkpoint / "trainer_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"log_history": [1]}))


def weights_gone(checkpoint):
    (checkpoint / "model.safetensors").unlink()


def weights_cut(checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def optimizer_cut(checkpoint):
    path = checkpoint / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:-100])


def without(name):
    def remove(checkpoint):
        (checkpoint / name).unlink()

    remove.__name__ = f"without_{name}"
    return remove


def written_by(processes, checkpoint, says):
    """Makes a checkpoint look as if so many processes had written it."""
    state = (checkpoint / "rng_state.pth").read_bytes()
    (checkpoint / "rng_state.pth").unlink()
    for name in random_files(processes):
        (checkpoint / name).write_bytes(state)
    path = checkpoint / "totals.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"processes": processes})) if says else path.unlink()


def needs_of_processes(number):
    return Needs(("optimizer.pt", "scheduler.pt", *random_files(number)))


DAMAGE = [
    (state_emptied, "trainer_state.json"),
    (state_of_another_kind, "trainer_state.json"),
    (state_with_another_history, "trainer_state.json"),
    (weights_gone, "model.safetensors"),
    (weights_cut, "model.safetensors"),
    (optimizer_cut, "optimizer.pt"),
    *((without(name), name) for name in ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth")),
]


class TestDamage:
    @pytest.mark.parametrize("spoil,name", DAMAGE, ids=lambda value: getattr(value, "__name__", value))
    def test_the_file_is_named(self, stopped, spoil, name):
        checkpoint = stopped / "phases" / "heads" / LAST
        assert damage(checkpoint, Needs()) is None
        spoil(checkpoint)
        assert f"{checkpoint}/{name}" in damage(checkpoint, Needs())

    @pytest.mark.parametrize("spoil", [state_emptied, weights_gone, without("rng_state.pth")])
    def test_the_newest_readable_one_is_taken(self, stopped, uninterrupted, warnings, spoil):
        folder = stopped / "phases" / "heads"
        spoil(folder / LAST)
        assert newest_readable(folder, Needs()) == str(folder / "checkpoint-6")
        trainer = run(stopped, seed=7)
        results = trainer.train(resume_from_checkpoint=True)
        assert any(f"{folder / LAST} cannot be resumed from" in message for message in warnings())
        check_same(trainer, results, uninterrupted)

    def test_without_a_readable_one_the_phase_starts_anew(self, stopped, uninterrupted, warnings):
        for checkpoint in (stopped / "phases" / "heads").iterdir():
            state_emptied(checkpoint)
        trainer = run(stopped)
        results = trainer.train(resume_from_checkpoint=True)
        assert any("nothing to resume; starting anew" in message for message in warnings())
        check_same(trainer, results, uninterrupted)

    def test_a_callback_that_the_first_run_had_not(self, stopped):
        patience = EarlyStoppingCallback(early_stopping_patience=50)
        fields = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss"}
        trainer = run(stopped, patience, load_best_model_at_end=True, **fields)
        trainer.train(resume_from_checkpoint=True)
        state = json.loads((stopped / "phases" / "policy" / "checkpoint-12" / "trainer_state.json").read_text())
        assert {"EarlyStoppingCallback", "TrainerControl"} <= set(state["stateful_callbacks"])

    def test_other_folders_are_no_checkpoints(self, stopped, uninterrupted):
        folder = stopped / "phases" / "heads"
        for name in ("checkpoint-8-backup", "checkpoint-", "checkpoint-x"):
            shutil.copytree(folder / LAST, folder / name)
        (folder / "checkpoint-9").write_text("a file")
        assert newest_readable(folder, Needs()) == str(folder / LAST)
        trainer = run(stopped, seed=7)
        check_same(trainer, trainer.train(resume_from_checkpoint=True), uninterrupted)

    def test_a_named_one_is_refused(self, stopped):
        checkpoint = stopped / "phases" / "heads" / LAST
        without("optimizer.pt")(checkpoint)
        for trainer, path in ((run(stopped), checkpoint), (run(stopped), str(checkpoint))):
            with pytest.raises(ValueError, match=r"resume_from_checkpoint.*optimizer\.pt is missing.*another checkp"):
                trainer.train(resume_from_checkpoint=path)
        with pytest.raises(ValueError, match=r"resume_from_checkpoint.*optimizer\.pt is missing"):
            run(stopped).train_heads(resume_from_checkpoint=str(checkpoint))

    def test_a_named_one_is_taken(self, stopped, uninterrupted):
        checkpoint = stopped / "phases" / "heads" / "checkpoint-4"
        seen = []

        class See(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                seen.append(state.global_step)

        trainer = run(stopped, See(), seed=7)
        check_same(trainer, trainer.train(resume_from_checkpoint=checkpoint), uninterrupted)
        assert seen[0] == 5

    @pytest.mark.parametrize("says", [True, False])
    @pytest.mark.parametrize("wrote,reads", [(1, 2), (1, 4), (2, 1), (2, 4), (4, 1), (4, 2)])
    def test_another_number_of_processes_is_said(self, stopped, warnings, wrote, reads, says):
        """Where the checkpoint says how many wrote it, and where only its files do, as in Trainer's own."""
        folder = stopped / "phases" / "heads"
        written_by(wrote, folder / LAST, says)
        assert newest_readable(folder, needs_of_processes(reads)) == str(folder / LAST)
        (message,) = {message for message in warnings() if LAST in message}
        assert f"written by {wrote} process" in message and f"and {reads} go on" in message

    @pytest.mark.parametrize("says", [True, False])
    @pytest.mark.parametrize("wrote,gone", [(2, 0), (2, 1), (4, 2), (4, 3)])
    def test_of_the_same_number_of_processes_none_is_missing(self, stopped, wrote, gone, says):
        checkpoint = stopped / "phases" / "heads" / LAST
        written_by(wrote, checkpoint, says)
        assert damage(checkpoint, needs_of_processes(wrote)) is None
        (checkpoint / f"rng_state_{gone}.pth").unlink()
        reason = damage(checkpoint, needs_of_processes(wrote))
        if says or (wrote, gone) != (4, 3):
            assert reason == f"{checkpoint}/rng_state_{gone}.pth is missing"
        else:
            # Files alone cannot tell four processes without the last from three.
            assert reason is None


class TestWhatIsReported:
    @pytest.mark.parametrize("phase,step", [("heads", 9), ("policy", 3), ("policy", 12)])
    def test_as_of_an_uninterrupted_run(self, tmp_path, uninterrupted, phase, step):
        """Of phases that had finished, too; also where the last step had been taken."""
        with pytest.raises(Kill):
            run(tmp_path, KillAt(phase, step)).train()
        trainer = run(tmp_path, seed=7)
        check_same(trainer, trainer.train(resume_from_checkpoint=True), uninterrupted)

    def test_of_a_finished_run(self, tmp_path, uninterrupted):
        run(tmp_path).train()
        trainer = run(tmp_path, seed=7)
        check_same(trainer, trainer.train(resume_from_checkpoint=True), uninterrupted)

    @pytest.mark.parametrize("steps", [None, 1])
    def test_after_the_last_step(self, tmp_path, uninterrupted, steps):
        """No step was left to take; with and without losses that were logged before."""
        logs = {} if steps is None else {"logging_strategy": "steps", "logging_steps": steps}

        class KillAtEnd(TrainerCallback):
            def on_train_end(self, args, state, control, **kwargs):
                raise Kill

        with pytest.raises(Kill):
            run(tmp_path, KillAtEnd(), **logs).train()
        trainer = run(tmp_path, seed=7, **logs)
        check_same(trainer, trainer.train(resume_from_checkpoint=True), uninterrupted)


# Those of a resumed phase are of its last start.
TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "eval_runtime")
LOGS = {"logging_strategy": "steps", "logging_steps": 2, "phases": ["heads", "hardness", "policy"]}


def figures_and_times(expected, found):
    """What a run has to have logged: figures as expected, times as they are."""
    assert len(expected) == len(found)
    return [
        {name: other.get(name) if name in TIMES else approximately(value) for name, value in entry.items()}
        for entry, other in zip(expected, found, strict=True)
    ]


def approximately(value):
    return value if isinstance(value, str) else pytest.approx(value)


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    trainer = run(tmp_path_factory.mktemp("logged"), **LOGS)
    trainer.train()
    return trainer.state.log_history


class TestWhatIsLogged:
    def test_of_a_finished_run(self, tmp_path, history):
        run(tmp_path, **LOGS).train()
        trainer = run(tmp_path, seed=7, **LOGS)
        trainer.train(resume_from_checkpoint=True)
        assert {entry["phase"] for entry in history} == {"heads", "hardness", "policy"}
        assert trainer.state.log_history == figures_and_times(history, trainer.state.log_history)

    @pytest.mark.parametrize("phase,step", [("heads", 9), ("policy", 3)])
    def test_of_a_run_that_was_killed(self, tmp_path, history, phase, step):
        """Callbacks, and so reporters, are told the mean over all steps, too."""
        with pytest.raises(Kill):
            run(tmp_path, KillAt(phase, step), **LOGS).train()
        told = []

        class Listen(TrainerCallback):
            def on_log(self, args, state, control, logs, **kwargs):
                told.extend([logs["train_loss"]] if "train_loss" in logs else [])

        trainer = run(tmp_path, Listen(), seed=7, **LOGS)
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.log_history == figures_and_times(history, trainer.state.log_history)
        losses = [entry["train_loss"] for entry in history if "train_loss" in entry]
        assert told == pytest.approx(losses[-len(told) :]) and told


class TestNothingToResume:
    def test_starts_anew_and_says_so(self, tmp_path, uninterrupted, warnings):
        trainer = run(tmp_path)
        assert not trainer.resumes(True)
        results = trainer.train(resume_from_checkpoint=True)
        assert any("holds nothing to resume; starting anew" in message for message in warnings())
        check_same(trainer, results, uninterrupted)

    def test_a_wrong_path_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"resume_from_checkpoint.*nowhere"):
            run(tmp_path).train(resume_from_checkpoint=str(tmp_path / "nowhere"))

    def test_resumes(self, stopped, tmp_path):
        trainer = run(tmp_path / "new")
        assert trainer.resumes(str(stopped)) and not trainer.resumes(None) and not trainer.resumes(False)
        shutil.rmtree(stopped / "phases" / "heads")
        assert not run(stopped).resumes(True)

    def test_an_empty_folder_is_refused(self, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match=r"resume_from_checkpoint.*empty.*Leave it out to begin a run in `output"):
            run(tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "empty"))
        assert not list((tmp_path / "empty").iterdir())

    def test_a_run_that_cannot_be_resumed_stays_where_it_is(self, stopped, tmp_path):
        for checkpoint in (stopped / "phases" / "heads").iterdir():
            state_emptied(checkpoint)
        before = sorted(stopped.rglob("*"))
        with pytest.raises(ValueError, match=r"resume_from_checkpoint.*holds nothing to resume. Leave it out"):
            run(tmp_path / "new").train(resume_from_checkpoint=str(stopped))
        assert sorted(stopped.rglob("*")) == before

    def test_a_checkpoint_behind_steps_that_are_not_finished(self, stopped, tmp_path):
        """The weights that its step began with are not there."""
        folder = stopped / "phases"
        shutil.copytree(folder / "heads" / LAST, folder / "policy" / LAST)
        before = sorted(stopped.rglob("*"))
        with pytest.raises(ValueError, match=r"checkpoint-8' is of 'policy', but the run is to go on with 'heads'"):
            run(tmp_path / "new").train(resume_from_checkpoint=str(folder / "policy" / LAST))
        assert sorted(stopped.rglob("*")) == before


# The worse the better, so that the best checkpoint is not the last.
class Falls(TrainerCallback):
    """A figure that gets worse, so that the first checkpoint is the best one, whatever the model makes of it."""

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_falling"] = -float(state.global_step)


BEST = {
    "load_best_model_at_end": True,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "metric_for_best_model": "falling",
    "greater_is_better": True,
    "phases": ["heads"],
}


class TestBestCheckpoint:
    def test_of_a_run_that_was_moved(self, tmp_path):
        whole = run(tmp_path / "whole", Falls(), **BEST)
        whole.train()
        with pytest.raises(Kill):
            run(tmp_path / "first", Falls(), KillAt("heads", 9), **BEST).train()
        shutil.move(tmp_path / "first", tmp_path / "second")
        trainer = run(tmp_path / "second", Falls(), seed=7, **BEST)
        trainer.train(resume_from_checkpoint=True)
        assert not changed(weights(whole.model), weights(trainer.model))

    def test_that_is_gone(self, tmp_path):
        with pytest.raises(Kill):
            run(tmp_path, Falls(), KillAt("heads", 9), **BEST).train()
        folder = tmp_path / "phases" / "heads"
        best = json.loads((folder / LAST / "trainer_state.json").read_text())["best_model_checkpoint"]
        assert best.endswith("checkpoint-2")
        shutil.rmtree(best)
        assert "calls the best checkpoint" in damage(folder / LAST, Needs(best=True))
        assert damage(folder / LAST, Needs()) is None


def test_damaged_hardness_is_computed_again(tmp_path, warnings):
    trainer = run(tmp_path)
    layers = trainer.compute_hardness()
    path = tmp_path / "hardness.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    again = run(tmp_path).compute_hardness()
    assert torch.equal(layers, again)
    assert any(f"{path} cannot be read" in message for message in warnings())
    assert torch.equal(run(tmp_path).compute_hardness(), layers)
    assert [one.name for one in tmp_path.iterdir() if "part" in one.name] == []
