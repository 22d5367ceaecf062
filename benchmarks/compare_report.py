# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""One page of tables and pictures from the JSON files of the comparison. See compare.py."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compare_chosen import HEADLINE, chosen_section, interval, percent, times
from compare_results import (
    FULL,
    POLICIES,
    REFERENCE,
    TIE,
    Method,
    Run,
    TaskResults,
    mean_of_known,
    objective_name,
    read_results,
)

from transformers_cee.evaluation.plots import plot_seeds
from transformers_cee.evaluation.report import markdown_table, method_name, spread, spread_table
from transformers_cee.files import write_text


# Written by hand, beside the JSON files; what the tables say.
NOTES = "notes.md"
SPEEDUPS = (1.5, 2.0, 3.0)
FAMILY_SPEEDUPS = (1.2, 1.5, 2.0, 3.0, 4.0)

INTRODUCTION = """\
Every method on every task, all on the same data, code and seeds. A method is a training objective of the exit heads
and an exit criterion. *ConsistentEE* continues the layer-weighted model and trains heads and policy in turn,
*two-stage ConsistentEE* does so from the two-stage model; with other objectives the policy is trained on the finished
heads. *Policy by budget* is one policy conditioned on the price of a layer, *one policy per α* a family of policies
trained apart, from which dev picks at every depth. Thresholds, prices and estimators come from dev, figures from test.

Tables show the metric in %, mean ± standard deviation over seeds, at layer speed-ups (all layers over the mean exit
layer); the best mean of a column is bold. What a layer speed-up is worth in time stands below each of them: wall-clock
over full depth, in turn in the same run, on rows of test that were really executed."""


def speedup_table(results: TaskResults, methods: Sequence[Method], speedups: Sequence[float] = SPEEDUPS) -> str:
    """One row per method, one column per speed-up."""
    return spread_table(
        {
            results.label(method): {times(speedup): results.at(method, speedup) for speedup in speedups}
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
            rows.append([results.label(method), percent(found.mean, "+"), interval(found), str(found.pairs)])
    if not rows:
        return f"{objective_name(REFERENCE[0])} shares no seed with another method yet."
    return markdown_table(["ConsistentEE minus", "points", "95 % interval", "seeds"], rows)


def family_table(results: TaskResults) -> str:
    """One conditioned policy against policies trained apart, on the same heads."""
    methods = family_methods(results)
    values: dict[str, dict[str, list[float | None]]] = {
        name: {times(speedup): results.at(method, speedup) for speedup in FAMILY_SPEEDUPS}
        for name, method in methods.items()
    }
    (objective, _), *_ = methods.values()
    return spread_table(values, f"{objective_name(objective)}, {results.metric.replace('_', ' ')} in %")


def family_methods(results: TaskResults) -> dict[str, Method]:
    """One conditioned policy and one policy per price of a layer, by what tables call them."""
    objective = REFERENCE[0] if REFERENCE[0] in results.objectives else results.plain_objective
    return {"one policy by budget": (objective, "policy"), "one policy per α": (objective, "policies_by_alpha")}


def time_table(results: TaskResults) -> str:
    """Layer and wall-clock speed-up of the main methods near the headline speed-up, by batch size: over the seeds
    whose figures are no noise, `noise` where all are."""
    rows, sizes = [], list(dict.fromkeys(size for found in _timed(results.any_run).values() for size in found))
    for objective, criterion in results.main_methods:
        timed = [_timed(run)[criterion] for run in results.deep(objective).values() if criterion in _timed(run)]
        if timed:
            layers = spread([one[sizes[0]]["layers"] for one in timed], scale=1.0)
            by_size = ([one[size] for one in timed] for size in sizes)
            rows.append([results.label((objective, criterion)), layers, *map(_time_cell, by_size)])
    if not rows:
        return "None of these was timed."
    return markdown_table(["speed-up", "layers", *(f"wall-clock, batch {size}" for size in sizes)], rows)


def _time_cell(found: Sequence[Mapping[str, float | None]]) -> str:
    """Wall-clock speed-up over seeds."""
    known = [one["wall_clock"] for one in found]
    if all(value is None for value in known) and any(one.get("noisy_wall_clock") is not None for one in found):
        return "noise"
    return spread(known, scale=1.0)


def _timed(run: dict[str, Any]) -> dict[str, dict[str, dict[str, float | None]]]:
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
            f"### Time near {times(HEADLINE)}",
            time_table(results),
            f"### ConsistentEE against the others at {times(HEADLINE)}",
            difference_table(results, results.main_methods),
            "### One policy for all speeds, or one per speed",
            family_table(results),
            *([] if family_picture is None else [f"![one policy against one per α]({family_picture})"]),
            "### Full depth, oracle, overthinking, calibration",
            depth_table(results),
            plain_facts(results),
            f"<details><summary>All {len(methods)} methods</summary>",
            speedup_table(results, methods),
            f"The same against ConsistentEE, policy by budget, at {times(HEADLINE)}:",
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
                percent(mean_of_known([results.mean_at(method, HEADLINE) for results, method in entries])),
                percent(mean_of_known([results.area(method) for results, method in entries])),
            ]
        )
    others = {
        label: [results.task for results, method in entries if _leads(results, method, results.methods)]
        for label, entries in labels.items()
        if label not in main
    }
    leading = [f"{label} ({', '.join(names)})" for label, names in others.items() if names]
    header = ["method", "tasks", "best of these", "best of all", f"mean at {times(HEADLINE)}", "area"]
    text = (
        f"In how many of its tasks a method is at or above every other mean at {times(HEADLINE)}, of the methods in "
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
    header = ["policy minus", *(times(speedup) for speedup in FAMILY_SPEEDUPS)]
    return "\n\n".join(["## The policy against other criteria on the same heads", text, markdown_table(header, rows)])


def _difference_cell(values: Sequence[float]) -> str:
    """Mean difference in points, and the share of values that are not negative."""
    if not values:
        return "-"
    level = sum(value >= -TIE for value in values)
    return f"{percent(statistics.mean(values), '+')} ({level} of {len(values)})"


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
        *filter(None, [chosen_section(tasks, {task for task, _, _ in missing}), same_heads_section(tasks)]),
        missing_section(missing, len(wanted)),
        *sections,
        "## Commands",
        commands(config),
        f"MODEL is an encoder checkpoint, DATA the folder that the paths in `{config}` start from. Runs whose results "
        "are there are not repeated.",
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, "\n\n".join(page) + "\n")
    return output
