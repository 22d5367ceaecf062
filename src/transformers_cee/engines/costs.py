# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What layers and checks of an exported model cost on this machine, measured."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from tqdm.auto import tqdm

from transformers_cee.calibration.cost_table import CostTable, MeasuredBatch
from transformers_cee.calibration.scores import boldest_threshold
from transformers_cee.evaluation.environment import processor_name
from transformers_cee.evaluation.timing import Timer
from transformers_cee.exits.criteria import CRITERIA
from transformers_cee.exits.deciding import ExitDecision, model_criterion
from transformers_cee.exits.row_batch import RowBatch


BATCH_SIZES = (1, 8, 32)
LENGTHS = (8, 64)
# Rows that a variant runs, so that it has a turn of several runs: a single row's time would be that of fetching
# weights which others threw out of the processor's caches.
_ROWS_IN_TURN = 16


@torch.no_grad()
def measure_costs(
    model: Any,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    lengths: Sequence[int] = LENGTHS,
    timer: Timer | None = None,
    disable_tqdm: bool = False,
) -> CostTable:
    """Measures what an exported model's layers and checks cost, on an idle machine.

    Walks in turn tell them apart: without exits, with one and with every exit asked and nobody leaving, and with
    everybody leaving halfway. A check is then all that a further exit takes, another call of the engine, head, score
    and decision; and what the first one takes beyond that is what asking takes at all.

    Args:
        model ([`ExportedSequenceClassifier`]): the model.
        batch_sizes, lengths (sequences of `int`): rows of a batch and tokens of a row that are measured. One row
            always is, and longer rows than the model reads are as long as it reads.
        timer ([`Timer`], *optional*): takes the times.
        disable_tqdm (`bool`): no progress bar.
    """
    if len(model.layer_numbers) == 1 or model.record["criterion"] is None:
        raise ValueError(
            f"The graphs of {model.name_or_path} have the exits {model.layer_numbers} and the criterion "
            f"{model.record['criterion']!r}: there are no checks to measure."
        )
    timer = timer or Timer()
    # Of a walk that asks every exit, whatever it costs.
    bare = copy.deepcopy(model)
    bare.costs = None
    most = model.most_tokens or max(lengths)
    # A table takes fewer rows than were measured to cost what the fewest did, and of a batch one row may be left.
    rows_measured = sorted({1, *batch_sizes})
    sizes = [(rows, length) for length in sorted({min(length, most) for length in lengths}) for rows in rows_measured]
    measured = [
        _measured(bare, rows, length, timer) for rows, length in tqdm(sizes, desc="Costs", disable=disable_tqdm)
    ]
    record = model.record
    return CostTable(record["engine"], record["precision"], processor_name(), model.engine.threads, measured)


def nobody_leaves(criterion: str) -> dict[str, Any]:
    """Exit arguments with which every exit is asked and no row leaves: the threshold is as near to where exits are
    closed as a number can be."""
    return {"exit_criterion": criterion, "exit_threshold": math.nextafter(CRITERIA[criterion].off, 0.5)}


def _measured(model: Any, rows: int, length: int, timer: Timer) -> MeasuredBatch:
    numbers, last = model.layer_numbers, model.config.num_hidden_layers
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (rows, length), generator=generator)
    run = partial(model, input_ids=ids)
    half = min(numbers[:-1], key=lambda layer: abs(layer - last / 2))
    criterion = model.record["criterion"]
    cls = CRITERIA[criterion]
    everybody = boldest_threshold(criterion)
    one = copy.deepcopy(model)
    one.asked = lambda *_: (numbers.index(half),)
    variants: dict[str, Callable[[], Any]] = {
        "whole": partial(run, exit_criterion=criterion, exit_threshold=cls.off),
        "asked": partial(run, **nobody_leaves(criterion), min_exit_layer=1),
        "half": partial(run, exit_criterion=criterion, exit_threshold=everybody, min_exit_layer=half),
        "kept": _keeping(rows, length, model.config.hidden_size),
    }
    if len(numbers) > 2:
        variants["one"] = partial(one, input_ids=ids, **nobody_leaves(criterion), min_exit_layer=1)
    again = max(1, _ROWS_IN_TURN // rows)
    found = timer.time({name: [call] * again for name, call in variants.items()}, "whole", device=model.device)
    # Ratios are those within rounds: the machine may have slowed down between them.
    whole = found.seconds["whole"].median / again
    seconds = {name: whole / figure.median for name, figure in found.speedups["whole"].items()} | {"whole": whole}
    internal = len(numbers) - 1
    checks = max(0.0, seconds["asked"] - seconds["whole"]) / internal
    asking = 0.0
    if internal > 1:
        # Neither is below 0, and both together are what asking all of them takes.
        further = min(checks, max(0.0, seconds["asked"] - seconds["one"]) / (internal - 1))
        checks, asking = further, internal * (checks - further)
    # Exits before the first that may be left at are not asked, unless the criterion remembers them.
    decision = ExitDecision(criterion, everybody)
    remembers = model_criterion(model, decision, input_ids=ids, first_exit=model.first_exit(half)).has_memory
    until_half = sum(number <= half for number in numbers) if remembers else 1
    until = max(0.0, seconds["half"] - asking - until_half * checks)
    layer = max(0.0, seconds["whole"] - until) / (last - half)
    # The first layer has the embeddings, too, and costs no less, whatever noise says.
    layer = min(layer, seconds["whole"] / last)
    first = max(0.0, seconds["whole"] - layer * (last - 1))
    return MeasuredBatch(
        rows,
        length,
        {1: first, **dict.fromkeys(range(2, last + 1), layer)},
        0.0,
        {number: 0.0 if number == last else checks for number in numbers},
        seconds["kept"],
        asking,
    )


def _keeping(rows: int, length: int, hidden: int) -> Callable[[], Any]:
    """Keeps all but one of the rows of a batch."""
    mask = torch.ones(rows + 1, length, dtype=torch.bool)
    batch = RowBatch(torch.zeros(rows + 1, length, hidden), padding_mask=mask, index=torch.arange(rows + 1))
    return partial(batch.select, torch.arange(rows))
