# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Estimators: small modules that some exit criteria fit on stored exits. They are saved with the model's weights."""

from collections.abc import Callable
from typing import Any

from torch import nn


# Name of the criterion to a function from a config to its estimator, before it is fitted.
ESTIMATORS: dict[str, Callable[[Any], nn.Module]] = {}


def make_estimators(config: Any) -> nn.ModuleDict:
    """Estimators named by `config.exit_estimators`; none by default."""
    return nn.ModuleDict({name: ESTIMATORS[name](config) for name in config.exit_estimators})
