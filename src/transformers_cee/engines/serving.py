# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What an exported model keeps so that exits never cost more than they save: measured costs, and its exits' rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from transformers_cee.calibration.cost_table import CostTable
from transformers_cee.calibration.exit_choice import ExitChoice, choose_exits
from transformers_cee.calibration.exit_plans import ExitRates
from transformers_cee.calibration.scores import ExitScores, score_store
from transformers_cee.evaluation.environment import processor_name
from transformers_cee.exits.by_layer import layers_named
from transformers_cee.exits.deciding import criterion_settings
from transformers_cee.stores.store import ExitStore


logger = logging.get_logger(__name__)

COSTS = "costs.json"
RATES = "rates_{}.safetensors"
# Prices of a layer for which rates are kept, of conditioned policies.
PRICES = 6


def rates_of(model: Any, store: ExitStore) -> list[ExitRates]:
    """Rates of the criterion that is part of an exported model's graphs; of conditioned policies at several prices of
    a layer, the default one among them."""
    criterion = model.record["criterion"]
    if criterion is None or len(model.layer_numbers) == 1:
        return []
    settings = criterion_settings(model)
    budgets = model.config.exit_budgets
    prices: list[float | None] = [None]
    if criterion == "policy" and model.exit_policies.is_conditioned and budgets:
        known = sorted({alpha for _, alpha, _ in budgets})
        places = torch.linspace(0, len(known) - 1, min(PRICES, len(known))).round().long().tolist()
        prices = sorted({model.exit_policies.default_alpha, *(known[place] for place in places)})
    # Calls may leave earlier than the config says, or later.
    rescored = partial(score_store, store, criterion, model, min_exit_layer=1)
    return [ExitRates.of(rescored(replace(settings, alpha=alpha))) for alpha in prices]


def choose(
    model: Any, store: ExitStore, costs: CostTable, agreement: float, batch_size: int, length: float
) -> ExitChoice:
    """The exits and the threshold with the least expected time of a batch, for an agreement with full depth that is
    certified on the second half of a store's rows."""
    criterion = model.record["criterion"]

    def rescore(layers: Sequence[int]) -> ExitScores:
        places = torch.tensor([store.layers.tolist().index(layer) for layer in layers])
        return score_store(subset(store, places), criterion, of_layers(model, layers))

    scores = score_store(store, criterion, model)
    return choose_exits(scores, costs, batch_size=batch_size, length=length, epsilon=1 - agreement, rescore=rescore)


def subset(store: ExitStore, exits: torch.Tensor) -> ExitStore:
    """A store of some exits (0-based) alone, the last one included."""
    kept = {name: getattr(store, name) for name in ("states", "logits", "predictions", "token_losses")}
    parts = {name: value[:, exits] for name, value in kept.items() if value is not None}
    return replace(store, **parts, layers=store.layers[exits])


def of_layers(model: Any, layers: Sequence[int]) -> Any:
    """The exported model with the exits behind some of its layers (1-based) alone, the last one included."""
    config = type(model.config).from_dict(model.config.to_dict(), exit_layers=list(layers))
    made = type(model)(config, model.engine)
    weights = {name: value for name, value in model.state_dict().items() if is_of(name, config)}
    made.load_state_dict(weights)
    made.name_or_path = model.name_or_path
    made.blocks, made.costs = model.blocks, model.costs
    return made


def is_of(name: str, config: Any) -> bool:
    """Does a weight belong to one of a config's exits, or to all of them at once, as some estimators do?"""
    if not set(layers_named([name])) <= set(config.exit_layer_numbers):
        return False
    kind, _, rest = name.partition(".")
    return kind != "exit_estimators" or rest.partition(".")[0] in config.exit_estimators


def save_serving(model: Any, folder: Path) -> list[str]:
    """Writes an exported model's costs and rates, and gives the names of the files."""
    files = []
    if model.costs is not None:
        model.costs.save(folder / COSTS)
        files.append(COSTS)
    for place, rates in enumerate(model.rates):
        rates.save(folder / RATES.format(place))
        files.append(RATES.format(place))
    return files


def load_serving(model: Any, folder: Path) -> None:
    """Gives an exported model the costs and rates of its folder. Costs of another processor are used, with a word:
    what exits save and cost has about the same ratio everywhere."""
    files = model.record["files"]
    if COSTS in files:
        model.costs = costs = CostTable.load(folder / COSTS)
        here = (processor_name(), model.engine.threads)
        if here != (costs.processor, costs.threads):
            logger.info(
                f"The costs of {model.name_or_path} were measured on {costs.processor} with {costs.threads} threads; "
                f"here are {here[0]} with {here[1]}. `measure_costs(model)` measures them anew."
            )
    names = [name for name in files if name.startswith(RATES.partition("{")[0])]
    rates = [ExitRates.load(folder / name) for name in sorted(names)]
    model.rates = [found for one in rates if (found := _of_exits(one, model.layer_numbers)) is not None]


def _of_exits(rates: ExitRates, layers: Sequence[int]) -> ExitRates | None:
    """Rates of some exits alone; None where scores would be others once only these are asked."""
    known = rates.layers.tolist()
    if known == list(layers):
        return rates
    if rates.has_memory:
        return None
    places = torch.tensor([known.index(layer) for layer in layers])
    return replace(rates, scores=rates.scores[:, places[:-1]].contiguous(), layers=rates.layers[places])


def keep_own(folder: Path, name: str, config: Any) -> None:
    """Leaves those weights of a file that belong to a config's exits."""
    weights = load_file(folder / name)
    save_file({key: value.clone() for key, value in weights.items() if is_of(key, config)}, folder / name)
