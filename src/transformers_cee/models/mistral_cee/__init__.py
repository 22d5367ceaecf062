# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Mistral with exits. The config alone is loaded without the model."""

from transformers_cee.lazy import lazy_names


_PUBLIC = {
    "MistralCeeConfig": "configuration_mistral_cee",
    "MistralCeeModel": "modeling_mistral_cee",
    "MistralForConsistentEECausalLM": "modeling_mistral_cee",
}

__all__ = list(_PUBLIC)

__getattr__, __dir__ = lazy_names(__name__, _PUBLIC)
