# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A tiny random early-exit classifier, its tokenizer, and a way to run code in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


SOURCES = Path(__file__).parents[2] / "src"
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *"a the film with heart not single joke lands and plot is worse".split(),
]
LABELS = {0: "negative", 1: "positive"}


def tiny_config(**fields):
    """A `BertCeeConfig` of 4 layers of 32 units."""
    from transformers_cee import BertCeeConfig

    return BertCeeConfig(
        **{
            "vocab_size": len(WORDS),
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "intermediate_size": 37,
            "max_position_embeddings": 64,
            "id2label": LABELS,
            "label2id": {name: index for index, name in LABELS.items()},
            **fields,
        }
    )


def tiny_model(**fields):
    """A random `BertForConsistentEE` in evaluation mode, the same at every call."""
    import torch

    from transformers_cee import BertForConsistentEE

    torch.manual_seed(0)
    return BertForConsistentEE(tiny_config(**fields)).eval()


def tiny_tokenizer():
    """A word tokenizer over `WORDS`."""
    from transformers import BertTokenizer

    return BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)}, model_max_length=64)


def run_python(
    code: str, *arguments: str, environment: Mapping[str, str] = os.environ, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a new interpreter that sees this checkout, without a terminal."""
    path = os.pathsep.join(filter(None, [str(SOURCES), environment.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**environment, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=1200,
    )
