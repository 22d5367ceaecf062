# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""SmolLM3 with exits."""

from torch import nn
from transformers.models.smollm3.modeling_smollm3 import SmolLM3ForCausalLM, SmolLM3Model, SmolLM3PreTrainedModel

from transformers_cee.modeling.body import BodyWithoutExits
from transformers_cee.modeling.causal_lm import EarlyExitCausalLM
from transformers_cee.models.smollm3_cee.configuration_smollm3_cee import SmolLM3CeeConfig


class SmolLM3ForConsistentEECausalLM(EarlyExitCausalLM, SmolLM3PreTrainedModel):
    """SmolLM3 for text generation in which every token leaves at its own layer (ConsistentEE, Zeng et al., AAAI 2024).

    Loads from its own checkpoints and from any SmolLM3 checkpoint.

    Args:
        config ([`SmolLM3CeeConfig`]): sizes of SmolLM3 and the fields of the exits.
    """

    config_class = SmolLM3CeeConfig
    config: SmolLM3CeeConfig
    stock_class = SmolLM3ForCausalLM
    body_class = SmolLM3Model

    def rotates(self, layer: nn.Module) -> bool:
        return bool(layer.self_attn.use_rope)


class SmolLM3CeeModel(BodyWithoutExits, SmolLM3Model):
    """The decoder of a [`SmolLM3ForConsistentEECausalLM`], without exits and heads.

    Args:
        config ([`SmolLM3CeeConfig`]): sizes of SmolLM3; the fields of the exits have no effect.
    """

    config_class = SmolLM3CeeConfig
    config: SmolLM3CeeConfig


__all__ = ["SmolLM3CeeModel", "SmolLM3ForConsistentEECausalLM"]
