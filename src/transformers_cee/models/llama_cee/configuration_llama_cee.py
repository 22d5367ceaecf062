# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Configuration of LLaMA with exits."""

from transformers import LlamaConfig

from transformers_cee.exits.configuration import DecoderExitConfigMixin
from transformers_cee.modeling.remote_code import RemoteCodeConfigMixin


class LlamaCeeConfig(RemoteCodeConfigMixin, DecoderExitConfigMixin, LlamaConfig):
    """Configuration of [`LlamaForConsistentEECausalLM`]: the fields of `LlamaConfig` and of `DecoderExitConfigMixin`.

    Raises:
        ValueError: a field of the exits is out of its range; the message names the field, the value and what is
            accepted.

    Example:

    ```python
    >>> from transformers_cee import LlamaCeeConfig

    >>> config = LlamaCeeConfig(num_hidden_layers=30, exit_layers=[10, 15, 20], exit_head="low_rank")
    >>> config.exit_layer_numbers
    [10, 15, 20, 30]
    ```
    """

    model_type = "llama_cee"


__all__ = ["LlamaCeeConfig"]
