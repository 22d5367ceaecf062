# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tiny classifiers, texts for them and a tokenizer that reads these."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from transformers_cee import BertCeeConfig, BertForConsistentEE


WORDS = [f"w{number}" for number in range(50)]


@pytest.fixture(scope="session")
def tokenizer():
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32)


@pytest.fixture(scope="session")
def texts():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 12, (60,), generator=generator).tolist()
    return [
        " ".join(WORDS[number] for number in torch.randint(0, len(WORDS), (length,), generator=generator).tolist())
        for length in lengths
    ]


@pytest.fixture(scope="session")
def make_model():
    def make(**fields):
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
        config = BertCeeConfig(
            vocab_size=60,
            num_labels=3,
            initializer_range=0.15,
            **sizes,
            **{"num_hidden_layers": 4, "max_position_embeddings": 64, **fields},
        )
        return BertForConsistentEE(config).eval()

    return make
