# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from transformers_cee.evaluation.operating_points import OperatingPoint
from transformers_cee.evaluation.report import (
    escape_markdown,
    markdown_table,
    matched_depth_table,
    method_name,
    operating_points_table,
    spread,
    spread_table,
    write_results,
)


POINT = OperatingPoint(
    "policy", 0.5, 3.0, 0.5, 2.0, 1.8, {"accuracy": 0.875}, {"2": 2, "4": 2}, wall_clock_spread=0.05
)


def test_markdown_table_lines_up():
    table = markdown_table(["method", "accuracy"], [["policy", "0.9"], ["maximum probability", "0.85"]])
    assert table.splitlines() == [
        "| method              | accuracy |",
        "| ------------------- | -------: |",
        "| policy              |      0.9 |",
        "| maximum probability |     0.85 |",
    ]


def test_operating_points_never_show_layer_speedup_without_wall_clock():
    untimed = OperatingPoint("max_probability", [0.1, 0.2], 4.0, 1 / 3, 1.5, None, {"accuracy": math.nan})
    header, _, first, second = operating_points_table([POINT, untimed], ["accuracy", "f1"]).splitlines()
    assert [cell.strip() for cell in header.strip("|").split("|")] == [
        "criterion", "threshold", "depth", "saved layers", "layer speed-up", "wall-clock speed-up", "accuracy", "f1",
    ]  # fmt: skip
    assert [cell.strip() for cell in first.strip("|").split("|")] == [
        "ConsistentEE (policy)", "0.5", "3.00", "50.0%", "2.00x", "1.80x ± 0.05", "0.8750", "-",
    ]  # fmt: skip
    assert [cell.strip() for cell in second.strip("|").split("|")] == [
        "maximum probability", "per exit", "4.00", "33.3%", "1.50x", "-", "-", "-",
    ]  # fmt: skip


def test_noise_is_no_figure():
    noisy = replace(POINT, wall_clock_speedup=None, noisy_wall_clock_speedup=6.1)
    row = operating_points_table([noisy], ["accuracy"]).splitlines()[-1]
    assert [cell.strip() for cell in row.strip("|").split("|")][4:6] == ["2.00x", "noise"] and "6.1" not in row


def test_matched_depths():
    table = matched_depth_table({"policy": {3.0: 0.9, 1.5: None}, "entropy": {3.0: 0.8}}, "accuracy", 6)
    assert [" ".join(line.replace("|", " ").split()) for line in table.splitlines()[::2]] == [
        "accuracy at depth (of 6) 1.50 3.00",
        "ConsistentEE (policy) - 0.9000",
    ]


def test_method_names():
    assert method_name("full depth") == "full depth"
    assert method_name("my_rule") == "my rule"


def test_results_are_plain_json(tmp_path):
    results = {
        "points": [POINT],
        "nan": math.nan,
        1: np.float32(0.5),
        "rows": np.arange(2),
        "path": Path("a"),
        "t": ("b",),
    }
    path = write_results(results, tmp_path / "new" / "results.json")
    read = json.loads(path.read_text())
    assert read["points"] == [POINT.to_dict()]
    assert read["nan"] is None
    assert (read["1"], read["rows"], read["path"], read["t"]) == (0.5, [0, 1], "a", ["b"])


def test_results_refuse_other_objects(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_results({"model": object()}, tmp_path / "results.json")


def test_results_are_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = write_results({"run": 1}, tmp_path / "results.json")
    before = path.read_bytes()

    def full(self, text, **options):
        self.write_bytes(text.encode()[:5])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_results({"run": 2}, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("SST-2, dev_matched (5 %)", "SST-2, dev_matched (5 %)"),
        ("<b>&", "&lt;b&gt;&amp;"),
        ("a|b\nc", "a\\|b c"),
        ("[x](y) `z` *w* _v_ ~u~ \\", "\\[x\\](y) \\`z\\` \\*w\\* \\_v\\_ \\~u\\~ \\\\"),
        ("# head", "\\# head"),
        ("- item", "\\- item"),
        ("1. item", "1\\. item"),
        ("-0.5", "-0.5"),
    ],
)
def test_names_show_as_they_are_written(name, shown):
    assert escape_markdown(name) == shown


def test_threshold_just_below_one_is_not_shown_as_one():
    points = [replace(POINT, exit_threshold=value) for value in (0.9999651908874512, 1.0)]
    rows = operating_points_table(points, ["accuracy"]).splitlines()[2:]
    assert [row.split("|")[2].strip() for row in rows] == ["0.999965191", "1"]


def test_budgets_and_names_stand_where_thresholds_do():
    points = [replace(POINT, exit_budget=0.5), replace(POINT, exit_threshold="certified")]
    rows = operating_points_table(points, ["accuracy"]).splitlines()[2:]
    assert [row.split("|")[2].strip() for row in rows] == ["budget 0.5", "certified"]


@pytest.mark.parametrize(
    ("values", "options", "text"),
    [
        ([0.9, 0.8, 0.85], {}, "85.0 ± 5.0"),
        ([0.9, None, 0.8, math.nan], {}, "85.0 ± 7.1"),
        ([0.912], {}, "91.2"),
        ([None, math.nan], {}, "-"),
        ([], {}, "-"),
        ([1.5, 2.0], {"digits": 2, "scale": 1.0}, "1.75 ± 0.35"),
    ],
)
def test_spread(values, options, text):
    assert spread(values, **options) == text


def cells_of(table: str) -> list[list[str]]:
    header, _, *rows = table.splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, *rows)]


def test_spread_table():
    values = {
        "policy": {"SST-2": [0.9, 0.92], "TREC": [0.8]},
        "entropy": {"SST-2": [0.88, None], "RTE": [0.6, 0.7]},
        "max_probability": {"TREC": [0.8004], "RTE": [None]},
    }
    assert cells_of(spread_table(values, "accuracy in %")) == [
        ["accuracy in %", "SST-2", "TREC", "RTE"],
        ["ConsistentEE (policy)", "**91.0 ± 1.4**", "**80.0**", "-"],
        ["entropy", "88.0", "-", "**65.0 ± 7.1**"],
        ["maximum probability", "-", "**80.0**", "-"],
    ]


def test_spread_table_where_lower_is_better():
    values = {"policy": {"perplexity": [9.0, 9.5], "-1": [-0.2]}, "margin": {"perplexity": [8.5], "-1": [-0.1]}}
    rows = cells_of(spread_table(values, digits=2, scale=1.0, lower_is_better=["perplexity"]))
    assert rows[1:] == [
        ["ConsistentEE (policy)", "9.25 ± 0.35", "-0.20"],
        ["margin", "**8.50**", "**-0.10**"],
    ]


def test_spread_table_refuses():
    with pytest.raises(ValueError, match="at least one method"):
        spread_table({})
    with pytest.raises(ValueError, match=r"\['loss'\] of `lower_is_better`"):
        spread_table({"policy": {"accuracy": [0.5]}}, lower_is_better=["loss"])
