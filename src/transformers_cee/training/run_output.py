# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What a run of several phases returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from transformers.trainer_utils import TrainOutput


class StepResult(NamedTuple):
    """What a step of a run gives back.

    Args:
        output (`TrainOutput` or `Tensor`): of hardness, the memorized layers.
        log_history (`list[dict]`): what it logged, in order.
    """

    output: Any
    log_history: list[dict[str, Any]]


class RunOutput(TrainOutput):
    """The `TrainOutput` of a run of several steps, with the result of each.

    - `global_step`: optimizer steps of all steps.
    - `training_loss`: loss of the last step that trained the model itself; where only policies learned, theirs; NaN
      where nothing did.
    - `metrics`: numbers only, as `log_metrics` and `save_metrics` take them: `train_runtime` (seconds of the run),
      `train_loss` and `total_flos`, and the metrics of each step behind its name, such as `heads_train_loss`.
    - `phases` (`dict[str, Any]`): result of each step by name, a `TrainOutput` or, for hardness, the memorized layers.
    """

    phases: dict[str, Any]

    @classmethod
    def of(cls, phases: Mapping[str, Any], seconds: float) -> RunOutput:
        """From the results of steps, in order, and the seconds that they took."""
        trained = {step: result for step, result in phases.items() if isinstance(result, TrainOutput)}
        of_model = [result for step, result in trained.items() if not _is_policy(step)]
        metrics: dict[str, float] = {"train_runtime": round(seconds, 4)}
        loss = float("nan")
        if trained:
            loss = (of_model or list(trained.values()))[-1].training_loss
            metrics["train_loss"] = loss
            metrics["total_flos"] = sum(result.metrics.get("total_flos", 0.0) for result in trained.values())
        for step, result in trained.items():
            metrics |= {f"{step}_{name}": value for name, value in result.metrics.items()}
        output = cls(sum(result.global_step for result in trained.values()), loss, metrics)
        output.phases = dict(phases)
        return output


def _is_policy(step: str) -> bool:
    return step.split("-")[-1] == "policy"


__all__ = ["RunOutput", "StepResult"]
