# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Checkpoints of 🤗 Trainer after a kill: which can be read in full, and what a resumed training reports."""

from __future__ import annotations

import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from transformers import Trainer, TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from transformers_cee.files import read_json, write_json


logger = logging.get_logger(__name__)

ADAPTER_WEIGHTS_NAME, ADAPTER_CONFIG_NAME = "adapter_model.safetensors", "adapter_config.json"
# What Trainer does not keep: the sum of the losses of all steps so far, and the number of processes.
TOTALS_NAME = "totals.json"
RANDOM = "rng_state"
WAY_OUT = "Name another checkpoint, or delete this one."
# What Trainer computes with; `None` where it may be missing.
STATE_KINDS: dict[str, tuple[type, ...]] = {
    "epoch": (int, float, type(None)),
    "global_step": (int,),
    "max_steps": (int,),
    "logging_steps": (int, float),
    "eval_steps": (int, float),
    "save_steps": (int, float),
    "train_batch_size": (int,),
    "num_train_epochs": (int, float),
    "num_input_tokens_seen": (int,),
    "total_flos": (int, float),
    "log_history": (list,),
    "best_metric": (int, float, type(None)),
    "best_global_step": (int, type(None)),
    "best_model_checkpoint": (str, type(None)),
    "stateful_callbacks": (dict,),
}


class Needs(NamedTuple):
    """What a resumed training needs beside the state of a checkpoint, or else it would be another training.

    Args:
        files (`tuple` of `str`): files beside the weights; empty where a backend keeps all of it in its own way.
        best (`bool`): the best checkpoint, to end with.
    """

    files: tuple[str, ...] = (OPTIMIZER_NAME, SCHEDULER_NAME, "rng_state.pth")
    best: bool = False


def needs_of(trainer: Trainer) -> Needs:
    """What a resumed training by `trainer` needs."""
    best = trainer.args.load_best_model_at_end
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return Needs((), best)
    scaler = [SCALER_NAME] if getattr(trainer.accelerator, "scaler", None) is not None else []
    return Needs((OPTIMIZER_NAME, SCHEDULER_NAME, *scaler, *random_files(trainer.args.world_size)), best)


def newest_readable(folder: str | os.PathLike[str], needs: Needs) -> str | None:
    """The newest checkpoint in `folder` that can be read in full; newer ones are named in a warning.

    Args:
        needs ([`Needs`]): what a resumed training needs.

    Returns:
        `str`, *optional*: the checkpoint's folder; None when there is none.
    """
    found = {}
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        name = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-([0-9]+)", path.name)
        if name and path.is_dir():
            found[int(name[1])] = path
    for number in sorted(found, reverse=True):
        reason = damage(found[number], needs)
        if reason is None:
            return str(found[number])
        logger.warning_once(f"{found[number]} cannot be resumed from: {reason}.")
    if found:
        logger.warning(
            f"{os.fspath(folder)} holds no checkpoint that can be resumed from: it is trained from its start."
        )
    return None


def damage(checkpoint: str | os.PathLike[str], needs: Needs) -> str | None:
    """Why a checkpoint cannot be resumed from, naming the file; None when it can be."""
    checkpoint = Path(checkpoint)
    reason = _state_damage(checkpoint / TRAINER_STATE_NAME, needs.best)
    if reason is not None or not needs.files:
        return reason
    reason = weights_damage(checkpoint)
    if reason is not None:
        return reason
    for name in needs.files:
        path = checkpoint / name
        if path.is_file():
            if not zipfile.is_zipfile(path):
                return f"{path} is cut off, or no file of PyTorch"
        elif not name.startswith(RANDOM):
            return f"{path} is missing (`save_only_model` leaves out what a resumed training needs)"
    # Each process of a training has a file of its own.
    processes, wrote = sum(name.startswith(RANDOM) for name in needs.files), _processes_of(checkpoint)
    for name in random_files(wrote):
        if not (checkpoint / name).is_file():
            return f"{checkpoint / name} is missing"
    if wrote != processes:
        logger.warning_once(
            f"{checkpoint} was written by {wrote} process{'es' if wrote > 1 else ''}, and {processes} go on: results "
            "will differ from those of a run that was not interrupted."
        )
    return None


def weights_damage(folder: str | os.PathLike[str]) -> str | None:
    """Why the weights in a folder cannot be read, naming the file; None when they can be."""
    folder = Path(folder)
    if not folder.is_dir():
        return f"{folder} is missing"
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    names = [name for name in (SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME) if (folder / name).is_file()]
    try:
        if index.is_file() and SAFE_WEIGHTS_NAME not in names:
            names = sorted({os.path.basename(name) for name in read_json(index, "").get("weight_map").values()})
        if ADAPTER_WEIGHTS_NAME in names:
            read_json(folder / ADAPTER_CONFIG_NAME, "")
    except (OSError, ValueError, AttributeError) as error:
        return f"{index if index.is_file() else folder / ADAPTER_CONFIG_NAME} cannot be read ({error})"
    if not names:
        return f"{folder / SAFE_WEIGHTS_NAME} is missing"
    for name in names:
        try:
            with safe_open(folder / name, framework="pt") as file:
                file.keys()
        except (OSError, SafetensorError) as error:
            return f"{folder / name} cannot be read ({error})"
    return None


def _state_damage(path: Path, needs_best: bool) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    try:
        state = vars(TrainerState.load_from_json(str(path)))
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        return f"{path} cannot be read ({error})"
    for name, kinds in STATE_KINDS.items():
        value = state.get(name)
        if name in state and (not isinstance(value, kinds) or isinstance(value, bool)):
            return f"{path} cannot be read (`{name}` is {json.dumps(value)[:80]})"
    if not all(isinstance(entry, dict) for entry in state["log_history"]):
        return f"{path} cannot be read (`log_history` holds other things than figures by name)"
    if path.parent.name != f"{PREFIX_CHECKPOINT_DIR}-{state['global_step']}":
        return f"{path} is of another step (`global_step` is {state['global_step']})"
    best = state["best_model_checkpoint"]
    if needs_best and best is not None:
        reason = weights_damage(_moved(best, path.parent))
        return reason and f"{reason}, which {path} calls the best checkpoint"
    return None


def _moved(best: str, checkpoint: Path) -> Path:
    """Where the best checkpoint of a training lies: where it was, or beside `checkpoint` if all were moved."""
    return Path(best) if os.path.isdir(best) else checkpoint.parent / os.path.basename(best)


def random_files(processes: int) -> list[str]:
    """Names of the files in which Trainer keeps the random numbers' states of all processes."""
    return [f"{RANDOM}_{number}.pth" for number in range(processes)] if processes > 1 else [f"{RANDOM}.pth"]


def _processes_of(checkpoint: Path) -> int:
    """How many processes wrote a checkpoint: as it says, or, of one by Trainer alone, as its files say."""
    wrote = _totals(checkpoint).get("processes")
    if isinstance(wrote, int) and wrote > 0:
        return wrote
    numbers = [re.fullmatch(rf"{RANDOM}_([0-9]+)\.pth", path.name) for path in checkpoint.glob(f"{RANDOM}_*.pth")]
    # One process alone has no number; where only that of the first is left, there were two or more.
    return max([2, *(int(number[1]) + 1 for number in numbers if number)]) if any(numbers) else 1


class ResumableTrainer(Trainer):
    """🤗 Trainer whose resumed training is the one that was not interrupted, or says why not: checkpoints are read in
    full before any work, and `train_loss` is the mean over all steps, not over those since the last start."""

    # Sum of the losses of the steps before a resume; None of a training that was not resumed.
    _loss_before: float | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        needs = needs_of(self)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_readable(self.args.output_dir, needs)
            if resume_from_checkpoint is None:
                logger.warning(
                    f"`resume_from_checkpoint`: nothing to resume in {self.args.output_dir}; starting anew."
                )
        elif resume_from_checkpoint:
            check_checkpoint(resume_from_checkpoint, needs)
        checkpoint = resume_from_checkpoint or None
        if checkpoint is not None and needs.best:
            _find_best(Path(checkpoint))
        self._loss_before = None if checkpoint is None else _loss_of(checkpoint)
        output = super().train(checkpoint, *args, **kwargs)
        if self._loss_before is None:
            return output
        loss = self._whole_loss(self._loss_before)
        return TrainOutput(output.global_step, loss, {**output.metrics, "train_loss": loss})

    def _whole_loss(self, before: float) -> float:
        return (before + self._total_loss_scalar) / max(1, self.state.global_step)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        # What Trainer logs at the end is the mean over the steps since the last start.
        if self._loss_before is not None and {"train_loss", "total_flos"} <= logs.keys():
            logs["train_loss"] = self._whole_loss(self._loss_before)
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.args.should_save:
            folder = os.path.join(
                self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            )
            total = (self._loss_before or 0.0) + self._total_loss_scalar + float(self._tr_loss)
            # The loss as text, since NaN is no JSON.
            write_json(os.path.join(folder, TOTALS_NAME), {"loss": str(total), "processes": self.args.world_size})
            # Trainer asks the state of the checkpoint that it resumed from for each of them, new ones included.
            for one in (*self.callback_handler.callbacks, self.control):
                if isinstance(one, ExportableState):
                    self.state.stateful_callbacks.setdefault(type(one).__name__, one.state())
        super()._save_checkpoint(model, trial)


def check_checkpoint(checkpoint: str | os.PathLike[str], needs: Needs) -> None:
    """Raises `ValueError` for a named checkpoint that cannot be resumed from."""
    reason = damage(checkpoint, needs)
    if reason is not None:
        raise ValueError(
            f"`resume_from_checkpoint`={os.fspath(checkpoint)!r} cannot be resumed from: {reason}. {WAY_OUT}"
        )


def _find_best(checkpoint: Path) -> None:
    """Renews the path of the best checkpoint in a state, which Trainer would otherwise do without."""
    path = checkpoint / TRAINER_STATE_NAME
    state = read_json(path, WAY_OUT)
    best = state.get("best_model_checkpoint")
    if best is not None and not os.path.isdir(best):
        write_json(path, state | {"best_model_checkpoint": str(_moved(best, checkpoint))})


def _totals(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint keeps beside what Trainer does; nothing where that cannot be read."""
    try:
        totals = read_json(checkpoint / TOTALS_NAME, "")
    except (OSError, ValueError):
        return {}
    return totals if isinstance(totals, dict) else {}


def _loss_of(checkpoint: str) -> float:
    """Sum of the losses of all steps before a checkpoint; NaN where it is not known."""
    try:
        return float(_totals(Path(checkpoint))["loss"])
    except (KeyError, ValueError, TypeError):
        return float("nan")
