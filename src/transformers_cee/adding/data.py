# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Texts of which exits learn, and those that their promise is certified on."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers.utils import logging

from transformers_cee.bulk.texts import find_texts
from transformers_cee.tokenizing import longest_text


logger = logging.get_logger(__name__)

# Half of all texts certify, the others are learned from; more than these make hardly a difference.
MOST_CERTIFYING, MOST_LEARNING = 10_000, 20_000
# Fewer texts to learn from say nothing.
FEWEST_TEXTS = 40


@dataclass
class TextsToLearn:
    """Tokenised texts, cut in two at random.

    Args:
        rows (`Dataset`): token ids, in the order of the texts.
        labels (`LongTensor` of shape `(rows,)`, *optional*): true classes, where they are given.
        learning, certifying (`LongTensor`): numbers of the rows of either half.
    """

    rows: Dataset
    labels: Tensor | None
    learning: Tensor
    certifying: Tensor


@dataclass
class GivenTexts:
    """Texts as they were given, or as many of them as were drawn, in their order.

    Args:
        texts (`list[str]`): the texts.
        numbers (`list[int]`): which of all texts they are, from 1.
        labels (`list`, *optional*): what stands in the column of their labels.
    """

    texts: list[str]
    numbers: list[int]
    labels: list[Any] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def place(self, row: int) -> str:
        """Where one of them (0-based) stands, in words that begin a sentence."""
        return f"Row {self.numbers[row]} of `texts`"


def read_texts(texts: Any, text_column: str, label_column: str | None, most: int, seed: int) -> GivenTexts:
    """Texts, of more than `most` as many drawn at random, and their labels as they are written.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: no texts.
        ValueError: a row without text, a missing column, or too few texts to learn from.
    """
    kept: list[tuple[int, str]] = []
    draws, total = random.Random(seed), 0
    for text in find_texts(texts, text_column).checked(takes_blanks=False):
        total += 1
        if total <= most:
            kept.append((total, text))
        # The next text is one of the drawn with the chance that all before it have (Vitter 1985, algorithm R).
        elif (place := draws.randrange(total)) < most:
            kept[place] = (total, text)
    if total < FEWEST_TEXTS:
        raise ValueError(
            f"`texts` holds {total} texts; exits learn from at least {FEWEST_TEXTS}, better from thousands."
        )
    kept.sort()
    given = GivenTexts([text for _, text in kept], [number for number, _ in kept])
    if label_column is not None:
        given.labels = _labels(texts, label_column, given.numbers, total)
    return given


def _labels(texts: Any, label_column: str, numbers: list[int], total: int) -> list[Any]:
    """What stands in a column beside some of the texts."""
    is_file = isinstance(texts, (str, os.PathLike))
    if not hasattr(texts, "select_columns") and not (is_file and not os.fspath(texts).lower().endswith(".txt")):
        raise ValueError(f"`label_column`={label_column!r} is of a data set, or of a file with columns.")
    source = find_texts(texts, label_column, argument="label_column")
    if not source.is_lasting:
        raise ValueError(f"`label_column`={label_column!r}: `texts` is a stream, which is read once; store it first.")
    wanted, found, count = set(numbers), [], 0
    for _, label in source.read():
        count += 1
        if count in wanted:
            found.append(label)
    if count != total:
        raise ValueError(f"`label_column`={label_column!r} has {count} labels for {total} texts.")
    return found


def class_ids(given: GivenTexts, config: Any, label_column: str | None) -> Tensor | None:
    """Numbers of the model's classes (rows,) of labels that are names, or numbers, of classes; None without labels.

    Raises:
        ValueError: a label that is no class of the model, or a model that tells many labels per text.
    """
    labels = given.labels
    if labels is None:
        return None
    if config.problem_type == "multi_label_classification":
        raise ValueError(f"`label_column`={label_column!r}: the model tells many labels per text; accepted is None.")
    ids = {str(name): index for index, name in config.id2label.items()}
    # Numbers that are no texts count classes.
    are_numbers = all(isinstance(label, int) and not isinstance(label, bool) for label in labels)
    if are_numbers or ids.keys().isdisjoint(map(str, labels)):
        ids = {str(index): index for index in config.id2label}
    wrong = next((row for row, label in enumerate(labels) if str(label) not in ids), None)
    if wrong is not None:
        known = ", ".join(map(repr, config.id2label.values()))
        raise ValueError(f"{given.place(wrong)} has the label {labels[wrong]!r}; the model has {known}.")
    return torch.tensor([ids[str(label)] for label in labels])


def prepare(given: GivenTexts, labels: Tensor | None, tokenizer: Any, model: Any, seed: int) -> TextsToLearn:
    """Tokenises texts and cuts them in two at random.

    Raises:
        ValueError: a text of which the tokenizer makes no token.
    """
    order = torch.randperm(len(given), generator=torch.Generator().manual_seed(seed))
    certifying = min(len(given) // 2, MOST_CERTIFYING)
    made = tokenizer(given.texts, truncation=True, max_length=longest_text(model, tokenizer))
    rows = Dataset.from_dict({name: made[name] for name in tokenizer.model_input_names if name in made})
    empty = next((row for row, ids in enumerate(made["input_ids"]) if not ids), None)
    if empty is not None:
        text = given.texts[empty]
        raise ValueError(f"{given.place(empty)} is {text!r}, and the tokenizer makes no token of that.")
    certifies = torch.zeros(len(given), dtype=torch.bool)
    certifies[order[:certifying]] = True
    return TextsToLearn(rows, labels, *(half.nonzero().squeeze(1) for half in (~certifies, certifies)))


def say_too_few(certifying: int, levels: Iterable[float], risk: float, most: int) -> None:
    """Warns, before anything runs, of promises that so few texts certify in no case.

    Args:
        certifying (`int`): texts that certify.
        levels (iterable of `float`): promised agreements.
        risk (`float`): with which each may fail.
        most (`int`): texts that certify at most.
    """
    for level in levels:
        # Of texts without any disagreement.
        needed = math.ceil(math.log(risk) / math.log(level) - 1e-9)
        if certifying < needed:
            advice = "twice as many `texts` in all" if needed <= most else f"and {most} at most do"
            logger.warning(
                f"`agreement`={level:g} takes {needed} texts that certify, {advice}; there are {certifying}, so exits "
                "will be off at it."
            )
