# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Texts of which exits learn, and those that their promise is certified on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from transformers_cee.bulk.texts import find_texts
from transformers_cee.tokenizing import longest_text


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


def read_texts(texts: Any, text_column: str, label_column: str | None) -> tuple[list[str], list[Any] | None]:
    """Texts, and their labels as they are written.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: no texts.
        ValueError: a row without text, a missing column, or too few texts to learn from.
    """
    found = list(find_texts(texts, text_column).checked(takes_blanks=False))
    if len(found) < FEWEST_TEXTS:
        raise ValueError(
            f"`texts` holds {len(found)} texts; exits learn from at least {FEWEST_TEXTS}, better from thousands."
        )
    return found, None if label_column is None else _labels(texts, label_column, len(found))


def _labels(texts: Any, label_column: str, rows: int) -> list[Any]:
    """What stands in a column beside the texts."""
    is_file = isinstance(texts, (str, os.PathLike))
    if not hasattr(texts, "select_columns") and not (is_file and not os.fspath(texts).lower().endswith(".txt")):
        raise ValueError(f"`label_column`={label_column!r} is of a data set, or of a file with columns.")
    try:
        source = find_texts(texts, label_column)
        if not source.is_lasting:
            raise ValueError(
                f"`label_column`={label_column!r}: `texts` is a stream, which is read once; store it first."
            )
        labels = [label for _, label in source.read()]
    except ValueError as error:
        raise ValueError(str(error).replace("`text_column`", "`label_column`")) from error
    if len(labels) != rows:
        raise ValueError(f"`label_column`={label_column!r} has {len(labels)} labels for {rows} texts.")
    return labels


def class_ids(labels: list[Any], config: Any, label_column: str | None) -> Tensor:
    """Numbers of the model's classes (rows,) of labels that are names, or numbers, of classes.

    Raises:
        ValueError: a label that is no class of the model, or a model that tells many labels per text.
    """
    if config.problem_type == "multi_label_classification":
        raise ValueError(f"`label_column`={label_column!r}: the model tells many labels per text; accepted is None.")
    ids = {str(name): index for index, name in config.id2label.items()}
    # Numbers that are no texts count classes.
    are_numbers = all(isinstance(label, int) and not isinstance(label, bool) for label in labels)
    if are_numbers or ids.keys().isdisjoint(map(str, labels)):
        ids = {str(index): index for index in config.id2label}
    wrong = next((number for number, label in enumerate(labels, start=1) if str(label) not in ids), None)
    if wrong is not None:
        known = ", ".join(map(repr, config.id2label.values()))
        raise ValueError(f"Row {wrong} of `texts` has the label {labels[wrong - 1]!r}; the model has {known}.")
    return torch.tensor([ids[str(label)] for label in labels])


def prepare(texts: list[str], labels: Tensor | None, tokenizer: Any, model: Any, seed: int) -> TextsToLearn:
    """Tokenises texts and cuts them in two at random.

    Raises:
        ValueError: a text of which the tokenizer makes no token.
    """
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    certifying = min(len(texts) // 2, MOST_CERTIFYING)
    drawn = order[: certifying + MOST_LEARNING].sort().values
    made = tokenizer(
        [texts[row] for row in drawn.tolist()], truncation=True, max_length=longest_text(model, tokenizer)
    )
    rows = Dataset.from_dict({name: made[name] for name in tokenizer.model_input_names if name in made})
    empty = next((number for number, ids in enumerate(made["input_ids"]) if not ids), None)
    if empty is not None:
        text = texts[int(drawn[empty])]
        raise ValueError(f"The tokenizer makes no token of row {int(drawn[empty]) + 1} of `texts`: {text!r}.")
    certifies = torch.isin(drawn, order[:certifying])
    halves = [half.nonzero().squeeze(1) for half in (~certifies, certifies)]
    return TextsToLearn(rows, None if labels is None else labels[drawn], *halves)
