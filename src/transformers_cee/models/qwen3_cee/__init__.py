# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Qwen3 with exits. The config alone is loaded without the model."""

from transformers_cee.lazy import lazy_names


_PUBLIC = {
    "Qwen3CeeConfig": "configuration_qwen3_cee",
    "Qwen3CeeModel": "modeling_qwen3_cee",
    "Qwen3ForConsistentEECausalLM": "modeling_qwen3_cee",
}

__all__ = list(_PUBLIC)

__getattr__, __dir__ = lazy_names(__name__, _PUBLIC)
