# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tokens per second of generation with forced and mixed exits against stock `generate`, in one run, in turn.

    python benchmarks/generation_speed.py --model MODEL --batch_sizes 1 4 16 --output runs/generation-speed
    python benchmarks/generation_speed.py --random llama-3-8b --device cuda --dtype bfloat16 --batch_sizes 1 8 32 \
        --accepted 0.5 0.65 0.8 --output runs/generation-speed-8b

MODEL is a LLaMA checkpoint with or without exits (a folder, a Hub name, or a folder with `--gguf_file`); `--random`
makes a model of a shape without trained weights, whose times are the same. Exits are
forced by thresholds (0 at one exit, 1 before it), so every layer that counts as saved is one that was not executed.
Mixed exits are drawn at random per token, with equal probability over the exits. The ratio to beat at an exit e is

    (L + H) / (e + (L − e)·κ + H)

with κ, the time to fill a skipped layer's keys and values, and H, the time of the LM head, both in units of a layer
and measured here (Elbayad et al. 2020 skip layers this way). With `--accepted` a drafter of one layer drafts
`--drafts` tokens in every pass, the whole model verifies them, and each is then accepted with the chance that was
given, whatever it is. The ratio to beat is that of the measured costs,

    (1 + α + … + αⁿ) / (1 + n·(c_d + c_v) + s)

with the costs of a draft, of one more token to verify and of a pass over several tokens in decode steps. Figures are
medians over rounds in which all of them run in turn, with the rounds' spread; noise is called so.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, DynamicCache, LlamaForCausalLM
from transformers.utils import logging

from transformers_cee import LlamaCeeConfig, LlamaForConsistentEECausalLM
from transformers_cee.evaluation.environment import timing_environment
from transformers_cee.evaluation.report import markdown_table, write_results
from transformers_cee.evaluation.timing import FEWEST_ROUNDS, Derived, Figure, Reported, Timer
from transformers_cee.exits.cache_name import CACHE_NAME
from transformers_cee.exits.criteria import CRITERIA, ExitCriterion, ExitStep, register_criterion
from transformers_cee.files import write_text
from transformers_cee.generation.cache import EarlyExitCache
from transformers_cee.generation.draft_costs import DraftCosts, draft_costs
from transformers_cee.generation.drafting import Drafter, Drafting, Drafts, JumpDrafts
from transformers_cee.generation.drafts_pay import DraftsPay
from transformers_cee.generation.verifying import Verification


SHAPES = {
    "tiny": {
        "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512,
    },
    "llama-3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
}  # fmt: skip
# Of `--random`: the drafter's words.
DRAFTER_WORDS = 32_768


class RandomExit(ExitCriterion):
    """Leaves at an exit drawn per token, every exit alike; measures mixed depths without a trained policy."""

    name = "benchmark_random"
    looks_at = frozenset()

    def score(self, step: ExitStep) -> Tensor:
        share = 1 / (len(self.thresholds) - step.index)
        return (torch.rand(len(step.state), device=step.state.device) < share).float() * 0.9


class ForcedDrafts(JumpDrafts):
    """Every pass gets as many drafts as there may be, whatever comes of them."""

    def draft(self, drafting: Drafting, room: Tensor, pays: DraftsPay) -> Drafts | None:
        # Other choices of a first draft would be accepted beside those that are asked for.
        return super().draft(replace(drafting, chooses=False), room, AlwaysPays(0.0, 0.0))


class AlwaysPays(DraftsPay):
    """For drafters that are to draft."""

    def rests(self) -> bool:
        return False

    def most(self, shares: Sequence[float], before: int = 0, runs: int = 0) -> int:
        return len(shares)


class ForcedVerification(Verification):
    """Accepts every draft with the same chance: tells the speed of an acceptance without a drafter that has learned.

    Args:
        model (`EarlyExitCausalLM`): a model with a drafter.
        drafts (`int`): tokens of a draft.
        chance (`float`): of each to be accepted where those before it are.
    """

    def __init__(self, model: Any, drafts: int, chance: float) -> None:
        super().__init__(model, [ForcedDrafts(model, drafts)], partial(draft_costs, model))
        self.chance = chance

    def _choose(self, scores: Tensor, drafts: Drafts | None, counts: Tensor) -> tuple[Tensor, Tensor]:
        choice = scores.argmax(-1)
        accepted = torch.zeros_like(counts)
        if drafts is not None:
            held = torch.rand(drafts.tokens.shape, device=counts.device) < self.chance
            accepted = torch.minimum(held.int().cumprod(1).sum(1), counts)
        return accepted, choice.gather(1, accepted.unsqueeze(1)).squeeze(1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="folder or Hub name of a LLaMA checkpoint")
    what.add_argument("--random", choices=SHAPES, help="a LLaMA of this shape without trained weights")
    parser.add_argument("--gguf_file", help="name of a GGUF file in MODEL")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt_tokens", type=int, default=32)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5, help="rounds, at least 3")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--accepted", type=float, nargs="+", default=[], help="chances of drafts, of a model with a drafter"
    )
    parser.add_argument("--drafts", type=int, default=3, help="tokens that are drafted in a pass")
    parser.add_argument("--settings", nargs="+", help='only these, such as "exits off" and "exit 15, copy"')
    parser.add_argument("--output", type=Path, help="folder for results.json and table.md")
    args = parser.parse_args()
    if any(not 0 <= chance <= 1 for chance in args.accepted):
        parser.error(f"--accepted must be chances in 0..1; got {args.accepted}")
    if args.repeats < FEWEST_ROUNDS:
        parser.error(f"--repeats must be at least {FEWEST_ROUNDS}; got {args.repeats}")
    return args


def load_models(args: argparse.Namespace) -> tuple[LlamaForCausalLM, LlamaForConsistentEECausalLM]:
    """The stock model, and the same weights with exits after a quarter, half and three quarters of the layers."""
    dtype, classes = getattr(torch, args.dtype), LlamaForConsistentEECausalLM
    if args.random:
        shape = SHAPES[args.random]
        layers, words = shape["num_hidden_layers"], min(DRAFTER_WORDS, shape["vocab_size"] // 4)
        config = LlamaCeeConfig(
            **shape, **exits_of(layers), drafter_layer=2 * layers // 3, drafter_vocab_size=words, pad_token_id=0
        )
        with torch.device(args.device):
            model = classes._from_config(config, dtype=dtype)
    else:
        source = {"gguf_file": args.gguf_file} if args.gguf_file else {}
        layers = AutoConfig.from_pretrained(args.model, **source).num_hidden_layers
        model = classes.from_pretrained(args.model, dtype=dtype, **exits_of(layers), **source)
    model = model.to(args.device).eval()
    with torch.device("meta"):
        stock = LlamaForCausalLM(model.config)
    stock.load_state_dict(model.state_dict(), strict=False, assign=True)
    stock.model.rotary_emb = model.model.rotary_emb
    # That of a config alone may be without a cache, as trainers leave it.
    stock.generation_config = model.generation_config
    for one in (stock, model):
        # Every row gets all its tokens.
        one.generation_config.eos_token_id = None
    return stock.eval(), model


def exits_of(layers: int) -> dict[str, Any]:
    return {"exit_layers": sorted({max(1, layers // 4), layers // 2, 3 * layers // 4}), "exit_head": "norm"}


@torch.no_grad()
def unit_costs(model: LlamaForConsistentEECausalLM, batch_size: int, past: int, repeats: int) -> dict[str, Figure]:
    """κ and H in layers, from one decode step's parts, all layers in turn so that weights come from memory."""
    config, like = model.config, {"device": model.device, "dtype": model.dtype}
    state = torch.randn(batch_size, 1, config.hidden_size, **like)
    position = torch.full((1, 1), past, device=model.device)
    rotary = model.model.rotary_emb(state, position)
    cache = DynamicCache(config=config)
    shape = (batch_size, config.num_key_value_heads, past, model.model.layers[0].self_attn.head_dim)
    for index in range(config.num_hidden_layers):
        cache.update(torch.randn(shape, **like), torch.randn(shape, **like), index)
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
        device=model.device,
    )
    return {"layer_ms": found.seconds["layers"].times(1e3 / total), **found.derived}


def settings(model: LlamaForConsistentEECausalLM) -> dict[str, dict[str, Any]]:
    """What is measured besides stock: exits off, each exit forced, mixed exits, also where they must pay; both ways to
    fill skipped layers."""
    count = len(model.layer_numbers)
    found: dict[str, dict[str, Any]] = {"exits off": {"exit_threshold": 1.0}}
    for skipped_kv in ("copy", "deferred"):
        for index, layer in enumerate(model.layer_numbers[:-1]):
            thresholds = [1.0] * index + [0.0] * (count - index)
            found[f"exit {layer}, {skipped_kv}"] = {"exit_threshold": thresholds, "skipped_kv": skipped_kv}
        mixed = {"exit_criterion": RandomExit.name, "exit_threshold": 0.5, "skipped_kv": skipped_kv}
        found[f"mixed, {skipped_kv}"] = mixed
        found[f"mixed, {skipped_kv}, must pay"] = mixed | {"exits_must_pay": True}
    return found


def draft_settings(model: Any, prompt: Tensor, common: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Runs with forced acceptance by name; each gives its [`ForcedVerification`]."""
    found = {}
    for chance in args.accepted:

        def run(chance: float = chance) -> ForcedVerification:
            torch.manual_seed(0)
            verification = ForcedVerification(model, args.drafts, chance)
            model.generate(prompt, custom_generate=verification, **common)
            return verification

        found[f"{args.drafts} drafts, {chance:g} accepted"] = run
    return found


def draft_formula(costs: DraftCosts, drafter: Drafter, drafts: int, chance: float) -> float:
    """The ratio to stock that measured costs allow."""
    tokens = sum(chance**count for count in range(drafts + 1))
    return tokens / (1 + drafts * (drafter.cost(costs) + costs.verify) + costs.start)


def measure(stock: Any, model: Any, batch_size: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per setting: tokens/s, ratio to stock, depth, and the ratio that the formula allows at batch 1."""
    torch.manual_seed(0)
    prompt = torch.randint(10, model.config.vocab_size, (batch_size, args.prompt_tokens)).to(model.device)
    common = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": args.new_tokens,
        "do_sample": False,
        "pad_token_id": 0,
    }
    ways, drafted = settings(model), draft_settings(model, prompt, common, args)
    unknown = set(args.settings or ()) - {*ways, *drafted}
    if unknown:
        names = ", ".join(map(repr, (*ways, *drafted)))
        raise ValueError(f"`settings`={sorted(unknown)} unknown; accepted are {names}.")
    ways, drafted = (
        {name: way for name, way in some.items() if not args.settings or name in args.settings}
        for some in (ways, drafted)
    )
    runs: dict[str, Callable[[], Any]] = {"stock": lambda: stock.generate(prompt, **common)}
    for name, way in ways.items():
        runs[name] = lambda way=way: model.generate(prompt, **common, **way)
    runs |= drafted
    costs = unit_costs(model, batch_size, args.prompt_tokens + args.new_tokens // 2, args.repeats)
    total, tokens = model.config.num_hidden_layers, batch_size * args.new_tokens
    about: dict[str, dict[str, Any]] = {"stock": {"depth": float(total)}}
    for name, way in ways.items():
        about[name] = {"depth": depth_of(model, prompt, {**common, **way})}
    # No token costs less than the layers up to its exit, and no pass less than a step. Without exits the two classes
    # differ by their caches alone.
    limits = {name: total / one["depth"] for name, one in about.items() if one["depth"] < total}
    for name, run in drafted.items():
        verification = run()
        passes = torch.stack(verification.accepted)
        per_pass = 1 + float(passes[passes >= 0].float().mean())
        drafts = draft_costs(model, batch_size)
        formula = draft_formula(drafts, ForcedDrafts(model, 1), args.drafts, verification.chance)
        about[name] = {"depth": float(total), "formula": formula, "passes": len(passes), "tokens_per_pass": per_pass}
        limits[name] = args.new_tokens / len(passes)
    found = Timer(rounds=args.repeats).time(runs, "stock", allowed={"stock": limits}, device=model.device)
    kappa, head = costs["kappa"].value, costs["H"].value
    rows = []
    for name, one in about.items():
        seconds, ratio = found.seconds[name], found.speedups["stock"].get(name, Figure(1.0, 0.0))
        if kappa is not None and head is not None:
            formula = (total + head) / (one["depth"] + (total - one["depth"]) * kappa + head)
            one = {"formula": formula, **one}
        figures = {"tokens_per_second": seconds.inverse().times(tokens), "over_stock": ratio, **costs}
        if "passes" in one:
            figures["pass_ms"] = seconds.times(1e3 / one["passes"])
        rows.append({"batch": batch_size, "setting": name, "formula": None, **one} | _named(figures))
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
    if any("passes" in row for row in rows):
        header += ["tokens per pass", "ms per pass"]
        for cell, row in zip(cells, rows, strict=True):
            passes = "passes" in row
            cell += [f"{row['tokens_per_pass']:.2f}", reported(row, "pass_ms").text("", 2)] if passes else ["-", "-"]
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
    if args.accepted and model.exit_drafter is None:
        raise ValueError(f"`--accepted`={args.accepted} needs a model with a drafter (`drafter_layer` of its config).")
    rows = []
    for batch_size in args.batch_sizes:
        rows += measure(stock, model, batch_size, args)
        costs = ", ".join(f"{name} {reported(rows[-1], name).text('', 3)}" for name in ("layer_ms", "kappa", "H"))
        if args.accepted:
            drafts = draft_costs(model, batch_size)
            costs += f"; in steps: a draft {ForcedDrafts(model, 1).cost(drafts):.3f}, to verify it {drafts.verify:.3f}"
            costs += f", a pass over several tokens {drafts.start:.3f}"
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
