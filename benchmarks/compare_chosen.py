# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Our best method against the best of the others, both chosen on dev. See compare.py."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from compare_results import TIE, Method, TaskResults, chosen_for_all

from transformers_cee.evaluation.report import markdown_table, spread
from transformers_cee.evaluation.statistics import PairedDifference


HEADLINE = 2.0
CHOSEN_SPEEDUPS = (1.5, 2.0, 3.0, 4.0)

INTRODUCTION = """\
The policy on the heads that dev prefers, against what dev prefers of all methods without a policy: every criterion on
the heads of the other objectives, and at its own depth the shallower model. Dev chooses for each task and speed, by
means over seeds of what one half of its rows says of thresholds, prices and estimators fitted on the other. For test
they are fitted on all of dev, of which those that learn more, such as classifiers on states, gain more."""


def percent(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{100 * value:{sign}.1f}"


def times(speedup: float) -> str:
    return f"{speedup:g}x"


def interval(difference: PairedDifference) -> str:
    """In points; of one pair there is none."""
    if difference.low is None:
        return "-"
    return f"{percent(difference.low, '+')} to {percent(difference.high, '+')}"


def chosen_section(tasks: Sequence[TaskResults], incomplete: Collection[str] = ()) -> str:
    """Ours against the others; empty before dev has judged any policy.

    Args:
        incomplete: names of tasks that lack runs; of these nothing is chosen yet.
    """
    judged = [results for results in tasks if results.chosen_on_dev(results.ours, HEADLINE) is not None]
    if not judged:
        return ""
    parts = ["## ConsistentEE against the best of the others, both chosen on dev", INTRODUCTION]
    known = [results for results in judged if not results.judged_in_sample and results.task not in incomplete]
    for speedup in CHOSEN_SPEEDUPS if known else ():
        table, reached, count = _chosen_on_dev(known, speedup)
        if count:
            parts += [f"At {times(speedup)} the policy is at or above it in {reached} of {count} tasks:", table]
    others = {
        "runs are missing": [results.task for results in tasks if results.task in incomplete],
        "dev judged the policy alone, on the rows that its prices were picked on": [
            results.task for results in judged if results.judged_in_sample
        ],
    }
    parts += [f"Not chosen yet, since {why}: {', '.join(names)}." for why, names in others.items() if names]
    return "\n\n".join([*parts, _against_the_luckiest(judged)])


def _chosen_on_dev(tasks: Sequence[TaskResults], speedup: float) -> tuple[str, int, int]:
    """A table of tasks, in how many of them ours is at or above its rival, and of how many."""
    rows, reached = [], 0
    for results in tasks:
        ours, other = (results.chosen_on_dev(some, speedup) for some in (results.ours, results.baselines))
        found = None if ours is None or other is None else results.difference(other, speedup, of=ours)
        if ours is None or other is None or found is None:
            continue
        reached += found.mean >= -TIE
        methods = [cell for one in (ours, other) for cell in (results.label(one), spread(results.at(one, speedup)))]
        rows.append([results.task, *methods, percent(found.mean, "+"), interval(found), str(found.pairs)])
    header = ["task", "ours", "metric", "best of the others", "metric", "points", "95 % interval", "seeds"]
    return markdown_table(header, rows) if rows else "", reached, len(rows)


def _against_the_luckiest(tasks: Sequence[TaskResults]) -> str:
    """A remark: the same choices of ours against the others' best on test."""
    own, own_reached, count = _best_on_test([(one, one.chosen_on_dev(one.ours, HEADLINE)) for one in tasks])
    over_all = chosen_for_all(tasks, HEADLINE)
    one, one_reached, _ = _best_on_test([(results, over_all) for results in tasks])
    text = (
        f"A remark: of so many methods the best on test is a lucky one. At {times(HEADLINE)} the policy, chosen on "
        f"dev, is at or above even that in {own_reached} of {count} tasks."
    )
    more = (
        "Dev has few rows to choose by. The heads with the best mean on dev over all tasks, in all tasks: at or above "
        f"it in {one_reached} of {count}."
    )
    return "\n\n".join([text, own, more, one])


def _best_on_test(chosen: Sequence[tuple[TaskResults, Method | None]]) -> tuple[str, int, int]:
    """A table of one method per task with the best baseline on test, in how many tasks the method is at or above it,
    and the number of tasks."""
    rows, reached = [], 0
    for results, method in chosen:
        means = {one: results.mean_at(one, HEADLINE) for one in results.baselines}
        known = {one: mean for one, mean in means.items() if mean is not None}
        own = None if method is None else results.mean_at(method, HEADLINE)
        if method is None or own is None or not known:
            continue
        best = max(known, key=known.__getitem__)
        reached += own >= known[best] - TIE
        above = sum(mean > own + TIE for mean in known.values())
        methods = [cell for one in (method, best) for cell in (results.label(one), spread(results.at(one, HEADLINE)))]
        rows.append([results.task, *methods, f"{above} of {len(known)}"])
    header = ["task", "chosen on dev", "metric", "best baseline on test", "metric", "baselines above"]
    return markdown_table(header, rows), reached, len(rows)
