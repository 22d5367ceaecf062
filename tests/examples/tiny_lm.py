# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A tiny random LLaMA, a word tokenizer with and without a chat template, and rows of instructions."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


WORDS = "name a the of two red green blue cats dogs birds fish that run swim fly and sleep . ? : short text".split()
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIAL = ("<pad>", "<unk>", "<end>", "<user>", "<assistant>")


def word_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """One id per word; `<end>` ends a sequence, `<pad>` pads."""
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<end>",
        additional_special_tokens=["<user>", "<assistant>"],
    )
    if chat:
        made.chat_template = TEMPLATE
    return made


def save_checkpoint(folder: Path, chat: bool = True) -> Path:
    """A random LLaMA of 4 layers and its tokenizer."""
    word_tokenizer(chat).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=128,
        initializer_range=0.15,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def instructions(count: int) -> list[dict[str, str]]:
    """Rows in Alpaca's columns, every third with an input."""
    colors, animals = ("red", "green", "blue"), ("cats", "dogs", "birds", "fish")
    return [
        {
            "instruction": f"name two {animals[index % 4]} .",
            "input": f"{colors[index % 3]} {animals[index % 4]}" if index % 3 == 0 else "",
            "output": f"the {colors[index % 3]} {animals[index % 4]} sleep .",
        }
        for index in range(count)
    ]
