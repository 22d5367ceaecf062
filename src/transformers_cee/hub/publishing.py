# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What is published of a run's folder: the model, its tokenizer and its card, and nothing else that lies there."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from transformers_cee.engines.record import exported_files
from transformers_cee.files import REMOTE_CODE_FILE
from transformers_cee.stalls import stalls_end


# Optimizers, states of random numbers, `training_args.bin` with its token, stored exits of training rows and whatever
# else a folder may hold are not listed, so they stay where they are.
WEIGHTS = r"(adapter_)?model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
CONFIGS = ("config.json", "generation_config.json", "adapter_config.json", REMOTE_CODE_FILE)
TOKENIZERS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "preprocessor_config.json",
    "processor_config.json",
)
TEMPLATES = "additional_chat_templates"
CARD = "README.md"


def published_files(folder: str | os.PathLike[str], processing_class: Any = None) -> list[str]:
    """Files of a folder that may be published, by their path in it: weights, configs, tokenizer, card, and the
    pictures that the card shows.

    Args:
        processing_class (tokenizer or processor, *optional*): names the files of its vocabulary, if it has unusual
            ones.
    """
    folder = Path(folder)
    names = {*CONFIGS, *TOKENIZERS, CARD, *getattr(processing_class, "vocab_files_names", {}).values()}
    names |= _pictures(folder / CARD)
    files = [path for path in folder.iterdir() if path.name in names or re.fullmatch(WEIGHTS, path.name)]
    files += (folder / TEMPLATES).glob("*.jinja")
    files += [folder / name for name in exported_files(folder)]
    return sorted(path.relative_to(folder).as_posix() for path in files if path.is_file())


def _pictures(card: Path) -> set[str]:
    """Names of the pictures beside a card that it shows."""
    if not card.is_file():
        return set()
    shown = re.findall(r"!\[[^\]]*\]\(([^()\s]+\.(?:png|svg|jpg|jpeg|gif))\)", card.read_text("utf-8", "replace"))
    return {name for name in shown if os.path.basename(name) == name}


def upload(
    folder: str | os.PathLike[str], repo_id: str, *, processing_class: Any = None, token: Any = None, **kwargs: Any
) -> Any:
    """Uploads what may be published of a folder, see `published_files`.

    Args:
        kwargs: those of `HfApi.upload_folder`.

    Raises:
        TimeoutError: the server has sent nothing for `STALL_SECONDS`.
    """
    # Names that mean themselves, also as patterns.
    files = [re.sub(r"([\[*?])", r"[\1]", name) for name in published_files(folder, processing_class)]
    with stalls_end():
        return HfApi(token=token).upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=files, ignore_patterns=[], **kwargs
        )
