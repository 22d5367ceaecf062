# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Configuration of ResNet with exits."""

from transformers import ResNetConfig

from transformers_cee.exits.configuration import StagedExitConfigMixin
from transformers_cee.modeling.remote_code import RemoteCodeConfigMixin


class ResNetCeeConfig(RemoteCodeConfigMixin, StagedExitConfigMixin, ResNetConfig):
    """Configuration of [`ResNetForConsistentEE`]: the fields of `ResNetConfig` and those of `StagedExitConfigMixin`.

    Raises:
        ValueError: a field of the exits is out of its range; the message names the field, the value and what is
            accepted.

    Example:

    ```python
    >>> from transformers_cee import ResNetCeeConfig

    >>> config = ResNetCeeConfig(depths=[2, 2, 2, 2], exit_layers=[2, 4, 6])
    >>> config.exit_layer_numbers
    [2, 4, 6, 8]
    ```
    """

    model_type = "resnet_cee"


__all__ = ["ResNetCeeConfig"]
