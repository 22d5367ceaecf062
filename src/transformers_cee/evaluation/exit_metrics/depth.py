# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Depth as a metric of 🤗 Evaluate. Imports nothing of this package: Evaluate copies the file elsewhere."""

from typing import Any

import datasets
import evaluate
import numpy as np


class Depth(evaluate.Metric):
    """Mean exit layer, from `exit_layers` (1-based) of rows or tokens.

    `compute` returns `{"depth": ...}`. Raises `ValueError` on no layers, or one below 1.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Mean layer, counted from 1, at which rows or tokens leave a model with early exits.",
            citation="",
            inputs_description="Args:\n    exit_layers: 1-based exit layer of each row or token.\n",
            features=datasets.Features({"exit_layers": datasets.Value("int64")}),
        )

    def _compute(self, *, exit_layers: Any, **columns: Any) -> dict[str, float]:  # type: ignore[override]
        # `evaluate.combine(...).compute(...)` hands every metric the columns of all of them.
        layers = np.asarray(exit_layers)
        if not len(layers) or layers.min() < 1:
            raise ValueError(f"`exit_layers` must be at least one layer, counted from 1; got {layers[:8].tolist()}.")
        return {"depth": float(layers.mean())}
