# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Qwen2 with exits."""

from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM, Qwen2Model, Qwen2PreTrainedModel

from transformers_cee.modeling.body import BodyWithoutExits
from transformers_cee.modeling.causal_lm import EarlyExitCausalLM
from transformers_cee.models.qwen2_cee.configuration_qwen2_cee import Qwen2CeeConfig


class Qwen2ForConsistentEECausalLM(EarlyExitCausalLM, Qwen2PreTrainedModel):
    """Qwen2 for text generation in which every token leaves at its own layer (ConsistentEE, Zeng et al., AAAI 2024).

    Loads from its own checkpoints and from any Qwen2 checkpoint, GGUF files included (`gguf_file=`).

    Args:
        config ([`Qwen2CeeConfig`]): sizes of Qwen2 and the fields of the exits.
    """

    config_class = Qwen2CeeConfig
    config: Qwen2CeeConfig
    stock_class = Qwen2ForCausalLM
    body_class = Qwen2Model


class Qwen2CeeModel(BodyWithoutExits, Qwen2Model):
    """The decoder of a [`Qwen2ForConsistentEECausalLM`], without exits and heads.

    Args:
        config ([`Qwen2CeeConfig`]): sizes of Qwen2; the fields of the exits have no effect.
    """

    config_class = Qwen2CeeConfig
    config: Qwen2CeeConfig


__all__ = ["Qwen2CeeModel", "Qwen2ForConsistentEECausalLM"]
