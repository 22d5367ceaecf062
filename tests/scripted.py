# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A criterion that lets each row leave where the test says: any pattern of exits, and an example of a user's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from transformers_cee.exits.criteria import CRITERIA, ExitCriterion, ExitStep, register_criterion


@contextmanager
def scripted(exits: list[int]) -> Iterator[str]:
    """Registers a criterion under which row `i` leaves at exit `exits[i]` (0-based); gives its name."""

    class Scripted(ExitCriterion):
        name = "scripted"

        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            self.planned = torch.tensor(exits)

        def score(self, step: ExitStep) -> Tensor:
            assert len(self.planned) == len(step.state), "the criterion's memory does not follow the rows"
            return (self.planned == step.index).float()

        def select(self, kept: Tensor) -> None:
            self.planned = self.planned[kept]

    register_criterion(Scripted)
    try:
        yield "scripted"
    finally:
        del CRITERIA["scripted"]
