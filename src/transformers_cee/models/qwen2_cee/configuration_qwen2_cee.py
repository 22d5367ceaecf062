# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Configuration of Qwen2 with exits."""

from transformers import Qwen2Config

from transformers_cee.exits.configuration import DecoderExitConfigMixin
from transformers_cee.modeling.remote_code import RemoteCodeConfigMixin


class Qwen2CeeConfig(RemoteCodeConfigMixin, DecoderExitConfigMixin, Qwen2Config):
    """Configuration of [`Qwen2ForConsistentEECausalLM`]: the fields of `Qwen2Config` and of `DecoderExitConfigMixin`.

    Raises:
        ValueError: a field of the exits is out of its range; the message names the field, the value and what is
            accepted.
    """

    model_type = "qwen2_cee"


__all__ = ["Qwen2CeeConfig"]
