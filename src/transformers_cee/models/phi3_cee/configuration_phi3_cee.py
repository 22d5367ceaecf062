# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Configuration of Phi-3 with exits."""

from transformers import Phi3Config

from transformers_cee.exits.configuration import DecoderExitConfigMixin
from transformers_cee.modeling.remote_code import RemoteCodeConfigMixin


class Phi3CeeConfig(RemoteCodeConfigMixin, DecoderExitConfigMixin, Phi3Config):
    """Configuration of [`Phi3ForConsistentEECausalLM`]: the fields of `Phi3Config` and of `DecoderExitConfigMixin`.

    Raises:
        ValueError: a field of the exits is out of its range; the message names the field, the value and what is
            accepted.
    """

    model_type = "phi3_cee"


__all__ = ["Phi3CeeConfig"]
