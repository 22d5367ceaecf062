# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass, field

import numpy as np
import pytest

from transformers_cee.evaluation import plots
from transformers_cee.evaluation.plots import plot_curves, plot_exit_histogram, plot_reliability, plot_seeds
from transformers_cee.evaluation.reliability import reliability


PNG = b"\x89PNG\r\n\x1a\n"


@dataclass
class Point:
    """What the plots read of an operating point."""

    depth: float
    wall_clock_speedup: float | None
    metrics: dict[str, float] = field(default_factory=dict)
    exit_histogram: dict[str, int] = field(default_factory=dict)


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
    assert "no wall-clock figures" in path.read_text() or path.stat().st_size > 1000


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


@pytest.fixture
def panels(monkeypatch):
    """Panels of the last picture."""
    drawn = []
    finish = plots.save_figure

    def remember(figure, *arguments):
        drawn[:] = figure.axes
        return finish(figure, *arguments)

    monkeypatch.setattr(plots, "save_figure", remember)
    return drawn


def seed(points: list[tuple[float, float]], timed: bool = True) -> list[Point]:
    return [
        Point(depth, 4 / depth if timed else None, {"accuracy": value}, {"2": 4 - int(depth), "4": int(depth)})
        for depth, value in points
    ]


def test_seeds_are_averaged_where_all_of_them_reach(tmp_path, panels):
    # Straight lines, so that their mean is one.
    policy = [seed([(1.0, 0.5), (3.0, 0.7)]), seed([(2.0, 0.6), (4.0, 1.0)]), seed([(4.0, 0.9), (1.5, 0.4)])]
    curves = {"policy": policy, "entropy": [seed([(1.0, 0.5), (4.0, 0.6)], timed=False)]}
    path = plot_seeds(
        curves,
        "accuracy",
        tmp_path / "new" / "seeds.png",
        axes=["depth", "flops", "wall_clock"],
        exit_costs=[10.0, 20.0],
        full=seed([(4.0, 0.8), (4.0, 0.9)]),
        title="TREC",
    )
    assert path.read_bytes().startswith(PNG)
    by_depth, by_flops, by_time = panels
    line = by_depth.lines[0]
    xs, ys = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
    assert (xs[0], xs[-1]) == (2.0, 3.0)
    for depth, height in ((2.0, [0.6, 0.6, 0.5]), (3.0, [0.7, 0.8, 0.7])):
        assert ys[xs == depth] == pytest.approx(statistics.mean(height))
        bounds = by_depth.collections[0].get_paths()[0].vertices
        at = sorted({round(y, 9) for x, y in bounds if x == depth})
        mean, deviation = statistics.mean(height), statistics.stdev(height)
        assert (at[0], at[-1]) == (pytest.approx(mean - deviation), pytest.approx(mean + deviation))
    assert len(by_depth.collections) == 1  # one seed has no band
    assert by_flops.lines[0].get_xdata()[0] == 10 * 2 / 4 + 20 * 2 / 4
    assert by_time.lines[0].get_xdata()[0] == pytest.approx(0.5)
    assert len(by_time.lines[1].get_xdata()) == 0  # not timed
    assert [line.get_label() for line in by_depth.lines] == ["policy", "entropy", "full depth"]
    assert by_depth.lines[2].get_ydata() == [pytest.approx(0.85)] * 2


def test_oracle_of_seeds_is_a_star_where_depth_is_the_axis(tmp_path, panels):
    oracle = [Point(1.5, 4.0, {"accuracy": 0.9}), Point(2.5, 4.0, {"accuracy": 1.0})]
    curves = {"a": [seed([(1.0, 0.5), (4.0, 0.8)])]}
    plot_seeds(curves, "accuracy", tmp_path / "a.png", axes=["depth", "wall_clock"], oracle=oracle)
    star = panels[0].lines[-1]
    assert star.get_label() == "oracle (first correct exit)"
    assert star.get_xydata().tolist() == [[2.0, pytest.approx(0.95)]]
    assert len(panels[1].lines) == 1


def test_seeds_that_were_not_timed_say_so(tmp_path, panels):
    plot_seeds({"a": [seed([(1.0, 0.5)], timed=False)]}, "accuracy", tmp_path / "a.png", axes=["wall_clock"])
    assert [text.get_text() for text in panels[0].texts] == ["no method was timed"]


def test_seeds_that_meet_in_one_point(tmp_path, panels):
    plot_seeds({"a": [seed([(1.0, 0.5), (2.0, 0.6)]), seed([(2.0, 0.7)])]}, "accuracy", tmp_path / "a.png")
    assert panels[0].lines[0].get_xydata().tolist() == [[2.0, pytest.approx(0.65)]]


@pytest.mark.parametrize(
    ("curves", "options", "message"),
    [
        ({}, {}, "must hold a method"),
        ({"a": []}, {}, r"without seeds: \['a'\]"),
        ({"a": [seed([(1.0, 0.5)])]}, {"axes": []}, "`axes` one name"),
        ({"a": [seed([(1.0, 0.5)])]}, {"axes": ["joules"]}, "`x`='joules'"),
        ({"a": [seed([(1.0, 0.5)]), seed([(2.0, 0.5)])]}, {}, "'a' must share a range of depth"),
        ({"a": [[]]}, {}, "at least one operating point"),
        ({"a": [seed([(1.0, 0.5)])]}, {"full": [Point(6.0, 1.0)]}, "`metric` must be in every point"),
        ({"a": [seed([(1.0, 0.5)])]}, {"oracle": [Point(6.0, 1.0)]}, "`metric` must be in every point"),
    ],
)
def test_seeds_refuse(curves, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plot_seeds(curves, "accuracy", tmp_path / "a.png", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("equal_mass", [False, True])
def test_reliability(equal_mass, tmp_path, panels):
    generator = np.random.default_rng(0)
    exits = {
        layer: reliability(generator.random(50), generator.random(50) < 0.5, 4, equal_mass)
        for layer in (1, 2, 3, 5, 6)
    }
    path = plot_reliability(exits, tmp_path / "reliability.png", columns=3, title="TREC")
    assert path.read_bytes().startswith(PNG)
    assert [panel.get_visible() for panel in panels] == [True] * 5 + [False]
    for panel, (layer, bins) in zip(panels, exits.items(), strict=False):
        assert panel.get_title() == f"layer {layer}: ECE {100 * bins.expected_calibration_error:.1f} %"
        heights = [bar.get_height() for bar in panel.patches][:4]
        assert heights == pytest.approx(bins.accuracy.tolist())


def test_reliability_leaves_out_empty_bins(tmp_path, panels):
    plot_reliability({12: reliability([0.95, 0.9], [True, False], 10)}, tmp_path / "reliability.png")
    # The bar of the legend comes last.
    assert [(bar.get_x(), bar.get_height()) for bar in panels[0].patches[:-1]] == [(0.8, 0.0), (0.9, 1.0)]


def test_reliability_refuses(tmp_path):
    with pytest.raises(ValueError, match=r"`exits` \(0\)"):
        plot_reliability({}, tmp_path / "reliability.png")
    with pytest.raises(ValueError, match=r"`columns` \(0\)"):
        plot_reliability({1: reliability([0.5], [True])}, tmp_path / "reliability.png", columns=0)
