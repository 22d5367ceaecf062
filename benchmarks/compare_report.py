# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""One page of tables and pictures from the JSON files of the comparison. See compare.py."""

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
from transformers_cee.evaluation.plots import plot_seeds
from transformers_cee.evaluation.report import markdown_table, method_name, spread, spread_table
from transformers_cee.evaluation.statistics import PairedDifference, paired_differences


# A method is an objective and a criterion. `FULL` is no criterion: all rows at the last exit of a shallower model.
Method = tuple[str, str]
Run = tuple[str, str, int]  # task, objective, seed
# What `evaluate_run` returned, by seed.
BySeed = dict[int, dict[str, Any]]

REFERENCE: Method = ("consistentee", "policy")
FULL = "full"
# Criteria that are policies, conditioned or one per price.
POLICIES = ("policy", "policies_by_alpha")
# Means that differ by less are the same.
TIE = 1e-9
# Written by hand, beside the JSON files; what the tables say.
NOTES = "notes.md"
# The short tables and the pictures; a fixed list, so that nothing is picked on test.
MAIN_METHODS: tuple[Method, ...] = (
    REFERENCE,
    ("layer_weighted", "policy"),
    ("layer_weighted", "max_probability"),
    ("layer_weighted", "patience"),
    ("cosee", "max_probability"),
    ("two_stage", "entropy"),
)
# Whose overthinking, calibration, full depth and oracle are told beside the methods.
PLAIN_OBJECTIVE = "layer_weighted"
SPEEDUPS = (1.5, 2.0, 3.0)
FAMILY_SPEEDUPS = (1.2, 1.5, 2.0, 3.0, 4.0)
HEADLINE = 2.0
OBJECTIVE_NAMES = {"consistentee": "ConsistentEE", "layer_weighted": "layer-weighted", "cosee": "COSEE"}
CRITERION_NAMES = {"policy": "policy by budget", "policies_by_alpha": "one policy per α"}

INTRODUCTION = """\
Every method on every task, all on the same data, code and seeds. A method is a training objective of the exit heads
and an exit criterion. *ConsistentEE* continues the layer-weighted model and trains heads and policy in turn; with
other objectives the policy is trained on the finished heads. *Policy by budget* is one policy conditioned on the
price of a layer, *one policy per α* a family of policies trained apart, from which dev picks at every depth.
Thresholds, prices and estimators come from dev, figures from test.

Tables show the metric in %, mean ± standard deviation over seeds, at layer speed-ups (all layers over the mean exit
layer); the best mean of a column is bold. What a layer speed-up is worth in time stands below each of them: wall-clock
over full depth, in turn in the same run, on rows of test that were really executed."""


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
        return _mean(self.at(method, speedup))

    @property
    def baselines(self) -> list[Method]:
        """Methods without a policy, on heads that no policy had a part in; shallower models too."""
        return [
            (objective, criterion)
            for objective, criterion in self.methods
            if objective != REFERENCE[0] and criterion not in POLICIES
        ]

    def chosen_variant(self, speedup: float) -> Method | None:
        """The heads on which the policy has the best mean on dev, over the seeds in which it was judged there on all
        of them; None before that, or without ConsistentEE."""
        on_dev = {
            objective: {
                seed: value
                for seed, run in self.deep(objective).items()
                if (value := run.get("policy_on_dev", {}).get(str(speedup))) is not None
            }
            for objective, criterion in self.methods
            if criterion == "policy"
        }
        shared = set.intersection(*map(set, on_dev.values())) if on_dev else set()
        if REFERENCE not in self.methods or not shared:
            return None
        best = max(on_dev, key=lambda objective: statistics.mean(on_dev[objective][seed] for seed in shared))
        return best, "policy"

    def difference(self, method: Method, speedup: float) -> PairedDifference | None:
        """ConsistentEE minus another method; None when they share no seed."""
        first, second = self.at(REFERENCE, speedup), self.at(method, speedup)
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
        return _mean([area_under_curve(curve, self.metric) for curve in self.curves(method)])

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


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def _percent(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{100 * value:{sign}.1f}"


def _times(speedup: float) -> str:
    return f"{speedup:g}x"


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


def speedup_table(results: TaskResults, methods: Sequence[Method], speedups: Sequence[float] = SPEEDUPS) -> str:
    """One row per method, one column per speed-up."""
    return spread_table(
        {
            results.label(method): {_times(speedup): results.at(method, speedup) for speedup in speedups}
            for method in methods
        },
        f"{results.metric.replace('_', ' ')} in %",
    )


def difference_table(results: TaskResults, methods: Sequence[Method], speedup: float = HEADLINE) -> str:
    """ConsistentEE minus each other method, paired by seed."""
    rows = []
    for method in methods:
        found = None if method == REFERENCE else results.difference(method, speedup)
        if found is not None:
            low, high = _percent(found.low, "+"), _percent(found.high, "+")
            interval = "-" if found.low is None else f"{low} to {high}"
            rows.append([results.label(method), _percent(found.mean, "+"), interval, str(found.pairs)])
    if not rows:
        return f"{objective_name(REFERENCE[0])} shares no seed with another method yet."
    return markdown_table(["ConsistentEE minus", "points", "95 % interval", "seeds"], rows)


def family_table(results: TaskResults) -> str:
    """One conditioned policy against policies trained apart, on the same heads."""
    methods = family_methods(results)
    values: dict[str, dict[str, list[float | None]]] = {
        name: {_times(speedup): results.at(method, speedup) for speedup in FAMILY_SPEEDUPS}
        for name, method in methods.items()
    }
    (objective, _), *_ = methods.values()
    return spread_table(values, f"{objective_name(objective)}, {results.metric.replace('_', ' ')} in %")


def family_methods(results: TaskResults) -> dict[str, Method]:
    """One conditioned policy and one policy per price of a layer, by what tables call them."""
    objective = REFERENCE[0] if REFERENCE[0] in results.objectives else results.plain_objective
    return {"one policy by budget": (objective, "policy"), "one policy per α": (objective, "policies_by_alpha")}


def time_table(results: TaskResults) -> str:
    """Layer and wall-clock speed-up of the main methods near the headline speed-up, by batch size."""
    rows, sizes = [], list(dict.fromkeys(size for found in _timed(results.any_run).values() for size in found))
    for objective, criterion in results.main_methods:
        timed = [_timed(run)[criterion] for run in results.deep(objective).values() if criterion in _timed(run)]
        if timed:
            cells = [
                spread([one[size][kind] for one in timed], scale=1.0)
                for kind, size in [("layers", sizes[0]), *(("wall_clock", size) for size in sizes)]
            ]
            rows.append([results.label((objective, criterion)), *cells])
    if not rows:
        return "None of these was timed."
    return markdown_table(["speed-up", "layers", *(f"wall-clock, batch {size}" for size in sizes)], rows)


def _timed(run: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    return run.get("timed", {})


def depth_table(results: TaskResults) -> str:
    """Full depth, and the oracle with its depth, of each objective's heads."""
    rows = []
    for objective in results.objectives:
        runs = list(results.deep(objective).values())
        oracles = [run["oracle"] for run in runs]
        rows.append(
            [
                objective_name(objective),
                spread([run["full"] for run in runs]),
                spread([oracle["metric"] for oracle in oracles]),
                spread([oracle["depth"] for oracle in oracles], scale=1.0),
            ]
        )
    return markdown_table(["heads", "full model", "oracle", "oracle depth"], rows)


def plain_facts(results: TaskResults) -> str:
    """Overthinking and calibration of the plain objective."""
    objective = results.plain_objective
    runs = list(results.deep(objective).values())
    wasteful, destructive = (
        spread([run["overthinking"][name] for run in runs]) for name in ("wasteful", "destructive")
    )
    depth = spread([run["overthinking"]["oracle_depth"] for run in runs], scale=1.0)
    layers = sorted(map(int, runs[0]["calibration_error"]))
    chosen = list(dict.fromkeys([layers[0], layers[(len(layers) - 1) // 2], layers[-1]]))
    errors = ", ".join(
        f"{spread([run['calibration_error'][str(layer)] for run in runs])} at layer {layer}" for layer in chosen
    )
    return (
        f"Of the {objective_name(objective)} heads: an earlier exit than the last is right already for {wasteful} % "
        f"of rows (wasteful overthinking), an internal exit is right and the last wrong for {destructive} % "
        f"(destructive); the first correct exit lies at depth {depth} of {results.num_layers}. Expected calibration "
        f"error in %: {errors}."
    )


def draw(results: TaskResults, path: Path) -> None:
    """Curves of the main methods."""
    curves = {results.label(method): results.curves(method) for method in results.main_methods}
    seeds = f"{len(results.seeds)} seed{'s' if len(results.seeds) > 1 else ''}"
    plot_seeds(
        {name: found for name, found in curves.items() if found},
        results.metric,
        path,
        full=results.full_points(),
        oracle=results.oracle_points(),
        title=f"{results.task}, test, {seeds}; full depth and oracle: {objective_name(results.plain_objective)}",
    )


def draw_family(results: TaskResults, path: Path) -> bool:
    """Curves of one policy for all speeds and of one per speed; False, and nothing drawn, if one is missing."""
    curves = {name: results.curves(method) for name, method in family_methods(results).items()}
    if not all(curves.values()):
        return False
    plot_seeds(curves, results.metric, path, full=results.full_points(), title=f"{results.task}, test")
    return True


def task_section(results: TaskResults, picture: str, family_picture: str | None) -> str:
    """Everything about one task."""
    run = results.any_run
    rows = ", ".join(f"{count} {name}" for name, count in run["rows"].items())
    notes = dict.fromkeys(
        note for by_seed in results.runs.values() for one in by_seed.values() for note in one["notes"]
    )
    methods = results.methods
    return "\n\n".join(
        [
            f"## {results.task}",
            f"Rows: {rows}. Seeds: {', '.join(map(str, results.seeds))}. {results.num_layers} layers.",
            *(["\n".join(f"- {note}" for note in notes)] if notes else []),
            speedup_table(results, results.main_methods),
            f"![{results.metric} against depth]({picture})",
            f"### Time near {_times(HEADLINE)}",
            time_table(results),
            f"### ConsistentEE against the others at {_times(HEADLINE)}",
            difference_table(results, results.main_methods),
            "### One policy for all speeds, or one per speed",
            family_table(results),
            *([] if family_picture is None else [f"![one policy against one per α]({family_picture})"]),
            "### Full depth, oracle, overthinking, calibration",
            depth_table(results),
            plain_facts(results),
            f"<details><summary>All {len(methods)} methods</summary>",
            speedup_table(results, methods),
            f"The same against ConsistentEE, policy by budget, at {_times(HEADLINE)}:",
            difference_table(results, methods),
            "</details>",
        ]
    )


def summary(tasks: Sequence[TaskResults]) -> str:
    """Over tasks at the headline speed-up: how often a method has the best mean, its mean, its area."""
    labels: dict[str, list[tuple[TaskResults, Method]]] = {}
    for results in tasks:
        for method in results.methods:
            labels.setdefault(results.label(method), []).append((results, method))
    main = dict.fromkeys(results.label(method) for results in tasks for method in results.main_methods)
    rows = []
    for label in main:
        entries = labels[label]
        rows.append(
            [
                label,
                str(len(entries)),
                str(sum(_leads(*entry, entry[0].main_methods) for entry in entries)),
                str(sum(_leads(*entry, entry[0].methods) for entry in entries)),
                _percent(_mean([results.mean_at(method, HEADLINE) for results, method in entries])),
                _percent(_mean([results.area(method) for results, method in entries])),
            ]
        )
    others = {
        label: [results.task for results, method in entries if _leads(results, method, results.methods)]
        for label, entries in labels.items()
        if label not in main
    }
    leading = [f"{label} ({', '.join(names)})" for label, names in others.items() if names]
    header = ["method", "tasks", "best of these", "best of all", f"mean at {_times(HEADLINE)}", "area"]
    text = (
        f"In how many of its tasks a method is at or above every other mean at {_times(HEADLINE)}, of the methods in "
        "this table and of all; its mean over tasks; and the area under its curve, the mean metric over all depths."
    )
    lines = ["## Summary", text, markdown_table(header, rows)]
    if leading:
        lines.append(f"Best of all elsewhere: {'; '.join(leading)}.")
    return "\n\n".join(lines)


def _leads(results: TaskResults, method: Method, rivals: Sequence[Method]) -> bool:
    """Is no rival's mean higher?"""
    means = [mean for rival in rivals if (mean := results.mean_at(rival, HEADLINE)) is not None]
    own = results.mean_at(method, HEADLINE)
    return own is not None and own >= max(means) - TIE


def chosen_section(tasks: Sequence[TaskResults]) -> str:
    """Per task the policy on the heads that dev prefers, against the best of all methods without a policy."""
    rows, reached = [], 0
    for results in tasks:
        variant = results.chosen_variant(HEADLINE)
        means = {method: results.mean_at(method, HEADLINE) for method in results.baselines}
        known = {method: mean for method, mean in means.items() if mean is not None}
        own = None if variant is None else results.mean_at(variant, HEADLINE)
        if variant is None or own is None or not known:
            continue
        best = max(known, key=known.__getitem__)
        reached += own >= known[best] - TIE
        above = sum(mean > own + TIE for mean in known.values())
        rows.append(
            [
                results.task,
                results.label(variant),
                spread(results.at(variant, HEADLINE)),
                results.label(best),
                spread(results.at(best, HEADLINE)),
                f"{above} of {len(known)}",
            ]
        )
    if not rows:
        return ""
    header = ["task", "chosen on dev", "metric", "best baseline on test", "metric", "baselines above"]
    text = (
        f"The policy at {_times(HEADLINE)} on the heads that dev prefers, trained in turn with it or finished before, "
        "against everything that has no policy: all criteria on the heads of the other objectives, and the shallower "
        "model. The best of so many is picked on test, which flatters it. At or above it in "
        f"{reached} of {len(rows)} tasks."
    )
    return "\n\n".join(["## ConsistentEE against the best of the others", text, markdown_table(header, rows)])


def same_heads_section(tasks: Sequence[TaskResults]) -> str:
    """The policy minus every other criterion on the same heads, over all models of all tasks."""
    differences: dict[str, dict[float, list[float]]] = {}
    for results in tasks:
        for objective, criterion in results.methods:
            if criterion in (*POLICIES, FULL) or (objective, "policy") not in results.methods:
                continue
            found = differences.setdefault(criterion, {speedup: [] for speedup in FAMILY_SPEEDUPS})
            for speedup, values in found.items():
                pairs = zip(
                    results.at((objective, "policy"), speedup),
                    results.at((objective, criterion), speedup),
                    strict=True,
                )
                values += [own - other for own, other in pairs if own is not None and other is not None]
    rows = [
        [method_name(criterion), *(_difference_cell(values) for values in found.values())]
        for criterion, found in differences.items()
    ]
    if not rows:
        return ""
    text = (
        "Points that the policy is ahead of another criterion on the same heads, mean over all models of all tasks, "
        "and in how many of them it is ahead or level."
    )
    header = ["policy minus", *(_times(speedup) for speedup in FAMILY_SPEEDUPS)]
    return "\n\n".join(["## The policy against other criteria on the same heads", text, markdown_table(header, rows)])


def _difference_cell(values: Sequence[float]) -> str:
    """Mean difference in points, and the share of values that are not negative."""
    if not values:
        return "-"
    level = sum(value >= -TIE for value in values)
    return f"{_percent(statistics.mean(values), '+')} ({level} of {len(values)})"


def missing_section(missing: Sequence[Run], total: int) -> str:
    """Which runs are not in the tables, with their seeds."""
    if not missing:
        return "All runs of the configuration are in."
    seeds: dict[str, dict[str, list[str]]] = {}
    for task, objective, seed in missing:
        seeds.setdefault(task, {}).setdefault(objective, []).append(str(seed))
    lines = [f"{len(missing)} of {total} runs have no result yet; their seeds:", ""]
    for task, objectives in seeds.items():
        found = "; ".join(f"{objective} {', '.join(numbers)}" for objective, numbers in objectives.items())
        lines.append(f"- {task}: {found}")
    return "\n".join(lines)


def commands(config: str) -> str:
    """What regenerates the page."""
    return "\n".join(
        [
            "```bash",
            f"python benchmarks/compare.py train {config} --model MODEL --data DATA",
            f"python benchmarks/compare.py evaluate {config} --data DATA",
            f"python benchmarks/compare.py report {config}",
            "```",
        ]
    )


def write_report(wanted: Sequence[Run], results: Path, output: Path, config: str) -> Path:
    """Writes the page, and a picture per task into the folder of the same name beside it.

    Args:
        wanted: task, objective and seed of every run of the configuration.
        results: folder of the JSON files, and of `notes.md` for the page if there is one.
        output: the Markdown file.
        config: what the commands on the page call the configuration.

    Returns:
        `output`.

    Raises:
        ValueError: as `read_results`.
    """
    tasks, missing = read_results(wanted, results)
    pictures = output.with_suffix("")
    sections = []
    for one in tasks:
        draw(one, pictures / f"{one.task}.png")
        family = pictures / f"{one.task}-family.png"
        family_picture = f"{pictures.name}/{family.name}" if draw_family(one, family) else None
        sections.append(task_section(one, f"{pictures.name}/{one.task}.png", family_picture))
    notes = results / NOTES
    page = [
        "# All methods, all tasks",
        INTRODUCTION,
        *([notes.read_text(encoding="utf-8").strip()] if notes.is_file() else []),
        summary(tasks),
        *filter(None, [chosen_section(tasks), same_heads_section(tasks)]),
        missing_section(missing, len(wanted)),
        *sections,
        "## Commands",
        commands(config),
        f"MODEL is a BERT checkpoint, DATA the folder that the paths in `{config}` start from. Runs whose results are "
        "there are not repeated.",
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n\n".join(page) + "\n", encoding="utf-8")
    return output
