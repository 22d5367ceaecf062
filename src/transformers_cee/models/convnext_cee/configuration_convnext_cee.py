# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Configuration of ConvNeXt with exits."""

from typing import ClassVar

from transformers import ConvNextConfig

from transformers_cee.exits.configuration import StagedExitConfigMixin
from transformers_cee.modeling.remote_code import RemoteCodeConfigMixin


class ConvNextCeeConfig(RemoteCodeConfigMixin, StagedExitConfigMixin, ConvNextConfig):
    """Configuration of [`ConvNextForConsistentEE`]: fields of `ConvNextConfig` and of `StagedExitConfigMixin`.

    Raises:
        ValueError: a field of the exits is out of its range; the message names the field, the value and what is
            accepted.

    Example:

    ```python
    >>> from transformers_cee import ConvNextCeeConfig

    >>> config = ConvNextCeeConfig(depths=[3, 3, 9, 3], exit_layers=[3, 6, 15])
    >>> config.exit_layer_numbers
    [3, 6, 15, 18]
    ```
    """

    model_type = "convnext_cee"
    # Of transformers 5.24: `num_hidden_layers` are stages there, and blocks here.
    attribute_map: ClassVar[dict[str, str]] = {}


__all__ = ["ConvNextCeeConfig"]
