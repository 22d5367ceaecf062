# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Expected seconds of a batch, and losses of rows, by loops over all batches that can be drawn."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

from populations import slow_exit

from transformers_cee.calibration.cost_table import CostTable


Rows = Sequence[Sequence[float]]


def all_subsets(internal: int) -> Iterator[tuple[int, ...]]:
    for size in range(internal + 1):
        yield from itertools.combinations(range(internal), size)


def taken(rows: Rows, exits: Sequence[int], threshold: float) -> list[int]:
    """Exit (0-based) of each row when only some internal exits are asked; the last one's number otherwise."""
    internal = len(rows[0])
    places = [slow_exit([row[index] for index in exits], [threshold] * len(exits)) for row in rows]
    return [exits[place] if place < len(exits) else internal for place in places]


def slow_seconds(
    table: CostTable,
    layers: Sequence[int],
    rows: Rows,
    exits: Sequence[int],
    threshold: float,
    batch_size: int,
    length,
) -> float:
    """A mean over all batches of rows that are drawn one by one, of what their walk takes. Dropping rows counts with
    its frequency, at the mean number of rows that stay."""
    left_at = taken(rows, exits, threshold)
    costs = table.at(batch_size, length)
    total, batches = 0.0, 0
    dropped, staying = dict.fromkeys(exits, 0), dict.fromkeys(exits, 0)
    for batch in itertools.product(left_at, repeat=batch_size):
        batches += 1
        left, start = list(batch), 0
        for index in [*exits, len(layers) - 1]:
            if left:
                total += table.cost(len(left), length, start, layers[index])
                total += costs.checks[layers[index]][len(left)]
            start = layers[index]
            stay = [one for one in left if one > index]
            if index in dropped:
                staying[index] += len(stay)
                dropped[index] += 0 < len(stay) < len(left)
            left = stay
    for index in exits:
        mean = staying[index] / batches
        low = math.floor(mean)
        keep = costs.compaction[low]
        if mean > low:
            keep += (mean - low) * (costs.compaction[low + 1] - keep)
        total += dropped[index] * keep
    return total / batches + (costs.walk[batch_size] if exits else 0.0)


def slow_loss(rows: Rows, losses: Rows, exits: Sequence[int], threshold: float, of_any: bool) -> list[float]:
    """Loss of each row; the worst one of all walks that ask only some of the exits, if that counts."""
    walks = [
        [loss[exit_] for loss, exit_ in zip(losses, taken(rows, some, threshold), strict=True)]
        for some in (
            [[exits[place] for place in subset] for subset in all_subsets(len(exits))] if of_any else [list(exits)]
        )
    ]
    return [max(ways) for ways in zip(*walks, strict=True)]
