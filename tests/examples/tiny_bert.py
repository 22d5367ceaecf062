# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A tiny random BERT with a word tokenizer, 60 questions of three kinds, and options of a short run on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast


WORDS = "who where how many did was is the a river painted city long people ?".split()
QUESTIONS = {
    "human": "who painted the {} ?",
    "location": "where is the {} ?",
    "number": "how many people was the {} ?",
}


def save_checkpoint(folder: Path) -> Path:
    """A random BERT of 3 layers and its word tokenizer."""
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def questions(labels: list[str] | None = None) -> list[tuple[str, str]]:
    """60 rows of (text, label)."""
    labels = labels or sorted(QUESTIONS)
    kinds = [labels[index % len(labels)] for index in range(60)]
    return [(QUESTIONS[kind].format(WORDS[index % len(WORDS)]), kind) for index, kind in enumerate(kinds)]


def write_questions(path: Path, labels: list[str] | None = None) -> Path:
    rows = [f"{text},{label}" for text, label in questions(labels)]
    path.write_text("\n".join(["sentence,label", *rows]) + "\n")
    return path


def make_options(checkpoint: Path, train_file: Path, output: Path) -> dict[str, Any]:
    return {
        "model_name_or_path": str(checkpoint),
        "base_model": "a tiny BERT",
        "train_file": str(train_file),
        "validation_split": 0.2,
        "test_split": 0.2,
        "output_dir": str(output),
        "do_train": True,
        "do_eval": True,
        "exit_pooling": "mean",
        "exit_norm": "layer_norm",
        "learning_rate": 1e-2,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 12,
        "policy_num_train_epochs": 2,
        "operating_points": 2,
        "timing_batch_sizes": [4, 1],
        "eval_timing_rows": 8,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }


def words(options: dict[str, Any]) -> list[str]:
    """Options as command-line words."""
    made = []
    for name, value in options.items():
        made += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    return made
