# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Configuration of Qwen3 with exits."""

from transformers import Qwen3Config

from transformers_cee.exits.configuration import DecoderExitConfigMixin
from transformers_cee.modeling.remote_code import RemoteCodeConfigMixin


class Qwen3CeeConfig(RemoteCodeConfigMixin, DecoderExitConfigMixin, Qwen3Config):
    """Configuration of [`Qwen3ForConsistentEECausalLM`]: the fields of `Qwen3Config` and of `DecoderExitConfigMixin`.

    Raises:
        ValueError: a field of the exits is out of its range; the message names the field, the value and what is
            accepted.
    """

    model_type = "qwen3_cee"


__all__ = ["Qwen3CeeConfig"]
