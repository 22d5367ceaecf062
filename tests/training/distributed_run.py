# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What `test_distributed.py` runs in its own process and, through torchrun, in two others. Writes `result.pt`."""

from __future__ import annotations

import os
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tiny import tiny_model, tiny_trainer, weights


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
    for name, objective in (("heads", "layer_weighted"), ("last", "last"), ("consistent", "layer_weighted")):
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

    # The whole run, all phases, and its evaluation; the weights of all processes must agree.
    trainer = tiny_trainer(
        f"{folder}/run",
        rows=21,
        eval_strategy="epoch",
        save_strategy="epoch",
        eval_timing_rows=8,
    )
    steps = trainer.train()
    result["steps"] = list(steps)
    metrics = trainer.evaluate()
    with torch.no_grad():
        batch = trainer.data_collator(list(trainer.eval_dataset))
        layers = trainer.model.eval()(**batch).exit_layers
    result["evaluation"] = (
        metrics["eval_depth"],
        float(layers.float().mean()),
        sum(metrics["eval_exit_histogram"].values()),
    )
    total = torch.cat([value.flatten().float() for value in weights(trainer.model).values()])
    gathered = trainer.accelerator.gather(total[None])
    result["apart"] = float((gathered - gathered[0]).abs().max())
    if trainer.is_world_process_zero():
        torch.save(result, f"{folder}/result.pt")
    trainer.accelerator.wait_for_everyone()
    if processes > 1:
        # Tearing gloo down has been seen to wait for ever on a peer that is gone already.
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
