# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""OLMo 2 with exits. The config alone is loaded without the model."""

from transformers_cee.lazy import lazy_names


_PUBLIC = {
    "Olmo2CeeConfig": "configuration_olmo2_cee",
    "Olmo2CeeModel": "modeling_olmo2_cee",
    "Olmo2ForConsistentEECausalLM": "modeling_olmo2_cee",
}

__all__ = list(_PUBLIC)

__getattr__, __dir__ = lazy_names(__name__, _PUBLIC)
