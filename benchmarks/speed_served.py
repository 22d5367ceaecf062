# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What `speed_tasks.py` times: rows, a model on an engine with its exits, and the exits chosen of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorWithPadding

from transformers_cee.calibration.exit_choice import ExitChoice
from transformers_cee.calibration.points import CalibratedPoint, calibrated_point
from transformers_cee.calibration.scores import ExitScores, score_store
from transformers_cee.engines.serving import of_layers, rates_of, subset
from transformers_cee.stores.filling import length_sorted_batches
from transformers_cee.stores.store import ExitStore


# Thresholds that are tried for an agreement, evenly ranked.
TRIED = 1024


@dataclass
class Data:
    """Tokenised rows of dev and test, texts for scales, and what makes batches."""

    dev: Any
    test: Any
    texts: list[str]
    tokenizer: Any

    def batches(self, rows: Any, size: int) -> list[dict[str, Tensor]]:
        """Padded batches of similar length, with labels."""
        collate = DataCollatorWithPadding(self.tokenizer)
        return [dict(collate([rows[row] for row in some])) for some in length_sorted_batches(rows, size)]

    def length(self) -> float:
        """Median number of tokens of a row of dev."""
        return float(torch.tensor([float(len(ids)) for ids in self.dev["input_ids"]]).median())


@dataclass
class Served:
    """A model on an engine, and its exits on dev and test.

    Args:
        export: exports the model with a criterion in its graphs.
        model: exported with the first criterion.
        dev, test: its exits, which all criteria are asked of.
    """

    name: str
    export: Callable[[str], Any]
    model: Any
    dev: ExitStore
    test: ExitStore

    def with_criterion(self, criterion: str) -> Any:
        """The exported model with a criterion in its graphs."""
        if criterion == self.model.record["criterion"]:
            return self.model
        made = self.export(criterion)
        made.costs, made.rates = self.model.costs, rates_of(made, self.dev)
        return made

    def scores(
        self, criterion: str, layers: Sequence[int] | None = None, store: ExitStore | None = None
    ) -> ExitScores:
        """Scores of dev, or of another store; of some exits alone as they are when only these are asked."""
        store = self.dev if store is None else store
        if layers is None:
            return score_store(store, criterion, self.model)
        return score_store(subset(store, self.places(layers)), criterion, of_layers(self.model, layers))

    def places(self, layers: Sequence[int]) -> Tensor:
        """Where exits stand among all of them."""
        known = self.dev.layers.tolist()
        return torch.tensor([known.index(layer) for layer in layers])


@dataclass
class Chosen:
    """The exits of one engine and batch size."""

    criterion: str
    choice: ExitChoice


def accuracy_of(store: ExitStore, taken: Tensor | None = None) -> float:
    """Accuracy at exits (rows,), or at the last one."""
    correct = store.correct
    return float((correct[:, -1] if taken is None else correct.gather(1, taken[:, None])).float().mean())


def share_as_full(scores: ExitScores, taken: Tensor) -> float:
    """Share of rows that are answered at their exits (rows,) as at full depth."""
    return 1 - float(scores.disagrees.gather(1, taken.unsqueeze(1)).float().mean())


def agreement_of(scores: ExitScores, point: CalibratedPoint) -> float:
    """Share of rows that are answered as at full depth."""
    return share_as_full(scores, point.taken_exits(scores))


def agreement_on(served: Served, chosen: Chosen) -> float:
    """Share of rows of dev that the exits chosen answer as full depth does."""
    return agreement_of(served.scores(chosen.criterion, chosen.choice.exit_layers), chosen.choice.point)


def boldest(scores: ExitScores, agreement: float) -> CalibratedPoint:
    """The lowest threshold, one for all exits, with which so large a share of these rows is answered as at full
    depth; nothing is promised."""
    values = scores.oriented.flatten().unique()
    values = values[torch.linspace(0, len(values) - 1, min(len(values), TRIED)).round().long()].tolist()
    for value in values:
        shared = [value] * (scores.num_exits - 1)
        point = calibrated_point(scores, shared, "agreement", {"epsilon": 1 - agreement}, "measured")
        if agreement_of(scores, point) >= agreement:
            break
    return point
