# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Metrics of exits for 🤗 Evaluate, loaded from the installed package: no Hub, no download."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any


__all__ = ["METRICS", "load_metric", "metric_path"]

# Name, which is also that of the module, to class.
METRICS = {"agreement": "Agreement", "depth": "Depth", "layer_speedup": "LayerSpeedup"}


def load_metric(name: str, **kwargs: Any) -> Any:
    """A metric of exits, as `evaluate.load` would give it.

    Their columns have names of their own (`exit_layers`, `full_depth_predictions`), so that `evaluate.combine` can
    feed them together with the task's metrics in one `add_batch`.

    Args:
        name (`str`): `"depth"`, `"layer_speedup"` (which needs `num_layers`) or `"agreement"`.
        kwargs: of the metric's constructor, e.g. `config_name`, `cache_dir`, `experiment_id`.

    Returns:
        `evaluate.Metric`

    Raises:
        ValueError: an unknown name, or `num_layers` missing or not positive.
    """
    module = importlib.import_module(f"{__name__}.{_check(name)}")
    return getattr(module, METRICS[name])(**kwargs)


def metric_path(name: str) -> str:
    """File of a metric, for `evaluate.load(metric_path("depth"))`. Errors as `load_metric`."""
    return str(Path(__file__).parent / f"{_check(name)}.py")


def _check(name: str) -> str:
    if name not in METRICS:
        raise ValueError(f"`name`={name!r} is unknown; accepted are {', '.join(map(repr, METRICS))}.")
    return name
