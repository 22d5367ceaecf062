# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Configuration of SmolLM3 with exits."""

from transformers import SmolLM3Config

from transformers_cee.exits.configuration import DecoderExitConfigMixin
from transformers_cee.modeling.remote_code import RemoteCodeConfigMixin


class SmolLM3CeeConfig(RemoteCodeConfigMixin, DecoderExitConfigMixin, SmolLM3Config):
    """Configuration of [`SmolLM3ForConsistentEECausalLM`]: the fields of `SmolLM3Config` and of
    `DecoderExitConfigMixin`.

    Raises:
        ValueError: a field of the exits is out of its range; the message names the field, the value and what is
            accepted.
    """

    model_type = "smollm3_cee"


__all__ = ["SmolLM3CeeConfig"]
