# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What `test_distributed.py` runs in its own process and, through torchrun, in two others. Writes `result.pt`."""

from __future__ import annotations

import os
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from text_steps import certain
from tiny import tiny_llama, tiny_model, tiny_text_trainer, tiny_trainer, weights, with_adapters


def apart(trainer) -> float:
    """Largest difference between the weights of any two processes."""
    total = torch.cat([value.flatten().float() for value in weights(trainer.model).values()])
    gathered = trainer.accelerator.gather(total[None])
    return float((gathered - gathered[0]).abs().max())


def decoder(folder: str, result: dict, sgd: dict) -> None:
    """The same of a decoder: stores of tokens, one step on the same 8 rows in two micro-batches, a whole run."""
    trainer = tiny_text_trainer(f"{folder}/text", tiny_llama(policy_inputs="both"), rows=13, store_memory_limit_mb=0)
    result["text_memorized"] = trainer.compute_hardness()
    store = trainer._stores["train"][1]
    for name in ("states", "token_losses", "predictions", "labels", "features", "rows", "may_exit"):
        result[f"text_{name}"] = getattr(store, name).clone()
    some = trainer.collect_exits(trainer.train_dataset, max_tokens=17)
    result["text_sample"] = some.rows

    for name in ("heads", "consistent", "sampled"):
        model = certain(tiny_llama(3)) if name == "sampled" else tiny_llama()
        options = {"consistent_objective": "sampled", "consistent_samples": 2} if name == "sampled" else {}
        trainer = tiny_text_trainer(
            f"{folder}/text-{name}", model, rows=8, gradient_accumulation_steps=2, **sgd, **options
        )
        if name == "heads":
            trainer.train_heads()
        else:
            trainer._consistent_model(f"{folder}/text-{name}/one", None)
        result[f"text_{name}"] = weights(trainer.model)

    trainer = tiny_text_trainer(
        f"{folder}/text-run", with_adapters(tiny_llama(exit_threshold=0.5)), rows=21, eval_strategy="epoch"
    )
    result["text_steps"] = list(trainer.train().phases)
    result["text_apart"] = apart(trainer)
    trainer = tiny_text_trainer(f"{folder}/text-evaluation", tiny_llama(exit_threshold=0.5), rows=8)
    metrics = trainer.evaluate()
    result["text_metrics"] = {name: metrics[f"eval_{name}"] for name in ("loss", "agreement", "depth")}
    result["text_histogram"] = list(trainer.operating_points["eval"][0].exit_histogram.values())


def main(folder: str) -> None:
    torch.set_num_threads(1)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    result: dict = {"processes": processes}

    # Hardness and stores: 13 rows, which neither the batches nor the processes divide.
    trainer = tiny_trainer(f"{folder}/hardness", rows=13, per_device_eval_batch_size=4)
    result["memorized"] = trainer.compute_hardness()
    store = trainer.collect_exits(trainer.eval_dataset)
    result["states"], result["logits"], result["labels"] = store.states, store.logits, store.labels
    mapped = tiny_trainer(f"{folder}/mapped", rows=5, store_memory_limit_mb=0, per_device_eval_batch_size=4)
    result["mapped"] = mapped.collect_exits(mapped.train_dataset, "train").states.clone()

    # One step of SGD on the same 8 rows, through heads and consistent.
    sgd = {
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "max_steps": 1,
        "train_sampling_strategy": "sequential",
        "per_device_train_batch_size": 8 // processes,
    }
    for name in ("layer_weighted", "last", "two_stage", "variational", "consistent"):
        objective = "layer_weighted" if name == "consistent" else name
        trainer = tiny_trainer(f"{folder}/{name}", rows=8, heads_objective=objective, **sgd)
        if name == "consistent":
            trainer._consistent_model(f"{folder}/{name}/one", None)
        else:
            trainer.train_heads()
        result[name] = weights(trainer.model)
    trainer = tiny_trainer(
        f"{folder}/policy",
        tiny_model(num_hidden_layers=4, reward_alpha=0.3),
        rows=8,
        policy_batch_size=8 // processes,
        policy_learning_rate=0.5,
        **sgd,
    )
    trainer.train_policy()
    result["policy"] = weights(trainer.model)

    decoder(folder, result, {**sgd, "per_device_train_batch_size": 4 // processes})

    # The whole run, all phases, and its evaluation; the weights of all processes must agree.
    trainer = tiny_trainer(
        f"{folder}/run",
        rows=21,
        eval_strategy="epoch",
        save_strategy="epoch",
        eval_timing_rows=8,
    )
    # Also where the model has been evaluated before.
    trainer.evaluate()
    steps = trainer.train()
    result["steps"] = list(steps.phases)
    metrics = trainer.evaluate()
    with torch.no_grad():
        batch = trainer.data_collator(list(trainer.eval_dataset))
        layers = trainer.model.eval()(**batch).exit_layers
    result["evaluation"] = (
        metrics["eval_depth"],
        float(layers.float().mean()),
        sum(trainer.operating_points["eval"][0].exit_histogram.values()),
    )
    result["apart"] = apart(trainer)
    if trainer.is_world_process_zero():
        torch.save(result, f"{folder}/result.pt")
    trainer.accelerator.wait_for_everyone()
    if processes > 1:
        # Tearing gloo down has been seen to wait for ever on a peer that is gone already.
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
