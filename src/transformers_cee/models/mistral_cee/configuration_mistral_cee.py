# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Configuration of Mistral with exits."""

from transformers import MistralConfig

from transformers_cee.exits.configuration import DecoderExitConfigMixin
from transformers_cee.modeling.remote_code import RemoteCodeConfigMixin


class MistralCeeConfig(RemoteCodeConfigMixin, DecoderExitConfigMixin, MistralConfig):
    """Configuration of [`MistralForConsistentEECausalLM`]: the fields of `MistralConfig` and of
    `DecoderExitConfigMixin`.

    Raises:
        ValueError: a field of the exits is out of its range; the message names the field, the value and what is
            accepted.
    """

    model_type = "mistral_cee"


__all__ = ["MistralCeeConfig"]
