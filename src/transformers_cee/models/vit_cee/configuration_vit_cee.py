# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Configuration of ViT with exits."""

from transformers import ViTConfig

from transformers_cee.exits.configuration import EncoderExitConfigMixin
from transformers_cee.modeling.remote_code import RemoteCodeConfigMixin


class ViTCeeConfig(RemoteCodeConfigMixin, EncoderExitConfigMixin, ViTConfig):
    """Configuration of [`ViTForConsistentEE`]: the fields of `ViTConfig` and those of `EncoderExitConfigMixin`.

    Raises:
        ValueError: a field of the exits is out of its range; the message names the field, the value and what is
            accepted.

    Example:

    ```python
    >>> from transformers_cee import ViTCeeConfig

    >>> config = ViTCeeConfig(num_hidden_layers=12, exit_layers=3)
    >>> config.exit_layer_numbers
    [3, 6, 9, 12]
    ```
    """

    model_type = "vit_cee"


__all__ = ["ViTCeeConfig"]
