# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""LLaMA with exits."""

from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel

from transformers_cee.modeling.body import BodyWithoutExits
from transformers_cee.modeling.causal_lm import EarlyExitCausalLM
from transformers_cee.models.llama_cee.configuration_llama_cee import LlamaCeeConfig


class LlamaForConsistentEECausalLM(EarlyExitCausalLM, LlamaPreTrainedModel):
    """LLaMA for text generation in which every token leaves at its own layer (ConsistentEE, Zeng et al., AAAI 2024).

    Loads from its own checkpoints and from any LLaMA checkpoint, GGUF files included (`gguf_file=`).

    Args:
        config ([`LlamaCeeConfig`]): sizes of LLaMA and the fields of the exits.
    """

    config_class = LlamaCeeConfig
    config: LlamaCeeConfig
    stock_class = LlamaForCausalLM
    body_class = LlamaModel


class LlamaCeeModel(BodyWithoutExits, LlamaModel):
    """The decoder of a [`LlamaForConsistentEECausalLM`], without exits and heads.

    Args:
        config ([`LlamaCeeConfig`]): sizes of LLaMA; the fields of the exits have no effect.
    """

    config_class = LlamaCeeConfig
    config: LlamaCeeConfig


__all__ = ["LlamaCeeModel", "LlamaForConsistentEECausalLM"]
