# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tiny checkpoints, data and options for runs of both training scripts that last seconds."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


TESTS = Path(__file__).resolve().parents[1]
for folder in (TESTS, TESTS / "hub", TESTS / "examples", TESTS.parent / "examples"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def make_assets(folder: Path) -> None:
    """A random BERT and a random LLaMA with their tokenizers, and rows for both."""
    import tiny_lm
    import torch
    from tiny_models import tiny_tokenizer
    from transformers import BertConfig, BertModel

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder / "bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder / "bert")
    words = [word for word in tokenizer.get_vocab() if word.isalpha()]
    lines = [f"{words[row % len(words)]} {words[row * 7 % len(words)]},{'abc'[row % 3]}" for row in range(60)]
    (folder / "rows.csv").write_text("\n".join(["sentence,label", *lines]) + "\n")
    tiny_lm.save_checkpoint(folder / "llama")
    (folder / "rows.json").write_text(json.dumps(tiny_lm.instructions(40)))


def options(flow: str, assets: Path, output: Path) -> dict[str, Any]:
    """Options of a run that draws random numbers wherever it can, and saves a checkpoint every second step."""
    shared = {
        "output_dir": output,
        "do_train": True,
        "validation_split": 0.2,
        "test_split": 0.2,
        "learning_rate": 1e-2,
        "exit_layers": [1, 2],
        "policy_gradient": "reinforce",
        "policy_num_train_epochs": 3,
        "policy_batch_size": 12,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 2,
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": True,
    }
    if flow == "classifier":
        return shared | {
            "model_name_or_path": assets / "bert",
            "train_file": assets / "rows.csv",
            "exit_pooling": "mean",
            "num_train_epochs": 2,
            "consistent_num_train_epochs": 2,
            "per_device_train_batch_size": 6,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "load_best_model_at_end": True,
            "metric_for_best_model": "loss",
        }
    return shared | {
        "model_name_or_path": assets / "llama",
        "train_file": assets / "rows.json",
        "exit_head": "low_rank",
        "exit_head_rank": 4,
        "fit_heads_tokens": 100,
        "trainable": "exits",
        "phases": ["heads", "hardness", "policy"],
        "max_seq_length": 32,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 6,
        "per_device_eval_batch_size": 4,
    }


def words(values: dict[str, Any]) -> list[str]:
    """Options as command-line words."""
    made: list[str] = []
    for name, value in values.items():
        made += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    return made


def table(header: list[str], rows: list[list[Any]]) -> str:
    """Columns that line up."""
    from transformers_cee.evaluation.report import markdown_table

    return markdown_table(header, [[str(cell) for cell in row] for row in rows])
