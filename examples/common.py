# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What the training scripts share: options from the command line or a file, checks, logging, upload."""

import difflib
import json
import logging
import os
import sys
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import yaml
from huggingface_hub import HfApi
from huggingface_hub.repocard import metadata_load
from transformers import EarlyStoppingCallback, HfArgumentParser, TrainerCallback, TrainingArguments

from transformers_cee.files import read_json
from transformers_cee.hub.publishing import stalls_end, upload


# Levels of torch.set_float32_matmul_precision.
MATMUL_PRECISIONS = ("highest", "high", "medium")


# Longest configuration file, in bytes.
LONGEST_CONFIGURATION = 2**20
# Deepest nesting of its values.
DEEPEST_CONFIGURATION = 16


def parse_dataclasses(types: Iterable[type], argv: list[str], description: str) -> tuple[Any, ...]:
    """Command line to dataclasses; a leading .yaml or .json file stands for the options in it.

    Raises:
        ValueError: a file that cannot be read, or an unknown option; the message names the nearest known one.
    """
    types = tuple(types)
    parser = HfArgumentParser(types, description=description)
    known = [one.name for kind in types for one in fields(kind) if one.init]
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        path = Path(argv[0])
        options = read_options(path)
        for name in options:
            _check_option(name, known, f"{path}: ")
        argv = _words(path, options) + argv[1:]
    *parsed, rest = parser.parse_args_into_dataclasses(argv, look_for_args_file=False, return_remaining_strings=True)
    for word in rest:
        if word.startswith("--"):
            _check_option(word.removeprefix("--").partition("=")[0], known, "")
    if rest:
        raise ValueError(f"Words that belong to no option: {' '.join(rest)}.")
    return tuple(parsed)


def _check_option(name: str, known: list[str], where: str) -> None:
    if str(name).replace("-", "_") not in known:
        nearest = difflib.get_close_matches(str(name), known, n=1)
        meant = f"did you mean {nearest[0]!r}?" if nearest else "see --help for what is accepted."
        raise ValueError(f"{where}unknown option {name!r}; {meant}")


def read_options(path: Path) -> dict[str, Any]:
    """The options in a .yaml or .json file by name.

    Raises:
        ValueError: no such file, too large, damaged, with aliases, or no `name: value` pairs.
    """
    if not path.is_file():
        raise ValueError(f"No such configuration file: {str(path)!r}.")
    if path.stat().st_size > LONGEST_CONFIGURATION:
        raise ValueError(f"{path}: {path.stat().st_size} bytes; a configuration has at most {LONGEST_CONFIGURATION}.")
    if path.suffix == ".json":
        options = read_json(path, "A configuration holds one object: names with values.")
    else:
        options = _read_yaml(path)
    if not isinstance(options, dict):
        raise ValueError(f"{path}: expected `name: value` pairs; got {type(options).__name__}.")
    return options


def _read_yaml(path: Path) -> Any:
    try:
        text = path.read_bytes().decode("utf-8-sig")
        depth = 0
        # A few aliases of aliases stand for billions of values, and what is nested deep takes the parser forever.
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("aliases (`*name`) are not accepted")
            if depth > DEEPEST_CONFIGURATION:
                raise ValueError(f"values are nested more than {DEEPEST_CONFIGURATION} deep")
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: the configuration cannot be read: {' '.join(str(error).split())}.") from error


def _words(path: Path, options: dict[str, Any]) -> list[str]:
    """Options as command-line words, so that later words override them."""
    words = []
    for name, value in options.items():
        if isinstance(value, list):
            if any(isinstance(one, list | dict) or one is None for one in value):
                raise ValueError(f"{path}: `{name}` has {value!r:.80}; accepted are lists of texts and numbers.")
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}={json.dumps(value, default=str) if isinstance(value, dict) else value}")
    return words


class TrainingPrecision(TrainerCallback):
    """Matrix products of float32 tensors at a level of `torch.set_float32_matmul_precision` while weights are trained.
    Exits are collected and timed as the model will serve: at the level from before."""

    def __init__(self, level: str) -> None:
        self.level = self.before = level

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.level)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.set_float32_matmul_precision(self.before)


def training_callbacks(precision: str, early_stopping_patience: int | None) -> list[TrainerCallback]:
    """Callbacks of a run: the precision of its training, and an early stop where one is asked for."""
    callbacks: list[TrainerCallback] = [TrainingPrecision(precision)]
    if early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience))
    return callbacks


def check_files(paths: dict[str, str | None], file_types: tuple[str, ...]) -> None:
    """Raises `ValueError` for a path that is no existing file of one of the types; keys are the arguments' names."""
    for name, path in paths.items():
        if path is None:
            continue
        if Path(path).suffix not in file_types:
            raise ValueError(f"`{name}` must end in one of {', '.join(file_types)}; got {path!r}.")
        # Where `Path` raises for names that no file can have, this is False.
        if not os.path.isfile(path):
            raise ValueError(f"`{name}` must be an existing file; got {path!r}.")


def check_split_shares(arguments: Any, names: Iterable[str] = ("validation_split", "test_split")) -> None:
    """Raises `ValueError` for a share of the training rows outside of (0, 0.5)."""
    for name in names:
        if not 0.0 < getattr(arguments, name) < 0.5:
            raise ValueError(f"`{name}` must lie between 0 and 0.5 (both excluded); got {getattr(arguments, name)}.")


def check_positive(arguments: Any, names: Iterable[str]) -> None:
    """Raises `ValueError` for a number below 1; `None` passes."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1; got {value}.")


def check_stages(args: TrainingArguments) -> None:
    """Raises `ValueError` when neither training nor evaluation was asked for."""
    if not (args.do_train or args.do_eval):
        raise ValueError("Nothing to do: pass `--do_train`, `--do_eval` or both.")


def set_up_logging(logger: logging.Logger, args: TrainingArguments) -> None:
    """Logs to standard output: a script's own `logger` at `--log_level`, or what it has to tell if that is not given;
    the libraries from warnings up."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stdout, force=True)
    log_level = args.get_process_log_level()
    tells = args.log_level == "passive" and args.should_log
    logger.setLevel(logging.INFO if tells else log_level)
    datasets.utils.logging.set_verbosity(max(log_level, logging.WARNING))
    transformers.utils.logging.set_verbosity(max(log_level, logging.WARNING))


def resume_argument(args: TrainingArguments) -> bool | str | None:
    """`--resume_from_checkpoint` as `Trainer.train` takes it: a truth value, or the name of a folder."""
    named = args.resume_from_checkpoint
    return {"true": True, "false": None}.get(str(named).lower(), named)


def fitting_length(wanted: int, tokenizer: Any, config: Any, logger: logging.Logger) -> int:
    """`--max_seq_length`, or as many positions as tokenizer and model have; says so where these are fewer."""
    limit = min(int(tokenizer.model_max_length), config.max_position_embeddings)
    if wanted > limit:
        logger.warning(f"--max_seq_length {wanted} is more than the model's {limit} positions; {limit} is used.")
    return min(wanted, limit)


def can_draw(logger: logging.Logger) -> bool:
    """Is matplotlib there? Says so where it is not: everything but the pictures is made without it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        logger.warning("No pictures will be drawn: matplotlib is missing (pip install 'transformers-cee[plots]').")
        return False
    return True


def earlier_training(args: TrainingArguments, logger: logging.Logger) -> dict[str, Any]:
    """What an earlier run in the same folder wrote down about its training; an evaluation alone keeps it."""
    return {} if args.do_train else written_before(args, logger, "fitted_heads", "train", "train_seconds")


def written_before(args: TrainingArguments, logger: logging.Logger, *names: str) -> dict[str, Any]:
    """Some entries of the results.json that an earlier run left in the same folder."""
    path = Path(args.output_dir) / "results.json"
    if not path.is_file():
        return {}
    try:
        before = read_json(path, "It is written anew, without what it said of training.")
    except ValueError as error:
        logger.warning(str(error))
        return {}
    before = before if isinstance(before, dict) else {}
    return {name: before[name] for name in names if name in before}


def card_language(given: str | None, checkpoint: str, known: str | None = None) -> str | list[str] | None:
    """Language of a model card: as given, that of the data where it is known, or what the card of a checkpoint on this
    machine says; None where nobody says."""
    card = Path(checkpoint) / "README.md"
    if given or known or not card.is_file():
        return given or known
    try:
        return (metadata_load(card) or {}).get("language")
    except (ValueError, yaml.YAMLError):
        return None


def push(folder: Path, args: TrainingArguments) -> None:
    """Uploads the model folder: weights, configs, tokenizer, card and its pictures."""
    with stalls_end():
        repo = HfApi(token=args.hub_token).create_repo(
            args.hub_model_id or folder.absolute().name, private=args.hub_private_repo, exist_ok=True
        )
    upload(folder, repo.repo_id, token=args.hub_token, revision=args.hub_revision)
