# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Configuration of MPNet with exits."""

from transformers import MPNetConfig

from transformers_cee.exits.configuration import EncoderExitConfigMixin
from transformers_cee.modeling.remote_code import RemoteCodeConfigMixin


class MPNetCeeConfig(RemoteCodeConfigMixin, EncoderExitConfigMixin, MPNetConfig):
    """Configuration of [`MPNetForConsistentEE`]: the fields of `MPNetConfig` and of `EncoderExitConfigMixin`.

    Raises:
        ValueError: a field of the exits is out of its range; the message names the field, the value and what is
            accepted.
    """

    model_type = "mpnet_cee"


__all__ = ["MPNetCeeConfig"]
