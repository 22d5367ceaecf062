# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What a language model writes at which depth and speed: greedy answers with exits against full depth in the same run.

The full model answers the same prompts in turn with every operating point, so that both meet the same machine; figures
of time are medians over rounds, see `speeds` and `timing`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from transformers_cee.evaluation.answers import FULL_DEPTH, answer, teacher_forced
from transformers_cee.evaluation.memory import PeakMemory
from transformers_cee.evaluation.operating_points import OperatingPoint, depth_figures, exit_histogram
from transformers_cee.evaluation.speeds import Speed, measure_speed
from transformers_cee.evaluation.timing import Timer
from transformers_cee.exits.criteria import Thresholds, check_thresholds
from transformers_cee.exits.deciding import price_of_budget, resolve_decision
from transformers_cee.exits.numbers import plain
from transformers_cee.stores.filling import similar_length_batches


TextMetrics = Callable[[Sequence[str], Sequence[str]], dict[str, float]]


@dataclass
class GenerationPoint(OperatingPoint):
    """An operating point of a language model.

    Depth and exit histogram are those of the generated tokens, the first token of each answer (which always runs to
    the last layer) included. `metrics` holds those of the texts and

    - `agreement`: share of positions, fed with the full model's own answer, at which the exit taken chooses the full
      model's token; the first token of each answer, where nothing is decided, is left out. Not where known text would
      leave elsewhere than `generate` does: with `exit_threshold_decay`, or with `skipped_kv="deferred"`;
    - `identical`: share of answers that are the full model's, token for token;
    - `perplexity`: of the references, fed token by token, if it was asked for and wherever there is `agreement`.

    Args:
        speeds (`dict[str, Speed]`): by batch size; the first gives `wall_clock_speedup`.
        peak_memory_mb (`float`, *optional*): highest memory while answering, of the process or of the accelerator.
    """

    speeds: dict[str, Speed] = field(default_factory=dict)
    peak_memory_mb: float | None = None


class GenerationBenchmark:
    """Measures operating points of one model on one set of prompts.

    Args:
        model: an early-exit language model.
        prompts: token ids of each prompt.
        answers: token ids of each reference, end-of-sequence included.
        decode: maps lists of token ids to texts.
        references: texts that answers are compared with; by default the decoded `answers`.
        text_metrics: maps answers and references to figures, see `text_metrics.py`.
        max_new_tokens: longest answer.
        batch_size: rows at a time where no time is taken.
        timing_batch_sizes: batch sizes at which time is taken; the first gives `wall_clock_speedup`.
        timing_prompts: prompts on which time is taken.
        perplexity_tokens: tokens of each reference whose perplexity is taken; None for all, 0 for no perplexity.
        pad: token id of padding.
        timer: how often the timed prompts are answered; three rounds and two attempts by default.
        disable_tqdm: no progress bars.

    Raises:
        ValueError: no prompts, lists of different length, or nothing to time.
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        decode: Callable[[Sequence[Sequence[int]]], list[str]],
        *,
        pad: int,
        references: Sequence[str] | None = None,
        text_metrics: TextMetrics | None = None,
        max_new_tokens: int = 128,
        batch_size: int = 8,
        timing_batch_sizes: Sequence[int] = (1,),
        timing_prompts: int = 4,
        perplexity_tokens: int | None = None,
        timer: Timer | None = None,
        disable_tqdm: bool = False,
    ) -> None:
        if not prompts or len(prompts) != len(answers):
            raise ValueError(
                f"`prompts` ({len(prompts)}) and `answers` ({len(answers)}) must be as many, at least one."
            )
        if references is not None and len(references) != len(answers):
            raise ValueError(f"`references` ({len(references)}) must be as many as `answers` ({len(answers)}).")
        if min(timing_prompts, max_new_tokens, batch_size, *timing_batch_sizes) < 1:
            raise ValueError(
                f"`timing_prompts`={timing_prompts}, `max_new_tokens`={max_new_tokens}, `batch_size`={batch_size} and "
                f"`timing_batch_sizes`={list(timing_batch_sizes)} must all be at least 1."
            )
        self.model, self.prompts, self.answers, self.pad = model.eval(), prompts, answers, pad
        self.decode = decode
        self.references = decode(answers) if references is None else references
        self.judged_answers = [tokens[:perplexity_tokens] for tokens in answers]
        self.text_metrics = text_metrics or (lambda answers, references: {})
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.timing_batch_sizes, self.disable_tqdm = timing_batch_sizes, disable_tqdm
        # Answers take long.
        self.timer = timer or Timer(rounds=3, attempts=2)
        # Spread over the prompts, which may be sorted.
        step = max(1, len(prompts) // timing_prompts)
        self.timed = list(range(0, len(prompts), step))[:timing_prompts]
        self.full_answers: list[list[int]] | None = None
        self.texts: dict[tuple[str, str], list[str]] = {}

    def full_depth(self) -> GenerationPoint:
        """The point without exits; the others are compared with its answers, so it comes first."""
        point, self.full_answers = self._point("full depth", 1.0, FULL_DEPTH)
        point.metrics |= {"agreement": 1.0, "identical": 1.0}
        return point

    def measure(self, criterion: str, threshold: Thresholds | str, **exit_arguments: Any) -> GenerationPoint:
        """The point of a criterion at a threshold.

        Args:
            criterion: name of an exit criterion.
            threshold: its threshold, or the name of one of the model's operating points of that criterion.
            exit_arguments: more of what `generate` takes, such as `min_exit_layer`.

        Raises:
            ValueError: an unknown criterion, or a threshold that it does not accept.
        """
        decision = resolve_decision(self.model.config, threshold, criterion)
        check_thresholds(decision.criterion, decision.threshold, len(self.model.layer_numbers))
        asked = {"exit_criterion": criterion, "exit_threshold": threshold}
        return self._measure(criterion, threshold, asked, exit_arguments)

    def measure_budget(self, exit_budget: float, **exit_arguments: Any) -> GenerationPoint:
        """The point of the conditioned policies at a budget.

        Args:
            exit_budget: wanted mean depth as a share of all layers, in (0, 1].
            exit_arguments: more of what `generate` takes, such as `min_exit_layer`.

        Raises:
            ValueError: the model has no fitted budgets, or the budget is out of range.
        """
        _, threshold = price_of_budget(self.model.config.exit_budgets, exit_budget)
        return self._measure("policy", threshold, {"exit_budget": exit_budget}, exit_arguments)

    def _measure(
        self, criterion: str, threshold: Thresholds | str, asked: dict[str, Any], more: dict[str, Any]
    ) -> GenerationPoint:
        if self.full_answers is None:
            self.full_depth()
        assert self.full_answers is not None
        settings = {**asked, **more}
        point, answers = self._point(criterion, threshold, settings)
        same = [one == other for one, other in zip(answers, self.full_answers, strict=True)]
        if self._decides_alike(settings):
            own = teacher_forced(
                self.model,
                self.prompts,
                self.full_answers,
                self.batch_size,
                self.pad,
                self._bar("Agreement"),
                **settings,
            )
            point.metrics["agreement"] = own.agreement
        point.metrics["identical"] = sum(same) / len(same)
        point.speeds = {str(size): self._speed(size, settings) for size in self.timing_batch_sizes}
        for speed in list(point.speeds.values())[:1]:
            point.wall_clock = speed.figure("speedup")
        return point

    def _decides_alike(self, settings: dict[str, Any]) -> bool:
        """Does known text leave where `generate` would? It copies exit states, and knows no time that thresholds could
        decay with."""
        kept = settings.get("skipped_kv") or self.model.config.skipped_kv
        decay = settings.get(
            "exit_threshold_decay", getattr(self.model.generation_config, "exit_threshold_decay", None)
        )
        return settings == FULL_DEPTH or (kept == "copy" and decay is None)

    def _point(
        self, criterion: str, threshold: Thresholds | str, settings: dict[str, Any]
    ) -> tuple[GenerationPoint, list[list[int]]]:
        tokens: list[list[int]] = [[] for _ in self.prompts]
        layers: list[int] = []
        lengths = [len(prompt) for prompt in self.prompts]
        with PeakMemory(self.model.device) as memory:
            for batch in self._bar("Answers")(similar_length_batches(range(len(lengths)), lengths, self.batch_size)):
                made = answer(
                    self.model, [self.prompts[row] for row in batch], self.max_new_tokens, self.pad, **settings
                )
                for row, (new, exits) in zip(batch, made.rows(), strict=True):
                    tokens[row] = new
                    layers += exits
        texts = self.decode(tokens)
        budget = settings.get("exit_budget")
        self.texts[criterion, str(threshold) if budget is None else f"budget {budget}"] = texts
        numbers = self.model.config.exit_layer_numbers
        figures = depth_figures(torch.tensor(layers), numbers[-1])
        point = GenerationPoint(
            criterion,
            plain(threshold),
            depth=figures["depth"],
            saved_layers=figures["saved_layers"],
            layer_speedup=figures["layer_speedup"],
            metrics={**self.text_metrics(texts, self.references), **self._perplexity(settings)},
            exit_histogram=exit_histogram(torch.tensor(layers), numbers),
            exit_budget=budget,
            peak_memory_mb=memory.peak_mb,
        )
        return point, tokens

    def _perplexity(self, settings: dict[str, Any]) -> dict[str, float]:
        """Perplexity of the references with exits; nothing if it was not asked for."""
        if not any(self.judged_answers) or not self._decides_alike(settings):
            return {}
        reference = teacher_forced(
            self.model,
            self.prompts,
            self.judged_answers,
            self.batch_size,
            self.pad,
            self._bar("Perplexity"),
            compare=False,
            **settings,
        )
        return {"perplexity": reference.perplexity}

    def _speed(self, batch_size: int, settings: dict[str, Any]) -> Speed:
        """Times the batches of `timed` prompts, exits and full depth in turn."""
        prompts = [self.prompts[row] for row in self.timed]
        batches = [prompts[at : at + batch_size] for at in range(0, len(prompts), batch_size)]
        bar = self._bar(f"Time, batch size {batch_size}")
        return measure_speed(self.model, batches, settings, self.max_new_tokens, self.pad, self.timer, bar)

    def _bar(self, name: str) -> Callable[[Any], Any]:
        return lambda batches: tqdm(batches, desc=name, disable=self.disable_tqdm, leave=False)


__all__ = ["GenerationBenchmark", "GenerationPoint"]
