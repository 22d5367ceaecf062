# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Stores are filled in one pass: a data set runs to full depth once, and every exit's state and result is kept."""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from transformers_cee.exits.entries import ExitEntries
from transformers_cee.exits.evaluating import evaluating
from transformers_cee.exits.losses import resolve_problem_type
from transformers_cee.exits.saved_points import made_on
from transformers_cee.exits.token_targets import IGNORED
from transformers_cee.stores.mapped import mapped_array
from transformers_cee.stores.store import ExitStore


def length_sorted_batches(dataset: Any, batch_size: int, rows: Sequence[int] | None = None) -> list[list[int]]:
    """Row numbers in batches of rows of similar length, longest first; in order for data without `input_ids`.

    Batches do not depend on the number of processes, so that every row meets the same neighbours everywhere.

    Args:
        dataset (sized): the data set.
        batch_size (`int`): rows per batch.
        rows (sequence of `int`, *optional*): the rows to take, ascending; all by default.
    """
    rows = range(len(dataset)) if rows is None else rows
    if "input_ids" not in (getattr(dataset, "column_names", None) or ()):
        return similar_length_batches(rows, [0] * len(rows), batch_size)
    lengths = [len(ids) for ids in dataset["input_ids"]]
    return similar_length_batches(rows, [lengths[row] for row in rows], batch_size)


def similar_length_batches(rows: Sequence[int], lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Rows in batches of similar length, longest first; those of one length stay in their order.

    Args:
        rows (sequence of `int`): numbers of rows.
        lengths (sequence of `int`): length of each of them.
        batch_size (`int`): rows per batch.
    """
    order = sorted(range(len(rows)), key=lambda index: -lengths[index])
    return [[rows[index] for index in order[at : at + batch_size]] for at in range(0, len(order), batch_size)]


@dataclass
class OneProcess:
    """What filling a store asks of an accelerator, for this process alone and in the model's own precision.
    Accelerators share their precision and device with all others of the process.

    Args:
        device (`torch.device`): of the model.
    """

    device: torch.device
    num_processes: ClassVar[int] = 1
    process_index: ClassVar[int] = 0
    is_local_main_process: ClassVar[bool] = True

    @staticmethod
    def autocast() -> AbstractContextManager[None]:
        return nullcontext()


def collect_exits(
    model: nn.Module,
    dataset: Any,
    data_collator: Any,
    accelerator: Accelerator | OneProcess,
    *,
    problem_type: str,
    batch_size: int = 32,
    directory: str | None = None,
    memory_limit_mb: int = 2048,
    tolerance: float = 0.5,
    max_tokens: int | None = None,
    rows: Tensor | None = None,
    seed: int = 0,
    needs_labels: bool = True,
    disable_tqdm: bool = False,
) -> ExitStore:
    """Runs a data set to full depth once and keeps every exit's state and result.

    Several processes share the batches and every process ends with the whole store, assembled by number of entry.

    Args:
        model (`nn.Module`): an early-exit model, unwrapped; runs in evaluation mode and is left as it was.
        dataset (sized, indexable): rows with `labels`; only the model's inputs.
        data_collator (`Callable`): makes a batch of tensors from a list of rows; the same labels whenever it is asked.
        accelerator (`Accelerator` or `OneProcess`): device, precision and processes.
        problem_type (`str`): what logits and labels mean, one of `exits.losses.PROBLEM_TYPES`.
        batch_size (`int`): rows per batch.
        directory (`str`, *optional*): where states larger than `memory_limit_mb` are memory-mapped.
        max_tokens (`int`, *optional*):
            Of a decoder, keep no more tokens than this: those of rows drawn with `seed` until there are enough. Rows
            that are not drawn are not run.
        rows (`LongTensor`, *optional*): rows to draw from with `max_tokens`; all by default.
        needs_labels (`bool`): with `False`, rows of an encoder may come without `labels`.

    Raises:
        ValueError: an unknown problem type, rows without `labels`, an empty data set, one without a token to predict,
            or a collator that gives other labels when it is asked again.
    """
    if len(dataset) == 0:
        raise ValueError("`dataset` is empty; at least one row is needed.")
    resolve_problem_type(problem_type, 1)
    disable_tqdm = disable_tqdm or not accelerator.is_local_main_process
    kept = _entries_per_row(model, dataset, data_collator, batch_size, max_tokens, rows, seed, disable_tqdm)
    batches = length_sorted_batches(dataset, batch_size, kept.nonzero().squeeze(1).tolist())
    path = None if directory is None else os.path.join(directory, f"states-{accelerator.process_index}.npy")
    parts: dict[str, Tensor] = {}
    filled, size = 0, int(kept.sum())
    with evaluating(model):
        for number, some in tqdm(
            _outputs(model, dataset, data_collator, accelerator, batches, kept, problem_type, needs_labels),
            total=-(-len(batches) // accelerator.num_processes),
            desc="Exit states",
            disable=disable_tqdm,
        ):
            if not parts:
                parts = {
                    name: _empty(size, value, path if name == "states" else None, memory_limit_mb)
                    for name, value in some.items()
                }
            for name, value in some.items():
                parts[name][number] = value
            filled += len(number)
    if filled != size:
        raise ValueError(f"`data_collator` gave {filled} tokens to predict where it gave {size} before.")
    about = {"layers": torch.tensor(model.layer_numbers), "problem_type": problem_type, "tolerance": tolerance}
    return ExitStore(**{"logits": None, **parts, **about, "made_on": made_on(model.config)})


def _entries_per_row(
    model: nn.Module,
    dataset: Any,
    data_collator: Any,
    batch_size: int,
    max_tokens: int | None,
    rows: Tensor | None,
    seed: int,
    disable_tqdm: bool,
) -> Tensor:
    """How many entries of each row (rows,) the store keeps: its first ones, all but in the last row that is drawn."""
    if model.item == "row":
        return torch.ones(len(dataset), dtype=torch.long)
    order = torch.arange(len(dataset))
    if max_tokens is not None:
        order = order if rows is None else rows
        order = order[torch.randperm(len(order), generator=torch.Generator().manual_seed(seed))]
    kept = torch.zeros(len(dataset), dtype=torch.long)
    for some in tqdm(order.split(batch_size), desc="Tokens to predict", disable=disable_tqdm):
        batch = _predictable(_collate(dataset, some.tolist(), data_collator))
        kept[some] = model.count_items(batch["labels"]).cpu()
        if max_tokens is not None and int(kept.sum()) >= max_tokens:
            before = kept[order].cumsum(0) - kept[order]
            kept[order] = (max_tokens - before).clamp_min(0).minimum(kept[order])
            break
    if not bool(kept.any()):
        raise ValueError("`dataset` has no token to predict: every label is -100, or rows have one token only.")
    return kept


def _collate(dataset: Any, rows: list[int], data_collator: Any, needs_labels: bool = True) -> dict[str, Tensor]:
    batch = data_collator([dataset[row] for row in rows])
    if needs_labels and "labels" not in batch:
        raise ValueError(f"`dataset` rows need `labels`; got {sorted(batch)}.")
    made = len(batch.get("labels", next(iter(batch.values()))))
    if made != len(rows):
        raise ValueError(f"`data_collator` made {made} rows of {len(rows)}; it must keep them apart.")
    return batch


def _predictable(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch of texts without a label at each row's first token, which nothing predicts. Padding on the left would
    stand in that place, and rows that need none would have one token less."""
    labels, mask = batch["labels"], batch.get("attention_mask")
    if mask is None or mask.shape != labels.shape:
        return batch
    first = (mask != 0).to(torch.int8).argmax(1, keepdim=True)
    return {**batch, "labels": labels.scatter(1, first, IGNORED)}


def _outputs(
    model: nn.Module,
    dataset: Any,
    data_collator: Any,
    accelerator: Accelerator | OneProcess,
    batches: list[list[int]],
    kept: Tensor,
    problem_type: str,
    needs_labels: bool,
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Numbers of entries and their part of the store, one batch per process at a time, gathered from all processes."""
    starts = kept.cumsum(0) - kept
    for start in range(0, len(batches), accelerator.num_processes):
        mine = start + accelerator.process_index
        rows = batches[min(mine, len(batches) - 1)]
        batch = _collate(dataset, rows, data_collator, needs_labels)
        batch = _predictable(batch) if model.item == "token" else batch
        batch = {name: value.to(accelerator.device) for name, value in batch.items()}
        with torch.no_grad(), accelerator.autocast():
            output = model(**batch, output_all_exits=True)
        parts = _parts(model.entries(output, batch.get("labels"), problem_type))
        row, column = torch.tensor(rows, device=parts["rows"].device)[parts["rows"]], _places(parts["rows"])
        parts |= {"rows": row, "number": starts.to(row.device)[row] + column}
        wanted = (column < kept.to(row.device)[row]) & (mine < len(batches))
        truth = [name for name, value in parts.items() if value.dtype == torch.bool]
        parts = {name: value[wanted].contiguous() for name, value in parts.items()}
        if isinstance(accelerator, Accelerator) and accelerator.num_processes > 1:
            # Truth values as numbers, since padding turns them into others.
            parts |= {name: parts[name].to(torch.int8) for name in truth}
            parts = {name: accelerator.pad_across_processes(value, pad_index=-1) for name, value in parts.items()}
            parts = accelerator.gather(parts)
        real = parts["number"] >= 0
        parts = {name: value[real].cpu() for name, value in parts.items()}
        parts |= {name: parts[name].bool() for name in truth}
        yield parts.pop("number"), parts


def _places(rows: Tensor) -> Tensor:
    """Number of each entry within its row, from the rows (entries,) of entries that come row by row."""
    counts = rows.bincount()
    first = counts.cumsum(0) - counts
    return torch.arange(len(rows), device=rows.device) - first[rows]


def _parts(entries: ExitEntries) -> dict[str, Tensor]:
    """Fields of the store for the entries of a batch; what is computed in half precision is kept in float32."""
    parts = {name: value for name, value in vars(entries).items() if value is not None}
    single = ("states", "logits", "token_losses", "features")
    return {name: value.float() if name in single else value for name, value in parts.items()}


def _empty(entries: int, like: Tensor, path: str | None, memory_limit_mb: int) -> Tensor:
    """An empty field of the store, memory-mapped when it has a path and is above the limit."""
    shape = (entries, *like.shape[1:])
    if path is None or 4 * math.prod(shape) <= memory_limit_mb * 2**20:
        return torch.empty(shape, dtype=like.dtype)
    return torch.from_numpy(mapped_array(path, shape, "Free space, or lower `policy_max_tokens` of a decoder."))
