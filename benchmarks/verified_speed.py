# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Verified generation against plain `generate` of the stock model, in one run, in turn; is the text the same?

    python benchmarks/verified_speed.py --model MODEL --prompts alpaca.jsonl --field instruction --output runs/verified

MODEL is a language model with exits, a drafter (`drafter_layer`), or both. Beside its own ways to draft stand those of
transformers on the stock model, `prompt_lookup_num_tokens` and `assistant_early_exit`. Prompts are the field of each
line, as a user's turn where the tokenizer has a chat template. Speed-ups are medians over rounds with their spread.
All texts are compared: where one differs, the difference of the two best logits there says whether it was a tie within
rounding. *By costs* is what the costs measured beforehand say of the passes that were made.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import transformers_cee  # noqa: F401  (registers the Auto classes)
from transformers_cee.evaluation.environment import timing_environment
from transformers_cee.evaluation.report import markdown_table, write_results
from transformers_cee.evaluation.timing import FEWEST_ROUNDS, Reported, Timer
from transformers_cee.files import write_text
from transformers_cee.generation.draft_costs import draft_costs
from transformers_cee.generation.packed import packed_linears


PLAIN, PACKED = "plain", "plain, packed"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub name of a language model with exits")
    parser.add_argument("--prompts", required=True, type=Path, help="JSON lines, or a JSON list of objects")
    parser.add_argument("--field", default="prompt", help="of each object")
    parser.add_argument("--prefix", default="", help="stands before each prompt")
    parser.add_argument("--characters", type=int, default=1500, help="a prompt is cut to so many")
    parser.add_argument("--raw", action="store_true", help="texts to go on with, without the chat template")
    parser.add_argument("--timed", type=int, default=16, help="prompts whose answers are timed; 0 for none")
    parser.add_argument("--compared", type=int, default=0, help="prompts whose texts are compared beside these")
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1])
    parser.add_argument("--draft_layers", type=int, nargs="*", default=[], help="exits that draft")
    parser.add_argument("--ways", nargs="+", help='only these, such as "jump" and "lookup and jump"')
    parser.add_argument("--peers", action="store_true", help="also time the ways of transformers")
    parser.add_argument(
        "--packed", action="store_true", help="our model in `packed_linears`; the stock model never is"
    )
    parser.add_argument("--rounds", type=int, default=3, help="at least 3")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", required=True, type=Path, help="folder for results.json and table.md")
    args = parser.parse_args()
    if args.rounds < FEWEST_ROUNDS:
        parser.error(f"--rounds must be at least {FEWEST_ROUNDS}; got {args.rounds}")
    return args


def read_prompts(args: argparse.Namespace, tokenizer: Any) -> list[str]:
    """Prompts as the model reads them."""
    text = args.prompts.read_text(encoding="utf-8")
    rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    prompts = [args.prefix + row[args.field][: args.characters] for row in rows[: args.timed + args.compared]]
    if args.raw or not tokenizer.chat_template:
        return prompts
    return [
        tokenizer.apply_chat_template([{"role": "user", "content": one}], tokenize=False, add_generation_prompt=True)
        for one in prompts
    ]


def ways(args: argparse.Namespace, stock: Any, model: Any) -> dict[str, Callable[..., Any]]:
    """Ways to generate by name; each takes inputs."""
    asked = {"max_new_tokens": args.new_tokens, "do_sample": False}
    ours, lookup = partial(model.generate, exit_verify=True, **asked), {"prompt_lookup_num_tokens": 10}
    # The same modules, but for the drafter.
    bare = copy.copy(model)
    bare._modules = {**model._modules, "exit_drafter": None}
    found: dict[str, Callable[..., Any]] = {PLAIN: partial(stock.generate, **asked)}
    if args.packed:
        found[PACKED] = partial(bare.generate, **asked)
    if model.exit_drafter is not None:
        found["jump"] = ours
        found["lookup and jump"] = partial(ours, **lookup)
    found["lookup"] = partial(bare.generate, exit_verify=True, **lookup, **asked)
    for layer in args.draft_layers:
        found[f"exit {layer}"] = partial(ours, assistant_early_exit=layer)
    if args.peers:
        found["transformers: lookup"] = partial(stock.generate, **lookup, **asked)
        for layer in args.draft_layers:
            found[f"transformers: exit {layer}"] = partial(stock.generate, assistant_early_exit=layer, **asked)
    wrong = set(args.ways or ()) - set(found)
    if wrong:
        raise ValueError(f"`--ways` names {sorted(wrong)}; accepted are {', '.join(found)}.")
    always = (PLAIN, PACKED)
    return {name: way for name, way in found.items() if name in always or not args.ways or name in args.ways}


def same_texts(stock: Any, inputs: Any, expected: Tensor, found: Tensor) -> list[float]:
    """For each row that differs, the difference of the two best logits where it first does."""
    width = max(expected.shape[1], found.shape[1])
    one, other = (torch.nn.functional.pad(text, (0, width - text.shape[1]), value=-1) for text in (expected, found))
    gaps = []
    for row in (one != other).any(1).nonzero().flatten().tolist():
        place = int((one[row] != other[row]).nonzero()[0])
        mask = torch.ones_like(one[row : row + 1, :place])
        mask[:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"][row]
        best = stock(one[row : row + 1, :place], attention_mask=mask).logits[0, -1].topk(2).values
        gaps.append(float(best[0] - best[1]))
    return gaps


def main() -> None:
    args = parse_arguments()
    logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    stock = type(model).stock_class(model.config).eval()
    stock.load_state_dict(model.state_dict(), strict=False)
    stock.generation_config = model.generation_config
    for one in (model, stock):
        one.generation_config.pad_token_id = tokenizer.pad_token_id
    prompts, asked = read_prompts(args, tokenizer), ways(args, stock, model)
    results: dict[str, Any] = {"arguments": {name: str(value) for name, value in vars(args).items()}, "sizes": []}
    results["environment"] = timing_environment(torch.device("cpu"))
    with packed_linears(model) if args.packed else nullcontext():
        for size in args.batch_sizes:
            results["sizes"].append(one_size(args, tokenizer, stock, model, prompts, asked, size))
            write_results(results, args.output / "results.json")
            write_text(args.output / "table.md", table(results))
    print(table(results))


@torch.no_grad()
def one_size(
    args: argparse.Namespace,
    tokenizer: Any,
    stock: Any,
    model: Any,
    prompts: list[str],
    asked: dict[str, Callable[..., Any]],
    size: int,
) -> dict[str, Any]:
    batches = [
        tokenizer(prompts[start : start + size], return_tensors="pt", padding=True, add_special_tokens=args.raw)
        for start in range(0, len(prompts), size)
    ]
    timed = batches[: -(-args.timed // size)]
    found: dict[str, Any] = {"batch_size": size, "costs": asdict(draft_costs(model, size)), "ways": {}}
    for name in asked:
        found["ways"][name] = {"texts": 0, "gaps": [], "passes": 0, "proposed": 0, "accepted": 0, "expected": []}
    for batch in tqdm(batches, desc=f"Texts of {size}"):
        expected = asked[PLAIN](**batch)
        for name, way in asked.items():
            about = found["ways"][name]
            if name == PLAIN or (name.startswith("transformers") and size > 1):
                continue
            output = way(**batch, return_dict_in_generate=True)
            about["texts"] += len(expected)
            about["gaps"] += same_texts(stock, batch, expected, output.sequences)
            if output.get("accepted_drafts") is not None:
                drafts = output.accepted_drafts
                about["passes"] += int((drafts >= 0).sum())
                about["proposed"] += int(output.proposed_drafts.clamp_min(0).sum())
                about["accepted"] += int(drafts.clamp_min(0).sum())
                about["expected"].append(output.expected_speedup)
    for about in found["ways"].values():
        about["tokens_per_pass"] = 1 + about["accepted"] / about["passes"] if about["passes"] else None
    if not timed:
        return found
    names = [name for name in asked if size == 1 or not name.startswith("transformers")]
    # A pass over several tokens is no cheaper than a step.
    limits = {name: about["tokens_per_pass"] for name, about in found["ways"].items() if about["tokens_per_pass"]}
    timings = Timer(rounds=args.rounds).time(
        {name: [partial(asked[name], **batch) for batch in timed] for name in names},
        PLAIN,
        allowed={PLAIN: limits},
        progress=tqdm,
    )
    for name in names:
        about = found["ways"][name]
        if name == PLAIN:
            tokens = sum(int((asked[PLAIN](**batch)[:, batch["input_ids"].shape[1] :] >= 0).sum()) for batch in timed)
            about["tokens_per_second"] = tokens / timings.seconds[PLAIN].median
        else:
            about["speedup"] = timings.speedups[PLAIN][name].reported._asdict()
    return found


def table(results: dict[str, Any]) -> str:
    lines = []
    for one in results["sizes"]:
        rows = []
        for name, about in one["ways"].items():
            per_pass, gaps = about["tokens_per_pass"], about["gaps"]
            speed = "1.00x" if name == PLAIN else Reported(**about.get("speedup", {})).text()
            differ = "" if name == PLAIN else f"{len(gaps)} of {about['texts']}"
            proposed, expected = about["proposed"], about["expected"]
            rows.append(
                [
                    name,
                    speed,
                    f"{median(expected):.2f}x" if expected else "",
                    "" if per_pass is None else f"{per_pass:.2f}",
                    f"{about['accepted'] / proposed:.2f} of {proposed}" if proposed else "",
                    differ,
                    f"{max(gaps):.1e}" if gaps else "",
                ]
            )
        header = ["", "speed-up", "by costs", "tokens per pass", "accepted", "texts that differ", "largest gap"]
        plain = one["ways"][PLAIN].get("tokens_per_second")
        speed = "not timed" if plain is None else f"{plain:.1f} tokens per second without drafts"
        costs = one["costs"]
        lines.append(
            f"Batch {one['batch_size']}, {speed}. In decode steps, a pass with drafts costs {costs['start']:.3f} and "
            f"each draft {costs['verify']:.3f} to verify; a layer costs {costs['layer']:.3f}, the LM head "
            f"{costs['head']:.3f}.\n"
        )
        lines.append(markdown_table(header, rows) + "\n")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
