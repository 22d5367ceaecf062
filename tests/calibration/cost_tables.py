# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tables of costs that no machine has measured."""

from __future__ import annotations

from collections.abc import Sequence

from transformers_cee.calibration.cost_table import CostTable, MeasuredBatch


def measured_batch(
    rows: int,
    length: int,
    layers: int = 8,
    exits: Sequence[int] | None = None,
    block: float = 0.25,
    check: float = 0.5,
    compaction: float = 0.125,
    walk: float = 0.0625,
) -> MeasuredBatch:
    """Layer l takes l/8 for each row's token and a second on top."""
    return MeasuredBatch(
        rows,
        length,
        {layer: 1.0 + rows * length * layer / 8 for layer in range(1, layers + 1)},
        block,
        dict.fromkeys(exits or range(1, layers + 1), check + rows / 16),
        compaction,
        walk,
    )


def cost_table(batches: Sequence[MeasuredBatch] | None = None, **options) -> CostTable:
    sizes = ((1, 2), (4, 2), (8, 2), (1, 8), (8, 8))
    batches = [measured_batch(*size, **options) for size in sizes] if batches is None else batches
    return CostTable("torch", "float32", "a processor", 1, batches)
