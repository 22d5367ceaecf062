# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Which of a model's exits to ask at all, for given thresholds, at the size of the batch that is served."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from transformers_cee.calibration.cost_table import CostTable, check_batch
from transformers_cee.calibration.exit_subsets import expected_seconds, find_exits, prefixes
from transformers_cee.calibration.scores import ExitScores
from transformers_cee.exits.criteria import CRITERIA, Thresholds, check_thresholds
from transformers_cee.files import replacing


# A model keeps about so many bytes of scores: 2,083 rows at 12 exits.
MAX_BYTES = 100_000


@dataclass(frozen=True, eq=False)
class ExitRates:
    """How many rows come past each exit, whatever the thresholds: scores of held-out rows that a model keeps.

    Args:
        criterion (`str`): exit criterion that the scores belong to.
        scores (`Tensor` of shape `(rows, exits − 1)`): its scores at all internal exits, float32.
        layers (`LongTensor` of shape `(exits,)`): 1-based layer of each exit.
        has_memory (`bool`): do scores depend on which exits were asked before?
        alpha (`float`, *optional*): price of one layer that the scores' policies were asked for.

    Raises:
        ValueError: an unknown criterion, shapes that do not fit, no rows, layers that do not rise, or a score that is
            not a number.
    """

    criterion: str
    scores: Tensor
    layers: Tensor
    has_memory: bool = False
    alpha: float | None = None

    def __post_init__(self) -> None:
        CRITERIA.find(self.criterion, "criterion")
        if self.scores.dim() != 2 or not len(self.scores) or self.layers.shape != (self.scores.shape[1] + 1,):
            raise ValueError(
                f"`scores` of shape {tuple(self.scores.shape)} must be (rows, exits − 1), rows above 0, with `layers` "
                f"of shape (exits,); got {tuple(self.layers.shape)}."
            )
        if self.layers.is_floating_point() or not bool((self.layers.diff(prepend=torch.zeros(1)) > 0).all()):
            raise ValueError(f"`layers`={self.layers.tolist()} must be rising numbers of layers from 1.")
        if bool(self.scores.isnan().any()):
            raise ValueError("`scores` contains NaN; accepted are numbers.")

    @classmethod
    def of(cls, scores: ExitScores, seed: int = 0) -> ExitRates:
        """Rates of held-out rows: of all, or of as many as fit into 100 kB, drawn with a seed."""
        rows = min(len(scores), max(1, MAX_BYTES // (4 * max(1, scores.num_exits - 1))))
        drawn = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed))[:rows].sort().values
        kept = scores.scores[drawn].float().contiguous()
        return cls(scores.criterion, kept, scores.layers, bool(scores.has_memory), scores.alpha)

    def leaves(self, thresholds: Thresholds) -> Tensor:
        """Would each row leave at each internal exit, were it asked there? (rows, exits − 1), for an `exit_threshold`
        as a model takes it."""
        limits = check_thresholds(self.criterion, thresholds, len(self.layers))
        passes = CRITERIA[self.criterion].passes
        columns = [passes(self.scores[:, index], limits[index]) for index in range(len(limits) - 1)]
        return torch.stack(columns, dim=1) if columns else torch.zeros(len(self.scores), 0, dtype=torch.bool)

    def survivors(self, thresholds: Thresholds) -> dict[int, float]:
        """Share of the rows that come past each internal exit, by its layer, when all of them are asked."""
        stays = (~self.leaves(thresholds)).int().cumprod(1).double().mean(0)
        return dict(zip(self.layers[:-1].tolist(), stays.tolist(), strict=True))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Replaces a safetensors file by the rates."""
        about = {"criterion": self.criterion, "has_memory": str(self.has_memory), "alpha": str(self.alpha)}
        with replacing(path) as beside:
            save_file({"scores": self.scores, "layers": self.layers.contiguous()}, beside, metadata=about)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ExitRates:
        """Reads rates that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, or holds something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                about, tensors = file.metadata(), {name: file.get_tensor(name) for name in ("scores", "layers")}
            has_memory = {"True": True, "False": False}[about["has_memory"]]
            alpha = None if about["alpha"] == "None" else float(about["alpha"])
            return cls(about["criterion"], **tensors, has_memory=has_memory, alpha=alpha)
        except (SafetensorError, TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)} is damaged, or holds no rates of exits ({error}).") from error


@lru_cache(maxsize=256)
def rates_at(rates: tuple[ExitRates, ...], alpha: float) -> ExitRates:
    """Rates at a price of a layer, from those of the same rows at some prices: between two of them scores are linear
    in the logarithm of the price, beyond them as at the nearest.

    Args:
        rates (tuple of `ExitRates`): by rising price, at least one.
    """
    upper = next((place for place, one in enumerate(rates) if (one.alpha or 0.0) >= alpha), len(rates) - 1)
    lower = max(0, upper - 1)
    low, high = rates[lower].alpha or alpha, rates[upper].alpha or alpha
    if upper == lower or alpha >= high:
        return rates[upper]
    share = math.log(alpha / low) / math.log(high / low)
    return replace(rates[lower], scores=torch.lerp(rates[lower].scores, rates[upper].scores, share), alpha=alpha)


@dataclass(frozen=True)
class ExitPlan:
    """Which exits to ask for batches of one size.

    Args:
        exit_layers (`tuple[int, ...]`): layers (1-based, ascending) of the internal exits to ask; empty where none
            pays.
        seconds (`float`): expected, of one batch; never more than without exits.
        full_seconds (`float`): without exits.
        in_vain (`float`): what these exits take beyond that where nobody leaves at them.
        is_exact (`bool`): is no other subset of the exits expected to take less?
    """

    exit_layers: tuple[int, ...]
    seconds: float
    full_seconds: float
    in_vain: float
    is_exact: bool


def plan_exits(rates: ExitRates, thresholds: Thresholds, costs: CostTable, batch_size: int, length: float) -> ExitPlan:
    """Which exits to ask, so that a batch takes the least expected time.

    Exits that are not asked are passed without a look, so that rows leave later, elsewhere. A promise that must hold
    then, too, is made by `choose_exits`. A criterion with memory has to be asked at every exit up to the last one that
    counts, or its scores are others: it is planned so. The same question is answered from memory.

    Args:
        rates (`ExitRates`): of the model's exits.
        thresholds (`float` or sequence of `float`): one number for all exits or one per exit, as `exit_threshold`.
        costs (`CostTable`): of the engine and machine that serve.
        batch_size (`int`): rows of the batch.
        length (`float`): tokens of a row.

    Raises:
        ValueError: thresholds that the criterion does not accept, costs without one of the exits, a batch size that is
            no whole number of at least 1, or a length that is not above 0.
    """
    limits = tuple(check_thresholds(rates.criterion, thresholds, len(rates.layers)))
    check_batch(batch_size, length)
    return known_plan(rates, limits, costs, int(batch_size), float(length))


# Each entry keeps the rates and costs alive that it was made of: those of models that serve.
@lru_cache(maxsize=4096)
def known_plan(
    rates: ExitRates, limits: tuple[float, ...], costs: CostTable, batch_size: int, length: float
) -> ExitPlan:
    """`plan_exits` without a look at its arguments, for whoever serves: one threshold per exit."""
    layers = rates.layers.tolist()
    costs.check_layers(layers)
    leaves = _leaves(rates, limits)
    seconds = expected_seconds(costs.at(batch_size, length), layers, len(leaves))
    subsets = prefixes(leaves.shape[1]) if rates.has_memory else None
    found = find_exits(leaves, np.array([0.5]), seconds, subsets=subsets)
    nobody = float(seconds.of_exits(found.exits, [np.array(len(leaves))] * len(found.exits)))
    exits = tuple(layers[index] for index in found.exits)
    return ExitPlan(exits, found.seconds, seconds.full, nobody - seconds.full, found.is_exact)


@lru_cache(maxsize=64)
def _leaves(rates: ExitRates, limits: tuple[float, ...]) -> np.ndarray:
    return rates.leaves(list(limits)).double().numpy()


__all__ = ["ExitPlan", "ExitRates", "known_plan", "plan_exits"]
