# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""SmolLM3 with exits. The config alone is loaded without the model."""

from transformers_cee.lazy import lazy_names


_PUBLIC = {
    "SmolLM3CeeConfig": "configuration_smollm3_cee",
    "SmolLM3CeeModel": "modeling_smollm3_cee",
    "SmolLM3ForConsistentEECausalLM": "modeling_smollm3_cee",
}

__all__ = list(_PUBLIC)

__getattr__, __dir__ = lazy_names(__name__, _PUBLIC)
