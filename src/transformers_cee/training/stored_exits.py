# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The trainer's stored exits: of which rows, where, how long they hold; and the budgets that are fitted on them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from transformers_cee.evaluation.exit_budget import fit_exit_budgets
from transformers_cee.exits.deciding import resolve_decision
from transformers_cee.stores.filling import collect_exits
from transformers_cee.stores.store import ExitStore
from transformers_cee.training.checks import evaluation_sets
from transformers_cee.training.early_exit_trainer import EarlyExitTrainer
from transformers_cee.training.hardness import fingerprint
from transformers_cee.training.labels import FiniteLabels, without_labels
from transformers_cee.training.parameters import active_module


logger = logging.get_logger(__name__)


class StoredExitsTrainer(EarlyExitTrainer):
    """Collects exits of data sets once for as long as rows and weights stay the same. Arguments as in
    [`EarlyExitTrainer`]."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stores: dict[str, tuple[str, ExitStore]] = {}

    def collect_exits(
        self,
        dataset: Any,
        name: str = "other",
        max_tokens: int | None = None,
        rows: Tensor | None = None,
        needs_labels: bool = True,
    ) -> ExitStore:
        """Every exit's states and results for each row, or counted token, of `dataset`, in evaluation mode. What a
        phase has stored of the same rows and weights is not computed again.

        Args:
            dataset (sized, indexable): rows as the model takes them, with labels.
            name (`str`): names the file in `output_dir/exit_store` of states above `args.store_memory_limit_mb`.
            max_tokens (`int`, *optional*): of a decoder, the most tokens to keep, those of rows drawn at random.
            rows (`LongTensor`, *optional*): rows to draw from with `max_tokens`.
            needs_labels (`bool`): with `False`, labels of an encoder are not looked at, and not known to the store.
        """
        if max_tokens is None and self.args.policy_max_tokens is None and self._stores:
            mark = fingerprint(self._exit_model, dataset)
            for stored_mark, store in self._stores.values():
                if stored_mark == mark:
                    return store
        self._place_model()
        description = "exit states"
        collator = self.data_collator
        if hasattr(dataset, "column_names"):
            dataset = self._remove_unused_columns(dataset, description=description)
        else:
            collator = self._get_collator_with_removed_columns(collator, description=description)
        needs_labels = needs_labels or self.items.needs_labels
        if not needs_labels:
            collator = without_labels(collator)
        return collect_exits(
            self._exit_model,
            dataset,
            collator,
            self.accelerator,
            problem_type=self._problem_type(dataset if needs_labels else None),
            batch_size=self.args.per_device_eval_batch_size,
            directory=os.path.join(self.args.output_dir, "exit_store", name),
            memory_limit_mb=self.args.store_memory_limit_mb,
            tolerance=self.args.hardness_tolerance,
            max_tokens=max_tokens,
            rows=rows,
            seed=self._data_seed,
            needs_labels=needs_labels,
            disable_tqdm=self.args.disable_tqdm,
        )

    def _store(self, name: str, dataset: Any, mark: str, needs_labels: bool = True) -> ExitStore:
        stored = self._stores[name][0] if name in self._stores else ""
        if stored != mark and not needs_labels and not self.items.needs_labels:
            mark = f"{mark} without labels"
        if stored != mark:
            self._stores.pop(name, None)
            limit = self.args.policy_max_tokens
            rows = self._split()[1] if name == "train" and limit is not None else None
            with self._finite_labels() if needs_labels else nullcontext():
                self._stores[name] = (mark, self.collect_exits(dataset, name, limit, rows, needs_labels))
        return self._stores[name][1]

    def _split(self) -> tuple[Tensor, Tensor]:
        """Row numbers that the heads learn from, and those that the policies learn from."""
        rows = len(self.train_dataset)
        held_out = round(self.args.policy_holdout * rows)
        if held_out == 0:
            return torch.arange(rows), torch.arange(rows)
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(self._data_seed))
        return order[held_out:].sort().values, order[:held_out].sort().values

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def fit_exit_budgets(self) -> list[list[float]]:
        """Maps budgets to prices of a layer on the rows of all evaluation sets, of conditioned policies:
        `exit_budget=` then works. `train()` ends with it; labels are not looked at. See `evaluation.exit_budget`.

        Raises:
            ValueError: policies that are not conditioned, or no evaluation set.
        """
        if self.eval_dataset is None:
            raise ValueError(
                "`eval_dataset`=None must be a data set, or several by name: budgets are means over rows."
            )
        model = self._exit_model
        first_layer = model.layer_numbers[model.first_exit()]
        policies = active_module(model.exit_policies)
        stores = list(self._evaluation_stores(needs_labels=False).values())
        model.config.exit_budgets = fit_exit_budgets(policies, stores, min_exit_layer=first_layer)
        _check_default_budget(model.config)
        return model.config.exit_budgets

    def _evaluation_stores(self, needs_labels: bool = True) -> dict[str, ExitStore]:
        """Stored exits of the evaluation set, named "", or of several by their names."""
        sets = evaluation_sets(self)
        # Numbers, since names may be anything and these are folders.
        folders = ["eval" if name == "" else f"eval-{number}" for number, name in enumerate(sets)]
        return {
            name: self._store(folder, rows, fingerprint(self._exit_model, rows), needs_labels)
            for folder, (name, rows) in zip(folders, sets.items(), strict=True)
        }

    def _renew_budgets(self, fits: bool = True) -> None:
        """Names what is older than the weights. If there are rows for it, budgets are fitted to the policies anew,
        unless these are still to learn."""
        config, older = self._exit_model.config, ["exit_operating_points", "exit_estimators"]
        if fits and self._has_conditioned_policies and self.eval_dataset is not None:
            self.fit_exit_budgets()
        else:
            older.append("exit_budgets")
        stale = [name for name in older if getattr(config, name)]
        if stale:
            logger.warning(f"{' and '.join(stale)} of the config were fitted before this training: fit them again.")

    @property
    def _has_conditioned_policies(self) -> bool:
        return active_module(self._exit_model.exit_policies).is_conditioned

    @contextmanager
    def _finite_labels(self) -> Iterator[None]:
        """Batches with labels that are no finite numbers are refused."""
        collator = self.data_collator
        self.data_collator: Any = FiniteLabels(collator)
        try:
            yield
        finally:
            self.data_collator = collator


def _check_default_budget(config: Any) -> None:
    """Forgets a default budget that the policies no longer reach, with a warning: the config could not be loaded."""
    if config.exit_budget is None:
        return
    try:
        resolve_decision(config)
    except ValueError as error:
        logger.warning(f"`exit_budget` of the config is dropped: {error}")
        config.exit_budget = None
