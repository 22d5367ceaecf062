# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Blocks in few shapes: rows and columns are padded up to buckets, so that one CUDA graph serves many batches."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from transformers_cee.engines.graphs import ALPHA, HIDDEN, MASK, TOKENS


# A block by position, and the same on buffers of one bucket: it reads them and gives the same memory at every call.
Block = Callable[..., tuple[Tensor, ...]]
Replay = Callable[[], tuple[Tensor, ...]]
Capture = Callable[[Block, Sequence[Tensor]], Replay]
# Columns are padded to multiples of this, rows to powers of two.
COLUMNS = 16
# Larger batches keep the device busy without a graph, whose buffers would take memory.
MOST_TOKENS = 1 << 14
_WITH_COLUMNS = {*TOKENS, HIDDEN}


class Buckets:
    """A block that runs in the shapes of buckets alone. Rows of padding see their first column and nothing else; what
    they give is dropped. Threads take turns.

    Args:
        block: takes and gives tensors by position.
        inputs, outputs (sequences of `str`): their names.
        capture: makes the graph of a bucket.
        most_columns (`int`, *optional*): positions that the model has; a batch is not padded beyond them.
    """

    def __init__(
        self,
        block: Block,
        inputs: Sequence[str],
        outputs: Sequence[str],
        capture: Capture,
        most_columns: int | None = None,
        lock: threading.Lock | None = None,
    ) -> None:
        self.block, self.inputs, self.outputs, self.capture = block, inputs, outputs, capture
        self.most_columns = most_columns
        self.made: dict[tuple[Any, ...], tuple[dict[str, Tensor], Replay]] = {}
        self.lock = lock or threading.Lock()

    def __call__(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rows, columns = given[MASK].shape
        padded = bucket_of(rows, columns, self.most_columns)
        if padded[0] * padded[1] > MOST_TOKENS:
            return dict(zip(self.outputs, self.block(*(given[name] for name in self.inputs)), strict=True))
        shapes = {name: _padded_shape(name, given[name].shape, padded) for name in self.inputs}
        with self.lock:
            key = tuple(shapes.values())
            if key not in self.made:
                buffers = {name: given[name].new_zeros(shape) for name, shape in shapes.items()}
                # Padding but for the first column: layers may do without a mask where there is none to hide.
                buffers[MASK][:, 0] = True
                self.made[key] = buffers, self.capture(self.block, list(buffers.values()))
            buffers, replay = self.made[key]
            _fill(buffers, given, rows, columns)
            found = dict(zip(self.outputs, replay(), strict=True))
            # Copies: the next call writes where this one did, whatever stream and block it is of.
            copies = {
                name: (value[:rows, :columns] if name == HIDDEN else value[:rows]).clone()
                for name, value in found.items()
            }
            if given[MASK].is_cuda:
                torch.cuda.current_stream(given[MASK].device).synchronize()
            return copies


def bucket_of(rows: int, columns: int, most_columns: int | None = None) -> tuple[int, int]:
    """Rows and columns that a batch is padded to."""
    padded = -(-columns // COLUMNS) * COLUMNS
    if most_columns is not None and padded > most_columns:
        padded = max(columns, most_columns)
    return 1 << (rows - 1).bit_length(), padded


def _padded_shape(name: str, shape: Sequence[int], padded: tuple[int, int]) -> tuple[int, ...]:
    if name == ALPHA:
        return tuple(shape)
    return (*padded, *shape[2:]) if name in _WITH_COLUMNS else (padded[0], *shape[1:])


def _fill(buffers: Mapping[str, Tensor], given: Mapping[str, Tensor], rows: int, columns: int) -> None:
    for name, buffer in buffers.items():
        if name == ALPHA:
            buffer.copy_(given[name])
            continue
        buffer.zero_()
        (buffer[:rows, :columns] if name in _WITH_COLUMNS else buffer[:rows]).copy_(given[name])
    # A row that sees nothing would be a mean over nothing.
    buffers[MASK][rows:, 0] = True


class CudaGraphs:
    """Captures blocks as CUDA graphs, whose scratch memory they share: graphs run one after the other."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, block: Block, buffers: Sequence[Tensor]) -> Replay:
        device = buffers[0].device
        with torch.cuda.device(device):
            current, beside = torch.cuda.current_stream(), torch.cuda.Stream()
            beside.wait_stream(current)
            # What is set up at the first calls must not be part of the graph.
            with torch.cuda.stream(beside):
                for _ in range(3):
                    block(*buffers)
            current.wait_stream(beside)
            graph = torch.cuda.CUDAGraph()
            # What other threads ask of the GPU in the meantime is no part of it.
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                found = block(*buffers)

        def replay() -> tuple[Tensor, ...]:
            graph.replay()
            return found

        return replay
