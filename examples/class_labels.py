# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What labels mean: from the cells of a file to classes, and from these to the classes that a checkpoint knows."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,18}")
# Whole numbers of a table that had a gap in their column, as pandas writes them.
WHOLE_FRACTION = re.compile(r"([+-]?[0-9]{1,18})\.0+")
# Names that say nothing but a position: Transformers' own, or the position itself.
POSITION = re.compile(r"(?:LABEL_)?([0-9]{1,9})")


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def whole_number(text: str) -> str:
    """`1.0` as `1`; other texts as they are."""
    match = WHOLE_FRACTION.fullmatch(text)
    return text if match is None else str(int(match[1]))


def label_text(path: Path, number: int, value: Any) -> str:
    """A label as text, without space around it.

    Raises:
        ValueError: there is none, it is no finite number, or it is an object.
    """
    text = "" if value is None else str(value).strip()
    if not text:
        raise ValueError(f"{path}: row {number} has no label ({value!r}); every row needs one.")
    if isinstance(value, list | dict) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"{path}: row {number} has the label {value!r:.80}; accepted are names and whole numbers.")
    # A whole number that went through a table of fractional ones.
    return str(int(value)) if isinstance(value, float) and value.is_integer() else text


def label_list(path: Path, number: int, value: Any) -> list[str]:
    """The labels of a row that may have several, or none.

    Raises:
        ValueError: it is no list, or holds one label twice, or one that `label_text` refuses.
    """
    if not isinstance(value, list):
        raise ValueError(
            f"{path}: row {number} has the label {value!r:.80}; other rows have lists of labels, so that it must be a "
            "list, too."
        )
    names = [label_text(path, number, one) for one in value]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: row {number} has a label twice: {value!r:.80}.")
    return names


def class_names(path: Path, labels: Sequence[tuple[int, Any]], column: str, multi_label: bool) -> list[str]:
    """The distinct labels, sorted: as numbers if all are whole numbers, as text otherwise.

    Args:
        path: the training file.
        labels: row numbers and the cells of the label column.
        column: name of that column.
        multi_label: do rows have lists of labels?
    """
    read = label_list if multi_label else label_text
    found = [read(path, number, value) for number, value in labels]
    names = {name for row in found for name in row} if multi_label else set(found)
    whole = {whole_number(name) for name in names}
    if all(WHOLE_NUMBER.fullmatch(name) for name in whole):
        names = whole
    if len(names) < 2:
        only = next(iter(names), "")
        raise ValueError(f"{path}: column {column!r} has only the label {only!r}; two classes are needed.")
    if all(WHOLE_NUMBER.fullmatch(name) for name in names):
        return sorted(names, key=int)
    if all(is_number(name) for name in names):
        raise ValueError(f"{path}: the labels in {column!r} are fractional numbers; `--regression` predicts such.")
    return sorted(names)


def class_id(path: Path, number: int, text: str, ids: dict[str, int]) -> int:
    """Class id of a label given by name or by number (GLUE uses both).

    Raises:
        ValueError: an unknown label; the message names file, row, label and what is accepted.
    """
    if text in ids:
        return ids[text]
    whole = whole_number(text)
    by_name = not all(WHOLE_NUMBER.fullmatch(name) for name in ids)
    if not by_name and whole in ids:
        return ids[whole]
    if by_name and WHOLE_NUMBER.fullmatch(whole) and 0 <= int(whole) < len(ids):
        return int(whole)
    raise ValueError(f"{path}: row {number} has the label {text!r}; accepted: {', '.join(ids)}.")


def target_value(path: Path, number: int, value: Any) -> float:
    """A number to predict.

    Raises:
        ValueError: no number, or one that a float32 cannot hold: infinite, or not a number at all.
    """
    text = "" if value is None else str(value).strip()
    if not is_number(text):
        raise ValueError(f"{path}: row {number} has the label {text!r}; accepted: a number.")
    if not bool(torch.tensor(float(text)).isfinite()):
        raise ValueError(f"{path}: row {number} has the label {text!r}; accepted are finite numbers (float32).")
    return float(text)


# A checkpoint's classes


@dataclass(frozen=True)
class LabelMatch:
    """How the classes of a corpus and those of a checkpoint go together.

    Args:
        names: classes of the model in the order of their ids; empty for regression.
        ids: id of each of the corpus' classes, in the corpus' order.
        is_new: do heads start anew, since the checkpoint's are for another number of classes?
        note: what a reader of the run should know, if anything.
    """

    names: list[str]
    ids: list[int]
    is_new: bool = False
    note: str | None = None


def match_labels(
    names: Sequence[str], problem_type: str, config: Any, trains: bool, replace_heads: bool
) -> LabelMatch:
    """Finds the classes of a corpus among those of a checkpoint, by name where names match.

    Args:
        names: classes of the corpus; empty for regression.
        problem_type: of the corpus.
        config: the checkpoint's config. What it says of labels counts where the checkpoint has a head for them.
        trains: are weights to be trained? Otherwise classes that the checkpoint does not know are refused.
        replace_heads: may heads for another number of classes be replaced (`--ignore_mismatched_sizes`)?

    Raises:
        ValueError: classes that the checkpoint does not know are to be evaluated, or heads would have to be replaced
            without leave.
    """
    own = LabelMatch(list(names), list(range(len(names))))
    if not _has_head(config):
        return own
    known = [config.id2label[index] for index in range(config.num_labels)]
    shown, wanted = (", ".join(labels) or "a number" for labels in (known if len(known) > 1 else (), names))
    known_type = "regression" if len(known) == 1 else config.problem_type
    if not trains and known_type not in (None, problem_type):
        raise ValueError(
            f"The checkpoint is for {known_type} ({shown}), the data for {problem_type} ({wanted}): there is nothing "
            "to evaluate. Pass `--do_train` to learn from the data."
        )
    found = _find(names, known)
    if found is not None:
        return LabelMatch(known, found, note=_note(names, known, found))
    if len(known) == max(1, len(names)):
        if not names:
            return own
        if not trains and not _all_positions(known):
            raise ValueError(
                f"The checkpoint knows the labels {shown}; those of the data are {wanted}: predictions cannot be "
                "compared with them. Rename the labels of the data, or pass `--do_train` to learn them."
            )
        note = f"labels of the checkpoint ({shown}) stand for those of the data ({wanted}) in this order."
        return LabelMatch(own.names, own.ids, note=note)
    if not trains:
        raise ValueError(
            f"The checkpoint knows {shown}; the data has {wanted}: there is nothing to evaluate. Pass `--do_train` to "
            "learn from the data."
        )
    if not replace_heads:
        raise ValueError(
            f"The checkpoint's heads are for {shown}, the data has {wanted}. Pass `--ignore_mismatched_sizes` to "
            "start the heads anew."
        )
    note = f"the checkpoint's heads were for {shown}: classifier and exit heads start anew, for {wanted}."
    return LabelMatch(own.names, own.ids, is_new=True, note=note)


def _has_head(config: Any) -> bool:
    """Does the checkpoint hold a classifier? A bare encoder has labels in its config, too."""
    return any(name.endswith(("ForSequenceClassification", "ForConsistentEE")) for name in config.architectures or ())


def _find(names: Sequence[str], known: Sequence[str]) -> list[int] | None:
    """Ids of all names among the known ones: as they are written, in other case, or as numbers of as many classes.
    Regression has no names, and positions as names tell nothing."""
    if not names or len(known) < 2:
        return None
    for key in (str, str.casefold):
        ids = {key(name.strip()): index for index, name in enumerate(known)}
        if len(ids) == len(known) and all(key(name) in ids for name in names):
            return [ids[key(name)] for name in names]
    is_numbered = list(names) == [str(number) for number in range(len(known))]
    return list(range(len(known))) if is_numbered and not _all_positions(known) else None


def _all_positions(names: Sequence[str]) -> bool:
    """Do the names tell nothing but their positions?"""
    matches = [POSITION.fullmatch(name) for name in names]
    return all(match is not None and int(match[1]) == index for index, match in enumerate(matches))


def _note(names: Sequence[str], known: Sequence[str], found: Sequence[int]) -> str | None:
    if list(names) == list(known):
        return None
    pairs = ", ".join(f"{name} → {known[index]} ({index})" for name, index in zip(names, found, strict=True))
    return f"labels are the checkpoint's ({', '.join(known)}); those of the data: {pairs}."


__all__ = ["LabelMatch", "class_id", "class_names", "label_list", "label_text", "match_labels", "target_value"]
