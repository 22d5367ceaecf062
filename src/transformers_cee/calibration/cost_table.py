# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Measured seconds of one engine on one machine: what layers, checks at exits and dropping rows take.

A table holds a few measured batches. Between them costs are piecewise linear in rows, then in tokens. Beyond them:

- 0 rows take nothing, and below 1 row costs are proportional: that is the chance that a row is there.
- Fewer rows than the smallest measured batch, or fewer tokens than the shortest, take what that one took: nothing is
  saved that was not measured.
- More rows than the largest measured batch, or more tokens than the longest, cost in proportion: all parts keep the
  shares that they were measured with.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from transformers_cee.exits.fields import (
    MAX_LAYERS,
    MAX_SIZE,
    Kind,
    check_field,
    check_fields,
    is_number,
    is_whole,
    mapping,
    number,
    shown,
    text,
    whole,
)
from transformers_cee.exits.numbers import plain
from transformers_cee.exits.numbers import whole as without_point
from transformers_cee.files import read_json, write_json


# Longer times than a day are no measurements; sums of shorter ones stay finite.
MAX_SECONDS = 86_400.0
_seconds = number(0, MAX_SECONDS)
_by_layer = Kind(
    lambda value: (
        isinstance(value, dict)
        and 0 < len(value) <= MAX_LAYERS
        and all(is_whole(layer) and 1 <= layer <= MAX_LAYERS for layer in value)
        and all(is_number(seconds) and 0 <= seconds <= MAX_SECONDS for seconds in value.values())
    ),
    f"seconds in 0..{MAX_SECONDS:g} by number of the layer (1-based)",
)
_LAYER = re.compile("[1-9][0-9]{0,4}")
_BATCH_FIELDS = {
    "batch_size": whole(1),
    "length": whole(1),
    "layer_seconds": _by_layer,
    "block_seconds": _seconds,
    "check_seconds": _by_layer,
    "compaction_seconds": _seconds,
    "walk_seconds": _seconds,
}
# Tables of before have none.
_NEEDED = [name for name in _BATCH_FIELDS if name != "walk_seconds"]
_rows, _length = number(0, MAX_SIZE), number(0, MAX_SIZE, above=True)
_TABLE_FIELDS = {
    "engine": text,
    "precision": text,
    "processor": text,
    "threads": whole(1),
    "batches": Kind(lambda value: isinstance(value, list | tuple) and len(value) > 0, "a list of measured batches"),
}


@dataclass(frozen=True, eq=False)
class MeasuredBatch:
    """Seconds that a batch of one size takes.

    Args:
        batch_size (`int`): rows; of a decoder's step, tokens that are computed at once.
        length (`int`): tokens of a row; of a decoder's step, keys that a token attends to; of images, pixels a side.
        layer_seconds (`dict[int, float]`): of each layer 1..L as a part of a longer block, by its number.
        block_seconds (`float`): what a block of layers that runs as one takes beside its layers.
        check_seconds (`dict[int, float]`):
            By the exit's layer: head, exit criterion, decision and the wait for it. That of layer L is the last head
            alone, which full depth takes, too.
        compaction_seconds (`float`): of keeping so many rows of a larger batch.
        walk_seconds (`float`, *optional*, defaults to 0):
            What asking any exit takes, beside blocks and checks: bookkeeping for rows that may leave.

    Raises:
        ValueError: a field that is not of its kind, layers that are not 1..L, or an exit at none of them.
    """

    batch_size: int
    length: int
    layer_seconds: Mapping[int, float]
    block_seconds: float
    check_seconds: Mapping[int, float]
    compaction_seconds: float
    walk_seconds: float = 0.0

    def __post_init__(self) -> None:
        for name in _BATCH_FIELDS:
            value = getattr(self, name)
            if isinstance(value, Mapping):
                value = {without_point(layer): plain(seconds) for layer, seconds in value.items()}
            else:
                value = without_point(value) if name in ("batch_size", "length") else plain(value)
            object.__setattr__(self, name, value)
        _check_measured(vars(self), "MeasuredBatch")

    @classmethod
    def from_dict(cls, values: Any, where: str = "MeasuredBatch") -> MeasuredBatch:
        """Back from a dictionary out of JSON, whose layers are texts. Raises `ValueError` as the table's."""
        check_field(where, values, mapping)
        numbered: dict[str, Any] = {
            name: _numbered(value) if isinstance(value, dict) and name in ("layer_seconds", "check_seconds") else value
            for name, value in values.items()
        }
        _check_measured(numbered, where)
        return cls(**numbered)


def _check_measured(values: dict[str, Any], where: str) -> None:
    """Raises `ValueError` unless these are the fields of a measured batch."""
    check_fields(values, _BATCH_FIELDS, _NEEDED, where)
    layers, exits = sorted(values["layer_seconds"]), sorted(values["check_seconds"])
    if layers[-1] != len(layers):
        raise ValueError(f"`{where}.layer_seconds` has the layers {shown(layers)}; accepted are all of 1..L.")
    if exits[-1] != layers[-1]:
        raise ValueError(
            f"`{where}.check_seconds` has the layers {shown(exits)}; accepted are layers of 1..{layers[-1]}, the last "
            f"one included."
        )


def _numbered(by_layer: dict[str, Any]) -> dict[Any, Any]:
    """The same with numbers as keys, where a text is one as JSON has it."""
    return {int(key) if _LAYER.fullmatch(key) else key: value for key, value in by_layer.items()}


@dataclass(frozen=True)
class BatchCosts:
    """Seconds with 0..B rows of one length.

    Args:
        layers (array of shape `(B + 1, L + 1)`): of layers 1..l together, in column l.
        block, compaction, walk (arrays of shape `(B + 1,)`): of one block beside its layers; of keeping so many rows;
            of asking any exit.
        checks (`dict[int, array]` of shape `(B + 1,)`): of a check, by the exit's layer.
    """

    layers: np.ndarray
    block: np.ndarray
    compaction: np.ndarray
    walk: np.ndarray
    checks: dict[int, np.ndarray]


@dataclass(frozen=True, eq=False)
class CostTable:
    """Measured seconds of one engine on one machine, see this file's head for what lies between and beyond batches.

    Args:
        engine (`str`): what was measured, as `"torch"`.
        precision (`str`): of its numbers, as `"float32"`.
        processor (`str`): name of the processor.
        threads (`int`): that the engine used.
        batches (list of `MeasuredBatch`): at least one; each length may have batch sizes of its own.

    Raises:
        ValueError: a field that is not of its kind, batches of different models, or one that is there twice.
    """

    engine: str
    precision: str
    processor: str
    threads: int
    batches: Sequence[MeasuredBatch]
    # By length, batch sizes and what they take (batches, columns); lengths ascend.
    _lengths: np.ndarray = field(init=False, repr=False)
    _measured: list[tuple[np.ndarray, np.ndarray]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name, kind in _TABLE_FIELDS.items():
            check_field(f"CostTable.{name}", getattr(self, name), kind)
        for place, batch in enumerate(self.batches):
            if not isinstance(batch, MeasuredBatch):
                raise ValueError(f"`CostTable.batches[{place}]`={shown(batch)} must be a `MeasuredBatch`.")
        batches = sorted(self.batches, key=lambda batch: (batch.length, batch.batch_size))
        first = batches[0]
        for batch in batches:
            for name in ("layer_seconds", "check_seconds"):
                if getattr(batch, name).keys() != getattr(first, name).keys():
                    raise ValueError(
                        f"`CostTable.batches`: {name} of the batch {batch.batch_size} × {batch.length} have other "
                        f"layers than those of {first.batch_size} × {first.length}; accepted are batches of one model."
                    )
        sizes = [(batch.length, batch.batch_size) for batch in batches]
        twice = sorted({size for size in sizes if sizes.count(size) > 1})
        if twice:
            raise ValueError(f"`CostTable.batches` has {twice[0][1]} × {twice[0][0]} more than once.")
        lengths = sorted({batch.length for batch in batches})
        measured = []
        for length in lengths:
            same = [batch for batch in batches if batch.length == length]
            rows = np.array([batch.batch_size for batch in same], dtype=float)
            measured.append((rows, np.array([self._columns(batch) for batch in same])))
        object.__setattr__(self, "batches", tuple(batches))
        object.__setattr__(self, "_lengths", np.array(lengths, dtype=float))
        object.__setattr__(self, "_measured", measured)

    @property
    def num_layers(self) -> int:
        return len(self.batches[0].layer_seconds)

    @property
    def exit_layers(self) -> list[int]:
        """Layers (1-based, ascending) whose checks were measured, the last layer included."""
        return sorted(self.batches[0].check_seconds)

    def _columns(self, batch: MeasuredBatch) -> list[float]:
        layers = np.cumsum([batch.layer_seconds[layer] for layer in range(1, self.num_layers + 1)])
        checks = [batch.check_seconds[layer] for layer in self.exit_layers]
        return [batch.block_seconds, batch.compaction_seconds, batch.walk_seconds, 0.0, *layers, *checks]

    def _between(self, rows: np.ndarray, length: float) -> np.ndarray:
        """Columns (len(rows), columns) for numbers of rows and one length."""
        shares = _shares(self._lengths, np.array([length]))[0]
        total = np.zeros((len(rows), self._measured[0][1].shape[1]))
        for share, (sizes, columns) in zip(shares, self._measured, strict=True):
            if share:
                total += share * (_shares(sizes, rows) * np.minimum(rows, 1.0)[:, None]) @ columns
        return total

    def at(self, batch_size: int, length: float) -> BatchCosts:
        """Seconds with every number of rows up to a batch size.

        Raises:
            ValueError: a batch size that is no whole number of at least 1, or a length that is not above 0.
        """
        check_batch(batch_size, length)
        return self._at(int(without_point(batch_size)), float(plain(length)))

    # Serving asks for the same few sizes again and again; a table lives as long as its process.
    @lru_cache(maxsize=256)  # noqa: B019
    def _at(self, batch_size: int, length: float) -> BatchCosts:
        columns = self._between(np.arange(batch_size + 1, dtype=float), length)
        columns.flags.writeable = False
        first_check = self.num_layers + 4
        checks = {layer: columns[:, first_check + place] for place, layer in enumerate(self.exit_layers)}
        return BatchCosts(columns[:, 3:first_check], columns[:, 0], columns[:, 1], columns[:, 2], checks)

    def cost(self, rows: float, length: float, start: int, stop: int) -> float:
        """Seconds of layers start + 1..stop as one block.

        Args:
            rows (`float`): of the batch, or how many of them are expected to be left.
            length (`float`): tokens of a row.
            start (`int`): layer (1-based) that ran last before, 0 at the beginning.
            stop (`int`): last layer (1-based) of the block.

        Raises:
            ValueError: rows below 0, a length that is not above 0, or layers that are not 0 ≤ start < stop ≤ L.
        """
        check_field("rows", plain(rows), _rows)
        check_field("length", plain(length), _length)
        if not (is_whole(start) and is_whole(stop) and 0 <= start < stop <= self.num_layers):
            raise ValueError(
                f"`start`={shown(start)} and `stop`={shown(stop)} must be layers with 0 <= start < stop <= "
                f"{self.num_layers}."
            )
        columns = self._between(np.array([float(plain(rows))]), float(plain(length)))[0]
        return float(columns[0] + columns[3 + stop] - columns[3 + start])

    def exit_costs(self, layers: Sequence[int], batch_size: int, length: float) -> list[float]:
        """Seconds per row of a batch that leaves as a whole at each of a model's exits and is checked on the way, what
        asking takes included: the `costs` of a budget.

        Args:
            layers (sequence of `int`): layers (1-based, ascending) of the exits, the last one included.

        Raises:
            ValueError: exits that the table does not know, or as `at`.
        """
        layers = [int(layer) for layer in plain(layers)]
        self.check_layers(layers)
        costs = self.at(batch_size, length)
        blocks = [
            costs.block[-1] + costs.layers[-1, stop] - costs.layers[-1, start] + costs.checks[stop][-1]
            for start, stop in zip([0, *layers[:-1]], layers, strict=True)
        ]
        asking = costs.walk[-1] if len(layers) > 1 else 0.0
        return [float(seconds + asking) / int(without_point(batch_size)) for seconds in np.cumsum(blocks)]

    def check_layers(self, layers: Sequence[int]) -> None:
        """Raises `ValueError` unless the table has checks at all of some exits (layers, 1-based), of which the last
        is the table's last layer."""
        missing = sorted({*layers} - {*self.exit_layers})
        if missing or list(layers)[-1] != self.num_layers:
            raise ValueError(
                f"`costs` has checks at layers {self.exit_layers} of {self.num_layers}; needed are exits at layers "
                f"{list(layers)}, the last layer included."
            )

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for JSON."""
        kept = {name: getattr(self, name) for name in _TABLE_FIELDS}
        batches = []
        for batch in self.batches:
            values = asdict(batch)
            for name in ("layer_seconds", "check_seconds"):
                values[name] = {str(layer): seconds for layer, seconds in sorted(values[name].items())}
            batches.append(values)
        return {**kept, "batches": batches}

    @classmethod
    def from_dict(cls, values: Any) -> CostTable:
        """Back from `to_dict`.

        Raises:
            ValueError: fields that are missing, unknown or not of their kind; the message names the field.
        """
        check_field("CostTable", values, mapping)
        check_fields(values, _TABLE_FIELDS, _TABLE_FIELDS, "CostTable")
        batches = [
            MeasuredBatch.from_dict(batch, f"CostTable.batches[{place}]")
            for place, batch in enumerate(values["batches"])
        ]
        return cls(**{**values, "batches": batches})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Replaces a JSON file by the table."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CostTable:
        """Reads a table that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: no JSON, or as `from_dict`.
        """
        return cls.from_dict(read_json(path, "Measure the costs again."))


def check_batch(batch_size: Any, length: Any) -> None:
    """Raises `ValueError` unless these are the size of a batch and its length."""
    check_field("batch_size", without_point(batch_size), _BATCH_FIELDS["batch_size"])
    check_field("length", plain(length), _length)


def _shares(points: np.ndarray, at: np.ndarray) -> np.ndarray:
    """What each measured point counts (len(at), points) at some places: linear between two of them, the first one
    below, the last one in proportion above."""
    inside = np.clip(at, points[0], points[-1])
    right = np.clip(np.searchsorted(points, inside), 1, max(len(points) - 1, 1))
    shares = np.zeros((len(at), len(points)))
    numbers = np.arange(len(at))
    if len(points) == 1:
        shares[:, 0] = 1.0
    else:
        low, high = points[right - 1], points[right]
        shares[numbers, right] = (inside - low) / (high - low)
        shares[numbers, right - 1] = 1 - shares[numbers, right]
    return shares * np.maximum(at / points[-1], 1.0)[:, None]


__all__ = ["BatchCosts", "CostTable", "MeasuredBatch", "check_batch"]
