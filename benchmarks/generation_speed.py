# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tokens per second of generation with forced and mixed exits against stock `generate`, in one run, in turn.

    python benchmarks/generation_speed.py --model MODEL --batch_sizes 1 4 16 --output runs/generation-speed

MODEL is a LLaMA checkpoint with or without exits (a folder, a Hub name, or a folder with `--gguf_file`). Exits are
forced by thresholds (0 at one exit, 1 before it), so every layer that counts as saved is one that was not executed.
Mixed exits are drawn at random per token, with equal probability over the exits. The ratio to beat at an exit e is

    (L + H) / (e + (L − e)·κ + H)

with κ, the time to fill a skipped layer's keys and values, and H, the time of the LM head, both in units of a layer
and measured here (Elbayad et al. 2020 skip layers this way). Figures are medians over rounds in which all of them
run in turn, with the rounds' spread; noise is called so.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM
from transformers.utils import logging

from transformers_cee import LlamaForConsistentEECausalLM
from transformers_cee.evaluation.environment import timing_environment
from transformers_cee.evaluation.report import markdown_table, write_results
from transformers_cee.evaluation.timing import FEWEST_ROUNDS, Derived, Figure, Reported, Timer
from transformers_cee.exits.cache_name import CACHE_NAME
from transformers_cee.exits.criteria import CRITERIA, ExitCriterion, ExitStep, register_criterion
from transformers_cee.files import write_text
from transformers_cee.generation.cache import EarlyExitCache


class RandomExit(ExitCriterion):
    """Leaves at an exit drawn per token, every exit alike; measures mixed depths without a trained policy."""

    name = "benchmark_random"
    looks_at = frozenset()

    def score(self, step: ExitStep) -> Tensor:
        share = 1 / (len(self.thresholds) - step.index)
        return (torch.rand(len(step.state)) < share).float() * 0.9


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub name of a LLaMA checkpoint")
    parser.add_argument("--gguf_file", help="name of a GGUF file in MODEL")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt_tokens", type=int, default=32)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5, help="rounds, at least 3")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--settings", nargs="+", help='only these, such as "exits off" and "exit 15, copy"')
    parser.add_argument("--output", type=Path, help="folder for results.json and table.md")
    args = parser.parse_args()
    if args.repeats < FEWEST_ROUNDS:
        parser.error(f"--repeats must be at least {FEWEST_ROUNDS}; got {args.repeats}")
    return args


def load_models(args: argparse.Namespace) -> tuple[LlamaForCausalLM, LlamaForConsistentEECausalLM]:
    """The stock model, and the same with exits after a quarter, half and three quarters of the layers."""
    source = {"gguf_file": args.gguf_file} if args.gguf_file else {}
    stock = LlamaForCausalLM.from_pretrained(args.model, dtype=torch.float32, **source).eval()
    layers = stock.config.num_hidden_layers
    exits = sorted({max(1, layers // 4), layers // 2, 3 * layers // 4})
    model = LlamaForConsistentEECausalLM.from_pretrained(
        args.model, dtype=torch.float32, exit_layers=exits, exit_head="norm", **source
    )
    for one in (stock, model):
        # Every row gets all its tokens.
        one.generation_config.eos_token_id = None
    return stock, model.eval()


@torch.no_grad()
def unit_costs(model: LlamaForConsistentEECausalLM, batch_size: int, past: int, repeats: int) -> dict[str, Figure]:
    """κ and H in layers, from one decode step's parts, all layers in turn so that weights come from memory."""
    config = model.config
    state = torch.randn(batch_size, 1, config.hidden_size)
    position = torch.full((1, 1), past)
    rotary = model.model.rotary_emb(state, position)
    cache = DynamicCache(config=config)
    shape = (batch_size, config.num_key_value_heads, past, model.model.layers[0].self_attn.head_dim)
    for index in range(config.num_hidden_layers):
        cache.update(torch.randn(shape), torch.randn(shape), index)
    own = EarlyExitCache.from_cache(cache, config.num_hidden_layers)

    def layers() -> None:
        hidden_states = state
        for layer in model.model.layers:
            hidden_states = layer(hidden_states, position_embeddings=rotary, use_cache=True, **{CACHE_NAME: own})
        own.crop(-1)

    def fill() -> None:
        own.reserve()
        keys, values = model.project_skipped(0, config.num_hidden_layers, state, rotary)
        for index, layer in enumerate(own.layers):
            layer.put(keys[index], values[index])
        own.crop(-1)

    def head() -> None:
        model.lm_head(model.model.norm(state[:, -1]))

    total = config.num_hidden_layers
    found = Timer(rounds=10 * repeats).time(
        {"layers": layers, "fill": fill, "head": head},
        derived={
            "kappa": Derived(lambda seconds: seconds["fill"] / seconds["layers"]),
            "H": Derived(lambda seconds: seconds["head"] / seconds["layers"] * total),
        },
    )
    return {"layer_ms": found.seconds["layers"].times(1e3 / total), **found.derived}


def settings(model: LlamaForConsistentEECausalLM) -> dict[str, dict[str, Any]]:
    """What is measured besides stock: exits off, each exit forced, mixed exits; both ways to fill skipped layers."""
    count = len(model.layer_numbers)
    found: dict[str, dict[str, Any]] = {"exits off": {"exit_threshold": 1.0}}
    for skipped_kv in ("copy", "deferred"):
        for index, layer in enumerate(model.layer_numbers[:-1]):
            thresholds = [1.0] * index + [0.0] * (count - index)
            found[f"exit {layer}, {skipped_kv}"] = {"exit_threshold": thresholds, "skipped_kv": skipped_kv}
        mixed = {"exit_criterion": RandomExit.name, "exit_threshold": 0.5, "skipped_kv": skipped_kv}
        found[f"mixed, {skipped_kv}"] = mixed
    return found


def measure(stock: Any, model: Any, batch_size: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per setting: tokens/s, ratio to stock, depth, and the ratio that the formula allows at batch 1."""
    torch.manual_seed(0)
    prompt = torch.randint(10, model.config.vocab_size, (batch_size, args.prompt_tokens))
    common = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": args.new_tokens,
        "do_sample": False,
        "pad_token_id": 0,
    }
    ways = settings(model)
    unknown = set(args.settings or ()) - set(ways)
    if unknown:
        raise ValueError(f"`settings`={sorted(unknown)} unknown; accepted are {', '.join(map(repr, ways))}.")
    ways = {name: way for name, way in ways.items() if not args.settings or name in args.settings}
    runs: dict[str, Callable[[], Any]] = {"stock": lambda: stock.generate(prompt, **common)}
    for name, way in ways.items():
        runs[name] = lambda way=way: model.generate(prompt, **common, **way)
    costs = unit_costs(model, batch_size, args.prompt_tokens + args.new_tokens // 2, args.repeats)
    depths = {name: depth_of(model, prompt, {**common, **way}) for name, way in ways.items()}
    total, tokens = model.config.num_hidden_layers, batch_size * args.new_tokens
    # No token costs less than the layers up to its exit. Without exits the two classes differ by their caches alone.
    limits = {name: total / depth for name, depth in depths.items() if depth < total}
    found = Timer(rounds=args.repeats).time(runs, "stock", allowed={"stock": limits})
    kappa, head = costs["kappa"].value, costs["H"].value
    rows = []
    for name, depth in {"stock": float(total), **depths}.items():
        seconds, ratio = found.seconds[name], found.speedups["stock"].get(name, Figure(1.0, 0.0))
        formula = None
        if kappa is not None and head is not None:
            formula = (total + head) / (depth + (total - depth) * kappa + head)
        figures = {"tokens_per_second": seconds.inverse().times(tokens), "over_stock": ratio, **costs}
        rows.append({"batch": batch_size, "setting": name, "depth": depth, "formula": formula} | _named(figures))
    return rows


def depth_of(model: Any, prompt: Tensor, arguments: dict[str, Any]) -> float:
    """Mean exit layer of the generated tokens but the first, which always runs to the last layer."""
    output = model.generate(prompt, return_dict_in_generate=True, **arguments)
    return float(output["exit_layers"][:, 1:].float().mean())


def _named(figures: dict[str, Figure]) -> dict[str, Any]:
    """Values by name, and beside them spreads and what is noise."""
    told = {name: figure.reported for name, figure in figures.items()}
    return {
        **{name: one.value for name, one in told.items()},
        "spreads": {name: one.spread for name, one in told.items()},
        "noisy": {name: one.noisy_value for name, one in told.items() if one.noisy_value is not None},
    }


def reported(row: dict[str, Any], name: str) -> Reported:
    """A figure of a row, also of one that was written without spreads."""
    return Reported(row[name], row.get("spreads", {}).get(name), row.get("noisy", {}).get(name))


def table(rows: list[dict[str, Any]]) -> str:
    header = ["setting", "batch", "depth", "tokens/s", "over stock", "formula", "share of formula"]
    cells = [
        [
            row["setting"],
            str(row["batch"]),
            f"{row['depth']:.1f}",
            reported(row, "tokens_per_second").text("", 1),
            reported(row, "over_stock").text("", 3),
            *("-" if value is None else f"{value:.3f}" for value in (row["formula"], _share(row))),
        ]
        for row in rows
    ]
    return markdown_table(header, cells)


def _share(row: dict[str, Any]) -> float | None:
    """Of the ratio that the formula allows; None where one of both is noise."""
    return None if row["over_stock"] is None or row["formula"] is None else row["over_stock"] / row["formula"]


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    if RandomExit.name not in CRITERIA:
        register_criterion(RandomExit)
    stock, model = load_models(args)
    rows = []
    for batch_size in args.batch_sizes:
        rows += measure(stock, model, batch_size, args)
        costs = ", ".join(f"{name} {reported(rows[-1], name).text('', 3)}" for name in ("layer_ms", "kappa", "H"))
        print(
            f"\nbatch {batch_size}: {costs}\n\n{table([row for row in rows if row['batch'] == batch_size])}",
            flush=True,
        )
    if args.output is not None:
        write_results(
            {"rows": rows, "arguments": vars(args), "environment": timing_environment(model.device)},
            args.output / "results.json",
        )
        write_text(args.output / "table.md", table(rows) + "\n")


if __name__ == "__main__":
    main()
