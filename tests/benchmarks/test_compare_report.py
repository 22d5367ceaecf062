# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The page of the comparison on synthetic results, against numbers worked out by hand."""

from __future__ import annotations

import json

import compare
import compare_chosen
import compare_report
import compare_results
import pytest
import yaml


SPEEDUPS = ("1.2", "1.5", "2.0", "3.0", "4.0")
# Accuracy at 2x by objective and criterion, of seeds 1 and 2. At other speed-ups it is 0.1 lower per step of one.
AT_TWO = {
    ("consistentee", "policy"): (0.90, 0.92),
    ("consistentee", "policies_by_alpha"): (0.91, 0.91),
    ("layer_weighted", "max_probability"): (0.88, 0.86),
    ("layer_weighted", "patience"): (0.80, None),
    ("layer_weighted", "margin"): (0.93, 0.93),
}


def result(objective: str, seed: int) -> dict:
    """What `evaluate_run` returns, of a model of 12 layers; of 6 for `half_depth`."""
    shallow = objective == "half_depth"
    values = {name: pair[seed - 1] for (mine, name), pair in AT_TWO.items() if mine == objective}
    values = {"policy": 0.99} if shallow else values
    layers = 6 if shallow else 12
    return {
        "task": "trec",
        "objective": objective,
        "seed": seed,
        "metric": "accuracy",
        "num_layers": layers,
        "rows": {"train": 100, "validation": 20, "test": 50},
        "notes": ["no validation split: 20 of 120 rows."],
        "full": 0.84 if shallow else 0.95,
        "oracle": {"metric": 0.99, "depth": 1.0 + seed},
        "exits": [0.5] + [0.7] * (layers - 2) + [0.95],
        "at_speedup": {
            name: {speed: None if at is None else at - 0.1 * (float(speed) - 2) for speed in SPEEDUPS}
            for name, at in values.items()
        },
        "curves": {name: [[6.5, 0.7]] for name in values},
        "timed": {
            name: {size: {"layers": 2.0, "wall_clock": seed + 0.5} for size in ("1", "32")}
            for name in values
            if name in ("policy", "max_probability")
        },
        "estimators": {"consistency": 0.1},
        "overthinking": {"wasteful": 0.6, "destructive": 0.04, "oracle_depth": 1.0 + seed, "oracle_accuracy": 0.99},
        "calibration_error": {str(layer): layer / 100 for layer in range(1, layers + 1)},
    }


@pytest.fixture
def wanted():
    objectives = ("consistentee", "layer_weighted", "half_depth")
    return [("trec", objective, seed) for objective in objectives for seed in (1, 2)]


@pytest.fixture
def folder(tmp_path, wanted):
    path = tmp_path / "results"
    path.mkdir()
    for task, objective, seed in wanted:
        (path / f"{task}-{objective}-{seed}.json").write_text(json.dumps(result(objective, seed)))
    return path


def cells(text: str, label: str) -> list[list[str]]:
    """Every table row that starts with a label, without the label."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [row[1:] for row in rows if row[0] == label]


@pytest.fixture
def results(wanted, folder):
    ((one,), missing) = compare_results.read_results(wanted, folder)
    assert missing == []
    return one


def test_values_at_speedups(results):
    assert results.num_layers == 12
    assert results.objectives == ["consistentee", "layer_weighted"]
    assert results.at(("layer_weighted", "patience"), 2.0) == [0.80, None]
    assert results.at(("consistentee", "policy"), 3.0) == pytest.approx([0.80, 0.82])
    # Six of twelve layers are twice as fast and nothing else; its exits are not looked at.
    assert results.at(("half_depth", "full"), 2.0) == [0.84, 0.84]
    assert results.at(("half_depth", "full"), 1.5) == [None, None]
    assert ("half_depth", "policy") not in results.methods


def test_table_of_speedups(results):
    table = compare_report.speedup_table(results, results.methods)
    # Mean 91, deviations ±1 of two seeds: √2.
    assert cells(table, "ConsistentEE, policy by budget") == [["96.0 ± 1.4", "91.0 ± 1.4", "81.0 ± 1.4"]]
    assert cells(table, "layer-weighted, margin") == [["**98.0 ± 0.0**", "**93.0 ± 0.0**", "**83.0 ± 0.0**"]]
    assert cells(table, "layer-weighted, patience") == [["85.0", "80.0", "70.0"]]
    assert cells(table, "plain model of 6 layers, fine-tuned alike") == [["-", "84.0 ± 0.0", "-"]]
    assert cells(table, "accuracy in %") == [["1.5x", "2x", "3x"]]


def test_paired_differences(results):
    table = compare_report.difference_table(results, results.methods)
    # Differences of 2 and 6 points: mean 4, deviation √8, so 4 ± t(0.975, 1) · √8 / √2 = 4 ± 12.706 · 2.
    assert cells(table, "layer-weighted, maximum probability") == [["+4.0", "-21.4 to +29.4", "2"]]
    assert cells(table, "layer-weighted, patience") == [["+10.0", "-", "1"]]
    assert cells(table, "layer-weighted, margin") == [["-2.0", "-14.7 to +10.7", "2"]]
    assert cells(table, "plain model of 6 layers, fine-tuned alike") == [["+7.0", "-5.7 to +19.7", "2"]]
    assert cells(table, "ConsistentEE, policy by budget") == []


def test_one_policy_against_a_family(results):
    table = compare_report.family_table(results)
    assert cells(table, "ConsistentEE, accuracy in %") == [["1.2x", "1.5x", "2x", "3x", "4x"]]
    assert cells(table, "one policy by budget")[0][2] == "**91.0 ± 1.4**"
    assert cells(table, "one policy per α")[0] == [
        f"**{value} ± 0.0**" for value in ("99.0", "96.0", "91.0", "81.0", "71.0")
    ]


def test_time(results):
    table = compare_report.time_table(results)
    assert cells(table, "ConsistentEE, policy by budget") == [["2.0 ± 0.0", "2.0 ± 0.7", "2.0 ± 0.7"]]
    assert cells(table, "layer-weighted, maximum probability") == [["2.0 ± 0.0", "2.0 ± 0.7", "2.0 ± 0.7"]]
    assert cells(table, "layer-weighted, patience") == []
    assert cells(table, "speed-up") == [["layers", "wall-clock, batch 1", "wall-clock, batch 32"]]


def test_noise_of_a_seed_does_not_count(results):
    """In all seeds it is said."""
    runs = [run["timed"]["policy"] for run in results.deep("consistentee").values()]
    runs[0]["1"] |= {"wall_clock": None, "noisy_wall_clock": 9.9}
    row = cells(compare_report.time_table(results), "ConsistentEE, policy by budget")
    assert row == [["2.0 ± 0.0", "2.5", "2.0 ± 0.7"]]
    runs[1]["1"] |= {"wall_clock": None, "noisy_wall_clock": 9.9}
    row = cells(compare_report.time_table(results), "ConsistentEE, policy by budget")
    assert row == [["2.0 ± 0.0", "noise", "2.0 ± 0.7"]]


def test_family_is_drawn_when_it_is_there(results, tmp_path):
    assert compare_report.draw_family(results, tmp_path / "family.png")
    assert (tmp_path / "family.png").read_bytes().startswith(b"\x89PNG")
    for run in results.runs["consistentee"].values():
        del run["curves"]["policies_by_alpha"]
    assert not compare_report.draw_family(results, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_full_depth_and_oracle(results):
    table = compare_report.depth_table(results)
    assert cells(table, "layer-weighted") == [["95.0 ± 0.0", "99.0 ± 0.0", "2.5 ± 0.7"]]
    facts = compare_report.plain_facts(results)
    assert "for 60.0 ± 0.0 % of rows" in facts
    assert "1.0 ± 0.0 at layer 1, 6.0 ± 0.0 at layer 6, 12.0 ± 0.0 at layer 12" in facts


def test_area_under_the_curve(results):
    # From (1, 0.5) over (6.5, 0.7) to (12, 0.95): means 0.6 and 0.825 of two equal halves.
    assert results.area(("consistentee", "policy")) == pytest.approx(0.7125)
    assert results.area(("half_depth", "full")) is None


def test_summary(results):
    text = compare_report.summary([results])
    assert cells(text, "ConsistentEE, policy by budget") == [["1", "1", "0", "91.0", "71.2"]]
    assert cells(text, "layer-weighted, maximum probability") == [["1", "0", "0", "87.0", "71.2"]]
    assert cells(text, "plain model of 6 layers, fine-tuned alike") == [["1", "0", "0", "84.0", "-"]]
    assert "Best of all elsewhere: layer-weighted, margin (trec)." in text


def judge_on_dev(results, consistentee, layer_weighted):
    """Gives every run the policy's accuracy on dev at 2x, one value per seed; and layer-weighted heads a policy."""
    for objective, values in (("consistentee", consistentee), ("layer_weighted", layer_weighted)):
        for seed, value in zip((1, 2), values, strict=True):
            run = results.runs[objective][seed]
            run["on_dev"] = {} if value is None else {"policy": {"2.0": value}}
            run["at_speedup"].setdefault("policy", dict.fromkeys(SPEEDUPS, 0.94 + 0.01 * seed))


@pytest.mark.parametrize(
    ("consistentee", "layer_weighted", "chosen"),
    [
        ((0.8, 0.9), (0.84, 0.85), "consistentee"),
        ((0.8, 0.9), (0.84, 0.87), "layer_weighted"),
        # Only seeds in which both were judged count.
        ((0.9, None), (0.89, 0.99), "consistentee"),
        ((None, 0.9), (0.89, 0.99), "layer_weighted"),
    ],
)
def test_dev_chooses_the_variant(results, consistentee, layer_weighted, chosen):
    assert results.chosen_on_dev(results.ours, 2.0) is None
    judge_on_dev(results, consistentee, layer_weighted)
    assert results.chosen_on_dev(results.ours, 2.0) == (chosen, "policy")


def test_any_heads_may_be_chosen(results):
    judge_on_dev(results, (0.8, 0.9), (0.84, 0.85))
    results.runs["two_stage"] = {2: result("two_stage", 2) | {"on_dev": {"policy": {"2.0": 0.95}}}}
    results.runs["two_stage"][2]["at_speedup"] = {"policy": dict.fromkeys(SPEEDUPS, 0.7)}
    assert results.chosen_on_dev(results.ours, 2.0) == ("two_stage", "policy")
    results.runs["two_stage"][2]["on_dev"]["policy"]["2.0"] = 0.89
    # Of seed 2 alone, the only one that all three share.
    assert results.chosen_on_dev(results.ours, 2.0) == ("consistentee", "policy")


def test_no_variant_without_a_seed_in_common(results):
    judge_on_dev(results, (0.9, None), (None, 0.9))
    assert results.chosen_on_dev(results.ours, 2.0) is None
    assert compare_chosen.chosen_section([results]) == ""


def judge_others_on_dev(results, **at_two):
    """Gives every run of layer-weighted heads what dev says of other criteria at 2x; and the shallower model its."""
    full = at_two.pop("full", None)
    for run in results.runs["layer_weighted"].values():
        run["on_dev"] |= {name: {"2.0": value} for name, value in at_two.items()}
    for run in results.runs["half_depth"].values():
        run["full_on_dev"] = full


def test_both_sides_are_chosen_on_dev(results):
    """The margin is best on test, and dev does not know."""
    judge_on_dev(results, (0.8, 0.9), (0.84, 0.85))
    judge_others_on_dev(results, max_probability=0.9, margin=0.89, patience=0.7, full=0.8)
    text = compare_chosen.chosen_section([results])
    ours = ["ConsistentEE, policy by budget", "91.0 ± 1.4"]
    row = [*ours, "layer-weighted, maximum probability", "87.0 ± 1.4", "+4.0", "-21.4 to +29.4", "2"]
    assert cells(text, "trec")[0] == row
    assert "At 2x the policy is at or above it in 1 of 1 tasks" in text
    # At other speeds dev has judged nothing.
    assert "At 3x" not in text
    judge_others_on_dev(results, full=0.95)
    row = [*ours, "plain model of 6 layers, fine-tuned alike", "84.0 ± 0.0", "+7.0", "-5.7 to +19.7", "2"]
    assert cells(compare_chosen.chosen_section([results]), "trec")[0] == row
    judge_others_on_dev(results, margin=0.99)
    text = compare_chosen.chosen_section([results])
    assert cells(text, "trec")[0][2:] == ["layer-weighted, margin", "93.0 ± 0.0", "-2.0", "-14.7 to +10.7", "2"]
    assert "At 2x the policy is at or above it in 0 of 1 tasks" in text


def test_no_rival_where_dev_judged_the_policy_alone(results):
    """Figures of rows that prices were picked on choose heads for the remark, and stand beside no others."""
    judge_on_dev(results, (0.8, 0.9), (0.84, 0.85))
    for by_seed in results.runs.values():
        for run in by_seed.values():
            run["policy_on_dev"] = run.pop("on_dev", {}).get("policy", {})
    assert results.judged_in_sample
    text = compare_chosen.chosen_section([results])
    assert "At 2x the policy is at or above it" not in text and "A remark" in text
    assert (
        "Not chosen yet, since dev judged the policy alone, on the rows that its prices were picked on: trec." in text
    )
    assert cells(text, "trec")[0][0] == "ConsistentEE, policy by budget"
    results.runs["layer_weighted"][1]["on_dev"] = {"policy": {"2.0": 0.1}}
    assert results.chosen_on_dev(results.ours, 2.0) == ("layer_weighted", "policy")


def test_nothing_is_chosen_of_a_task_that_lacks_runs(results):
    judge_on_dev(results, (0.8, 0.9), (0.84, 0.85))
    judge_others_on_dev(results, max_probability=0.9)
    assert "At 2x the policy is at or above it" in compare_chosen.chosen_section([results], {"rte"})
    text = compare_chosen.chosen_section([results], {"trec"})
    assert "At 2x the policy is at or above it" not in text and "since runs are missing: trec." in text


def test_chosen_variant_against_the_luckiest_baseline(results):
    judge_on_dev(results, (0.8, 0.9), (0.84, 0.85))
    assert ("consistentee", "policies_by_alpha") not in results.baselines
    assert ("layer_weighted", "policy") not in results.baselines
    text = compare_chosen.chosen_section([results])
    # Of 93, 87, 80 and 84 one is above 91.
    row = ["ConsistentEE, policy by budget", "91.0 ± 1.4", "layer-weighted, margin", "93.0 ± 0.0", "1 of 4"]
    assert cells(text, "trec") == [row, row], "chosen for the task, and for all tasks"
    assert "dev, is at or above even that in 0 of 1 tasks" in text
    judge_on_dev(results, (0.8, 0.9), (0.86, 0.86))
    text = compare_chosen.chosen_section([results])
    assert cells(text, "trec")[0][:2] == ["layer-weighted, policy by budget", "95.5 ± 0.7"]
    assert "dev, is at or above even that in 1 of 1 tasks" in text


def test_a_variant_for_all_tasks(results, wanted, folder):
    """Each task prefers other heads; in the mean over both, the layer-weighted ones win."""
    other = compare_results.read_results(wanted, folder)[0][0]
    judge_on_dev(results, (0.8, 0.8), (0.7, 0.7))
    judge_on_dev(other, (0.5, 0.5), (0.9, 0.9))
    text = compare_chosen.chosen_section([results, other])
    names = [row[0] for row in cells(text, "trec")]
    assert names == ["ConsistentEE, policy by budget", *["layer-weighted, policy by budget"] * 3]
    assert "even that in 1 of 2 tasks" in text and "in all tasks: at or above it in 2 of 2" in text
    assert compare_results.chosen_for_all([], 2.0) is None


def test_no_baseline_stands_on_heads_that_a_policy_trained(results):
    before = results.baselines
    assert before
    for objective in ("two_stage", "two_stage_consistentee"):
        results.runs[objective] = {1: result(objective, 1)}
        results.runs[objective][1]["at_speedup"] = {"margin": dict.fromkeys(SPEEDUPS, 0.7)}
    assert set(results.baselines) - set(before) == {("two_stage", "margin")}
    assert results.label(("two_stage_consistentee", "margin")) == "two-stage ConsistentEE, margin"


def test_policy_against_criteria_on_the_same_heads(results):
    assert compare_report.same_heads_section([results]) == ""
    judge_on_dev(results, (0.8, 0.9), (0.84, 0.85))
    text = compare_report.same_heads_section([results])
    # 95 and 96 of the policy at every speed, against 88 and 86, 80 (one seed) and 93 and 93 at 2x.
    assert cells(text, "policy minus") == [["1.2x", "1.5x", "2x", "3x", "4x"]]
    assert cells(text, "maximum probability")[0][2] == "+8.5 (2 of 2)"
    assert cells(text, "patience")[0][2] == "+15.0 (1 of 1)"
    # At 1.2x the margin has 101 of 95 and 96.
    assert cells(text, "margin") == [
        ["-5.5 (0 of 2)", "-2.5 (0 of 2)", "+2.5 (2 of 2)", "+12.5 (2 of 2)", "+22.5 (2 of 2)"]
    ]
    assert cells(text, "one policy per α") == []


def write_config(path):
    objectives = {name: {"options": {}} for name in ("consistentee", "layer_weighted", "half_depth", "two_stage")}
    tasks = {"trec": {"seeds": [1, 2], "options": {}}, "rte": {"seeds": [5], "options": {}}}
    path.write_text(yaml.safe_dump({"options": {}, "tasks": tasks, "objectives": objectives}, sort_keys=False))
    return path


def test_page_and_picture(folder, tmp_path, capsys):
    config, output = write_config(tmp_path / "compare.yaml"), tmp_path / "docs" / "compare.md"
    compare.main(["report", str(config), "--results", str(folder), "--output", str(output)])
    assert str(output) in capsys.readouterr().out
    page = output.read_text()
    assert "Rows: 100 train, 20 validation, 50 test. Seeds: 1, 2. 12 layers." in page
    assert page.count("- no validation split: 20 of 120 rows.") == 1
    assert "![accuracy against depth](compare/trec.png)" in page
    assert (output.parent / "compare" / "trec.png").read_bytes().startswith(b"\x89PNG")
    assert "## rte" not in page
    assert "6 of 12 runs have no result yet" in page
    assert "- trec: two_stage 1, 2\n- rte: consistentee 5; layer_weighted 5; half_depth 5; two_stage 5\n" in page
    for stage in ("train", "evaluate", "report"):
        assert f"python benchmarks/compare.py {stage} compare.yaml" in page
    assert str(tmp_path) not in page


def test_page_before_consistentee_is_trained(folder, tmp_path):
    wanted = [("trec", "layer_weighted", 1)]
    page = compare_report.write_report(wanted, folder, tmp_path / "page.md", "compare.yaml").read_text()
    assert "All runs of the configuration are in." in page
    assert "ConsistentEE shares no seed with another method yet." in page
    assert cells(page, "layer-weighted, maximum probability")[0] == ["1", "1", "0", "88.0", "71.2"]


def test_page_of_the_shallow_model_alone(folder, tmp_path):
    wanted = [("trec", "half_depth", 1)]
    page = compare_report.write_report(wanted, folder, tmp_path / "page.md", "compare.yaml").read_text()
    assert "6 layers." in page


def test_no_results(tmp_path, wanted):
    with pytest.raises(ValueError, match=r"`--results`='.*' must hold .* it has none of the 6 wanted"):
        compare_report.write_report(wanted, tmp_path, tmp_path / "page.md", "compare.yaml")
    assert not (tmp_path / "page.md").exists()


def test_notes_stand_on_the_page(wanted, folder, tmp_path):
    (folder / "notes.md").write_text("## What they say\n\nLittle.\n")
    page = compare_report.write_report(wanted, folder, tmp_path / "page.md", "compare.yaml").read_text()
    assert page.index("## What they say\n\nLittle.\n\n## Summary") > page.index(compare_report.INTRODUCTION)
