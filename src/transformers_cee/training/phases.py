# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Which phases of a run are finished, where their checkpoints lie, and how a run goes on after a stop."""

import json
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging


logger = logging.get_logger(__name__)


@dataclass
class PhaseLog:
    """Bookkeeping of a run in `output_dir/phases`: one folder per step, and the list of finished steps.

    Args:
        directory (`str`): `output_dir/phases`.
        writes (`bool`): False in all processes but one.
    """

    directory: str
    writes: bool = True
    finished: list[str] = field(default_factory=list)

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
        folders = [self.weights_folder(step) for step in self.finished]
        return next((folder for folder in reversed(folders) if os.path.isdir(folder)), None)

    def start(self) -> None:
        """Begins a new run; an earlier one in the same place is moved aside, not deleted."""
        if self.writes and os.path.isdir(self.directory):
            aside = f"{self.directory}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
            logger.warning(f"{self.directory} holds an earlier run; moved to {aside}.")
            shutil.move(self.directory, aside)

    def resume(self) -> None:
        """Reads what an earlier run finished.

        Raises:
            ValueError: there is nothing to resume.
        """
        if not os.path.isdir(self.directory):
            raise ValueError(f"`resume_from_checkpoint`: no run to resume in {self.directory}.")
        if os.path.isfile(self._path):
            with open(self._path) as file:
                self.finished = json.load(file)

    def finish(self, step: str) -> None:
        """Notes that a step is done, and lets go of the model as earlier ones left it."""
        before = self.last_weights
        self.finished.append(step)
        if self.writes:
            os.makedirs(self.directory, exist_ok=True)
            with open(self._path + ".part", "w") as file:
                json.dump(self.finished, file)
            os.replace(self._path + ".part", self._path)
            if before is not None and self.last_weights != before:
                shutil.rmtree(before)

    def checkpoint(self, step: str) -> str | None:
        """The last complete checkpoint of a step, if it has one; a kill may have left a newer one half-written."""
        # Trainer writes its state last.
        written = Path(self.folder(step)).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")
        complete = sorted((path.parent for path in written), key=lambda path: int(path.name.rpartition("-")[2]))
        return str(complete[-1]) if complete else None
