# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Agreement as a metric of 🤗 Evaluate. Imports nothing of this package: Evaluate copies the file elsewhere."""

from typing import Any

import datasets
import evaluate
import numpy as np


class Agreement(evaluate.Metric):
    """Share of rows or tokens whose prediction at their exit is that of the full depth.

    `compute` returns `{"agreement": ...}`. The configuration `"multilabel"` takes one indicator per label and counts
    rows that agree in all. Raises `ValueError` on no rows.
    """

    def _info(self) -> evaluate.MetricInfo:
        value = datasets.Value("int64")
        feature = datasets.Sequence(value) if self.config_name == "multilabel" else value
        return evaluate.MetricInfo(
            description="Share of rows or tokens that a model with early exits predicts as its full depth does.",
            citation="",
            inputs_description=(
                "Args:\n    predictions: at the exits taken.\n    full_depth_predictions: at the last exit.\n"
            ),
            features=datasets.Features({"predictions": feature, "full_depth_predictions": feature}),
        )

    def _compute(  # type: ignore[override]
        self, *, predictions: Any, full_depth_predictions: Any, **columns: Any
    ) -> dict[str, float]:
        # `evaluate.combine(...).compute(...)` hands every metric the columns of all of them.
        same = np.asarray(predictions) == np.asarray(full_depth_predictions)
        if not len(same):
            raise ValueError("`predictions` must hold at least one row; got none.")
        return {"agreement": float(same.reshape(len(same), -1).all(1).mean())}
