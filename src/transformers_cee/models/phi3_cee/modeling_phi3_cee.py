# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Phi-3 with exits."""

from torch import Tensor, nn
from transformers.models.phi3.modeling_phi3 import (
    Phi3ForCausalLM,
    Phi3Model,
    Phi3PreTrainedModel,
    apply_rotary_pos_emb,
)

from transformers_cee.modeling.body import BodyWithoutExits
from transformers_cee.modeling.causal_lm import EarlyExitCausalLM
from transformers_cee.models.phi3_cee.configuration_phi3_cee import Phi3CeeConfig


class Phi3ForConsistentEECausalLM(EarlyExitCausalLM, Phi3PreTrainedModel):
    """Phi-3 for text generation in which every token leaves at its own layer (ConsistentEE, Zeng et al., AAAI 2024).

    Loads from its own checkpoints and from any Phi-3 checkpoint, GGUF files included (`gguf_file=`).

    Args:
        config ([`Phi3CeeConfig`]): sizes of Phi-3 and the fields of the exits.
    """

    config_class = Phi3CeeConfig
    config: Phi3CeeConfig
    stock_class = Phi3ForCausalLM
    body_class = Phi3Model
    # Of a part of each head.
    apply_rotary = staticmethod(apply_rotary_pos_emb)

    def keys_and_values(self, layer: nn.Module, states: Tensor) -> tuple[Tensor, Tensor]:
        # One projection gives queries, keys and values.
        attention = layer.self_attn
        size = attention.num_key_value_heads * attention.head_dim
        keys, values = attention.qkv_proj(layer.input_layernorm(states))[..., -2 * size :].split(size, dim=-1)
        return keys, values


class Phi3CeeModel(BodyWithoutExits, Phi3Model):
    """The decoder of a [`Phi3ForConsistentEECausalLM`], without exits and heads.

    Args:
        config ([`Phi3CeeConfig`]): sizes of Phi-3; the fields of the exits have no effect.
    """

    config_class = Phi3CeeConfig
    config: Phi3CeeConfig


__all__ = ["Phi3CeeModel", "Phi3ForConsistentEECausalLM"]
