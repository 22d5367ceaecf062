# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Configuration of XLM-RoBERTa with exits."""

from transformers import XLMRobertaConfig

from transformers_cee.exits.configuration import EncoderExitConfigMixin
from transformers_cee.modeling.remote_code import RemoteCodeConfigMixin


class XLMRobertaCeeConfig(RemoteCodeConfigMixin, EncoderExitConfigMixin, XLMRobertaConfig):
    """Configuration of [`XLMRobertaForConsistentEE`]: the fields of `XLMRobertaConfig` and of
    `EncoderExitConfigMixin`.

    Raises:
        ValueError: a field of the exits is out of its range; the message names the field, the value and what is
            accepted.
    """

    model_type = "xlm_roberta_cee"


__all__ = ["XLMRobertaCeeConfig"]
