# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Configuration of BERT with exits."""

from transformers import BertConfig

from transformers_cee.exits.configuration import EncoderExitConfigMixin
from transformers_cee.modeling.remote_code import RemoteCodeConfigMixin


class BertCeeConfig(RemoteCodeConfigMixin, EncoderExitConfigMixin, BertConfig):
    """Configuration of [`BertForConsistentEE`]: the fields of `BertConfig` and those of `EncoderExitConfigMixin`.

    Raises:
        ValueError: a field of the exits is out of its range; the message names the field, the value and what is
            accepted.

    Example:

    ```python
    >>> from transformers_cee import BertCeeConfig

    >>> config = BertCeeConfig(num_hidden_layers=12, exit_layers=3, exit_pooling="mean")
    >>> config.exit_layer_numbers
    [3, 6, 9, 12]
    ```
    """

    model_type = "bert_cee"


__all__ = ["BertCeeConfig"]
