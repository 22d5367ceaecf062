# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Configuration of OLMo 2 with exits."""

from transformers import Olmo2Config

from transformers_cee.exits.configuration import DecoderExitConfigMixin
from transformers_cee.modeling.remote_code import RemoteCodeConfigMixin


class Olmo2CeeConfig(RemoteCodeConfigMixin, DecoderExitConfigMixin, Olmo2Config):
    """Configuration of [`Olmo2ForConsistentEECausalLM`]: the fields of `Olmo2Config` and of `DecoderExitConfigMixin`.

    Raises:
        ValueError: a field of the exits is out of its range; the message names the field, the value and what is
            accepted.
    """

    model_type = "olmo2_cee"


__all__ = ["Olmo2CeeConfig"]
