# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
from __future__ import annotations

import sys
from dataclasses import dataclass, field

import pytest

from transformers_cee.evaluation.plots import plot_curves, plot_exit_histogram


PNG = b"\x89PNG\r\n\x1a\n"


@dataclass
class Point:
    """What the plots read of an operating point."""

    depth: float
    wall_clock_speedup: float | None
    metrics: dict[str, float] = field(default_factory=dict)


def make_curve(offset: float, timed: bool = True) -> list[Point]:
    depths = (1.5, 2.4, 3.1, 4.0, 5.2)
    values = [{"accuracy": 0.95 - offset - 0.2 / depth} for depth in depths]
    return [Point(depth, 5.4 / depth if timed else None, value) for depth, value in zip(depths, values, strict=True)]


def test_curves_with_every_kind_of_point(tmp_path):
    curves = {"policy": make_curve(0.0), "entropy": make_curve(0.01), "patience": make_curve(0.03, timed=False)}
    full, oracle = Point(6.0, 1.0, {"accuracy": 0.95}), Point(1.6, None, {"accuracy": 0.99})
    path = plot_curves(curves, "accuracy", tmp_path / "new" / "curve.png", full=full, oracle=oracle, title="TREC")
    assert path.read_bytes().startswith(PNG)


def test_curves_in_any_order_and_without_timing(tmp_path):
    path = plot_curves({"policy": make_curve(0.0, timed=False)[::-1]}, "accuracy", tmp_path / "curve.svg")
    assert "no point was timed" in path.read_text() or path.stat().st_size > 1000


def test_reference_points_alone_are_enough(tmp_path):
    path = plot_curves({}, "accuracy", tmp_path / "curve.png", full=Point(6.0, 1.0, {"accuracy": 0.9}))
    assert path.read_bytes().startswith(PNG)


def test_no_point_at_all(tmp_path):
    with pytest.raises(ValueError, match="at least one operating point"):
        plot_curves({"policy": []}, "accuracy", tmp_path / "curve.png")


def test_unknown_metric(tmp_path):
    with pytest.raises(ValueError, match=r"`metric`.*accuracy.*'f1'"):
        plot_curves({"policy": make_curve(0.0)}, "f1", tmp_path / "curve.png")


def test_exit_histogram(tmp_path):
    histograms = {"policy": {"1": 10, "2": 30, "6": 60}, "entropy": {"2": 55, "6": 45}}
    assert plot_exit_histogram(histograms, tmp_path / "exits.png", title="TREC").read_bytes().startswith(PNG)


@pytest.mark.parametrize("histograms", [{}, {"policy": {"1": 0}}])
def test_exit_histogram_without_rows(histograms, tmp_path):
    with pytest.raises(ValueError, match="at least one row"):
        plot_exit_histogram(histograms, tmp_path / "exits.png")


def test_missing_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"transformers-cee\[plots\]"):
        plot_curves({"policy": make_curve(0.0)}, "accuracy", tmp_path / "curve.png")
