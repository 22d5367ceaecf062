# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A classifier is exported: its graphs are written for an engine, and its promises are fitted anew there."""

from __future__ import annotations

import copy
import math
import os
import shutil
import statistics
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import save_file
from torch import Tensor
from transformers import DataCollatorWithPadding
from transformers.utils import logging

from transformers_cee.engines.costs import measure_costs
from transformers_cee.engines.engine import ENGINES, Engine, Written
from transformers_cee.engines.graphs import fits_graph, problem_type, token_inputs
from transformers_cee.engines.loading import load_exported
from transformers_cee.engines.model import ExportedSequenceClassifier
from transformers_cee.engines.promises import Promises, exits_of, fit_promises, take_promises
from transformers_cee.engines.record import EXITS, GRAPHS, RECORD
from transformers_cee.engines.serving import choose, keep_own, of_layers, rates_of, save_serving, subset
from transformers_cee.engines.tracing import tracing
from transformers_cee.exits.criteria import CRITERIA
from transformers_cee.exits.evaluating import evaluating
from transformers_cee.exits.fields import check_field, whole
from transformers_cee.exits.losses import check_labels
from transformers_cee.exits.numbers import plain, share
from transformers_cee.exits.support import MASKED
from transformers_cee.modeling.exits_saving import check_no_adapters
from transformers_cee.modeling.sequence_classification import EarlyExitSequenceClassifier
from transformers_cee.stores.filling import similar_length_batches
from transformers_cee.tokenizing import longest_text, tokenizer_of


logger = logging.get_logger(__name__)

# Texts that static scales are taken from, and rows of a batch of them.
SCALE_TEXTS, SCALE_ROWS = 256, 8


def export_model(
    model: EarlyExitSequenceClassifier,
    output: str | os.PathLike[str],
    *,
    engine: str = "openvino",
    precision: str = "int8",
    calibration_texts: Sequence[str] | None = None,
    calibration_labels: Sequence[Any] | None = None,
    processing_class: Any = None,
    exit_criterion: str | None = None,
    exit_layers: str | None = None,
    agreement: float = 0.99,
    batch_size: int = 32,
    measure: bool = True,
) -> ExportedSequenceClassifier:
    """Exports a classifier, see [`~EarlyExitSequenceClassifier.export`]."""
    made = ENGINES.find(engine)
    made.require()
    made.check_precision(precision)
    criterion = _check_model(model, exit_criterion)
    target = Path(output).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"`output`={os.fspath(output)!r} exists and is no empty folder; give another name.")
    texts = _check_texts(calibration_texts, made, precision)
    _check_labels(calibration_labels, texts, model.config)
    if exit_layers not in (None, "auto"):
        raise ValueError(
            f"`exit_layers`={exit_layers!r} must be 'auto', or None for all exits of the model. Others are chosen "
            "when it is loaded: `from_pretrained(..., exit_layers=[...])`."
        )
    share("agreement", agreement)
    check_field("batch_size", batch_size, whole(1))
    if exit_layers == "auto" and not (texts and measure):
        raise ValueError(
            "`exit_layers`='auto' takes `calibration_texts` and `measure`=True: exits are chosen by both."
        )
    if exit_layers == "auto" and criterion is None:
        raise ValueError(
            f"`exit_layers`='auto' needs a criterion in the graphs, which {model.config.exit_criterion!r} cannot be; "
            "give another `exit_criterion`."
        )
    if exit_layers == "auto" and len(model.layer_numbers) == 1:
        raise ValueError("`exit_layers`='auto' has nothing to choose from: the model has no internal exits.")
    if texts and processing_class is None:
        processing_class = tokenizer_of(model, "`calibration_texts`")
    if not texts and processing_class is None:
        with suppress(ValueError):
            processing_class = tokenizer_of(model, "texts")
    rows = _tokens(texts, processing_class, model, calibration_labels) if texts else None
    target.parent.mkdir(parents=True, exist_ok=True)
    # Written beside and moved at the end: whatever is at `output` is whole. A folder that is there may be all that
    # may be written to, and no folder that could be replaced.
    is_there = target.exists()
    beside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target if is_there else target.parent))
    # The folder around it is for this process alone, what is moved for everybody.
    written = beside / "written"
    try:
        written.mkdir()
        exported, promises = _write(model, written, made, precision, criterion, rows, processing_class)
        if rows is not None and precision in made.calibrated:
            rows = _without(rows, _scale_rows(len(rows)))
        _prepare(exported, promises, written, rows, processing_class, exit_layers, agreement, batch_size, measure)
        if is_there:
            # The config last: without it nothing is loaded.
            for path in sorted(written.iterdir(), key=lambda path: path.name == "config.json"):
                os.replace(path, target / path.name)
        else:
            os.replace(written, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return load_exported(target, threads=exported.engine.threads)


def _check_model(model: Any, criterion: str | None) -> str | None:
    """The criterion whose score becomes part of the graphs, if one can; raises what stands in the way of an export."""
    if isinstance(model, ExportedSequenceClassifier):
        raise TypeError(
            f"`model` is exported to {model.record['engine']!r} already; export the one that it was made of."
        )
    if not isinstance(model, EarlyExitSequenceClassifier):
        raise TypeError(f"`model` of type {type(model).__name__} must be a classifier of texts with exits.")
    check_no_adapters(model)
    asked = model.config.exit_criterion if criterion is None else criterion
    if fits_graph(CRITERIA.find(asked), model.exit_policies):
        return asked
    if criterion is not None:
        accepted = sorted(name for name, cls in CRITERIA.items() if fits_graph(cls, model.exit_policies))
        raise ValueError(
            f"`exit_criterion`={criterion!r} cannot be part of a graph; accepted are {', '.join(accepted)}. "
            "Others are asked outside of it, whatever the export was made for."
        )
    return None


def _check_texts(texts: Sequence[str] | None, engine: type[Engine], precision: str) -> list[str]:
    if texts is None:
        if precision in engine.calibrated:
            raise ValueError(
                f"`calibration_texts`=None, but `precision`={precision!r} of {engine.name!r} takes its scales from "
                "texts: give some hundred of those that the model is for, without labels."
            )
        return []
    given = [texts] if isinstance(texts, str) else list(texts)
    wrong = next((text for text in given if not isinstance(text, str) or not text.strip()), None)
    if isinstance(texts, str) or not given or wrong is not None:
        raise ValueError(f"`calibration_texts` must be a list of texts, none of them empty; got {wrong or texts!r}.")
    return given


def _check_labels(labels: Sequence[Any] | None, texts: Sequence[str], config: Any) -> None:
    """Raises `ValueError` unless these are labels of the texts, as the model's data sets hold them."""
    if labels is None:
        return
    if isinstance(labels, str) or len(labels) != len(texts):
        raise ValueError(
            f"`calibration_labels` must be a list of one label for each of {len(texts)} `calibration_texts`; got "
            f"{len(labels)}."
        )
    try:
        values = torch.tensor([plain(label) for label in labels])
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`calibration_labels` begin with {labels[0]!r}; accepted are numbers as in a data set's `labels`."
        ) from error
    check_labels(values, len(labels), config.num_labels, problem_type(config))


def _tokens(texts: Sequence[str], tokenizer: Any, model: Any, labels: Sequence[Any] | None) -> Dataset:
    made = tokenizer(list(texts), truncation=True, max_length=longest_text(model, tokenizer))
    columns = {} if labels is None else {"labels": [plain(label) for label in labels]}
    return Dataset.from_dict({name: made[name] for name in made} | columns)


def _write(
    model: Any,
    folder: Path,
    engine: type[Engine],
    precision: str,
    criterion: str | None,
    rows: Dataset | None,
    processing_class: Any,
) -> tuple[ExportedSequenceClassifier, Promises]:
    config = copy.deepcopy(model.config)
    config.exit_layers, config.architectures = list(model.layer_numbers), [type(model).__name__]
    promises = take_promises(config)
    graphs = folder / GRAPHS
    graphs.mkdir()
    samples = [] if rows is None else _samples(rows, processing_class, token_inputs(config))
    with evaluating(model):
        frozen = copy.deepcopy(model).float().cpu().requires_grad_(False)
        if frozen.config._attn_implementation not in MASKED:
            # Others are for GPUs, or cannot be traced.
            frozen.set_attn_implementation("sdpa")
        with tracing():
            engine.write(Written(frozen, precision, criterion, samples), graphs)
    own = {name: value for name, value in frozen.state_dict().items() if name.startswith(_KEPT)}
    save_file({name: value.contiguous() for name, value in own.items()}, folder / EXITS)
    files = sorted(f"{GRAPHS}/{path.name}" for path in graphs.iterdir())
    about = {"criterion": criterion, "most_tokens": model.most_tokens, "reads_longer": model.reads_longer}
    setattr(config, RECORD, {"engine": engine.name, "precision": precision, **about, "files": files})
    if processing_class is not None:
        processing_class.save_pretrained(folder)
    config.save_pretrained(folder)
    return load_exported(folder), promises


def _prepare(
    exported: ExportedSequenceClassifier,
    promises: Promises,
    folder: Path,
    rows: Dataset | None,
    processing_class: Any,
    exit_layers: str | None,
    agreement: float,
    batch_size: int,
    measure: bool,
) -> None:
    """Fits promises, measures costs and chooses exits, on the engine itself."""
    store = None if rows is None else exits_of(exported, rows, processing_class, batch_size)
    fit_promises(exported, promises, store)
    if store is not None and measure and exported.record["criterion"] is not None and exported.last_exit:
        exported.costs = measure_costs(exported)
        if exit_layers == "auto":
            lengths = [len(ids) for ids in rows["input_ids"]]  # type: ignore[index]
            with warnings.catch_warnings():
                # Said once, with the name of the point.
                warnings.filterwarnings("ignore", "Exits are off: ")
                found = choose(exported, store, exported.costs, agreement, batch_size, statistics.median(lengths))
            places = torch.tensor([store.layers.tolist().index(layer) for layer in found.exit_layers])
            store, exported = subset(store, places), of_layers(exported, found.exit_layers)
            keep_own(folder, EXITS, exported.config)
            name = f"agreement-{agreement:g}"
            if found.reason is not None:
                warnings.warn(f"Exits are off at {name!r}: {found.reason}", stacklevel=4)
            found.point.save_to(exported, name)
            exported.config.exit_threshold, exported.config.exit_budget = name, None
        exported.rates = rates_of(exported, store)
    exported.record["files"] += save_serving(exported, folder)
    exported.config.save_pretrained(folder)


# Of the exits, what calibration asks outside of the graphs.
_KEPT = ("exit_policies.", "exit_estimators.")


def _samples(rows: Dataset, processing_class: Any, names: Sequence[str]) -> list[dict[str, Tensor]]:
    """Batches of rows of similar length, evenly taken from all."""
    taken = rows.select(_scale_rows(len(rows))).select_columns([name for name in names if name in rows.column_names])
    lengths = [len(ids) for ids in taken["input_ids"]]
    collate = DataCollatorWithPadding(processing_class)
    batches = [
        collate([taken[row] for row in some])
        for some in similar_length_batches(range(len(taken)), lengths, SCALE_ROWS)
    ]
    return [_named(batch, names) for batch in batches]


def _scale_rows(count: int) -> range:
    """Which of so many rows set the scales. Nothing is certified on them: they are the ones that scales fit best."""
    return range(count % 2 if count > 1 else 0, count, max(2, math.ceil(count / SCALE_TEXTS)))


def _without(rows: Dataset, taken: range) -> Dataset:
    """Rows that are not taken; all where there is but one."""
    left = sorted(set(range(len(rows))) - set(taken))
    return rows.select(left) if left else rows


def _named(batch: Any, names: Sequence[str]) -> dict[str, Tensor]:
    """A batch with all that the first layer takes, masks as truth values."""
    given = {name: batch[name] for name in names if name in batch}
    given["attention_mask"] = given["attention_mask"] != 0
    if "token_type_ids" in names:
        given.setdefault("token_type_ids", torch.zeros_like(given["input_ids"]))
    return given
