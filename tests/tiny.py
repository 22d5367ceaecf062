# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tiny random models whose rows leave everywhere, tiny batches, a tiny task, and trainers for it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from transformers_cee import (
    BertCeeConfig,
    BertForConsistentEE,
    ConsistentEETrainer,
    ConsistentEETrainingArguments,
    LlamaCeeConfig,
    LlamaForConsistentEECausalLM,
)


VOCABULARY = 60


def tiny_config(**fields: Any) -> BertCeeConfig:
    """A config of 6 layers of 32 units without dropout; weights are drawn wide, so that rows differ."""
    return BertCeeConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "max_position_embeddings": 48,
            "num_labels": 3,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "initializer_range": 0.15,
            "pad_token_id": 0,
            "exit_threshold": 0.5,
            **fields,
        }
    )


def tiny_model(seed: int = 0, **fields: Any) -> BertForConsistentEE:
    """A random model in evaluation mode with opinionated heads and policies, so that exits spread over the layers."""
    torch.manual_seed(seed)
    model = BertForConsistentEE(tiny_config(**fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("exit_heads", "classifier", "exit_policies", "exit_norms")):
                parameter.normal_(0.0, 0.3)
        for network in model.exit_policies.networks:
            network[-1].bias.fill_(0.0)
    return model


def random_rows(rows: int, seed: int, shortest: int = 2, longest: int = 12, pairs: bool = False) -> list[dict]:
    """Rows of token ids and token types, without padding."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(rows):
        length = int(torch.randint(shortest, longest + 1, (1,), generator=generator))
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator)
        types = (torch.arange(length) >= length // 2).long() if pairs else torch.zeros(length, dtype=torch.long)
        made.append({"input_ids": ids, "token_type_ids": types})
    return made


def pad(rows: list[dict], side: str = "right", extra: int = 0) -> dict[str, Tensor]:
    """A batch of rows padded on `side`; `extra` adds columns that no row uses. Padding holds ids that must not
    count."""
    time = max(len(row["input_ids"]) for row in rows) + extra
    batch = {name: torch.full((len(rows), time), 7 if name == "input_ids" else 0) for name in rows[0]}
    batch["attention_mask"] = torch.zeros(len(rows), time, dtype=torch.long)
    for number, row in enumerate(rows):
        length = len(row["input_ids"])
        columns = slice(0, length) if side == "right" else slice(time - length, time)
        batch["attention_mask"][number, columns] = 1
        for name, values in row.items():
            batch[name][number, columns] = values
    return batch


def tiny_llama_config(**fields: Any) -> LlamaCeeConfig:
    """A LLaMA config of 4 layers of 32 units; weights are drawn wide, so that tokens differ."""
    return LlamaCeeConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "max_position_embeddings": 64,
            "initializer_range": 0.15,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **fields,
        }
    )


def tiny_llama(seed: int = 0, **fields: Any) -> LlamaForConsistentEECausalLM:
    """A random LLaMA in evaluation mode with opinionated exits and policies, so that tokens leave everywhere."""
    torch.manual_seed(seed)
    model = LlamaForConsistentEECausalLM(tiny_llama_config(**fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("exit_heads", "exit_policies")):
                parameter.normal_(0.0, 0.3)
            elif "exit_norms" in name:
                parameter.normal_(1.0, 0.3)
        for network in model.exit_policies.networks:
            network[-1].bias.fill_(0.0)
    return model


def with_adapters(model: LlamaForConsistentEECausalLM, **fields: Any) -> Any:
    """The model with LoRA in its attention, opinionated, too; its exits are PEFT's `modules_to_save`."""
    from peft import LoraConfig, get_peft_model

    own = ["exit_norms", "exit_policies", *(["exit_heads"] if len(model.exit_heads.heads) else [])]
    options = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"], "modules_to_save": own}
    with warnings.catch_warnings():
        # PEFT asks for what newer versions of transformers call something else.
        warnings.simplefilter("ignore", FutureWarning)
        adapted = get_peft_model(model, LoraConfig(**{**options, **fields}))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.1)
    return adapted.eval()


# A task that the tiny model can learn: short rows by their first token, long rows by their length.


def task(rows: int, seed: int, **extra: list) -> Dataset:
    """A data set of token ids, masks and three classes."""
    generator = torch.Generator().manual_seed(seed)
    columns: dict[str, list] = {"input_ids": [], "attention_mask": [], "labels": []}
    for _ in range(rows):
        length = int(torch.randint(3, 10, (1,), generator=generator))
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        columns["input_ids"].append(ids)
        columns["attention_mask"].append([1] * length)
        columns["labels"].append(ids[0] % 3 if length < 8 else length % 3)
    return Dataset.from_dict({**columns, **extra})


def collate(rows: list[dict]) -> dict[str, Tensor]:
    """Pads on the right with zeros."""
    time = max(len(row["input_ids"]) for row in rows)
    batch = {
        name: torch.tensor([list(row[name]) + [0] * (time - len(row[name])) for row in rows])
        for name in ("input_ids", "attention_mask")
    }
    batch["labels"] = torch.tensor([row["labels"] for row in rows])
    return batch


# Another one for decoders: repeat the prompt, one token up.


def instructions(rows: int, seed: int, plain: bool = False, **extra: list) -> Dataset:
    """A data set of prompts and answers of very different lengths; prompts are −100 in the labels. `plain` leaves
    labels out."""
    generator = torch.Generator().manual_seed(seed)
    columns: dict[str, list] = {"input_ids": [], "attention_mask": [], "labels": []}
    for _ in range(rows):
        length = int(torch.randint(1, 6, (1,), generator=generator))
        prompt = torch.randint(3, VOCABULARY - 1, (length,), generator=generator).tolist()
        kept = int(torch.randint(1, 6, (1,), generator=generator))
        answer = [*(token + 1 for token in prompt[:kept]), 2]
        columns["input_ids"].append(prompt + answer)
        columns["attention_mask"].append([1] * len(prompt + answer))
        columns["labels"].append([-100] * length + answer)
    if plain:
        del columns["labels"]
    return Dataset.from_dict({**columns, **extra})


def collate_text(rows: list[dict]) -> dict[str, Tensor]:
    """Pads on the right; padding holds an id that must not count."""
    fill = {"input_ids": 7, "attention_mask": 0, "labels": -100}
    time = max(len(row["input_ids"]) for row in rows)
    return {
        name: torch.tensor([list(row[name]) + [fill[name]] * (time - len(row[name])) for row in rows])
        for name in fill
        if name in rows[0]
    }


def accuracy(prediction: Any) -> dict[str, float]:
    """`compute_metrics` of the task."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def training_arguments(folder: Any, **fields: Any) -> ConsistentEETrainingArguments:
    """Arguments of a run of seconds on CPU."""
    return ConsistentEETrainingArguments(
        **{
            "output_dir": str(folder),
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "num_train_epochs": 1,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 8,
            "policy_num_train_epochs": 2,
            "policy_batch_size": 16,
            "save_strategy": "no",
            "logging_strategy": "no",
            "eval_timing_rows": 0,
            **fields,
        }
    )


def tiny_trainer(
    folder: Any, model: BertForConsistentEE | None = None, rows: int = 48, trainer: dict | None = None, **fields: Any
) -> ConsistentEETrainer:
    """A trainer of the task; `fields` are training arguments, `trainer` arguments of the trainer."""
    return ConsistentEETrainer(
        tiny_model(num_hidden_layers=4) if model is None else model,
        training_arguments(folder, **fields),
        **{
            "train_dataset": task(rows, seed=1),
            "eval_dataset": task(24, seed=2),
            "data_collator": collate,
            "compute_metrics": accuracy,
            **(trainer or {}),
        },
    )


def tiny_text_trainer(
    folder: Any, model: torch.nn.Module | None = None, rows: int = 24, trainer: dict | None = None, **fields: Any
) -> ConsistentEETrainer:
    """A trainer of a decoder on `instructions`; arguments as in `tiny_trainer`."""
    return ConsistentEETrainer(
        tiny_llama() if model is None else model,
        training_arguments(folder, **fields),
        **{
            "train_dataset": instructions(rows, seed=1),
            "eval_dataset": instructions(12, seed=2),
            "data_collator": collate_text,
            **(trainer or {}),
        },
    )


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of a model's weights."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names of weights that are not bit-identical."""
    return {name for name in before if not torch.equal(before[name], after[name])}
