# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""`add_exits`: a classifier becomes faster and says the same, as often as is promised."""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, DataCollatorWithPadding, PreTrainedConfig
from transformers.utils import logging

from transformers_cee.adding.data import (
    MOST_CERTIFYING,
    MOST_LEARNING,
    TextsToLearn,
    class_ids,
    prepare,
    read_texts,
    say_too_few,
)
from transformers_cee.adding.language import AUTO_CLASS as LANGUAGE_MODEL
from transformers_cee.adding.language import MOST_TEXTS, add_to_language_model
from transformers_cee.adding.learning import learn_heads, learn_policies
from transformers_cee.adding.report import AddedExits, CertifiedSpeed, save_added, write_report
from transformers_cee.auto import has_exits, model_class_of
from transformers_cee.calibration.agreement import calibrate_agreement
from transformers_cee.calibration.points import CalibratedPoint
from transformers_cee.calibration.prices import calibrate_price
from transformers_cee.calibration.scores import score_store
from transformers_cee.evaluation.wall_clock import measure_wall_clock
from transformers_cee.exits.deciding import criterion_settings
from transformers_cee.exits.fields import check_field, whole
from transformers_cee.exits.losses import resolve_problem_type
from transformers_cee.exits.numbers import plain, share
from transformers_cee.families import MODELS
from transformers_cee.modeling.exits_folder import EXITS
from transformers_cee.modeling.exits_saving import FromElsewhere
from transformers_cee.stores.filling import OneProcess, collect_exits
from transformers_cee.stores.store import ExitStore


logger = logging.get_logger(__name__)

AUTO_CLASS = "AutoModelForSequenceClassification"
# Where exits are, what they see and which prices of a layer their policies learn.
EXIT_FIELDS: dict[str, Any] = {
    "exit_pooling": "internal_mean",
    "policy_inputs": "log_confidence",
    "policy_condition": "film",
    "policy_alphas": [0.0001, 0.1],
    "exit_criterion": "policy",
    "exit_threshold": None,
}
TIMED_BATCH_SIZES = (1, 32)
TIMED_ROWS = 64


def add_exits(
    model: str | os.PathLike[str],
    texts: Any,
    output: str | os.PathLike[str],
    *,
    agreement: float | Sequence[float] = 0.99,
    risk: float = 0.05,
    text_column: str = "text",
    label_column: str | None = None,
    exit_layers: int | list[int] | None = None,
    batch_size: int = 32,
    device: str = "cpu",
    seed: int = 42,
    disable_tqdm: bool = False,
) -> AddedExits:
    """Gives exits to a classifier that was fine-tuned without, or to a language model, from texts without labels.

    The model stays as it is, and so do its answers at full depth. One pass over the texts stores the states of
    all layers; heads learn from them what the last layer says, and exit policies where it would say something else
    (self-supervised exits, Valade 2024, with the policy of ConsistentEE, Zeng et al. 2024). The texts that nothing
    has learned from certify how often an early answer is that of full depth: along the price of a layer, see
    [`calibrate_price`].

    Args:
        model (`str` or `os.PathLike`):
            Folder or Hub name of a fine-tuned classifier of texts, or of a language model, of any family. A language
            model's exits stand behind four of its layers by default; their heads are solved in closed form, and the
            promise is about its next tokens.
        texts (iterable of `str`, `datasets.Dataset`, `str` or `os.PathLike`):
            Texts as the classifier will see them, some thousand, or the path of a file in UTF-8: .txt with one text
            per line, .csv with a header, or .jsonl. They are cut in two at random; of more than 30,000 as many are
            drawn, of a language model of more than 4,000.
        output (`str` or `os.PathLike`):
            Folder for the exits: heads, policies and promises, a card and `results.json`. Auto classes load it, with
            the classifier that it names.
        agreement (`float` or list of `float`, *optional*, defaults to 0.99):
            Promised share of answers that are those of full depth. The operating point `"agreement-0.99"` is named
            after it; of several, the first is what the model does unless it is asked otherwise.
        risk (`float`, *optional*, defaults to 0.05): probability with which each promise may fail.
        text_column (`str`, *optional*, defaults to `"text"`): column of the texts, where there are several.
        label_column (`str`, *optional*):
            Column of true labels, of a classifier. Nothing learns from them; the accuracy is reported.
        exit_layers (`int` or `list[int]`, *optional*):
            As in a config; by default a text may leave after every layer, a token after four of them.
        batch_size (`int`, *optional*, defaults to 32): rows of a batch of the pass.
        device (`str`, *optional*, defaults to `"cpu"`): where the classifier runs.
        seed (`int`, *optional*, defaults to 42): of the cut in two and of what is drawn in learning.
        disable_tqdm (`bool`, *optional*, defaults to `False`): show no progress.

    Returns:
        [`AddedExits`]: what was reached. Where the texts do not certify the first agreement, exits are off by default,
        with a warning that says why.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: there is no such checkpoint.
        TypeError: no texts.
        ValueError: a checkpoint that has no classifier or has exits, a regression, a row without text, an unknown
            label, or an argument that is not accepted. Nothing has run by then.
    """
    start = time.perf_counter()
    levels = _levels(agreement)
    share("risk", risk)
    check_field("batch_size", batch_size, whole(1))
    _check_output(output)
    is_decoder = is_language_model(model)
    if is_decoder and label_column is not None:
        raise ValueError(f"`label_column`={label_column!r} is of a classifier; `model`={os.fspath(model)!r} is none.")
    most = 2 * MOST_TEXTS if is_decoder else MOST_CERTIFYING + MOST_LEARNING
    given = read_texts(texts, text_column, label_column, most, seed)
    if is_decoder:
        named = {_name(level): level for level in levels}
        added, decoder = add_to_language_model(
            model, given.texts, output, named, risk=risk, exit_layers=exit_layers, batch_size=batch_size,
            device=device, seed=seed, disable_tqdm=disable_tqdm,
        )  # fmt: skip
        write_report(added, decoder)
        return added
    found = _load_classifier(model, exit_layers, device)
    tokenizer = AutoTokenizer.from_pretrained(model)
    data = prepare(given, class_ids(given, found.config, label_column), tokenizer, found, seed)
    # Of both criteria each has half the risk.
    say_too_few(len(data.certifying), levels, risk / 2, MOST_CERTIFYING)
    seconds, begun = {}, time.perf_counter()
    # Where the exits will be there is room for their states.
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".exit-states-", dir=Path(output).parent) as folder:
        store = _stored(found, data, tokenizer, batch_size, folder, disable_tqdm)
        seconds["pass"], begun = time.perf_counter() - begun, time.perf_counter()
        store = learn_heads(found, store, data.learning, seed, disable_tqdm)
        learn_policies(found, store, data.learning, seed, disable_tqdm)
        held_out = store.select(data.certifying)
        del store
    seconds["learning"] = time.perf_counter() - begun
    points = {_name(level): _certified(found, held_out, level, risk) for level in levels}
    speeds = [_speed(found, name, point, held_out, data) for name, point in points.items()]
    for name, point in points.items():
        point.save_to(found, name)
    if speeds[0].reason is None:
        found.config.exit_threshold = speeds[0].name
    save_added(found, model, output)
    _time(found, speeds, data, tokenizer)
    seconds["all"] = time.perf_counter() - start
    accuracy = None if data.labels is None else _accuracy(held_out, data, _last(held_out))
    added = AddedExits(
        output=os.fspath(output),
        base=os.fspath(model),
        num_layers=found.config.num_hidden_layers,
        learning=len(data.learning),
        certifying=len(data.certifying),
        risk=risk,
        speeds=speeds,
        seconds=seconds,
        accuracy=accuracy,
    )
    write_report(added, found)
    return added


def _load_classifier(model: str | os.PathLike[str], exit_layers: int | list[int] | None, device: str = "cpu") -> Any:
    """A classifier with exits that have learned nothing yet.

    Raises:
        OSError: there is no such checkpoint.
        ValueError: a checkpoint without a classifier, with exits, of another architecture, or a regression.
    """
    source = os.fspath(model)
    model_class = model_class_of(source, AUTO_CLASS)
    config = model_class.config_class.from_pretrained(source, exit_layers=exit_layers, **EXIT_FIELDS)
    if resolve_problem_type(config.problem_type, config.num_labels) == "regression":
        raise ValueError(f"`model`={source!r} is a regression; accepted are classifiers, whose answers can agree.")
    if len(config.exit_layer_numbers) < 2:
        raise ValueError(f"`exit_layers`={exit_layers!r} has no exit before the last layer.")
    found, info = model_class.load_checkpoint(
        source, brings=FromElsewhere(model_class.task_modules), config=config, dtype=torch.float32
    )
    untrained = sorted(name for name in info["missing_keys"] if not name.startswith(EXITS))
    if untrained:
        raise ValueError(
            f"`model`={source!r} is no fine-tuned classifier: it lacks {untrained[0]!r}. Fine-tune it first, with "
            f"{AUTO_CLASS}."
        )
    return found.to(device).eval()


def is_language_model(model: str | os.PathLike[str]) -> bool:
    """Is a checkpoint a decoder that writes text? Raises `ValueError` where it has exits already."""
    source = os.fspath(model)
    if has_exits(source):
        raise ValueError(f"`model`={source!r} has exits already; accepted are models without.")
    values, _ = PreTrainedConfig.get_config_dict(source)
    decoders = {entry.stock for entry in MODELS.values() if LANGUAGE_MODEL in entry.auto_classes}
    # A classifier on a decoder is none.
    saved = values.get("architectures") or ["ForCausalLM"]
    return values.get("model_type") in decoders and any(name.endswith(("CausalLM", "LMHeadModel")) for name in saved)


def _check_output(output: str | os.PathLike[str]) -> None:
    path = Path(output)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"`output`={os.fspath(output)!r} exists and is no empty folder; give another name.")


def _levels(agreement: float | Sequence[float]) -> list[float]:
    given = plain(agreement)
    levels = given if isinstance(given, list) else [given]
    if not levels:
        raise ValueError(f"`agreement`={agreement!r} must be at least one number strictly between 0 and 1.")
    found = [share("agreement", level) for level in levels]
    if len({_name(level) for level in found}) < len(found):
        raise ValueError(f"`agreement`={agreement!r} must be numbers that differ in their first six digits.")
    return found


def _name(level: float) -> str:
    return f"agreement-{level:g}"


def _stored(
    model: Any, data: TextsToLearn, tokenizer: Any, batch_size: int, folder: str, disable_tqdm: bool
) -> ExitStore:
    return collect_exits(
        model,
        data.rows,
        DataCollatorWithPadding(tokenizer),
        OneProcess(model.device),
        problem_type=resolve_problem_type(model.config.problem_type, model.config.num_labels),
        batch_size=batch_size,
        directory=folder,
        needs_labels=False,
        disable_tqdm=disable_tqdm,
    )


def _both_ways(model: Any, store: ExitStore, level: float, risk: float) -> list[CalibratedPoint]:
    """What keeps a promise by the price of conditioned policies, and by one threshold of maximum probability."""
    with warnings.catch_warnings():
        # Said once, with the name of the point.
        warnings.simplefilter("ignore")
        return [
            calibrate_price(store, model, 1 - level, risk),
            calibrate_agreement(score_store(store, "max_probability", model), 1 - level, delta=risk),
        ]


def _certified(model: Any, store: ExitStore, level: float, risk: float) -> CalibratedPoint:
    """The shallower of both ways. Each is certified at half the risk, so that either may be picked on the same
    texts."""
    found = _both_ways(model, store, level, risk / 2)
    on = [point for point in found if point.reason is None]
    chosen = min(on or found[:1], key=lambda point: _depth(store, _taken(model, store, point)))
    # Of the one that was picked the whole risk holds.
    return replace(chosen, levels=chosen.levels | {"delta": risk})


def _taken(model: Any, store: ExitStore, point: CalibratedPoint) -> Tensor:
    """Exits (rows,) at which a store's texts leave."""
    settings = criterion_settings(model, point.alpha)
    return point.taken_exits(score_store(store, point.criterion, model, settings))


def _speed(model: Any, name: str, point: CalibratedPoint, store: ExitStore, data: TextsToLearn) -> CertifiedSpeed:
    taken, level = _taken(model, store, point), 1 - point.levels["epsilon"]
    alone = _both_ways(model, store, level, point.levels["delta"])
    found = CertifiedSpeed(
        name=name,
        promised=level,
        criterion=point.criterion,
        depth=_depth(store, taken),
        agreement=1 - float(store.disagrees.gather(1, taken.unsqueeze(1)).float().mean()),
        alone={way.criterion: _depth(store, _taken(model, store, way)) for way in alone},
        accuracy=None if data.labels is None else _accuracy(store, data, taken),
        reason=point.reason,
    )
    if point.reason is not None:
        logger.warning(f"Exits are off at {name!r}: {point.reason}")
    return found


def _depth(store: ExitStore, taken: Tensor) -> float:
    return float(store.layers[taken].float().mean())


def _last(store: ExitStore) -> Tensor:
    return torch.full((len(store),), len(store.layers) - 1)


def _accuracy(store: ExitStore, data: TextsToLearn, taken: Tensor) -> float:
    assert data.labels is not None and store.logits is not None
    answers = store.logits[torch.arange(len(store)), taken].argmax(-1)
    return float((answers == data.labels[data.certifying]).float().mean())


def _time(model: Any, speeds: list[CertifiedSpeed], data: TextsToLearn, tokenizer: Any) -> None:
    """Measures the time of each promise on some of the certifying texts, in turn with full depth."""
    # From everywhere: files may be sorted.
    step = max(1, len(data.certifying) // TIMED_ROWS)
    rows = data.rows.select(data.certifying[::step][:TIMED_ROWS].tolist())
    collate = DataCollatorWithPadding(tokenizer)
    on = [speed for speed in speeds if speed.reason is None]
    for size in TIMED_BATCH_SIZES if on else ():
        batches = []
        for at in range(0, len(rows), size):
            some = collate([rows[row] for row in range(at, min(at + size, len(rows)))])
            batches.append({name: value.to(model.device) for name, value in some.items()})
        found = measure_wall_clock(model, batches, [{"exit_threshold": speed.name} for speed in on])
        for speed, executed in zip(on, found, strict=True):
            speed.speedups[str(size)] = executed.speedup.reported


__all__ = ["add_exits"]
