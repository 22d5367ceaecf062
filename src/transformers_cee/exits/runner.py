# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The walks over layers: to all exits, and with exits at which rows leave. There is one more loop over layers in the
project, in which single tokens of a known sequence leave, see `token_runner`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from transformers_cee.exits.criteria import ExitCriterion, ExitStep
from transformers_cee.exits.recording import Place
from transformers_cee.exits.row_batch import RowBatch, token_spans


class Exits(Protocol):
    """What the loop needs to know of a model's exits."""

    @property
    def layer_numbers(self) -> Sequence[int]:
        """Layers (1-based) of all exits, ascending."""

    def state(self, hidden_states: Tensor, padding_mask: Tensor | None, index: int) -> Tensor:
        """Exit state (rows, hidden) of exit `index` (0-based) from hidden states (rows, time, hidden)."""

    def logits(self, state: Tensor, index: int) -> Tensor:
        """Logits (rows, labels) of exit `index` from its state (rows, hidden)."""


@dataclass
class ExitRun:
    """Result of a walk, in the original order of rows. Shapes as in `ExitClassifierOutput`; `states` (rows, hidden),
    in the place of logits, are what a head shared by all exits takes."""

    logits: Tensor | None
    exit_layers: Tensor
    scores: Tensor
    all_logits: Tensor | None = None
    all_states: Tensor | None = None
    states: Tensor | None = None


Layer = Callable[[RowBatch], Tensor]
# A block of layers gives the batch behind them, and with it what its graph found at the exit there.
Block = Callable[[RowBatch], RowBatch]
Leaving = Callable[[Tensor, Tensor, int], None]
Drops = Callable[[int, int], bool]


class _ScaleGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient * ctx.factor, None


def _behind(layer: Layer | Block, batch: RowBatch) -> RowBatch:
    """The batch behind a layer or a block of layers."""
    made = layer(batch)
    return made if isinstance(made, RowBatch) else replace(batch, hidden_states=made)


def _exit_step(batch: RowBatch, exits: Exits, index: int) -> ExitStep:
    """What is known of a batch at exit `index` (0-based): asked of the model, or found by the block before it."""
    found = batch.at_exit
    if found is None:
        state = exits.state(batch.hidden_states, batch.padding_mask, index)
        return ExitStep(index, state, partial(exits.logits, index=index), batch.index)
    # A graph that gives no state has no criterion that asks for one.
    state = found.logits if found.state is None else found.state
    head = partial(exits.logits, index=index)
    return ExitStep(index, state, head, batch.index, score=found.score, logits_=found.logits)


def collect_states(
    batch: RowBatch, layers: Sequence[Layer], exits: Exits, gradient_equilibrium: bool = False
) -> list[Tensor]:
    """The state of every exit, see `collect_steps`."""
    return [step.state for step in collect_steps(batch, layers, exits, gradient_equilibrium)]


def collect_steps(
    batch: RowBatch,
    layers: Sequence[Layer | Block],
    exits: Exits,
    gradient_equilibrium: bool = False,
    ends: Sequence[int] | None = None,
) -> list[ExitStep]:
    """Walks all layers with the criterion off and returns what is known at every exit.

    Args:
        ends (sequence of `int`, *optional*): as in `run_exits`.
        gradient_equilibrium (`bool`):
            What comes back to the hidden states of exit i (0-based, of n) is `g_i / (n − i)` from its own head and
            `(n − i − 1) / (n − i)` of what the deeper layers send, so that every layer gets the mean of the gradients
            of the exits behind it, not their sum (Li et al. 2019; ElasticBERT, Liu et al. 2022). States stay the same.
    """
    steps: list[ExitStep] = []
    for number, layer in zip(ends or range(1, len(layers) + 1), layers, strict=True):
        batch = _behind(layer, batch)
        if number not in exits.layer_numbers:
            continue
        seen = batch
        if gradient_equilibrium:
            left = len(exits.layer_numbers) - len(steps)
            parts = (_ScaleGradient.apply(batch.hidden_states, share / left) for share in (1, left - 1))
            seen, batch = (replace(batch, hidden_states=part) for part in parts)
        steps.append(_exit_step(seen, exits, len(steps)))
    return steps


def run_all_exits(
    batch: RowBatch,
    layers: Sequence[Layer | Block],
    exits: Exits,
    gradient_equilibrium: bool = False,
    ends: Sequence[int] | None = None,
) -> ExitRun:
    """`collect_steps`, and every exit head asked: one pass gives all exits' logits."""
    steps = collect_steps(batch, layers, exits, gradient_equilibrium, ends)
    run = _full_depth(steps[-1].logits, batch.size, exits)
    run.all_logits = torch.stack([step.logits for step in steps], dim=1)
    run.all_states = torch.stack([step.state for step in steps], dim=1)
    return run


def run_exits(
    batch: RowBatch,
    layers: Sequence[Layer | Block],
    exits: Exits,
    criterion: ExitCriterion,
    first_exit: int = 0,
    leaving: Leaving | None = None,
    score_closed: bool = True,
    places: list[Place] | None = None,
    head_state: Callable[[Tensor, int], Tensor] | None = None,
    drops: Drops | None = None,
    ends: Sequence[int] | None = None,
) -> ExitRun:
    """Walks the layers and lets rows leave where the criterion says so.

    The remaining rows are gathered and their padding trimmed, unless `drops` says that this does not pay. One host
    synchronisation per exit at which a row could leave; none with all exits off, when internal exits are not looked at
    and the walk costs what the plain stack does.

    Args:
        batch (`RowBatch`): embedded rows and their masks.
        layers (sequence of callables): each maps the batch to its next hidden states (rows, time, hidden), or to the
            batch behind a block of layers.
        exits (`Exits`): states and heads of the exits.
        criterion (`ExitCriterion`): a fresh criterion object.
        first_exit (`int`): exit (0-based) before which no row leaves.
        leaving (`Callable`, *optional*):
            Told of rows that no further layer sees: their numbers (rows,), hidden states (rows, time, hidden) and
            layer (1-based).
        score_closed (`bool`): also ask for scores at exits that a threshold closes, unless all exits are closed.
        places (`list[Place]`, *optional*): gets, for each layer that runs, where its rows stand in the batch.
        head_state (`Callable`, *optional*):
            Of exits that share one head, which the caller asks once for all rows: maps states (rows, hidden) of an
            exit (0-based) to what that head takes. The walk then gives these instead of logits.
        drops (`Callable`, *optional*):
            From the rows of the batch and those of them that have not left: are these to go on alone? Always, by
            default. Otherwise all stay in the batch, with those that left told in its `left`: the next layers run for
            them, too, but nobody asks for what these give.
        ends (sequence of `int`, *optional*):
            Layer (1-based) behind which each of `layers` ends, where these are blocks of several; exits inside of
            blocks are not asked. By default 1, 2, ….
    """
    rows, last = batch.size, len(exits.layer_numbers) - 1
    asks_none = ends is not None and set(exits.layer_numbers[:-1]).isdisjoint(ends)
    if criterion.is_off or first_exit >= last or asks_none:
        return _run_whole(batch, layers, exits, places, head_state)
    device = batch.hidden_states.device
    batch = replace(batch, index=torch.arange(rows, device=device), spans=token_spans(batch.padding_mask))
    walk = ExitWalk(rows, device, exits, criterion, first_exit, leaving, score_closed, head_state, drops)
    for number, layer in zip(ends or range(1, len(layers) + 1), layers, strict=True):
        if places is not None:
            places.append(Place(None if batch.size == rows else batch.index, batch.start))
        rest = walk.advance(batch, layer, number)
        if rest is None:
            break
        batch = rest
    return walk.finish()


class ExitWalk:
    """A walk in which rows leave, moved on by its caller: one batch behind one layer, or behind one block of layers,
    at a time. Rows of several batches may be on one walk, as long as `RowBatch.index` tells them apart.

    Args:
        rows (`int`): of all batches together.
        device (`torch.device`): of the rows.
        exits, criterion, first_exit, leaving, score_closed, head_state, drops: as in `run_exits`. What the criterion
            remembers must be of the batch that is moved.
    """

    def __init__(
        self,
        rows: int,
        device: torch.device,
        exits: Exits,
        criterion: ExitCriterion,
        first_exit: int = 0,
        leaving: Leaving | None = None,
        score_closed: bool = True,
        head_state: Callable[[Tensor, int], Tensor] | None = None,
        drops: Drops | None = None,
    ) -> None:
        self.exits, self.criterion, self.first_exit = exits, criterion, first_exit
        self.leaving, self.score_closed, self.drops = leaving, score_closed, drops
        self.last = len(exits.layer_numbers) - 1
        self.exit_of = {number: index for index, number in enumerate(exits.layer_numbers)}
        self.record = _Record(rows, self.last + 1, device, head_state)

    def may_leave(self, index: int) -> bool:
        """May rows leave at exit `index` (0-based)? At the last one they must."""
        return index == self.last or (index >= self.first_exit and self.criterion.can_exit(index))

    def advance(self, batch: RowBatch, layer: Layer | Block, number: int) -> RowBatch | None:
        """The rows of a batch that stay behind a layer, or behind a block that ends with the layer `number` (1-based);
        `None` when all have left."""
        batch = _behind(layer, batch)
        index = self.exit_of.get(number)
        if index is None:
            return batch
        may_leave = self.may_leave(index)
        unasked = index < self.first_exit or not self.score_closed
        if not may_leave and unasked and not self.criterion.has_memory:
            return batch
        step = _exit_step(batch, self.exits, index)
        if index == self.last:
            self.record.leave_all(batch, step, number)
            return None
        scores = self.criterion.score(step) if step.score is None else step.score
        self.record.keep_scores(batch, index, scores.detach())
        if not may_leave:
            return batch
        return _compact(batch, step, self.criterion, scores, number, self.record, self.leaving, self.drops)

    def finish(self) -> ExitRun:
        """What the rows left with, when all have."""
        return self.record.finish()


def _run_whole(
    batch: RowBatch,
    layers: Sequence[Layer | Block],
    exits: Exits,
    places: list[Place] | None,
    head_state: Callable[[Tensor, int], Tensor] | None,
) -> ExitRun:
    """All layers for all rows, and the last exit. Nothing here depends on numbers of rows or tokens."""
    for layer in layers:
        if places is not None:
            places.append(Place())
        batch = _behind(layer, batch)
    last = len(exits.layer_numbers) - 1
    step = _exit_step(batch, exits, last)
    if head_state is None:
        return _full_depth(step.logits, batch.size, exits)
    states = head_state(step.state, last)
    return replace(_full_depth(states, batch.size, exits), logits=None, states=states)


def _compact(
    batch: RowBatch,
    step: ExitStep,
    criterion: ExitCriterion,
    scores: Tensor,
    number: int,
    record: "_Record",
    leaving_to: Leaving | None,
    drops: Drops | None,
) -> RowBatch | None:
    """Lets the rows out that pass, and returns the rest; `None` when nobody is left."""
    passed = criterion.passes(scores, criterion.thresholds[step.index])
    # The one synchronisation: who leaves and how long each row is, in one transfer.
    host = passed.cpu() if batch.spans is None else torch.cat((passed.unsqueeze(1), batch.spans), dim=1).cpu()
    leaves = host if batch.spans is None else host[:, 0].bool()
    left = leaves
    if record.left is not None:
        left, leaves = leaves | record.left, leaves & ~record.left
    if not leaves.any():
        return batch
    assert batch.index is not None
    staying = len(left) - int(left.sum())
    if staying == 0:
        record.leave_all(batch, step, number)
        if leaving_to is not None:
            leaving_to(batch.index, batch.hidden_states, number)
        return None
    device = batch.hidden_states.device
    leaving = leaves.nonzero().squeeze(1).to(device, non_blocking=True)
    record.leave(batch.index.index_select(0, leaving), step, number, leaving)
    if drops is not None and not drops(len(left), staying):
        record.left = left
        return replace(batch, left=passed if batch.left is None else passed | batch.left)
    record.left = None
    kept = (~left).nonzero().squeeze(1).to(device, non_blocking=True)
    if leaving_to is not None:
        gone = leaving if left is leaves else left.nonzero().squeeze(1).to(device, non_blocking=True)
        numbers = batch.index.index_select(0, gone)
        leaving_to(numbers, batch.hidden_states.index_select(0, gone), number)
    criterion.select(kept)
    if batch.spans is None:
        return batch.select(kept)
    return batch.select(kept, *_trim(host[~left]))


def _trim(host: Tensor) -> tuple[slice, bool]:
    """Columns that the remaining rows still need, and whether no padding is left in them.

    Args:
        host (`LongTensor` of shape `(rows, 4)`): whether the row leaves, then its span.
    """
    start, stop = int(host[:, 1].min()), int(host[:, 2].max()) + 1
    return slice(start, stop), bool((host[:, 3] == stop - start).all())


class _Record:
    """Collects what leaves, and puts it back into the order of the original batch."""

    def __init__(
        self, rows: int, exits: int, device: torch.device, head_state: Callable[[Tensor, int], Tensor] | None
    ) -> None:
        self.shape = (rows, exits)
        self.head_state = head_state
        self.exit_layers = torch.zeros(rows, dtype=torch.long, device=device)
        # Scores while all rows are there, and after that with the rows that are left.
        self.columns: list[Tensor] = []
        self.whole: list[int] = []
        self.scores: list[tuple[Tensor, int, Tensor]] = []
        self.rows: list[Tensor] = []
        self.taken: list[Tensor] = []
        # On the host, what `left` of the batch is on the device: neither is moved to know the other.
        self.left: Tensor | None = None

    def keep_scores(self, batch: RowBatch, exit_index: int, scores: Tensor) -> None:
        if batch.left is not None:
            scores = scores.masked_fill(batch.left, float("nan"))
        if batch.size == self.shape[0]:
            self.columns.append(scores)
            self.whole.append(exit_index)
        else:
            assert batch.index is not None
            self.scores.append((batch.index, exit_index, scores))

    def leave_all(self, batch: RowBatch, step: ExitStep, layer: int) -> None:
        """Notes that all rows leave that have not yet."""
        assert batch.index is not None
        if self.left is None:
            self.leave(batch.index, step, layer)
        else:
            leaving = (~self.left).nonzero().squeeze(1).to(batch.index.device, non_blocking=True)
            self.leave(batch.index.index_select(0, leaving), step, layer, leaving)

    def leave(self, rows: Tensor, step: ExitStep, layer: int, leaving: Tensor | None = None) -> None:
        """Notes rows that leave behind a layer (1-based): all of the step, or those that `leaving` counts."""
        if rows.shape[0] == self.shape[0]:
            self.exit_layers.fill_(layer)
        else:
            self.exit_layers.index_fill_(0, rows, layer)
        self.rows.append(rows)
        if self.head_state is not None:
            self.taken.append(self.head_state(step.state if leaving is None else step.state[leaving], step.index))
        else:
            self.taken.append(step.logits if leaving is None else step.logits_of(leaving))

    def finish(self) -> ExitRun:
        nobody = torch.full(self.shape[:1], float("nan"), device=self.exit_layers.device)
        columns = [nobody] * self.shape[1]
        for exit_index, scores in zip(self.whole, self.columns, strict=True):
            columns[exit_index] = scores.to(nobody.dtype)
        table = torch.stack(columns, dim=1)
        for rows, exit_index, scores in self.scores:
            table[rows, exit_index] = scores.to(table.dtype)
        if len(self.rows) == 1:
            taken = self.taken[0]
        else:
            taken = torch.cat(self.taken).index_select(0, torch.cat(self.rows).argsort())
        if self.head_state is not None:
            return ExitRun(None, self.exit_layers, table, states=taken)
        return ExitRun(taken, self.exit_layers, table)


def _full_depth(logits: Tensor, rows: int, exits: Exits) -> ExitRun:
    layers = torch.full((rows,), exits.layer_numbers[-1], dtype=torch.long, device=logits.device)
    scores = torch.full((rows, len(exits.layer_numbers)), float("nan"), device=logits.device)
    return ExitRun(logits, layers, scores)
