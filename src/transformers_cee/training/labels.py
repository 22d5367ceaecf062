# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Labels that are numbers: one that is infinite or no number ruins a model, and its loss may look healthy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


# Columns that collators of transformers turn into `labels`.
LABEL_COLUMNS = ("labels", "label", "label_ids")


def check_label_column(dataset: Any, name: str) -> None:
    """Raises `ValueError` for a label of a 🤗 data set that is no finite number, all rows at once. Rows of other data
    sets are looked at as they are collated, see `FiniteLabels`: they may be made when they are asked for.

    Args:
        dataset: any data set; None is passed over.
        name (`str`): the argument that it came in.
    """
    features = getattr(dataset, "features", None)
    if not hasattr(dataset, "with_format") or not hasattr(dataset, "__len__") or not features or len(dataset) == 0:
        return
    for column in LABEL_COLUMNS:
        kind = getattr(features.get(column), "feature", features.get(column))
        if "float" not in getattr(kind, "dtype", ""):
            continue
        try:
            found = dataset.with_format("numpy", columns=[column], dtype=np.float64)[:][column]
            # What is missing becomes NaN.
            values = torch.from_numpy(np.array(found, dtype=np.float64))
        except (TypeError, ValueError):
            # Rows of different lengths: the collator or the model has its say.
            continue
        _check_finite(values, f"`{name}` row {{row}}, column {column!r}")


def _check_finite(values: Tensor, place: str) -> None:
    """Raises `ValueError` that says where; `{row}` in `place` becomes the number of the row."""
    if not values.is_floating_point():
        return
    # As the loss sees them: what is too large for float32 is infinite there.
    wrong = ~values.float().isfinite()
    if bool(wrong.any()):
        row = int(wrong.reshape(len(values), -1).any(1).nonzero()[0])
        value = values[row].flatten()[wrong[row].flatten()][0]
        raise ValueError(
            f"{place.replace('{row}', str(row))}: the label {float(value)} is not a finite number in float32."
        )


def check_labelled(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """The batch; raises `ValueError` if it has no labels."""
    if batch.get("labels") is None:
        raise ValueError(f"A batch has no `labels`; got {sorted(batch)}. Rows need a column 'labels' (or 'label').")
    return batch


def without_labels(collator: Callable[[list], Mapping[str, Any]]) -> Callable[[list], dict[str, Any]]:
    """The collator, whose batches come without labels: what is not looked at need not be there, nor be right."""
    return lambda rows: {name: value for name, value in collator(rows).items() if name != "labels"}


class FiniteLabels:
    """Collator that raises `ValueError` for a batch without labels, or with one that is no finite number. It looks
    before a batch is sent to a device, which need not wait.

    Args:
        collator (`Callable`): makes a batch of tensors from a list of rows.
    """

    def __init__(self, collator: Callable[[list], Mapping[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, rows: list) -> Mapping[str, Any]:
        batch = check_labelled(self.collator(rows))
        if isinstance(batch["labels"], Tensor):
            _check_finite(batch["labels"], f"`labels` of row {{row}} of a batch of {len(rows)}")
        return batch


class FiniteLoss:
    """Part of a Trainer: a loss that is no number stops the run before it reaches the weights. Trainer would leave it
    out of what it logs and go on. With float16 it goes on here, too: gradient scaling passes over such steps."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        options, state = self.args, self.state  # type: ignore[attr-defined]
        # Only where Trainer itself waits for the number.
        if options.logging_nan_inf_filter and not options.fp16 and not bool(loss.isfinite().all()):
            raise ValueError(
                f"The loss of step {state.global_step + 1} in {options.output_dir} is {loss.item()}, and so would the "
                "weights be. Labels are finite numbers; a smaller `learning_rate`, `max_grad_norm` or smaller targets "
                "may help."
            )
        return loss
