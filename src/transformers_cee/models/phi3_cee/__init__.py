# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Phi-3 with exits. The config alone is loaded without the model."""

from transformers_cee.lazy import lazy_names


_PUBLIC = {
    "Phi3CeeConfig": "configuration_phi3_cee",
    "Phi3CeeModel": "modeling_phi3_cee",
    "Phi3ForConsistentEECausalLM": "modeling_phi3_cee",
}

__all__ = list(_PUBLIC)

__getattr__, __dir__ = lazy_names(__name__, _PUBLIC)
