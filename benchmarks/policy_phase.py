# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""How much faster is an epoch of the policy phase on stored exit states than through the backbone?

    python benchmarks/policy_phase.py --model runs/demo --train_file assets/trec/train.csv

Both epochs do the same updates of the same policies: forward of the policies, policy gradient, optimizer step. One
takes exit states from the store; the other runs the frozen backbone for every batch, rows sorted by length. The two
alternate with filling the store, whose price stands beside them; figures are printed as JSON, null where noise.
"""

import argparse
import csv
import json

import torch
from accelerate import Accelerator
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from transformers_cee.evaluation.timing import Derived, Timer
from transformers_cee.exits.policy import all_features
from transformers_cee.stores.filling import collect_exits, length_sorted_batches
from transformers_cee.stores.store import ExitStore
from transformers_cee.training.hardness import memorized_layers
from transformers_cee.training.objectives import policy_loss
from transformers_cee.training.policy_phase import StoredRewards
from transformers_cee.training.rewards import RewardStep, hardness_guided


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of an encoder with exits")
    parser.add_argument("--train_file", required=True, help="csv with the columns sentence and label")
    parser.add_argument("--max_train_samples", type=int, default=2000)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3, help="rounds, at least 3")
    return parser.parse_args()


def read_rows(args: argparse.Namespace, label2id: dict[str, int]) -> Dataset:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with open(args.train_file, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[: args.max_train_samples]
    encoded = tokenizer([row["sentence"] for row in rows], truncation=True, max_length=128)
    labels = [label2id.get(row["label"], None) for row in rows]
    if None in labels:
        labels = [int(row["label"]) for row in rows]
    return Dataset.from_dict({**encoded, "labels": labels})


def main() -> None:
    args = parse_arguments()
    timer = Timer(rounds=args.repeats)
    model = AutoModelForSequenceClassification.from_pretrained(args.model).eval()
    rows = read_rows(args, model.config.label2id)
    collator = DataCollatorWithPadding(AutoTokenizer.from_pretrained(args.model))
    config, policies = model.config, model.exit_policies
    optimizer = torch.optim.AdamW(policies.parameters(), lr=1e-3)

    def update(states: torch.Tensor, rewards: torch.Tensor, features: torch.Tensor | None = None) -> None:
        loss = policy_loss(policies(states, features), rewards)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def fill() -> ExitStore:
        return collect_exits(
            model, rows, collator, Accelerator(cpu=True), problem_type="single_label_classification", batch_size=64
        )

    store = fill()
    hardness = memorized_layers(store.correct, store.layers)
    price = (config.num_hidden_layers, config.reward_alpha)
    data = StoredRewards(store, hardness_guided(RewardStep(store.losses, store.layers, hardness, *price)))

    def stored_epoch() -> None:
        for indices in torch.randperm(len(data)).split(args.batch_size):
            update(**data.__getitems__(indices))

    def backbone_epoch() -> None:
        for indices in tqdm(length_sorted_batches(rows, args.batch_size), desc="through the backbone"):
            batch = collator([rows[index] for index in indices])
            with torch.no_grad():
                output = model(**batch, output_all_exits=True)
            rewards = hardness_guided(RewardStep(output.all_exit_losses, store.layers, hardness[indices], *price))
            features = all_features(output.all_exit_logits) if policies.needs_logits else None
            update(output.all_exit_states, rewards, features)

    found = timer.time(
        {"stored": stored_epoch, "backbone": backbone_epoch, "fill": fill},
        derived={"times_faster": Derived(lambda seconds: seconds["backbone"] / seconds["stored"])},
    )
    print(json.dumps({"rows": len(rows), "layers": config.num_hidden_layers, **found.to_dict()}, indent=2))


if __name__ == "__main__":
    main()
