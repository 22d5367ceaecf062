# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What the training scripts share: options from the command line or a file, checks, logging, upload."""

import json
import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import yaml
from huggingface_hub import HfApi
from transformers import EarlyStoppingCallback, HfArgumentParser, TrainerCallback, TrainingArguments


# What a run leaves in its folder for itself and not for a reader.
NOT_PUBLISHED = ("hardness.safetensors",)
# Levels of torch.set_float32_matmul_precision.
MATMUL_PRECISIONS = ("highest", "high", "medium")


def parse_dataclasses(types: Iterable[type], argv: list[str], description: str) -> tuple[Any, ...]:
    """Command line to dataclasses; a leading .yaml or .json file stands for the options in it."""
    parser = HfArgumentParser(tuple(types), description=description)
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        argv = options_from_file(Path(argv[0])) + argv[1:]
    return parser.parse_args_into_dataclasses(argv, look_for_args_file=False)


def options_from_file(path: Path) -> list[str]:
    """The options in a .yaml or .json file as command-line words, so that later words override them."""
    if not path.is_file():
        raise ValueError(f"No such configuration file: {str(path)!r}.")
    text = path.read_text(encoding="utf-8")
    options = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    if not isinstance(options, dict):
        raise ValueError(f"{path}: expected `name: value` pairs; got {type(options).__name__}.")
    words = []
    for name, value in options.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
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
        if not Path(path).is_file():
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
    """`--resume_from_checkpoint` as `Trainer.train` takes it."""
    return True if args.resume_from_checkpoint in ("true", "True") else args.resume_from_checkpoint


def push(folder: Path, args: TrainingArguments) -> None:
    """Uploads the model folder: weights, config, tokenizer, card, pictures and results, without checkpoints."""
    api = HfApi(token=args.hub_token)
    repo = api.create_repo(args.hub_model_id or folder.name, private=args.hub_private_repo, exist_ok=True)
    files = [path.name for path in folder.iterdir() if path.is_file() and path.suffix != ".bin"]
    files = [name for name in files if name not in NOT_PUBLISHED]
    api.upload_folder(repo_id=repo.repo_id, folder_path=folder, allow_patterns=files)
