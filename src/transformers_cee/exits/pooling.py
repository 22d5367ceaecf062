# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""One walk of many batches: rows that stay behind an exit wait there for those of other batches, so that deep layers
run full batches, too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from transformers_cee.exits.criteria import ExitCriterion
from transformers_cee.exits.policy import ExitHistory
from transformers_cee.exits.row_batch import RowBatch, token_spans
from transformers_cee.exits.runner import Block, ExitRun, Exits, ExitWalk, Layer


# From hidden states (rows, time, hidden) and their mask (rows, time) or None to what layers take.
Masked = Callable[[Tensor, Tensor | None], RowBatch]
Stage = list[tuple[int, Layer | Block]]


@dataclass
class _Waiting:
    """Rows behind an exit, padded on the right.

    Args:
        hidden_states (`Tensor` of shape `(rows, time, hidden)`): input of the next layer.
        mask (`BoolTensor` of shape `(rows, time)`, *optional*): true at tokens; None where all are.
        index (`LongTensor` of shape `(rows,)`): their numbers in the walk.
        history (`ExitHistory`): what a policy that looks at confidences remembers of them.
    """

    hidden_states: Tensor
    mask: Tensor | None
    index: Tensor
    history: ExitHistory

    @property
    def size(self) -> int:
        return len(self.index)

    @property
    def time(self) -> int:
        return self.hidden_states.shape[1]

    def of(self, rows: slice) -> _Waiting:
        mask = None if self.mask is None else self.mask[rows]
        return _Waiting(self.hidden_states[rows], mask, self.index[rows], self.history.of(rows))


class _Pool:
    """Rows that wait behind one exit, first come, first served.

    Args:
        batch_size (`int`): rows that leave together.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.parts: list[_Waiting] = []

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)

    def add(self, part: _Waiting) -> Iterator[_Waiting]:
        """Takes rows and gives the batches that are full; those, too, that would be more padding than tokens with
        rows as short as the new ones."""
        if self.parts and 2 * part.time < max(one.time for one in self.parts):
            yield self.take(self.size)
        self.parts.append(part)
        while self.size >= self.batch_size:
            yield self.take(self.batch_size)

    def take(self, rows: int) -> _Waiting:
        """The rows that have waited longest."""
        taken: list[_Waiting] = []
        while rows:
            part = self.parts.pop(0)
            if part.size > rows:
                self.parts.insert(0, part.of(slice(rows, None)))
                part = part.of(slice(0, rows))
            taken.append(part)
            rows -= part.size
        return _joined(taken)


def _joined(parts: list[_Waiting]) -> _Waiting:
    time = max(part.time for part in parts)
    index = torch.cat([part.index for part in parts])
    history = ExitHistory.joined([part.history for part in parts])
    if all(part.mask is None and part.time == time for part in parts):
        return _Waiting(torch.cat([part.hidden_states for part in parts]), None, index, history)
    masks = [part.hidden_states.new_ones(part.size, part.time, dtype=torch.bool) if part.mask is None else part.mask
             for part in parts]  # fmt: skip
    mask = torch.cat([F.pad(one, (0, time - one.shape[1])) for one in masks])
    # A part of a batch may be shorter than the batch was.
    longest = int(mask.sum(1).max())
    hidden = torch.cat([F.pad(part.hidden_states, (0, 0, 0, time - part.time)) for part in parts])
    return _Waiting(hidden[:, :longest], mask[:, :longest], index, history)


def run_pooled(
    batches: Iterable[RowBatch],
    rows: int,
    layers: Sequence[Layer | Block],
    exits: Exits,
    criterion: ExitCriterion,
    masked: Masked,
    *,
    batch_size: int,
    first_exit: int = 0,
    ends: Sequence[int] | None = None,
) -> ExitRun:
    """Walks the layers with many batches and lets rows leave where the criterion says so, as `run_exits` does with
    one. Rows that stay wait behind the exit until there are `batch_size` of similar length, and go on together.

    Args:
        batches (iterable of `RowBatch`): embedded rows, padded on the right; longest first, so that those that wait
            together are of similar length. The next one is asked for when the one before has gone as far as it can:
            no more than a few batches per exit are held.
        rows (`int`): of all batches together.
        layers, exits, first_exit, ends: as in `run_exits`.
        criterion (`ExitCriterion`): a fresh criterion object, not off, that remembers nothing of earlier exits but an
            `ExitHistory`.
        masked (`Callable`): makes of hidden states and their mask what the layers take.
        batch_size (`int`): rows that go on together.

    Returns:
        `ExitRun`: of all rows, in the order in which they came.

    Raises:
        ValueError: batches of other rows than `rows`.
    """
    pooled: _PooledWalk | None = None
    seen = 0
    for batch in batches:
        device = batch.hidden_states.device
        if pooled is None:
            walk = ExitWalk(rows, device, exits, criterion, first_exit, score_closed=False)
            pooled = _PooledWalk(walk, _stages(walk, layers, ends), masked, batch_size)
        index = torch.arange(seen, seen + batch.size, device=device)
        pooled.run(0, batch, index, ExitHistory())
        seen += batch.size
    if pooled is None or seen != rows:
        raise ValueError(f"`rows`={rows} must be the rows of all `batches`, at least one; got {seen}.")
    pooled.finish()
    return pooled.walk.finish()


class _PooledWalk:
    """The walk, and what waits behind its exits.

    Args:
        walk (`ExitWalk`): of all rows.
        stages (list of lists): numbered layers, up to each exit at which rows may leave.
        masked, batch_size: as in `run_pooled`.
    """

    def __init__(self, walk: ExitWalk, stages: list[Stage], masked: Masked, batch_size: int) -> None:
        self.walk, self.stages, self.masked = walk, stages, masked
        self.criterion: Any = walk.criterion
        self.has_history = isinstance(getattr(walk.criterion, "history", None), ExitHistory)
        self.pools = [_Pool(batch_size) for _ in stages[1:]]

    def run(self, stage: int, batch: RowBatch, index: Tensor, history: ExitHistory) -> None:
        """Takes a batch to the exit behind a stage; rows that stay wait there until they are enough to go on."""
        left: RowBatch | None = replace(batch, index=index, spans=token_spans(batch.padding_mask))
        if self.has_history:
            self.criterion.history = history
        for number, layer in self.stages[stage]:
            assert left is not None
            left = self.walk.advance(left, layer, number)
        if left is None:
            return
        mask = None if left.padding_mask is None else left.padding_mask != 0
        assert left.index is not None
        kept = self.criterion.history if self.has_history else history
        for full in self.pools[stage].add(_Waiting(left.hidden_states, mask, left.index, kept)):
            self.go_on(stage + 1, full)

    def go_on(self, stage: int, rows: _Waiting) -> None:
        """Takes rows that waited through the next stage."""
        self.run(stage, self.masked(rows.hidden_states, rows.mask), rows.index, rows.history)

    def finish(self) -> None:
        """Takes all that still wait to their exits; from the first exit on, since what goes on may fill a later
        pool."""
        for stage, pool in enumerate(self.pools, start=1):
            if pool.size:
                self.go_on(stage, pool.take(pool.size))


def _stages(walk: ExitWalk, layers: Sequence[Layer | Block], ends: Sequence[int] | None) -> list[Stage]:
    """Layers with their numbers (1-based), up to each exit at which rows may leave."""
    stages: list[Stage] = [[]]
    for number, layer in zip(ends or range(1, len(layers) + 1), layers, strict=True):
        if stages[-1] and (index := walk.exit_of.get(stages[-1][-1][0])) is not None and walk.may_leave(index):
            stages.append([])
        stages[-1].append((number, layer))
    return stages
