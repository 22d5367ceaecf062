# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Exits of a whole data set, computed once: what hindsight curves, hardness and policies work on.

An *entry* of a store is what leaves at one exit: a row of an encoder, a counted token of a decoder.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from transformers_cee.evaluation.mapped import mapped_array
from transformers_cee.exits.losses import exit_errors, exit_losses, resolve_problem_type
from transformers_cee.exits.policy import all_features
from transformers_cee.files import replacing


# Loss terms of rewards.
REWARD_LOSSES = ("ce", "error", "disagreement")


@dataclass
class ExitStore:
    """Every exit's state and result for every entry of a data set, in evaluation mode, in the data set's order; tokens
    row by row, from left to right.

    Of an encoder the logits are kept and everything else follows from them. Of a decoder, whose logits are as wide as
    the vocabulary, losses and predictions are kept instead.

    Args:
        states (`Tensor` of shape `(entries, exits, hidden)`): exit states, float32, possibly memory-mapped.
        logits (`Tensor` of shape `(rows, exits, labels)`, *optional*): logits of all exit heads, float32; None with
            tokens.
        labels (`Tensor` of shape `(entries,)` or `(rows, labels)`): true labels, or the tokens to predict; NaN where
            they are not known.
        layers (`LongTensor` of shape `(exits,)`): 1-based layer of each exit.
        problem_type (`str`): what logits and labels mean; a token is one class of the vocabulary.
        tolerance (`float`): in regression, the absolute error up to which a head counts as right.
        features (`Tensor` of shape `(entries, exits − 1, 5)`, *optional*): confidence features, if policies use them.
        token_losses (`Tensor` of shape `(tokens, exits)`, *optional*): cross-entropy of each token at each exit.
        predictions (`LongTensor` of shape `(tokens, exits)`, *optional*): each exit's most probable token.
        rows (`LongTensor` of shape `(entries,)`, *optional*): row of the data set; by default the entry's number.
        may_exit (`BoolTensor` of shape `(entries,)`, *optional*):
            Can the entry leave before the last exit? By default all can; the last token of a prompt cannot.
    """

    states: Tensor
    logits: Tensor | None
    labels: Tensor
    layers: Tensor
    problem_type: str
    tolerance: float = 0.5
    features: Tensor | None = None
    token_losses: Tensor | None = None
    predictions: Tensor | None = None
    rows: Tensor | None = None
    may_exit: Tensor | None = None

    def __post_init__(self) -> None:
        if self.rows is None:
            self.rows = torch.arange(len(self))
        if self.may_exit is None:
            self.may_exit = torch.ones(len(self), dtype=torch.bool)
        exits = (len(self), len(self.layers))
        shapes = dict.fromkeys(("states", "logits", "token_losses", "predictions"), exits)
        for name, shape in {**shapes, "rows": exits[:1], "may_exit": exits[:1], "features": exits[:1]}.items():
            value = getattr(self, name)
            if value is not None and tuple(value.shape[: len(shape)]) != shape:
                raise ValueError(f"`{name}` of shape {tuple(value.shape)} must begin with {shape}, as `labels` do.")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def has_labels(self) -> bool:
        """Are the labels known? What needs none can be asked of a store without: scores, disagreement, budgets."""
        return not bool(self.labels.isnan().any())

    @property
    def losses(self) -> Tensor:
        """Loss (entries, exits) of each entry at each exit."""
        if self.logits is None:
            return self._of_tokens(self.token_losses)
        return exit_losses(self.logits, self._known_labels(), self.problem_type)

    @property
    def errors(self) -> Tensor:
        """Error (entries, exits) of each entry at each exit."""
        if self.logits is None:
            return (self._of_tokens(self.predictions) != self.labels.unsqueeze(1)).float()
        return exit_errors(self.logits, self._known_labels(), self.problem_type)

    @property
    def disagreements(self) -> Tensor:
        """Error (entries, exits) of each entry at each exit when the last exit's prediction is taken for the truth."""
        if self.logits is None:
            predictions = self._of_tokens(self.predictions)
            return (predictions != predictions[:, -1:]).float()
        last = self.logits[:, -1]
        if self.problem_type == "single_label_classification":
            last = last.argmax(-1)
        elif self.problem_type == "multi_label_classification":
            last = (last > 0).float()
        return exit_errors(self.logits, last, self.problem_type)

    def reward_losses(self, name: str) -> Tensor:
        """The loss term (entries, exits) of rewards: `"ce"`, `"error"` or `"disagreement"`."""
        if name not in REWARD_LOSSES:
            raise ValueError(f"`name`={name!r} is unknown; accepted are {', '.join(REWARD_LOSSES)}.")
        if name == "ce":
            return self.losses
        return self.errors if name == "error" else self.disagreements

    @property
    def correct(self) -> Tensor:
        """Does each exit predict the entry's label? (entries, exits)."""
        return self.errors <= self._same

    @property
    def disagrees(self) -> Tensor:
        """Does each exit predict something else than the last one? (entries, exits)."""
        return self.disagreements > self._same

    @property
    def _same(self) -> float:
        """Error up to which two predictions count as the same."""
        return self.tolerance if self.problem_type == "regression" else 0.0

    def select(self, entries: Tensor) -> "ExitStore":
        """The store of some entries (LongTensor) only; states are copied."""
        shared = ("layers", "problem_type", "tolerance")
        kept = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in shared}
        return replace(self, **{name: value[entries] for name, value in kept.items() if value is not None})

    def deciding(self, rows: Tensor | None = None) -> Tensor:
        """Numbers of the entries that can leave early, all or those of some rows (LongTensor) of the data set."""
        assert self.rows is not None and self.may_exit is not None
        mine = self.may_exit if rows is None else self.may_exit & torch.isin(self.rows, rows)
        return mine.nonzero().squeeze(1)

    def check_model(self, model: nn.Module) -> None:
        """Raises `ValueError` for an early-exit model whose exits are not those of the store."""
        numbers, size = list(model.layer_numbers), model.config.hidden_size
        if self.layers.tolist() != numbers or self.states.shape[-1] != size:
            raise ValueError(
                f"`store` has exits at layers {self.layers.tolist()} and states of {self.states.shape[-1]} numbers; "
                f"this model has {numbers} and {size}. Collect it again with this model."
            )

    def save(self, path: str | os.PathLike) -> None:
        """Replaces a safetensors file by the store."""
        tensors = {name: value.contiguous() for name, value in vars(self).items() if isinstance(value, Tensor)}
        about = {"problem_type": self.problem_type, "tolerance": repr(self.tolerance)}
        with replacing(path) as beside:
            save_file(tensors, beside, metadata=about)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "ExitStore":
        """Reads a store that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, or holds something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            return cls(
                **{"logits": None, **tensors}, problem_type=about["problem_type"], tolerance=float(about["tolerance"])
            )
        except (SafetensorError, TypeError, KeyError, ValueError) as error:
            raise ValueError(
                f"{os.fspath(path)} is damaged, or no store of exits ({error}). Delete it and store the exits again."
            ) from error

    def _known_labels(self) -> Tensor:
        if not self.has_labels:
            raise ValueError("`labels` of the store are not known (`needs_labels=False`), and losses need them.")
        return self.labels

    @staticmethod
    def _of_tokens(value: Tensor | None) -> Tensor:
        if value is None:
            raise ValueError("A store without `logits` needs `token_losses` and `predictions`.")
        return value


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without dropout; afterwards the model is in the mode it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def count_labels(labels: Tensor) -> Tensor:
    """Counted tokens (rows,) of labels (rows, time): positions whose next label is not −100."""
    return (labels[:, 1:] != -100).sum(1)


def length_sorted_batches(dataset: Any, batch_size: int, rows: Sequence[int] | None = None) -> list[list[int]]:
    """Row numbers in batches of rows of similar length, longest first; in order for data without `input_ids`.

    Batches do not depend on the number of processes, so that every row meets the same neighbours everywhere.

    Args:
        dataset (sized): the data set.
        batch_size (`int`): rows per batch.
        rows (sequence of `int`, *optional*): the rows to take, ascending; all by default.
    """
    columns = getattr(dataset, "column_names", None) or ()
    order = list(range(len(dataset)) if rows is None else rows)
    if "input_ids" in columns:
        lengths = [len(ids) for ids in dataset["input_ids"]]
        order.sort(key=lambda row: -lengths[row])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


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
        accelerator (`Accelerator`): device, precision and processes.
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
    return ExitStore(**{"logits": None, **parts, **about})


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
    if not model.exits_per_token:
        return torch.ones(len(dataset), dtype=torch.long)
    order = torch.arange(len(dataset))
    if max_tokens is not None:
        order = order if rows is None else rows
        order = order[torch.randperm(len(order), generator=torch.Generator().manual_seed(seed))]
    kept = torch.zeros(len(dataset), dtype=torch.long)
    for some in tqdm(order.split(batch_size), desc="Tokens to predict", disable=disable_tqdm):
        kept[some] = count_labels(_collate(dataset, some.tolist(), data_collator)["labels"]).cpu()
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


def _outputs(
    model: nn.Module,
    dataset: Any,
    data_collator: Any,
    accelerator: Accelerator,
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
        batch = _collate(dataset, rows, data_collator, needs_labels or model.exits_per_token)
        batch = {name: value.to(accelerator.device) for name, value in batch.items()}
        with torch.no_grad(), accelerator.autocast():
            output = model(**batch, output_all_exits=True)
        labels = batch.get("labels", output.exit_layers.new_full((len(rows),), torch.nan, dtype=torch.float))
        row, column = _places(model, output, labels)
        row_numbers = torch.tensor(rows, device=row.device)[row]
        number = starts.to(row.device)[row_numbers] + column
        wanted = (column < kept.to(row.device)[row_numbers]) & (mine < len(batches))
        parts = {"number": number, "rows": row_numbers, **_parts(model, output, labels, problem_type)}
        parts = {name: value[wanted].contiguous() for name, value in parts.items()}
        if accelerator.num_processes > 1:
            parts = {name: accelerator.pad_across_processes(value, pad_index=-1) for name, value in parts.items()}
            parts = accelerator.gather(parts)
        real = parts["number"] >= 0
        parts = {name: value[real].cpu() for name, value in parts.items()}
        if "may_exit" in parts:
            parts["may_exit"] = parts["may_exit"].bool()
        yield parts.pop("number"), parts


def _places(model: nn.Module, output: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Row of the batch and number within that row of each entry, both (entries,)."""
    if not model.exits_per_token:
        row = torch.arange(len(labels), device=labels.device)
        return row, torch.zeros_like(row)
    row = output.token_rows
    counts = count_labels(labels)
    first = counts.cumsum(0) - counts
    return row, torch.arange(len(row), device=row.device) - first[row]


def _parts(model: nn.Module, output: Any, labels: Tensor, problem_type: str) -> dict[str, Tensor]:
    """Fields of the store for the entries of a batch."""
    parts = {"states": output.all_exit_states.float()}
    if model.exits_per_token:
        parts["labels"] = output.token_labels
        parts["token_losses"] = output.all_exit_losses.float()
        parts["predictions"] = output.all_exit_predictions
        # A number, since padding turns truth values into others.
        parts["may_exit"] = output.may_exit.to(torch.int8)
    else:
        parts["labels"] = labels
        parts["logits"] = output.all_exit_logits.float()
    features = exit_features(model, output, problem_type)
    if features is not None:
        parts["features"] = features.float()
    return parts


def exit_features(model: nn.Module, output: Any, problem_type: str) -> Tensor | None:
    """Confidence features (entries, exits − 1, 5) of an output with all exits; None when the policies look at states
    only."""
    if not model.exit_policies.needs_logits:
        return None
    if model.exits_per_token:
        return output.all_exit_features
    return all_features(output.all_exit_logits, problem_type)


def _empty(entries: int, like: Tensor, path: str | None, memory_limit_mb: int) -> Tensor:
    """An empty field of the store, memory-mapped when it has a path and is above the limit."""
    shape = (entries, *like.shape[1:])
    if path is None or 4 * math.prod(shape) <= memory_limit_mb * 2**20:
        return torch.empty(shape, dtype=like.dtype)
    return torch.from_numpy(mapped_array(path, shape, "Free space, or lower `policy_max_tokens` of a decoder."))
