# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Phi-3 with exits."""

from typing import Any

from torch import Tensor, nn
from transformers.models.phi3.modeling_phi3 import (
    Phi3ForCausalLM,
    Phi3Model,
    Phi3PreTrainedModel,
    apply_rotary_pos_emb,
)

from transformers_cee.exits.cache_name import CACHE_NAME, rename_cache
from transformers_cee.modeling.body import BodyWithoutExits
from transformers_cee.modeling.causal_lm import EarlyExitCausalLM
from transformers_cee.models.phi3_cee.configuration_phi3_cee import Phi3CeeConfig


class Phi3ForConsistentEECausalLM(EarlyExitCausalLM, Phi3PreTrainedModel):
    """Phi-3 for text generation in which every token leaves at its own layer (ConsistentEE, Zeng et al., AAAI 2024).

    Loads from its own checkpoints and from any Phi-3 checkpoint, GGUF files included (`gguf_file=`).

    Args:
        config ([`Phi3CeeConfig`]): sizes of Phi-3 and the fields of the exits.
    """

    config_class = Phi3CeeConfig
    config: Phi3CeeConfig
    stock_class = Phi3ForCausalLM
    body_class = Phi3Model
    # Of a part of each head.
    apply_rotary = staticmethod(apply_rotary_pos_emb)

    def keys_and_values(self, layer: nn.Module, states: Tensor) -> tuple[Tensor, Tensor]:
        # One projection gives queries, keys and values.
        attention = layer.self_attn
        size = attention.num_key_value_heads * attention.head_dim
        keys, values = attention.qkv_proj(layer.input_layernorm(states))[..., -2 * size :].split(size, dim=-1)
        return keys, values

    def check_length(self, past: int, length: int) -> None:
        limit = self.config.original_max_position_embeddings
        if self._changes_rotary and past <= limit < length:
            raise ValueError(
                f"A text that grows from {past} to {length} tokens cannot have exits: beyond "
                f"`original_max_position_embeddings`={limit} the rotary embedding of all tokens is another one "
                "(`rope_type`='longrope'). Generate fewer tokens, or set `exit_threshold`=1.0."
            )

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As that of `Phi3ForCausalLM`: where the rotary embedding changes, all tokens are run again."""
        # `generate` takes `inputs_embeds` only where it finds it named here.
        rename_cache(kwargs)
        cache, limit = kwargs.get(CACHE_NAME), self.config.original_max_position_embeddings
        if self._changes_rotary and cache is not None and 0 < cache.get_seq_length() <= limit < input_ids.shape[1]:
            kwargs |= {CACHE_NAME: None, "next_sequence_length": None}
        return super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)

    @property
    def _changes_rotary(self) -> bool:
        return bool(self.config.rope_parameters["rope_type"] == "longrope")


class Phi3CeeModel(BodyWithoutExits, Phi3Model):
    """The decoder of a [`Phi3ForConsistentEECausalLM`], without exits and heads.

    Args:
        config ([`Phi3CeeConfig`]): sizes of Phi-3; the fields of the exits have no effect.
    """

    config_class = Phi3CeeConfig
    config: Phi3CeeConfig


__all__ = ["Phi3CeeModel", "Phi3ForConsistentEECausalLM"]
