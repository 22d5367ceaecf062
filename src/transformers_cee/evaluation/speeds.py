# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tokens per second of a language model's answers with exits, in turn with full depth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from transformers_cee.evaluation.answers import Answers, answer
from transformers_cee.evaluation.operating_points import FULL_DEPTH
from transformers_cee.evaluation.timing import Derived, Figure, Reported, Timer, Variant


@dataclass
class Speed:
    """Figures of timed answers, exits against full depth on the same prompts: medians over rounds. None where there is
    nothing to time, or where it is noise, see `timing.Figure`.

    Args:
        tokens_per_second (`float`, *optional*): new tokens over the time of the whole call, prompt included.
        decode_tokens_per_second (`float`, *optional*):
            New tokens after the first of each row over the time after the first.
        full_tokens_per_second, full_decode_tokens_per_second (`float`, *optional*): the same at full depth.
        speedup, decode_speedup (`float`, *optional*): medians of the rounds' ratios.
        prompts (`int`): how many were timed.
        spreads (`dict[str, float]`):
            By the name of a figure, the interquartile range of the rounds over their median.
        noisy (`dict[str, float]`): by the name of a figure, what was measured where that is noise; shown nowhere.
    """

    tokens_per_second: float | None
    decode_tokens_per_second: float | None
    full_tokens_per_second: float | None
    full_decode_tokens_per_second: float | None
    speedup: float | None
    decode_speedup: float | None
    prompts: int
    spreads: dict[str, float] = field(default_factory=dict)
    noisy: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, figures: Mapping[str, Figure], prompts: int) -> Speed:
        """From figures by the names of the fields; those that are not there were not timed."""
        values = {name: figures[name].value if name in figures else None for name in FIGURES}
        return cls(
            **values,
            prompts=prompts,
            spreads={name: figure.spread for name, figure in figures.items()},
            noisy={name: figure.median for name, figure in figures.items() if figure.is_noise},
        )

    def figure(self, name: str) -> Reported:
        """One of the figures by name."""
        return Reported(getattr(self, name), self.spreads.get(name), self.noisy.get(name))


FIGURES = (
    "tokens_per_second",
    "decode_tokens_per_second",
    "full_tokens_per_second",
    "full_decode_tokens_per_second",
    "speedup",
    "decode_speedup",
)
# Variants.
FULL, EARLY, FIRST = "full depth", "with exits", "first token"


def measure_speed(
    model: Any,
    batches: Sequence[Sequence[Sequence[int]]],
    settings: Mapping[str, Any],
    max_new_tokens: int,
    pad: int,
    timer: Timer,
    progress: Callable[[Any], Any] = iter,
) -> Speed:
    """Times greedy answers to batches of prompts at full depth, with exits, and up to their first token, in turn.

    An answer with exits may be longer or shorter than that of the full model, so speeds are those of tokens. They are
    noise where they exceed `allowed_speedup`, or where rounds lie too far apart.

    Args:
        model: an early-exit language model in evaluation mode.
        batches: token ids of prompts.
        settings: exit arguments of `generate`.
        max_new_tokens: longest answer.
        pad: token id of padding.
        timer: how often.
        progress: wraps the rounds, for a progress bar.
    """
    run = partial(_answers, model, batches, pad)
    # Answered once before anything is timed: how much there is to do, and the warm-up.
    full, early = ([one() for one in run(arguments, max_new_tokens)] for arguments in (FULL_DEPTH, settings))
    variants: dict[str, Variant] = {FULL: run(FULL_DEPTH, max_new_tokens), EARLY: run(settings, max_new_tokens)}
    derived = _figures("", full, early, lambda seconds, name: seconds[name])
    full_later, early_later = ([made.after_first() for made in answers] for answers in (full, early))
    if any(made.count for made in full_later) and any(made.count for made in early_later):
        # The prompt runs at full depth, whatever the exits.
        variants[FIRST] = run(FULL_DEPTH, 1)
        derived |= _figures("decode_", full_later, early_later, lambda seconds, name: seconds[name] - seconds[FIRST])
    found = timer.time(variants, derived=derived, device=model.device, warm_up=False, progress=progress)
    return Speed.of(found.derived, sum(map(len, batches)))


def _answers(
    model: Any, batches: Sequence[Sequence[Sequence[int]]], pad: int, settings: Mapping[str, Any], max_new_tokens: int
) -> list[Callable[[], Answers]]:
    """One run per batch."""
    return [partial(answer, model, batch, max_new_tokens, pad, **settings) for batch in batches]


def _figures(
    prefix: str,
    full: Sequence[Answers],
    early: Sequence[Answers],
    time: Callable[[Mapping[str, float], str], float],
) -> dict[str, Derived]:
    """Tokens per second and speed-up of answers.

    Args:
        prefix: of the figures' names.
        full, early: what the full model and that with exits answered.
        time: seconds that count, from those of a round and the name of a variant.
    """
    tokens, full_tokens = (sum(made.count for made in answers) for answers in (early, full))
    return {
        f"{prefix}tokens_per_second": Derived(lambda seconds: tokens / time(seconds, EARLY)),
        f"full_{prefix}tokens_per_second": Derived(lambda seconds: full_tokens / time(seconds, FULL)),
        f"{prefix}speedup": Derived(
            lambda seconds: tokens / full_tokens * time(seconds, FULL) / time(seconds, EARLY),
            allowed_speedup(full, early, has_prompt=not prefix),
        ),
    }


def allowed_speedup(full: Sequence[Answers], early: Sequence[Answers], has_prompt: bool) -> float:
    """The largest ratio of tokens per second, with exits over full depth, that answers can have that left as they did.

    The time of an answer is a sum of what exits do not save (the prompt, embeddings, heads) and of two kinds of work,
    each at a price of the machine's own: layers that are called in a step, and rows that run through them. So times
    cannot differ by more than the kind that was saved most, which for answers of one length in batches of one row is
    the layer speed-up; where the prompt is most of the time, they do not differ at all. Tokens per second differ by
    that times the answers' lengths.

    Args:
        full, early: answers of the full model and with exits, batch by batch.
        has_prompt: does the time contain what both do alike?
    """
    kinds = executed_work(full) / executed_work(early)
    ratio = max(float(kinds.max()), 1.0 if has_prompt else 0.0)
    return ratio * sum(made.count for made in early) / sum(made.count for made in full)


def executed_work(answers: Sequence[Answers]) -> Tensor:
    """Layers that were called, step by step, and rows that ran through layers, both in all batches, (2,)."""
    layers = [made.exit_layers for made in answers]
    return torch.tensor(
        [sum(int(one.amax(0).sum()) for one in layers), sum(int(one.sum()) for one in layers)], dtype=torch.float64
    )


__all__ = ["Speed", "allowed_speedup", "executed_work", "measure_speed"]
