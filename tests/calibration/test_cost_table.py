# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tables of measured costs: between and beyond what was measured, from and to files, and whatever is no table."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from operator import attrgetter

import numpy as np
import pytest
from cost_tables import cost_table, measured_batch
from mutations import WRONG_VALUES, mutated
from populations import population

from transformers_cee import CostTable, MeasuredBatch, calibrate_budget


def between(points: dict[float, float], at: float) -> float:
    """By a loop: linear between points, the first one below, the last one in proportion above."""
    places = sorted(points)
    if at <= places[0]:
        return points[places[0]]
    for low, high in itertools.pairwise(places):
        if at <= high:
            return points[low] + (at - low) / (high - low) * (points[high] - points[low])
    return points[places[-1]] * at / places[-1]


def slow_cost(table: CostTable, rows: float, length: float, seconds) -> float:
    """Seconds, a function of measured batches, at a size that may lie between them."""
    by_length = {}
    for batch in table.batches:
        by_length.setdefault(batch.length, {})[batch.batch_size] = seconds(batch)
    return min(rows, 1.0) * between({one: between(sizes, rows) for one, sizes in by_length.items()}, length)


@pytest.mark.parametrize("rows", [0, 0.25, 1, 1.5, 4, 5, 8, 24])
@pytest.mark.parametrize("length", [1, 2, 3.5, 8, 32])
def test_between_and_beyond_measured_batches(rows, length):
    table = cost_table()
    for start, stop in ((0, 8), (0, 1), (3, 5), (7, 8)):

        def seconds(batch, layers=range(start + 1, stop + 1)):
            return batch.block_seconds + sum(batch.layer_seconds[layer] for layer in layers)

        expected = slow_cost(table, rows, length, seconds)
        assert table.cost(rows, length, start, stop) == pytest.approx(expected, rel=1e-12)


def test_all_rows_of_a_batch_at_once():
    table = cost_table(exits=(3, 5, 8))
    costs = table.at(12, 5)
    assert costs.layers.shape == (13, 9) and sorted(costs.checks) == table.exit_layers == [3, 5, 8]
    for rows in range(13):
        for name in ("block", "compaction"):
            expected = slow_cost(table, rows, 5, attrgetter(f"{name}_seconds"))
            assert getattr(costs, name)[rows] == pytest.approx(expected, rel=1e-12)
        for layer in (3, 5, 8):
            expected = slow_cost(table, rows, 5, lambda batch, layer=layer: batch.check_seconds[layer])
            assert costs.checks[layer][rows] == pytest.approx(expected, rel=1e-12)
        one_block = costs.block[rows] + costs.layers[rows, 6] - costs.layers[rows, 2]
        assert one_block == pytest.approx(table.cost(rows, 5, 2, 6), rel=1e-12)
    with pytest.raises(ValueError, match="read-only"):
        costs.layers[0] = 1.0


def test_what_was_measured_comes_back_and_order_means_nothing():
    batches = [measured_batch(4, 16), measured_batch(1, 16), measured_batch(2, 4)]
    turned = replace(batches[0], layer_seconds=dict(reversed(batches[0].layer_seconds.items())))
    table, other = cost_table(batches), cost_table([batches[2], batches[1], turned])
    for batch in batches:
        for layer, seconds in batch.layer_seconds.items():
            found = table.cost(batch.batch_size, batch.length, layer - 1, layer) - batch.block_seconds
            assert found == pytest.approx(seconds, rel=1e-12)
    assert table.to_dict() == other.to_dict()


def test_files(tmp_path):
    table = cost_table(exits=(2, 8))
    table.save(tmp_path / "costs.json")
    loaded = CostTable.load(tmp_path / "costs.json")
    assert (
        loaded.to_dict() == table.to_dict() == CostTable.from_dict(json.loads(json.dumps(table.to_dict()))).to_dict()
    )
    assert loaded.cost(3, 5, 2, 7) == table.cost(3, 5, 2, 7)
    (tmp_path / "costs.json").write_text('{"engine": ')
    with pytest.raises(ValueError, match="Measure the costs again"):
        CostTable.load(tmp_path / "costs.json")


def test_tables_of_before_have_no_costs_of_asking():
    values = cost_table().to_dict()
    for batch in values["batches"]:
        del batch["walk_seconds"]
    assert {batch.walk_seconds for batch in CostTable.from_dict(values).batches} == {0.0}


def test_costs_of_a_budget():
    table = cost_table(exits=(2, 5, 8))
    measured = measured_batch(4, 2)
    expected, total = [], 0.0625
    for start, stop in ((0, 2), (2, 5), (5, 8)):
        total += 0.25 + sum(measured.layer_seconds[one] for one in range(start + 1, stop + 1)) + 0.75
        expected.append(total / 4)
    assert table.exit_costs([2, 5, 8], 4, 2) == pytest.approx(expected, rel=1e-12)
    costs = cost_table().exit_costs(range(1, 9), 1, 2)
    point = calibrate_budget(population(400), 0.6 * costs[-1], costs=costs, unit="seconds")
    assert point.check(population(400)).held_out["used_budget"] <= 1
    with pytest.raises(ValueError, match=r"checks at layers \[2, 5, 8\].*exits at layers \[3, 8\]"):
        table.exit_costs([3, 8], 4, 2)


def test_numbers_of_all_kinds():
    kinds = MeasuredBatch(
        np.int64(2), 4.0, {1.0: np.float32(0.5), np.int32(2): 1}, np.float64(0.25), {2: np.array(0.5)}, 0
    )
    assert json.loads(json.dumps(cost_table([kinds]).to_dict())) == cost_table([kinds]).to_dict()
    assert cost_table([kinds]).at(np.int64(2), np.float32(4)).layers[-1].tolist() == [0.0, 0.5, 1.5]


def test_one_wrong_field():
    values = json.loads(json.dumps(cost_table([measured_batch(1, 2, 3), measured_batch(4, 2, 3)]).to_dict()))
    refused = loaded = 0
    for path, changed in mutated(values):
        try:
            found = CostTable.from_dict(changed)
        except ValueError as error:
            refused += 1
            assert str(path[0]) in str(error), (path, str(error))
            continue
        loaded += 1
        assert math.isfinite(found.cost(3, 5, 0, 3)) and math.isfinite(found.at(5, 3).layers.sum())
    assert refused > 300 and loaded > 20


@pytest.mark.parametrize("values", [value for value in WRONG_VALUES if not isinstance(value, dict)])
def test_no_dictionary(values):
    with pytest.raises(ValueError, match="`CostTable`"):
        CostTable.from_dict(values)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([measured_batch(1, 2), measured_batch(1, 2)], "1 × 2 more than once"),
        ([measured_batch(1, 2, 3), measured_batch(4, 2, 4)], "layer_seconds of the batch 4 × 2"),
        ([measured_batch(1, 2, exits=(2, 8)), measured_batch(4, 2)], "check_seconds of the batch 4 × 2"),
    ],
)
def test_batches_that_do_not_fit(batches, message):
    with pytest.raises(ValueError, match=message):
        cost_table(batches)


def test_layers_that_are_missing():
    batch = measured_batch(1, 2, 3)
    with pytest.raises(ValueError, match=r"layer_seconds.*\[1, 3\].*all of 1..L"):
        replace(batch, layer_seconds={1: 1.0, 3: 1.0})
    with pytest.raises(ValueError, match=r"check_seconds.*\[1, 2\].*1..3, the last one included"):
        replace(batch, check_seconds={1: 1.0, 2: 1.0})
    for wrong in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"check_seconds.*seconds in 0"):
            replace(batch, check_seconds={3: wrong})
        with pytest.raises(ValueError, match="block_seconds"):
            replace(batch, block_seconds=wrong)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((-1, 2, 0, 1), "rows"),
        ((math.nan, 2, 0, 1), "rows"),
        ((1, 0, 0, 1), "length"),
        ((1, 2, 1, 1), "start"),
        ((1, 2, 0, 9), "stop"),
        ((1, 2, -1, 3), "start"),
        ((1, 2, 0.5, 3), "start"),
    ],
)
def test_wrong_arguments(arguments, name):
    with pytest.raises(ValueError, match=f"`{name}`="):
        cost_table().cost(*arguments)


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, "4", None, True])
def test_wrong_batch_sizes(batch_size):
    with pytest.raises(ValueError, match="`batch_size`="):
        cost_table().at(batch_size, 2)
    with pytest.raises(ValueError, match="`length`="):
        cost_table().at(2, -1.0)
