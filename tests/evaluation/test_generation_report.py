# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tables and pictures of language models' operating points."""

from __future__ import annotations

import pytest

from transformers_cee.evaluation.generation import GenerationPoint
from transformers_cee.evaluation.generation_report import generation_table, plot_generation, setting_name, speed_table
from transformers_cee.evaluation.speeds import Speed


def make_point(criterion="policy", depth=3.0, timed=True, **metrics):
    spreads = {"tokens_per_second": 0.1, "full_tokens_per_second": 0.02, "speedup": 0.06, "decode_speedup": 0.5}
    noisy = {"decode_speedup": 7.7, "decode_tokens_per_second": 77.7}
    speeds = {
        "1": Speed(20.0, None, 10.0, 12.5, 2.0, None, 4, spreads, noisy),
        "8": Speed(80.0, 90.0, 60.0, 75.0, 1.333, 1.2, 8),
    }
    return GenerationPoint(
        criterion,
        0.5,
        depth=depth,
        saved_layers=1 - depth / 6,
        layer_speedup=6 / depth,
        wall_clock_speedup=2.0 if timed else None,
        metrics={"rouge1": 0.25, "rougeL": 0.2, "perplexity": 9.5, "agreement": 0.9, "identical": 0.5, **metrics},
        exit_histogram={"2": 4, "6": 1},
        speeds=speeds if timed else {},
    )


def test_metrics_that_compare_with_full_depth_come_first():
    header, _, row = generation_table([make_point()]).splitlines()
    cells = [cell.strip() for cell in header.strip("|").split("|")]
    assert cells[-5:] == ["agreement", "identical", "rougeL", "rouge1", "perplexity"]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:6] == ["ConsistentEE (policy)", "0.5", "3.00", "50.0%", "2.00x", "2.00x"]
    assert cells[-5:] == ["0.9000", "0.5000", "0.2000", "0.2500", "9.5000"]


def test_speeds_stand_beside_those_of_full_depth():
    lines = speed_table([make_point(), make_point(timed=False)]).splitlines()
    assert len(lines) == 4
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells[3:] == ["20.0 ± 1.0 (10.0 ± 0.1)", "2.00x ± 0.06", "noise (12.5)", "noise"]
    assert "7.7" not in lines[2]
    cells = [cell.strip() for cell in lines[3].strip("|").split("|")]
    assert cells == ["ConsistentEE (policy)", "8", "3.00", "80.0 (60.0)", "1.33x", "90.0 (75.0)", "1.20x"]


def test_settings_have_short_names():
    assert setting_name("policy", 0.5) == "policy > 0.5"
    assert setting_name("entropy", 0.25) == "entropy < 0.25"
    assert setting_name("patience", 3) == "patience ≥ 3"
    assert setting_name("policy", 0.5, 1 / 3) == "policy, budget 0.3333"
    assert setting_name("policy", 0.99999952) == "policy > 0.99999952"
    assert setting_name("policy", [0.5, 0.5]) == "policy > per exit"


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    full = make_point("full depth", 6.0, timed=False)
    curves = {"policy": [make_point(depth=4.0), make_point(depth=2.0, timed=False)], "margin": [make_point("margin")]}
    path = plot_generation(curves, ["agreement", "rougeL"], tmp_path / "curve.svg", full, "A title")
    text = path.read_text()
    assert "<svg" in text
    noisy = make_point()
    noisy.speeds["1"].tokens_per_second = noisy.speeds["1"].full_tokens_per_second = None
    for curve in (curves, {"policy": [make_point(timed=False)]}, {"policy": [noisy]}):
        assert plot_generation(curve, ["agreement"], tmp_path / "curve.png", full).stat().st_size > 1000
    with pytest.raises(ValueError, match=r"`metric` must be in every point's metrics, .*; got 'bleu'"):
        plot_generation(curves, ["bleu"], tmp_path / "curve.png", full)
    with pytest.raises(ValueError, match="at least one operating point"):
        plot_generation({}, ["agreement"], tmp_path / "curve.png", full)
