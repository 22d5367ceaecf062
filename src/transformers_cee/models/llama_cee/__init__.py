# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""LLaMA with exits."""

from transformers_cee.models.llama_cee.configuration_llama_cee import LlamaCeeConfig
from transformers_cee.models.llama_cee.modeling_llama_cee import LlamaForConsistentEECausalLM


__all__ = ["LlamaCeeConfig", "LlamaForConsistentEECausalLM"]
