# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Answers of a language model: generated, or known and fed token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from transformers_cee.evaluation.operating_points import FULL_DEPTH
from transformers_cee.stores.filling import similar_length_batches


@dataclass
class Answers:
    """Answers to a batch of prompts.

    Args:
        tokens (`LongTensor` of shape `(rows, new)`): new tokens, end-of-sequence included, padded.
        exit_layers (`LongTensor` of shape `(rows, new)`): their exit layers (1-based); 0 after a row has ended.
    """

    tokens: Tensor
    exit_layers: Tensor

    @property
    def count(self) -> int:
        """New tokens of all rows."""
        return int((self.exit_layers > 0).sum())

    def after_first(self) -> Answers:
        """Without the first token of each row, which always runs to the last layer."""
        return Answers(self.tokens[:, 1:], self.exit_layers[:, 1:])

    def rows(self) -> list[tuple[list[int], list[int]]]:
        """Tokens and exit layers of each row, without padding."""
        return [
            (
                [token for token, layer in zip(tokens, layers, strict=True) if layer],
                [layer for layer in layers if layer],
            )
            for tokens, layers in zip(self.tokens.tolist(), self.exit_layers.tolist(), strict=True)
        ]


def pad_left(rows: Sequence[Sequence[int]], pad: int, device: Any = "cpu") -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` (rows, time) with padding on the left, so that the last column is real."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    mask = torch.arange(longest, device=device) >= longest - lengths.unsqueeze(1)
    return {"input_ids": ids, "attention_mask": mask.long()}


@torch.inference_mode()
def answer(
    model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int, pad: int, **exit_arguments: Any
) -> Answers:
    """Greedy answers to a batch of prompts (token ids).

    Args:
        model: an early-exit language model in evaluation mode.
        prompts: token ids; rows of different length are padded on the left.
        max_new_tokens: longest answer.
        pad: token id of padding.
        exit_arguments: `exit_threshold`, `exit_criterion` and others that `generate` takes.
    """
    batch = pad_left(prompts, pad, model.device)
    output = model.generate(
        **batch,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=pad,
        return_dict_in_generate=True,
        **exit_arguments,
    )
    tokens = output.sequences[:, batch["input_ids"].shape[1] :]
    return Answers(tokens.cpu(), output.exit_layers.cpu())


@dataclass
class TeacherForced:
    """Results of sequences that were given.

    Args:
        loss (`float`): cross-entropy in nats, summed over the answers' tokens.
        tokens (`int`): how many tokens that is.
        matches (`int`): tokens that the exit taken would have chosen, without the first of each answer.
        decided (`int`): how many tokens that is.
    """

    loss: float = 0.0
    tokens: int = 0
    matches: int = 0
    decided: int = 0

    @property
    def perplexity(self) -> float:
        return float(torch.tensor(self.loss / self.tokens, dtype=torch.float64).exp()) if self.tokens else float("nan")

    @property
    def agreement(self) -> float:
        return self.matches / self.decided if self.decided else float("nan")


@torch.inference_mode()
def teacher_forced(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    batch_size: int,
    pad: int,
    progress: Callable[[Any], Any] = iter,
    compare: bool = True,
    **exit_arguments: Any,
) -> TeacherForced:
    """Feeds prompts and answers (token ids); every token of an answer leaves where the criterion says.

    Exit states are copied to deeper layers as generation does, prompts run at full depth.

    Args:
        model: an early-exit language model.
        prompts, answers: token ids, row by row; rows without an answer do not count.
        batch_size: rows at a time.
        pad: token id of padding.
        progress: wraps the batches, for a progress bar.
        compare: also count tokens that the exits would have chosen, which needs the logits of the answers.
        exit_arguments: `exit_threshold` and `exit_criterion`.
    """
    result = TeacherForced()
    rows = [index for index, tokens in enumerate(answers) if tokens]
    for batch in progress(
        similar_length_batches(rows, [len(prompts[row]) + len(answers[row]) for row in rows], batch_size)
    ):
        inputs = pad_left([[*prompts[row], *answers[row]] for row in batch], pad, model.device)
        lengths = torch.tensor([len(answers[row]) for row in batch], device=model.device)
        longest, time_steps = int(lengths.max()), inputs["input_ids"].shape[1]
        column = torch.arange(time_steps, device=model.device)
        is_answer = column >= time_steps - lengths.unsqueeze(1)
        labels = torch.where(is_answer, inputs["input_ids"], -100)
        output = model(**inputs, labels=labels, logits_to_keep=longest + 1 if compare else 1, **exit_arguments)
        count = int(lengths.sum())
        result.loss += float(output.loss) * count
        result.tokens += count
        if not compare:
            continue
        chosen = output.logits[:, -longest - 1 : -1].argmax(-1)
        decided = is_answer & (column > time_steps - lengths.unsqueeze(1))
        right = (chosen == inputs["input_ids"][:, -longest:]) & decided[:, -longest:]
        result.matches += int(right.sum())
        result.decided += int(decided.sum())
    return result


__all__ = [
    "FULL_DEPTH",
    "Answers",
    "TeacherForced",
    "answer",
    "pad_left",
    "teacher_forced",
]
