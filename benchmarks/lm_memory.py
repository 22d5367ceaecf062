# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Peak memory of one training step of all exits' losses, in chunks and with all logits at once.

    python benchmarks/lm_memory.py --model MODEL

The step trains the exits of a frozen LLaMA checkpoint: forward, losses of all exits for all tokens, backward. Both
ways give the same loss. Figures are what the step adds to the memory that the loaded model takes.
"""

import argparse

import torch
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.utils import logging

from transformers_cee import LlamaForConsistentEECausalLM
from transformers_cee.evaluation.memory import PeakMemory
from transformers_cee.exits import token_losses
from transformers_cee.exits.losses import layer_weighted


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub name of a LLaMA checkpoint")
    parser.add_argument("--exits", type=int, default=6, help="exits, the last layer included")
    parser.add_argument("--exit_head", default="low_rank")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256, help="tokens per row")
    return parser.parse_args()


def in_chunks(model: LlamaForConsistentEECausalLM, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens, labels=tokens, output_all_exits=True).loss


def at_once(model: LlamaForConsistentEECausalLM, tokens: torch.Tensor) -> torch.Tensor:
    output = model(tokens, labels=tokens, output_all_exits=True)
    states, labels = output.all_exit_states, output.token_labels
    logits = [model.exit_logits(states[:, index], index) for index in range(states.shape[1])]
    return layer_weighted(torch.stack([F.cross_entropy(one, labels, reduction="none") for one in logits], dim=1))


def main() -> None:
    args = parse_arguments()
    logging.set_verbosity_error()
    layers = LlamaConfig.from_pretrained(args.model).num_hidden_layers
    exits = [round(layers * (index + 1) / args.exits) for index in range(args.exits)]
    model = LlamaForConsistentEECausalLM.from_pretrained(
        args.model, dtype=torch.float32, exit_layers=exits, exit_head=args.exit_head
    ).train()
    model.requires_grad_(False)
    for part in (model.exit_norms, model.exit_heads):
        part.requires_grad_(True)
    torch.manual_seed(0)
    tokens = torch.randint(10, model.config.vocab_size, (args.batch_size, args.tokens))
    with PeakMemory(model.device) as before:
        model(tokens[:1, :2], labels=tokens[:1, :2], output_all_exits=True).loss.backward()
    one = args.batch_size * (args.tokens - 1) * args.exits * model.config.vocab_size * 4 / 2**20
    print(f"{args.batch_size} rows of {args.tokens} tokens, exits after layers {exits}; all logits are {one:.0f} MB")
    for name, step in (("in chunks", in_chunks), ("all at once", at_once)):
        with PeakMemory(model.device) as peak:
            loss = step(model, tokens)
            loss.backward()
        print(
            f"{name} ({token_losses.CHUNK_ROWS} rows of logits at a time): loss {loss.item():.4f}, "
            if name == "in chunks"
            else f"{name}: loss {loss.item():.4f}, ",
            f"{peak.peak_mb - before.peak_mb:.0f} MB on top of {before.peak_mb:.0f} MB",
            sep="",
            flush=True,
        )


if __name__ == "__main__":
    main()
