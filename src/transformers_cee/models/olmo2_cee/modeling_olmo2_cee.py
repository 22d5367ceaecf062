# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""OLMo 2 with exits."""

from torch import Tensor, nn
from transformers.models.olmo2.modeling_olmo2 import (
    Olmo2ForCausalLM,
    Olmo2Model,
    Olmo2PreTrainedModel,
    apply_rotary_pos_emb,
)

from transformers_cee.modeling.body import BodyWithoutExits
from transformers_cee.modeling.causal_lm import EarlyExitCausalLM
from transformers_cee.models.olmo2_cee.configuration_olmo2_cee import Olmo2CeeConfig


class Olmo2ForConsistentEECausalLM(EarlyExitCausalLM, Olmo2PreTrainedModel):
    """OLMo 2 for text generation in which every token leaves at its own layer (ConsistentEE, Zeng et al., AAAI 2024).

    Loads from its own checkpoints and from any OLMo 2 checkpoint.

    Args:
        config ([`Olmo2CeeConfig`]): sizes of OLMo 2 and the fields of the exits.
    """

    config_class = Olmo2CeeConfig
    config: Olmo2CeeConfig
    stock_class = Olmo2ForCausalLM
    body_class = Olmo2Model
    # In float32, whatever the keys are.
    apply_rotary = staticmethod(apply_rotary_pos_emb)

    def keys_and_values(self, layer: nn.Module, states: Tensor) -> tuple[Tensor, Tensor]:
        # Norms stand behind attention and the feed-forward part, not before.
        attention = layer.self_attn
        return attention.k_norm(attention.k_proj(states)), attention.v_proj(states)

    def normed_keys(self, layer: nn.Module, keys: Tensor) -> Tensor:
        # That was done to all heads at once.
        return keys


class Olmo2CeeModel(BodyWithoutExits, Olmo2Model):
    """The decoder of a [`Olmo2ForConsistentEECausalLM`], without exits and heads.

    Args:
        config ([`Olmo2CeeConfig`]): sizes of OLMo 2; the fields of the exits have no effect.
    """

    config_class = Olmo2CeeConfig
    config: Olmo2CeeConfig


__all__ = ["Olmo2CeeModel", "Olmo2ForConsistentEECausalLM"]
