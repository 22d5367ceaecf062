# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Configuration of ELECTRA with exits."""

from transformers import ElectraConfig

from transformers_cee.exits.configuration import EncoderExitConfigMixin
from transformers_cee.modeling.remote_code import RemoteCodeConfigMixin


class ElectraCeeConfig(RemoteCodeConfigMixin, EncoderExitConfigMixin, ElectraConfig):
    """Configuration of [`ElectraForConsistentEE`]: the fields of `ElectraConfig` and of `EncoderExitConfigMixin`.

    Raises:
        ValueError: a field of the exits is out of its range; the message names the field, the value and what is
            accepted.
    """

    model_type = "electra_cee"


__all__ = ["ElectraCeeConfig"]
