# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The decoder alone, for whoever wants its states."""

from functools import wraps
from typing import Any, ClassVar

from transformers.models.llama.modeling_llama import LlamaModel

from transformers_cee.exits.arguments import check_arguments
from transformers_cee.models.llama_cee.configuration_llama_cee import LlamaCeeConfig


class LlamaCeeModel(LlamaModel):
    """The decoder of a [`LlamaForConsistentEECausalLM`] at full depth, without exits and heads: what stock heads and
    `AutoModel.from_config` make of its config.

    Args:
        config ([`LlamaCeeConfig`]): sizes of LLaMA; the fields of the exits have no effect.
    """

    config_class = LlamaCeeConfig
    config: LlamaCeeConfig
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"^exit_", r"^lm_head\."]

    @wraps(LlamaModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # There are no exits here, and arguments that ask for them would be dropped.
        check_arguments(LlamaModel.forward, self.config, kwargs)
        return super().forward(*args, **kwargs)


__all__ = ["LlamaCeeModel"]
