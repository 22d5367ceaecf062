# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What the JSON files of the comparison hold: all runs of a task, and what is asked of them. See compare.py."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers_cee.evaluation.curves import area_under_curve
from transformers_cee.evaluation.operating_points import OperatingPoint
from transformers_cee.evaluation.report import method_name
from transformers_cee.evaluation.statistics import PairedDifference, paired_differences


# A method is an objective and a criterion. `FULL` is no criterion: all rows at the last exit of a shallower model.
Method = tuple[str, str]
Run = tuple[str, str, int]  # task, objective, seed
# What `evaluate_run` returned, by seed.
BySeed = dict[int, dict[str, Any]]

REFERENCE: Method = ("consistentee", "policy")
# Objectives whose heads a policy had a part in.
WITH_POLICY = ("consistentee", "two_stage_consistentee")
FULL = "full"
# Criteria that are policies, conditioned or one per price.
POLICIES = ("policy", "policies_by_alpha")
# Means that differ by less are the same.
TIE = 1e-9
# The short tables and the pictures; a fixed list, so that nothing is picked on test.
MAIN_METHODS: tuple[Method, ...] = (
    REFERENCE,
    ("two_stage_consistentee", "policy"),
    ("layer_weighted", "policy"),
    ("layer_weighted", "max_probability"),
    ("layer_weighted", "patience"),
    ("cosee", "max_probability"),
    ("two_stage", "entropy"),
)
# Whose overthinking, calibration, full depth and oracle are told beside the methods.
PLAIN_OBJECTIVE = "layer_weighted"
OBJECTIVE_NAMES = {
    "consistentee": "ConsistentEE",
    "two_stage_consistentee": "two-stage ConsistentEE",
    "layer_weighted": "layer-weighted",
    "cosee": "COSEE",
}
CRITERION_NAMES = {"policy": "policy by budget", "policies_by_alpha": "one policy per α"}


@dataclass(frozen=True)
class TaskResults:
    """All runs of one task.

    Args:
        task: its name.
        runs: by objective and seed.
    """

    task: str
    runs: dict[str, BySeed]

    @property
    def any_run(self) -> dict[str, Any]:
        return next(run for by_seed in self.runs.values() for run in by_seed.values())

    @property
    def metric(self) -> str:
        return self.any_run["metric"]

    @property
    def num_layers(self) -> int:
        """Layers of the deepest model, which speed-ups refer to."""
        return max(run["num_layers"] for by_seed in self.runs.values() for run in by_seed.values())

    @property
    def seeds(self) -> list[int]:
        return sorted({seed for by_seed in self.runs.values() for seed in by_seed})

    def deep(self, objective: str) -> BySeed:
        """Runs of the deepest model."""
        return {
            seed: run for seed, run in self.runs.get(objective, {}).items() if run["num_layers"] == self.num_layers
        }

    @property
    def objectives(self) -> list[str]:
        return [objective for objective in self.runs if self.deep(objective)]

    @property
    def shallow(self) -> list[Method]:
        return [(objective, FULL) for objective in self.runs if objective not in self.objectives]

    @property
    def methods(self) -> list[Method]:
        """Every criterion of every objective, then the shallower models."""
        found = [
            (objective, criterion)
            for objective in self.objectives
            for criterion in dict.fromkeys(name for run in self.deep(objective).values() for name in run["at_speedup"])
        ]
        return found + self.shallow

    @property
    def main_methods(self) -> list[Method]:
        """Those of the fixed list, or the first ones where it has no run yet; and the shallower models."""
        known = [method for method in self.methods if method[1] != FULL]
        return ([method for method in MAIN_METHODS if method in known] or known[: len(MAIN_METHODS)]) + self.shallow

    @property
    def plain_objective(self) -> str:
        return PLAIN_OBJECTIVE if PLAIN_OBJECTIVE in self.objectives else self.objectives[0]

    def label(self, method: Method) -> str:
        objective, criterion = method
        if criterion == FULL:
            depths = sorted({run["num_layers"] for run in self.runs[objective].values()})
            return f"plain model of {' or '.join(map(str, depths))} layers, fine-tuned alike"
        return f"{objective_name(objective)}, {CRITERION_NAMES.get(criterion, method_name(criterion))}"

    def at(self, method: Method, speedup: float) -> list[float | None]:
        """Metric at a layer speed-up, one value per seed of the task; None where there is none."""
        objective, criterion = method
        runs = self.runs.get(objective, {}) if criterion == FULL else self.deep(objective)
        values: dict[int, float | None] = {}
        for seed, run in runs.items():
            if criterion != FULL:
                values[seed] = run["at_speedup"].get(criterion, {}).get(str(speedup))
            elif math.isclose(self.num_layers / run["num_layers"], speedup):
                values[seed] = run["full"]
        return [values.get(seed) for seed in self.seeds]

    def mean_at(self, method: Method, speedup: float) -> float | None:
        return mean_of_known(self.at(method, speedup))

    @property
    def baselines(self) -> list[Method]:
        """Methods without a policy, on heads that no policy had a part in; shallower models too."""
        return [
            (objective, criterion)
            for objective, criterion in self.methods
            if objective not in WITH_POLICY and criterion not in POLICIES
        ]

    @property
    def ours(self) -> list[Method]:
        """The conditioned policy on all heads."""
        return [method for method in self.methods if method[1] == "policy"]

    @property
    def judged_in_sample(self) -> bool:
        """Are there only figures of the policy on the rows of dev that its prices were picked on?"""
        return not any("on_dev" in run for by_seed in self.runs.values() for run in by_seed.values())

    def on_dev(self, method: Method, speedup: float) -> dict[int, float]:
        """Metric on dev by seed, of those that judged the method there; of a shallower model at its own depth."""
        objective, criterion = method
        found: dict[int, float | None] = {}
        for seed, run in self.runs.get(objective, {}).items():
            if criterion == FULL:
                is_there = math.isclose(self.num_layers / run["num_layers"], speedup)
                found[seed] = run.get("full_on_dev") if is_there else None
            elif run["num_layers"] == self.num_layers:
                by_criterion = run.get("on_dev", {})
                if self.judged_in_sample:
                    by_criterion = {"policy": run.get("policy_on_dev", {})}
                found[seed] = by_criterion.get(criterion, {}).get(str(speedup))
        return {seed: value for seed, value in found.items() if value is not None}

    def means_on_dev(self, methods: Sequence[Method], speedup: float) -> dict[Method, float]:
        """Mean metric on dev of the methods that were judged there, over the seeds that they share."""
        found = {method: values for method in methods if (values := self.on_dev(method, speedup))}
        shared = set.intersection(*map(set, found.values())) if found else set()
        return {method: statistics.mean(values[seed] for seed in shared) for method, values in found.items() if shared}

    def chosen_on_dev(self, methods: Sequence[Method], speedup: float) -> Method | None:
        """The method with the best mean on dev; None before dev has judged any."""
        means = self.means_on_dev(methods, speedup)
        return max(means, key=means.__getitem__, default=None)

    def difference(self, method: Method, speedup: float, of: Method = REFERENCE) -> PairedDifference | None:
        """A method, ConsistentEE by default, minus another; None when they share no seed."""
        first, second = self.at(of, speedup), self.at(method, speedup)
        if all(one is None or other is None for one, other in zip(first, second, strict=True)):
            return None
        return paired_differences(first, second)

    def curves(self, method: Method) -> list[list[OperatingPoint]]:
        """Points of each seed; every criterion can also send all rows to the first or to the last exit."""
        objective, criterion = method
        found = []
        for run in self.deep(objective).values():
            if criterion in run["curves"]:
                pairs = [(1.0, run["exits"][0]), *run["curves"][criterion], (float(self.num_layers), run["exits"][-1])]
                # An end that the curve reaches is there twice.
                found.append([self._point(depth, value) for depth, value in dict(map(tuple, pairs)).items()])
        return found

    def area(self, method: Method) -> float | None:
        """Mean metric over all depths, over seeds; None for models without exits."""
        return mean_of_known([area_under_curve(curve, self.metric) for curve in self.curves(method)])

    def _point(self, depth: float, value: float) -> OperatingPoint:
        layers = self.num_layers
        return OperatingPoint("", 0.0, depth, 1 - depth / layers, layers / depth, metrics={self.metric: value})

    def full_points(self) -> list[OperatingPoint]:
        """Full depth of each seed's plain objective."""
        return [self._point(self.num_layers, run["full"]) for run in self.deep(self.plain_objective).values()]

    def oracle_points(self) -> list[OperatingPoint]:
        runs = self.deep(self.plain_objective).values()
        return [self._point(run["oracle"]["depth"], run["oracle"]["metric"]) for run in runs]


def objective_name(objective: str) -> str:
    return OBJECTIVE_NAMES.get(objective, objective.replace("_", "-"))


def chosen_for_all(tasks: Sequence[TaskResults], speedup: float) -> Method | None:
    """The heads on which the policy is best on dev, in the mean over tasks, of those that all these tasks have; None
    before dev has judged any."""
    means = [results.means_on_dev(results.ours, speedup) for results in tasks]
    shared = set.intersection(*map(set, means)) if means else set()
    # By name, where they are alike.
    return max(sorted(shared), key=lambda method: statistics.mean(one[method] for one in means), default=None)


def mean_of_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def read_results(wanted: Sequence[Run], folder: Path) -> tuple[list[TaskResults], list[Run]]:
    """Results per task, and the runs without any.

    Args:
        wanted: task, objective and seed of every run.
        folder: holds one JSON file per run.

    Raises:
        ValueError: none of the runs has a file.
    """
    tasks: dict[str, dict[str, BySeed]] = {}
    missing = []
    for task, objective, seed in wanted:
        path = folder / f"{task}-{objective}-{seed}.json"
        if path.is_file():
            runs = tasks.setdefault(task, {}).setdefault(objective, {})
            runs[seed] = json.loads(path.read_text(encoding="utf-8"))
        else:
            missing.append((task, objective, seed))
    if not tasks:
        raise ValueError(
            f"`--results`={str(folder)!r} must hold TASK-OBJECTIVE-SEED.json files of the configuration's runs, which "
            f"`evaluate` writes; it has none of the {len(missing)} wanted."
        )
    return [TaskResults(task, runs) for task, runs in tasks.items()], missing
