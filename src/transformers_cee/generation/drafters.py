# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""From what a caller of `generate` asks for to the drafters of a verified call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from transformers_cee.exits.deciding import ExitDecision, model_criterion
from transformers_cee.exits.fields import check_field, flag, whole
from transformers_cee.exits.support import MASKED
from transformers_cee.generation.draft_costs import draft_costs
from transformers_cee.generation.drafting import Drafter, ExitDrafts, JumpDrafts, PromptLookup
from transformers_cee.generation.verifying import Verification


# Fields of a `GenerationConfig` by which transformers itself drafts, and which say the same here.
LOOKUP, EARLY_EXIT = "prompt_lookup_num_tokens", "assistant_early_exit"
_NGRAM, _MOST = "max_matching_ngram_size", "num_assistant_tokens"
# Drafts at most, and n-grams, where nobody says how many.
_DRAFTS, _LOOKED_UP, _LONGEST = 8, 10, 3
_REFUSED = {
    "assistant_model": "the model drafts by itself",
    "token_healing": "a prompt's last token is drawn anew by a step of its own",
    "use_mtp": "the model drafts by itself",
    "custom_generate": "there is one way to decode",
    "guidance_scale": "its scores need passes of their own",
    "watermarking_config": "its scores depend on which tokens were asked about before",
    "output_attentions": "a pass may look at tokens that are thrown away",
    "output_hidden_states": "a pass may look at tokens that are thrown away",
    "synced_gpus": "rows of other processes stop at other passes",
}


def check_exit_verify(value: Any) -> bool:
    """Raises `ValueError` unless `exit_verify` is True, False or None."""
    check_field("exit_verify", value, flag.or_none())
    return bool(value)


def open_verification(
    model: Any,
    ask: Callable[[str], Any],
    decision: ExitDecision | None,
    settings: Mapping[str, Any],
    streamer: Any,
) -> Verification:
    """What decodes a call of `generate` with `exit_verify`.

    Args:
        model (`EarlyExitCausalLM`): the model.
        ask (`Callable`): value of an argument of `generate` or field of its generation configs, by name.
        decision (`ExitDecision`, *optional*): how exits decide; None where they are off.
        settings (mapping): exit arguments of the call.
        streamer (`BaseStreamer`, *optional*): gets new tokens.

    Raises:
        ValueError: a way to generate that cannot be verified, or a number out of range.
    """
    for name, why in _REFUSED.items():
        value = ask(name)
        if value is not None and value is not False and (value is True or value != 1):
            raise ValueError(f"`{name}` and `exit_verify` exclude each other: {why}.")
    if (ask("num_beams") or 1) > 1:
        raise ValueError(f"`exit_verify`=True needs `num_beams`=1, not {ask('num_beams')}: beams have no one text.")
    # PEFT puts its own method in the place of the model's.
    adapters = getattr(getattr(model.prepare_inputs_for_generation, "__self__", None), "active_peft_config", None)
    if getattr(adapters, "is_prompt_learning", False):
        raise ValueError(
            f"`exit_verify`=True does not know where the virtual tokens of {type(adapters).__name__} stand; accepted "
            "are adapters that change weights, such as LoRA."
        )
    attention = getattr(model.config, "_attn_implementation", None)
    if attention not in MASKED:
        raise ValueError(
            f"`attn_implementation`={attention!r} has no masks for rows of different lengths; accepted with "
            f"`exit_verify` are {', '.join(MASKED)}."
        )
    most, lookup, layer = _number(ask, _MOST, _DRAFTS), ask(LOOKUP), ask(EARLY_EXIT)
    drafters: list[Drafter] = []
    if layer is None and model.exit_drafter is not None:
        drafters.append(JumpDrafts(model, most))
    elif layer is not None or decision is not None:
        drafters.append(_exit_drafts(model, layer, decision, model.first_exit(settings.get("min_exit_layer")), most))
    if lookup is not None or not drafters:
        # It costs nothing to ask first.
        drafters.insert(0, PromptLookup(_number(ask, LOOKUP, _LOOKED_UP), _number(ask, _NGRAM, _LONGEST)))
    return Verification(model, drafters, partial(draft_costs, model), streamer)


def _exit_drafts(model: Any, layer: Any, decision: ExitDecision | None, first: int, most: int) -> ExitDrafts:
    numbers = model.layer_numbers[:-1]
    if layer is None and first < len(numbers):
        layer = numbers[first]
    if layer not in numbers:
        raise ValueError(
            f"`{EARLY_EXIT}`={layer!r} must be one of the layers of the internal exits, "
            f"{', '.join(map(str, numbers)) or 'of which there are none'}."
        )
    how = decision or ExitDecision("max_probability", 0.5)
    no_tokens = torch.empty(0, 1, dtype=torch.long, device=model.device)
    # Anything wrong with the decision shows before any layer runs.
    model_criterion(model, how, input_ids=no_tokens)
    return ExitDrafts(numbers.index(layer), layer, most, lambda: model_criterion(model, how, input_ids=no_tokens))


def _number(ask: Callable[[str], Any], name: str, default: int) -> int:
    found = ask(name)
    if found is None:
        return default
    check_field(name, found, whole(1, 1024))
    return int(found)


__all__ = ["EARLY_EXIT", "LOOKUP", "check_exit_verify", "open_verification"]
