# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Exit states and logits of a whole data set, computed once: what hindsight curves, hardness and policies work on."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from transformers_cee.exits.losses import exit_errors, exit_losses


@dataclass
class ExitStore:
    """Every exit's state and logits for every row of a data set, in evaluation mode, in the data set's order.

    Args:
        states (`Tensor` of shape `(rows, exits, hidden)`): pooled exit states, float32, possibly memory-mapped.
        logits (`Tensor` of shape `(rows, exits, labels)`): logits of all exit heads, float32.
        labels (`Tensor` of shape `(rows,)` or `(rows, labels)`): true labels.
        layers (`LongTensor` of shape `(exits,)`): 1-based layer of each exit.
        problem_type (`str`): what logits and labels mean.
        tolerance (`float`): in regression, the absolute error up to which a head counts as right.
    """

    states: Tensor
    logits: Tensor
    labels: Tensor
    layers: Tensor
    problem_type: str
    tolerance: float = 0.5

    def __len__(self) -> int:
        return len(self.logits)

    @property
    def losses(self) -> Tensor:
        """Loss (rows, exits) of each row at each exit."""
        return exit_losses(self.logits, self.labels, self.problem_type)

    @property
    def errors(self) -> Tensor:
        """Error (rows, exits) of each row at each exit."""
        return exit_errors(self.logits, self.labels, self.problem_type)

    @property
    def correct(self) -> Tensor:
        """Does each exit predict the row's label? (rows, exits)."""
        return self.errors <= (self.tolerance if self.problem_type == "regression" else 0.0)

    def select(self, rows: Tensor) -> "ExitStore":
        """The store of some rows (LongTensor) only; states are copied."""
        return ExitStore(
            self.states[rows], self.logits[rows], self.labels[rows], self.layers, self.problem_type, self.tolerance
        )


def length_sorted_batches(dataset: Any, batch_size: int) -> list[list[int]]:
    """Row numbers in batches of rows of similar length, longest first; in order for data without `input_ids`.

    Batches do not depend on the number of processes, so that every row meets the same neighbours everywhere.
    """
    columns = getattr(dataset, "column_names", None) or ()
    rows = list(range(len(dataset)))
    if "input_ids" in columns:
        lengths = [len(ids) for ids in dataset["input_ids"]]
        rows.sort(key=lambda row: -lengths[row])
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def collect_exits(
    model: nn.Module,
    dataset: Any,
    data_collator: Any,
    accelerator: Accelerator,
    *,
    problem_type: str,
    batch_size: int = 32,
    directory: str | None = None,
    memory_limit_mb: int = 2048,
    tolerance: float = 0.5,
    disable_tqdm: bool = False,
) -> ExitStore:
    """Runs a data set to full depth once and keeps every exit's state and logits.

    Several processes share the batches and every process ends with the whole store, assembled by row number.

    Args:
        model (`nn.Module`): an early-exit model, unwrapped; runs in evaluation mode and is left as it was.
        dataset (sized, indexable): rows with `labels`; only the model's inputs.
        data_collator (`Callable`): makes a batch of tensors from a list of rows.
        accelerator (`Accelerator`): device, precision and processes.
        batch_size (`int`): rows per batch.
        directory (`str`, *optional*): where states larger than `memory_limit_mb` are memory-mapped.

    Raises:
        ValueError: rows without `labels`, or an empty data set.
    """
    if len(dataset) == 0:
        raise ValueError("`dataset` is empty; at least one row is needed.")
    training = model.training
    model.eval()
    store: ExitStore | None = None
    try:
        for rows, output, labels in tqdm(
            _outputs(model, dataset, data_collator, accelerator, batch_size),
            total=-(-len(dataset) // (batch_size * accelerator.num_processes)),
            desc="Exit states",
            disable=disable_tqdm or not accelerator.is_local_main_process,
        ):
            if store is None:
                name = f"states-{accelerator.process_index}.npy"
                path = None if directory is None else os.path.join(directory, name)
                store = _empty(len(dataset), output, labels, path, memory_limit_mb)
                store.layers = torch.tensor(model.layer_numbers)
                store.problem_type, store.tolerance = problem_type, tolerance
            store.states[rows] = output[0].float().cpu()
            store.logits[rows] = output[1].float().cpu()
            store.labels[rows] = labels.cpu()
    finally:
        model.train(training)
    assert store is not None
    return store


def _outputs(
    model: nn.Module, dataset: Any, data_collator: Any, accelerator: Accelerator, batch_size: int
) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor], Tensor]]:
    """Row numbers, (states, logits) and labels of one batch per process at a time, gathered from all processes."""
    batches = length_sorted_batches(dataset, batch_size)
    for start in range(0, len(batches), accelerator.num_processes):
        mine = start + accelerator.process_index
        rows = batches[min(mine, len(batches) - 1)]
        batch = data_collator([dataset[row] for row in rows])
        if "labels" not in batch:
            raise ValueError(f"`dataset` rows need `labels`; got {sorted(batch)}.")
        batch = {name: value.to(accelerator.device) for name, value in batch.items()}
        with torch.no_grad(), accelerator.autocast():
            output = model(**batch, output_all_exits=True)
        number = torch.tensor(rows if mine < len(batches) else [-1] * len(rows), device=accelerator.device)
        parts: tuple[Tensor, ...] = (number, output.all_exit_states, output.all_exit_logits, batch["labels"])
        if accelerator.num_processes > 1:
            missing = batch_size - len(rows)
            parts = tuple(_pad_rows(part.contiguous(), missing) for part in parts)
            parts = accelerator.gather(parts)
        number, states, logits, labels = parts
        real = number >= 0
        yield number[real].cpu(), (states[real], logits[real]), labels[real]


def _pad_rows(tensor: Tensor, missing: int) -> Tensor:
    """Appends rows of −1, which `gather` needs to find the same shape in every process."""
    return tensor if not missing else torch.cat((tensor, tensor.new_full((missing, *tensor.shape[1:]), -1)))


def _empty(
    rows: int, output: tuple[Tensor, Tensor], labels: Tensor, path: str | None, memory_limit_mb: int
) -> ExitStore:
    states, logits = output
    shape = (rows, *states.shape[1:])
    if path is not None and 4 * np.prod(shape) > memory_limit_mb * 2**20:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if os.path.exists(path):
            # A new file, not the old one overwritten: an earlier store may still be mapped to that.
            os.remove(path)
        kept = torch.from_numpy(np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape))
    else:
        kept = torch.empty(shape)
    return ExitStore(
        kept,
        torch.empty(rows, *logits.shape[1:]),
        torch.empty(rows, *labels.shape[1:], dtype=labels.dtype),
        torch.empty(0, dtype=torch.long),
        "",
    )
