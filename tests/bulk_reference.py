# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Texts of many lengths, tokenizers that read them, and a slow reference: each text alone, one call of the model."""

from __future__ import annotations

from typing import Any

import families
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


WORDS = range(10, 59)


def word_tokenizer(padding: int = 0) -> PreTrainedTokenizerFast:
    """Words `w10` … `w58` are the tokens 10 … 58; nothing is put around them."""
    vocabulary = {f"w{number}": number for number in WORDS} | {"[PAD]": padding, "[UNK]": 5}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_max_length=40)


def tokenizer_for(model: Any) -> PreTrainedTokenizerFast:
    return word_tokenizer(families.FAMILIES[model.config.model_type].padding)


def draw_texts(count: int, seed: int = 0) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 24, (count,), generator=generator).tolist()
    return [
        " ".join(f"w{word}" for word in torch.randint(10, 59, (length,), generator=generator).tolist())
        for length in lengths
    ]


@torch.no_grad()
def alone(model: Any, tokenizer: Any, texts: list[str], **asked: Any) -> list[tuple[torch.Tensor, int, torch.Tensor]]:
    """Logits (labels,), exit layer and the scores of the exits that were asked, of each text."""
    found = []
    for text in texts:
        output = model(**tokenizer([text], return_tensors="pt"), **asked)
        found.append((output.logits[0], int(output.exit_layers[0]), output.exit_probabilities[0]))
    return found


def thresholds_of(model: Any, tokenizer: Any, texts: list[str], criterion: str, off: float) -> list[float]:
    """One threshold per exit at which about half of the texts leave, far from all scores: in the widest gap of their
    middle."""
    runs = alone(model, tokenizer, texts, exit_criterion=criterion, exit_threshold=off)
    thresholds = []
    for scores in torch.stack([scores for *_, scores in runs])[:, :-1].unbind(1):
        middle = scores.sort().values[len(scores) // 3 : -(len(scores) // 3)]
        place = int(middle.diff().argmax())
        thresholds.append(float(middle[place : place + 2].mean()))
    return [*thresholds, off]
