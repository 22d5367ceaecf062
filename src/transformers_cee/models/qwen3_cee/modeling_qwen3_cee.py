# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Qwen3 with exits."""

from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM, Qwen3Model, Qwen3PreTrainedModel

from transformers_cee.modeling.body import BodyWithoutExits
from transformers_cee.modeling.causal_lm import EarlyExitCausalLM
from transformers_cee.models.qwen3_cee.configuration_qwen3_cee import Qwen3CeeConfig


class Qwen3ForConsistentEECausalLM(EarlyExitCausalLM, Qwen3PreTrainedModel):
    """Qwen3 for text generation in which every token leaves at its own layer (ConsistentEE, Zeng et al., AAAI 2024).

    Loads from its own checkpoints and from any Qwen3 checkpoint, GGUF files included (`gguf_file=`).

    Args:
        config ([`Qwen3CeeConfig`]): sizes of Qwen3 and the fields of the exits.
    """

    config_class = Qwen3CeeConfig
    config: Qwen3CeeConfig
    stock_class = Qwen3ForCausalLM
    body_class = Qwen3Model


class Qwen3CeeModel(BodyWithoutExits, Qwen3Model):
    """The decoder of a [`Qwen3ForConsistentEECausalLM`], without exits and heads.

    Args:
        config ([`Qwen3CeeConfig`]): sizes of Qwen3; the fields of the exits have no effect.
    """

    config_class = Qwen3CeeConfig
    config: Qwen3CeeConfig


__all__ = ["Qwen3CeeModel", "Qwen3ForConsistentEECausalLM"]
