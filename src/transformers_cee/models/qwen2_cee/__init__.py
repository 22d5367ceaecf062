# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Qwen2 with exits. The config alone is loaded without the model."""

from transformers_cee.lazy import lazy_names


_PUBLIC = {
    "Qwen2CeeConfig": "configuration_qwen2_cee",
    "Qwen2CeeModel": "modeling_qwen2_cee",
    "Qwen2ForConsistentEECausalLM": "modeling_qwen2_cee",
}

__all__ = list(_PUBLIC)

__getattr__, __dir__ = lazy_names(__name__, _PUBLIC)
