# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Layer speed-up as a metric of 🤗 Evaluate. Imports nothing of this package: Evaluate copies the file elsewhere."""

from typing import Any

import datasets
import evaluate
import numpy as np


class LayerSpeedup(evaluate.Metric):
    """Layers of the model over the mean exit layer, from `exit_layers` (1-based) of rows or tokens, and the share of
    layers that is saved. Neither is a time: print the wall-clock speed-up beside them.

    `compute` returns `{"layer_speedup": L / depth, "saved_layers": 1 − depth / L}`.

    Args:
        num_layers (`int`): layers `L` of the model.
        kwargs: of `evaluate.Metric`.

    Raises:
        ValueError: `num_layers` is missing or not positive; in `compute`, no layers, or one outside of 1..L.
    """

    def __init__(self, *args: Any, num_layers: int | None = None, **kwargs: Any) -> None:
        if num_layers is None or num_layers < 1:
            raise ValueError(f"`num_layers`={num_layers} must be the number of the model's layers, at least 1.")
        self.num_layers = num_layers
        super().__init__(*args, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Layers of a model with early exits over the mean layer at which rows or tokens leave.",
            citation="",
            inputs_description="Args:\n    exit_layers: 1-based exit layer of each row or token.\n",
            features=datasets.Features({"exit_layers": datasets.Value("int64")}),
        )

    def _compute(self, *, exit_layers: Any, **columns: Any) -> dict[str, float]:  # type: ignore[override]
        # `evaluate.combine(...).compute(...)` hands every metric the columns of all of them.
        layers = np.asarray(exit_layers)
        if not len(layers) or layers.min() < 1 or layers.max() > self.num_layers:
            raise ValueError(
                f"`exit_layers` must be at least one layer in 1..{self.num_layers}; got {layers[:8].tolist()}."
            )
        depth = float(layers.mean())
        return {"layer_speedup": self.num_layers / depth, "saved_layers": 1 - depth / self.num_layers}
