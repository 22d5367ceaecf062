# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The tokenizer of a model, and how long the texts may be that it reads."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer
from transformers.tokenization_utils_base import LARGE_INTEGER


def tokenizer_of(model: Any, texts: str) -> Any:
    """The tokenizer of the checkpoint that a model came from.

    Args:
        texts (`str`): what it is to read, for the message.

    Raises:
        ValueError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(model.name_or_path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`processing_class`=None, and {model.name_or_path!r}, from which the model came, has no tokenizer; give "
            f"the one that reads {texts}."
        ) from error


def longest_text(model: Any, tokenizer: Any, wanted: int | None = None) -> int | None:
    """Tokens that texts are cut to: the fewest of what is wanted, what the tokenizer says and what the model reads;
    None without a limit."""
    # Tokenizers that say nothing have a number beyond all texts.
    said = tokenizer.model_max_length if tokenizer.model_max_length < LARGE_INTEGER else None
    return min((most for most in (wanted, said, model.most_tokens) if most is not None), default=None)


__all__ = ["longest_text", "tokenizer_of"]
