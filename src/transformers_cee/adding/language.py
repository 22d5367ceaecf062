# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Exits for a language model that has none, from text: heads in closed form, policies on stored states, and a promise
about every token."""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoTokenizer, DataCollatorForSeq2Seq
from transformers.utils import logging

from transformers_cee.adding.data import say_too_few
from transformers_cee.adding.learning import learn_policies
from transformers_cee.adding.report import AddedExits, CertifiedSpeed, save_added
from transformers_cee.auto import model_class_of
from transformers_cee.calibration.points import CalibratedPoint
from transformers_cee.calibration.prices import calibrate_price
from transformers_cee.calibration.scores import score_store
from transformers_cee.evaluation.operating_points import FULL_DEPTH
from transformers_cee.evaluation.timing import FEWEST_ROUNDS, Timer
from transformers_cee.exits.deciding import criterion_settings
from transformers_cee.modeling.exits_saving import FromElsewhere
from transformers_cee.stores.filling import OneProcess, collect_exits
from transformers_cee.stores.store import ExitStore
from transformers_cee.training.least_squares import fit_exit_heads


logger = logging.get_logger(__name__)

AUTO_CLASS = "AutoModelForCausalLM"
# Where exits are, as shares of all layers: a token that leaves earlier is rarely the model's own.
EXITS_AT = (0.5, 0.65, 0.8, 0.9)
EXIT_FIELDS: dict[str, Any] = {
    "exit_head": "low_rank",
    # A look at the confidence would cost a head of the whole vocabulary at every exit.
    "policy_inputs": "state",
    "policy_condition": "film",
    "policy_alphas": [0.0001, 0.1],
    "exit_criterion": "policy",
    "exit_threshold": None,
    # Keys and values become those of full depth, which the promise is about.
    "skipped_kv": "deferred",
}
# Texts of either half, and how much is read of each: what makes so many tokens of a half, within bounds. Each text
# counts alike for a promise, so many texts say more than long ones.
MOST_TEXTS, TOKENS_OF_A_HALF, FEWEST_TOKENS, MOST_TOKENS = 2_000, 60_000, 32, 256
# Prompts that are answered to take the time, their length, and that of answers.
PROMPTS, PROMPT_TOKENS, ANSWER_TOKENS = 8, 16, 32
TIMED = "full depth"


def add_to_language_model(
    model: str | os.PathLike[str],
    texts: list[str],
    output: str | os.PathLike[str],
    levels: dict[str, float],
    *,
    risk: float,
    exit_layers: int | list[int] | None,
    batch_size: int,
    device: str,
    seed: int,
    disable_tqdm: bool,
) -> tuple[AddedExits, Any]:
    """What [`add_exits`] does for a language model.

    Args:
        levels (`dict[str, float]`): promised agreements by the names of their operating points.

    Returns:
        `tuple`: what was reached, and the model with its exits, which are saved.

    Raises:
        ValueError: a checkpoint of another architecture, or texts without three tokens.
    """
    start = time.perf_counter()
    found = _load(model, exit_layers, device)
    # On the right: heads would be fitted on padding that stands where a first token is predicted.
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="right")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows, learning, certifying = _prepare(texts, tokenizer, found, seed)
    say_too_few(len(certifying), levels.values(), risk, MOST_TEXTS)
    collate = DataCollatorForSeq2Seq(tokenizer)
    seconds, begun = {}, time.perf_counter()
    batches = _batches(rows.select(learning.tolist()), collate, batch_size)
    fit_exit_heads(found, tqdm(batches, desc="Exit heads", disable=disable_tqdm))
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".exit-states-", dir=Path(output).parent) as folder:
        store = collect_exits(
            found,
            rows,
            collate,
            OneProcess(found.device),
            problem_type="single_label_classification",
            batch_size=batch_size,
            directory=folder,
            disable_tqdm=disable_tqdm,
        )
        seconds["pass"], begun = time.perf_counter() - begun, time.perf_counter()
        learn_policies(found, store, _tokens_of(store, learning), seed, disable_tqdm)
        held_out = store.select(_tokens_of(store, certifying))
        del store
    seconds["learning"] = time.perf_counter() - begun
    points = {name: _certified(found, held_out, level, risk) for name, level in levels.items()}
    speeds = [_speed(found, name, point, held_out) for name, point in points.items()]
    for name, point in points.items():
        point.save_to(found, name)
    if speeds[0].reason is None:
        found.config.exit_threshold = speeds[0].name
    save_added(found, model, output)
    _time(found, speeds, rows.select(certifying.tolist()), tokenizer, disable_tqdm)
    seconds["all"] = time.perf_counter() - start
    added = AddedExits(
        output=os.fspath(output),
        base=os.fspath(model),
        num_layers=found.config.num_hidden_layers,
        learning=len(learning),
        certifying=len(certifying),
        risk=risk,
        speeds=speeds,
        seconds=seconds,
        promises="tokens",
    )
    return added, found


def _load(model: str | os.PathLike[str], exit_layers: int | list[int] | None, device: str) -> Any:
    """A language model with exits that have learned nothing yet.

    Raises:
        OSError: there is no such checkpoint.
        ValueError: a checkpoint of another architecture, or no layer to leave at.
    """
    source = os.fspath(model)
    model_class = model_class_of(source, AUTO_CLASS)
    config = model_class.config_class.from_pretrained(source)
    layers = config.num_hidden_layers
    if exit_layers is None:
        exit_layers = sorted({max(1, min(layers - 1, round(share * layers))) for share in EXITS_AT})
    fields = EXIT_FIELDS | {"exit_head_rank": config.hidden_size, "exit_layers": exit_layers}
    config = model_class.config_class.from_pretrained(source, **fields)
    if len(config.exit_layer_numbers) < 2:
        raise ValueError(f"`exit_layers`={exit_layers!r} has no exit before the last layer.")
    found, _ = model_class.load_checkpoint(source, brings=FromElsewhere(()), config=config, dtype=torch.float32)
    return found.to(device).eval()


def _prepare(texts: list[str], tokenizer: Any, model: Any, seed: int) -> tuple[Dataset, Tensor, Tensor]:
    """Tokenised texts, and the numbers of those that are learned from and of those that certify."""
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(len(texts) // 2, MOST_TEXTS)
    longest = max(FEWEST_TOKENS, min(MOST_TOKENS, TOKENS_OF_A_HALF // count))
    longest = min(longest, tokenizer.model_max_length, model.config.max_position_embeddings)
    some = tokenizer([texts[number] for number in order[: 2 * count]], truncation=True, max_length=longest)
    # A token that leaves early has one before it and one behind it.
    halves = [[ids for ids in half if len(ids) > 2] for half in (some["input_ids"][:count], some["input_ids"][count:])]
    if not all(halves):
        raise ValueError("`texts` have no three tokens to learn from and to certify on.")
    logger.info(f"{count} texts are learned from and as many certify, the first {longest} tokens of each.")
    ids = [row for half in halves for row in half]
    rows = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], "labels": ids})
    return rows, torch.arange(len(halves[0])), torch.arange(len(halves[0]), len(ids))


def _batches(rows: Dataset, collate: Any, size: int) -> Iterator[dict[str, Tensor]]:
    for start in range(0, len(rows), size):
        yield collate([rows[number] for number in range(start, min(start + size, len(rows)))])


def _tokens_of(store: ExitStore, rows: Tensor) -> Tensor:
    """Numbers of the tokens of some texts that may leave early."""
    return (torch.isin(store.rows, rows) & store.may_exit).nonzero().squeeze(1)


def _certified(model: Any, store: ExitStore, level: float, risk: float) -> CalibratedPoint:
    with warnings.catch_warnings():
        # Said once, with the name of the point.
        warnings.simplefilter("ignore")
        return calibrate_price(store, model, 1 - level, risk)


def _speed(model: Any, name: str, point: CalibratedPoint, store: ExitStore) -> CertifiedSpeed:
    scores = score_store(store, point.criterion, model, criterion_settings(model, point.alpha))
    taken = point.taken_exits(scores)
    agrees = (~store.disagrees.gather(1, taken.unsqueeze(1))).squeeze(1).double()
    depth = float(store.layers[taken].double().mean())
    if point.reason is not None:
        logger.warning(f"Exits are off at {name!r}: {point.reason}")
    return CertifiedSpeed(
        name=name,
        promised=1 - point.levels["epsilon"],
        criterion=point.criterion,
        depth=depth,
        # Each text counts alike, as in what is certified.
        agreement=float(scores.mean(agrees)),
        alone={point.criterion: depth},
        reason=point.reason,
    )


@torch.no_grad()
def _time(model: Any, speeds: list[CertifiedSpeed], rows: Dataset, tokenizer: Any, disable_tqdm: bool) -> None:
    """Answers some prompts at each promise, in turn with full depth: how fast, and how many answers are the same?"""
    on = [speed for speed in speeds if speed.reason is None]
    prompts = [ids[:PROMPT_TOKENS] for ids in rows["input_ids"] if len(ids) >= PROMPT_TOKENS][:PROMPTS]
    if not on or not prompts:
        return
    asked = {"max_new_tokens": ANSWER_TOKENS, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    given = [torch.tensor([ids], device=model.device) for ids in prompts]

    def answer(ids: Tensor, exits: dict[str, Any]) -> Tensor:
        found: Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), **exits, **asked)
        return found

    exits = {TIMED: FULL_DEPTH} | {speed.name: {"exit_threshold": speed.name} for speed in on}
    full = [answer(ids, FULL_DEPTH) for ids in given]
    for speed in on:
        early = [answer(ids, exits[speed.name]) for ids in given]
        speed.identical = sum(torch.equal(one, two) for one, two in zip(full, early, strict=True)) / len(full)
    ways = {name: [partial(answer, ids, how) for ids in given] for name, how in exits.items()}
    bar = partial(tqdm, desc="Answers", disable=disable_tqdm)
    timings = Timer(rounds=FEWEST_ROUNDS).time(ways, TIMED, device=model.device, progress=bar)
    for speed in on:
        speed.speedups["1"] = timings.speedups[TIMED][speed.name].reported


__all__ = ["AUTO_CLASS", "add_to_language_model"]
