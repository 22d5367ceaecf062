# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Mistral with exits."""

from transformers.models.mistral.modeling_mistral import MistralForCausalLM, MistralModel, MistralPreTrainedModel

from transformers_cee.modeling.body import BodyWithoutExits
from transformers_cee.modeling.causal_lm import EarlyExitCausalLM
from transformers_cee.models.mistral_cee.configuration_mistral_cee import MistralCeeConfig


class MistralForConsistentEECausalLM(EarlyExitCausalLM, MistralPreTrainedModel):
    """Mistral for text generation in which every token leaves at its own layer (ConsistentEE, Zeng et al., AAAI 2024).

    Loads from its own checkpoints and from any Mistral checkpoint.

    Args:
        config ([`MistralCeeConfig`]): sizes of Mistral and the fields of the exits.
    """

    config_class = MistralCeeConfig
    config: MistralCeeConfig
    stock_class = MistralForCausalLM
    body_class = MistralModel


class MistralCeeModel(BodyWithoutExits, MistralModel):
    """The decoder of a [`MistralForConsistentEECausalLM`], without exits and heads.

    Args:
        config ([`MistralCeeConfig`]): sizes of Mistral; the fields of the exits have no effect.
    """

    config_class = MistralCeeConfig
    config: MistralCeeConfig


__all__ = ["MistralCeeModel", "MistralForConsistentEECausalLM"]
