# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Which phases of a run are finished, where their checkpoints lie, and how a run goes on after a stop."""

from __future__ import annotations

import math
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from safetensors.torch import load_model
from torch import nn
from transformers.trainer_utils import TrainOutput
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from transformers_cee.files import read_json, write_json
from transformers_cee.training.checkpoints import Needs, check_checkpoint, newest_readable, weights_damage


logger = logging.get_logger(__name__)

# The step that leaves the model as it is.
HARDNESS = "hardness"
# Numbers that JSON has no word for, as they are stored.
NOT_FINITE = ("nan", "inf", "-inf")
WAY_OUT = "Restore it, or begin anew without `resume_from_checkpoint`; what is there is then moved aside."


@dataclass
class PhaseLog:
    """Bookkeeping of a run in `output_dir/phases`: one folder per step, and the finished steps with their results.

    Args:
        directory (`str`): `output_dir/phases`.
        writes (`bool`): False in all processes but one.
        finished (`dict[str, dict]`): fields of the `TrainOutput` of each finished step, in order, but for `hardness`,
            and in `log_history` what the step logged.
        place (`str`, *optional*): the folder of the run, or the checkpoint in it, that is named.
    """

    directory: str
    writes: bool = True
    finished: dict[str, dict[str, Any]] = field(default_factory=dict)
    place: str | None = None

    @classmethod
    def of(cls, output_dir: str, resume_from_checkpoint: bool | str | None, writes: bool = True) -> PhaseLog:
        """The log of a run in `output_dir`, or of the one whose folder or checkpoint is named.

        Raises:
            ValueError: a name that is neither.
        """
        if not isinstance(resume_from_checkpoint, (str, os.PathLike)):
            return cls(os.path.join(output_dir, "phases"), writes)
        root = os.fspath(resume_from_checkpoint).rstrip(os.sep)
        parts = root.split(os.sep)
        if os.path.isdir(root):
            if len(parts) > 2 and parts[-3] == "phases":
                return cls(os.sep.join(parts[:-2]), writes, place=root)
            if os.path.isdir(os.path.join(root, "phases")):
                return cls(os.path.join(root, "phases"), writes, place=root)
        raise ValueError(
            f"`resume_from_checkpoint`={root!r} must be True, the `output_dir` of a run, or a checkpoint in its "
            "`phases`. Leave it out to begin a run in `output_dir`."
        )

    @property
    def named(self) -> str | None:
        """The checkpoint to go on from, where one is named."""
        return None if self.place is None or os.path.join(self.place, "phases") == self.directory else self.place

    @property
    def _path(self) -> str:
        return os.path.join(self.directory, "finished.json")

    def folder(self, step: str) -> str:
        """Folder of a step's checkpoints."""
        return os.path.join(self.directory, step)

    def weights_folder(self, step: str) -> str:
        """Folder of the model as a step left it. A kill while it is written costs that step and nothing before it."""
        return os.path.join(self.directory, step, "finished")

    @property
    def last_weights(self) -> str | None:
        """Folder of the model as the last finished step left it."""
        steps = [step for step in self.finished if step != HARDNESS]
        return self.weights_folder(steps[-1]) if steps else None

    def start(self) -> None:
        """Begins a new run; an earlier one in the same place is moved aside, not deleted."""
        if self.writes and os.path.isdir(self.directory):
            aside = f"{self.directory}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
            logger.warning(f"{self.directory} holds an earlier run; moved to {aside}.")
            shutil.move(self.directory, aside)

    def resume(self, steps: Collection[str]) -> None:
        """Reads what an earlier run finished.

        Args:
            steps (collection of `str`): names that a step of the run may have.

        Raises:
            ValueError: the list of finished steps cannot be read or names others, weights of the last one are missing
                or damaged, or the step of the named checkpoint is finished.
        """
        if os.path.isfile(self._path):
            read = read_json(self._path, WAY_OUT)
            wrong = _wrong(read, steps)
            if wrong:
                raise ValueError(f"{self._path} {wrong}. {WAY_OUT}")
            self.finished = read
        if self.last_weights is not None:
            reason = weights_damage(self.last_weights)
            if reason is not None:
                raise ValueError(f"`resume_from_checkpoint`: {reason}, which {self._path} calls finished. {WAY_OUT}")
        if self.named is not None and self._step_of_named in self.finished:
            raise ValueError(
                f"`resume_from_checkpoint`={self.named!r} is of a finished step; name the folder of the run to go on "
                "after it."
            )

    def goes_on(self, steps: Collection[str], needs: Needs) -> bool:
        """Is there anything of an earlier run to go on from? `resume` has read it.

        Args:
            steps (collection of `str`): steps of this run, in order.
            needs ([`Needs`]): what a resumed training needs.

        Raises:
            ValueError: a place is named and there is not, or steps before the named checkpoint are not finished.
        """
        to_come = [step for step in steps if step not in self.finished]
        if self.named is not None and to_come[:1] != [self._step_of_named]:
            wanted = f"is to go on with {to_come[0]!r}" if to_come else "has finished its steps"
            raise ValueError(
                f"`resume_from_checkpoint`={self.named!r} is of {self._step_of_named!r}, but the run {wanted}; name "
                "the folder of the run to go on where it stopped."
            )
        if self.finished or (to_come and self.checkpoint(to_come[0], needs) is not None):
            return True
        if self.place is not None:
            raise ValueError(
                f"`resume_from_checkpoint`={self.place!r} holds nothing to resume. Leave it out to begin a run in "
                "`output_dir`."
            )
        return False

    def load(self, model: nn.Module, load_adapters: Callable[[str, nn.Module], None]) -> None:
        """Gives a model the weights that the last finished step left.

        Args:
            load_adapters (`Callable`): loads a folder without weights of a whole model.

        Raises:
            ValueError: the weights are those of another model.
        """
        if self.last_weights is None:
            return
        path = os.path.join(self.last_weights, SAFE_WEIGHTS_NAME)
        try:
            if os.path.isfile(path):
                # Strict, and knows of weights that are tied and stored once.
                load_model(model, path)
            else:
                load_adapters(self.last_weights, model)
        except RuntimeError as error:
            raise ValueError(
                f"`resume_from_checkpoint`: {self.last_weights} holds weights of another model ({error}). Resume with "
                "the model that the run began with."
            ) from error

    @property
    def _step_of_named(self) -> str | None:
        return None if self.named is None else os.path.basename(os.path.dirname(self.named))

    def result(self, step: str) -> TrainOutput | None:
        """What a finished step returned, but for hardness."""
        stored = self.finished[step]
        if step == HARDNESS:
            return None
        metrics = {name: _number(value) for name, value in stored["metrics"].items()}
        return TrainOutput(stored["global_step"], _number(stored["training_loss"]), metrics)

    @property
    def history(self) -> list[dict[str, Any]]:
        """What the finished steps logged, in order; `phase` of an entry is its step."""
        return [
            {**{name: float(value) if value in NOT_FINITE else value for name, value in entry.items()}, "phase": step}
            for step, stored in self.finished.items()
            for entry in stored["log_history"]
        ]

    def finish(self, step: str, result: Any = None, history: Iterable[dict[str, Any]] = ()) -> None:
        """Notes that a step is done, what it returned and logged, and lets go of the model as earlier ones left it."""
        before = self.last_weights
        stored: dict[str, Any] = {}
        if isinstance(result, TrainOutput):
            stored["global_step"] = result.global_step
            stored["training_loss"] = _stored(result.training_loss)
            stored["metrics"] = {name: _stored(value) for name, value in result.metrics.items()}
        # Whoever calls `Trainer.log` may log what JSON has no word for.
        stored["log_history"] = [
            {name: _stored(value) for name, value in entry.items() if isinstance(value, Real | str)}
            for entry in history
        ]
        self.finished[step] = stored
        if self.writes:
            write_json(self._path, self.finished)
            if before is not None and self.last_weights != before:
                shutil.rmtree(before, ignore_errors=True)

    def checkpoint(self, step: str, needs: Needs) -> str | None:
        """The checkpoint from which a step goes on: the named one, or the newest that can be read in full, if the step
        has one.

        Args:
            needs ([`Needs`]): what a resumed training needs.

        Raises:
            ValueError: the named checkpoint cannot be read.
        """
        if self.named is not None and self._step_of_named == step:
            check_checkpoint(self.named, needs)
            return self.named
        return newest_readable(self.folder(step), needs)

    def stage(self, stages: Sequence[str], asked: bool | str | None, needs: Needs) -> tuple[int, bool | str | None]:
        """Number of the stage of a phase that a checkpoint is of, and that checkpoint.

        Args:
            stages (sequence of `str`): all stages of the phase, in order.
            asked (`bool` or `str`, *optional*): a checkpoint's folder; `True` is the newest one of the last stage that
                has any. One of no stage is of the first.
        """
        if asked is True:
            found = (newest_readable(self.folder(stage), needs) for stage in reversed(stages))
            asked = next((checkpoint for checkpoint in found if checkpoint is not None), True)
        if not asked or asked is True:
            return 0, asked or None
        name = os.path.basename(os.path.dirname(os.path.abspath(asked)))
        return stages.index(name) if name in stages else 0, asked


def _wrong(read: Any, steps: Collection[str]) -> str | None:
    """What is wrong with the content of a list of finished steps."""
    if not isinstance(read, dict):
        return f"holds a {type(read).__name__}, not the finished steps by name"
    # What comes from a file must not be taken for a path.
    other = [step for step in read if step not in steps and not re.fullmatch(r"consistent-\d+-(model|policy)", step)]
    if other:
        return f"names {other[0]!r}, which is no step of this run; its steps are {', '.join(steps)}"
    for step, stored in read.items():
        history = stored.get("log_history") if isinstance(stored, dict) else None
        if not isinstance(history, list) or not all(
            isinstance(entry, dict) and all(isinstance(value, int | float | str) for value in entry.values())
            for entry in history
        ):
            return f"holds no `log_history` of the step {step!r}"
        if step == HARDNESS:
            continue
        try:
            _number(stored["training_loss"]), stored["global_step"] + 0
            [_number(value) for value in stored["metrics"].values()]
        except (TypeError, KeyError, ValueError, AttributeError):
            return f"holds no result of the step {step!r}"
    return None


def _stored(value: Any) -> Any:
    """A number as JSON can hold it."""
    value = value.item() if hasattr(value, "item") else value
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) else value
