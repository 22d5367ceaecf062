# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Configuration of DistilBERT with exits."""

from transformers import DistilBertConfig

from transformers_cee.exits.configuration import EncoderExitConfigMixin
from transformers_cee.modeling.remote_code import RemoteCodeConfigMixin


class DistilBertCeeConfig(RemoteCodeConfigMixin, EncoderExitConfigMixin, DistilBertConfig):
    """Configuration of [`DistilBertForConsistentEE`]: the fields of `DistilBertConfig` and of
    `EncoderExitConfigMixin`.

    Raises:
        ValueError: a field of the exits is out of its range; the message names the field, the value and what is
            accepted.
    """

    model_type = "distilbert_cee"


__all__ = ["DistilBertCeeConfig"]
