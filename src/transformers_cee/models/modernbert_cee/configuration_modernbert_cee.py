# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Configuration of ModernBERT with exits."""

from transformers import ModernBertConfig

from transformers_cee.exits.configuration import EncoderExitConfigMixin
from transformers_cee.modeling.remote_code import RemoteCodeConfigMixin


class ModernBertCeeConfig(RemoteCodeConfigMixin, EncoderExitConfigMixin, ModernBertConfig):
    """Configuration of [`ModernBertForConsistentEE`]: the fields of `ModernBertConfig` and those of
    `EncoderExitConfigMixin`.

    Internal exits pool by `exit_pooling`, the last one by `classifier_pooling`, as the stock model does.

    Raises:
        ValueError: a field of the exits is out of its range; the message names the field, the value and what is
            accepted.
    """

    model_type = "modernbert_cee"


__all__ = ["ModernBertCeeConfig"]
