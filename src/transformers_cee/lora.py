# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""LoRA adapters that carry exits with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft import LoraConfig

from transformers_cee.training.parameters import EXIT_MODULES


def exit_lora_config(
    task_type: str = "CAUSAL_LM", modules_to_save: Sequence[str] | None = None, **kwargs: Any
) -> LoraConfig:
    """A [`~peft.LoraConfig`] whose adapter trains and saves norms, heads and policies of the exits in full.

    A LoRA on `k_proj` or `v_proj` also changes the keys and values that a token's exit state leaves at the layers it
    skips: both come from the same modules.

    Args:
        task_type (`str`, *optional*, defaults to `"CAUSAL_LM"`): `"SEQ_CLS"` for an encoder.
        modules_to_save (`list[str]`, *optional*): further modules to train and save in full.
        kwargs: arguments of `LoraConfig`; target modules default to PEFT's own for the stock architecture.

    Example:

    ```python
    >>> from peft import get_peft_model
    >>> from transformers_cee import LlamaForConsistentEECausalLM, exit_lora_config

    >>> model = LlamaForConsistentEECausalLM.from_pretrained("org/llama")
    >>> model = get_peft_model(model, exit_lora_config(r=16, target_modules=["q_proj", "k_proj", "v_proj"]))
    ```
    """
    return LoraConfig(task_type=task_type, modules_to_save=[*EXIT_MODULES, *(modules_to_save or ())], **kwargs)


__all__ = ["exit_lora_config"]
