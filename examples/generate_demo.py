# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Answers one prompt at several thresholds, with the speed of each and the layer at which every token left, and at
last with drafts that the whole model verifies: the text of full depth.

    python examples/generate_demo.py --model runs/demo-llm --prompt "What is machine translation?"

Each threshold answers several times in turn with the full model; `noise` stands where these times lie too far apart.
On a terminal a token's colour is its exit layer; elsewhere the layer stands behind the token. Thresholds are those
that `run_clm_cee.py` measured (results.json in the model's folder), or those given by --exit_threshold.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from clm_data import choose_format, prompt_ids
from transformers import AutoModelForCausalLM, AutoTokenizer

import transformers_cee  # noqa: F401  (registers its models with the Auto classes)
from transformers_cee.evaluation.answers import FULL_DEPTH, answer, pad_left
from transformers_cee.evaluation.generation_report import setting_name
from transformers_cee.evaluation.speeds import measure_speed
from transformers_cee.evaluation.timing import FEWEST_ROUNDS, Derived, Timer
from transformers_cee.files import read_json


PROMPT = "What is machine translation, and why is it hard?"
DEFAULT_THRESHOLDS = (0.9, 0.7, 0.5)
# From the first exit to the last layer, in the colours of a 256-colour terminal: green, yellow, red.
COLORS = (46, 82, 118, 154, 190, 226, 220, 214, 208, 202, 196)


def measured_thresholds(folder: Path, criterion: str, count: int = 3) -> list[float]:
    """Up to `count` thresholds of a criterion that the folder's results.json holds, deepest first; none without it."""
    path = folder / "results.json"
    if not path.is_file():
        return []
    way_out = "Give --exit_threshold, or measure the model again."
    results = read_json(path, way_out)
    try:
        points = results.get("curves", {}).get(criterion, [])
        thresholds = [point["exit_threshold"] for point in sorted(points, key=lambda point: -point["depth"])]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no curves of operating points. {way_out}") from error
    if len(thresholds) <= count:
        return thresholds
    return [thresholds[round(index * (len(thresholds) - 1) / (count - 1))] for index in range(count)]


def pieces(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """What each token adds to the text, so that characters made of several tokens come out right."""
    texts = [tokenizer.decode(tokens[: index + 1], skip_special_tokens=True) for index in range(len(tokens))]
    texts = [text.rstrip("\N{REPLACEMENT CHARACTER}") for text in texts]
    return [text[len(before) :] for before, text in zip(["", *texts[:-1]], texts, strict=True)]


def paint(words: Sequence[str], layers: Sequence[int], exit_layers: Sequence[int], colored: bool) -> str:
    """Text whose words show their exit layer, by colour or as `word[layer]`."""
    if not colored:
        return "".join(f"{word}[{layer}]" if word.strip() else word for word, layer in zip(words, layers, strict=True))
    first, last = exit_layers[0], exit_layers[-1]
    shades = [round((layer - first) / max(1, last - first) * (len(COLORS) - 1)) for layer in layers]
    return "".join(f"\x1b[38;5;{COLORS[shade]}m{word}\x1b[0m" for word, shade in zip(words, shades, strict=True))


def legend(exit_layers: Sequence[int], colored: bool) -> str:
    """What colours or numbers mean."""
    names = [f"layer {layer}" for layer in exit_layers]
    if not colored:
        return f"[number]: the layer at which the token left, of {exit_layers[-1]}"
    return "colours: " + paint([f"{name}  " for name in names], exit_layers, exit_layers, colored).rstrip()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/demo-llm", help="folder or Hub name of a trained model")
    parser.add_argument("--prompt", default=PROMPT, help="what to answer")
    parser.add_argument("--prompt_format", help="chat, alpaca or plain; default: chat if the tokenizer has a template")
    parser.add_argument("--exit_criterion", default="policy", help="policy or a baseline, such as max_probability")
    parser.add_argument("--exit_threshold", type=float, nargs="+", help="1: exits off, 0: first exit")
    parser.add_argument("--max_new_tokens", type=int, default=48, help="longest answer")
    parser.add_argument("--repeats", type=int, default=3, help="how often each answer is timed")
    args = parser.parse_args(argv)
    if args.model.count("/") != 1 and not Path(args.model).is_dir():
        parser.error(f"--model: no such folder: {args.model!r}")
    for name, least in (("max_new_tokens", 1), ("repeats", FEWEST_ROUNDS)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}; got {getattr(args, name)}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    colored = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    layers = model.layer_numbers
    prompt = prompt_ids(tokenizer, choose_format(args.prompt_format, tokenizer), args.prompt)
    thresholds = args.exit_threshold or measured_thresholds(Path(args.model), args.exit_criterion)
    print(f"{type(model).__name__} from {args.model}\n\n> {args.prompt}\n\n{legend(layers, colored)}")
    full = answer(model, [prompt], args.max_new_tokens, pad, **FULL_DEPTH)
    print("\nfull depth\n")
    print(tokenizer.decode(full.rows()[0][0], skip_special_tokens=True))
    timer = Timer(rounds=args.repeats)
    for threshold in thresholds or DEFAULT_THRESHOLDS:
        settings = {"exit_criterion": args.exit_criterion, "exit_threshold": threshold}
        tokens, exits = answer(model, [prompt], args.max_new_tokens, pad, **settings).rows()[0]
        speed = measure_speed(model, [[prompt]], settings, args.max_new_tokens, pad, timer)
        own, full_depth = (
            speed.figure(name).text(" tokens/s", 1) for name in ("tokens_per_second", "full_tokens_per_second")
        )
        print(
            f"\n{setting_name(args.exit_criterion, threshold)}: depth {statistics.mean(exits):.1f} of {layers[-1]}, "
            f"{own}; full depth in turn: {full_depth}; speed-up: {speed.figure('speedup').text()}\n"
        )
        print(paint(pieces(tokenizer, tokens), exits, layers, colored))
    print(verified(model, tokenizer, prompt, full.rows()[0][0], args.max_new_tokens, pad, timer))


def verified(
    model: Any, tokenizer: Any, prompt: Sequence[int], full: Sequence[int], max_new_tokens: int, pad: int, timer: Timer
) -> str:
    """What the exact mode does with a prompt whose answer at full depth is known."""
    batch = pad_left([prompt], pad, model.device)
    asked = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": pad}
    exact = {**asked, "exit_verify": True, "prompt_lookup_num_tokens": 10}
    output = model.generate(**batch, **exact, return_dict_in_generate=True)
    tokens = output.sequences[0, len(prompt) :].tolist()
    runs = {"full": partial(model.generate, **batch, **asked), "exact": partial(model.generate, **batch, **exact)}
    found = timer.time(
        runs,
        "full",
        # A pass over several tokens is no cheaper than a step.
        allowed={"full": {"exact": output.tokens_per_pass}},
        derived={name: Derived(lambda seconds, name=name: len(tokens) / seconds[name]) for name in runs},
        device=model.device,
    )
    own, full_depth = (found.derived[name].reported.text(" tokens/s", 1) for name in ("exact", "full"))
    same = "the same text" if tokens == list(full) else "another text"
    return (
        f"\nexact, drafts that the whole model verifies: {output.tokens_per_pass:.2f} tokens per pass, {own}; "
        f"full depth in turn: {full_depth}; speed-up: {found.speedups['full']['exact'].reported.text()}; {same}:\n\n"
        + tokenizer.decode(tokens, skip_special_tokens=True)
    )


if __name__ == "__main__":
    main()
