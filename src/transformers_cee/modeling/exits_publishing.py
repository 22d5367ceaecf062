# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Publishing of exits without their base."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from transformers_cee.files import REMOTE_CODE_FILE
from transformers_cee.modeling.exits_folder import CARD, WEIGHTS
from transformers_cee.modeling.exits_saving import save_exits
from transformers_cee.stalls import stalls_end


def push_exits(
    model: Any,
    repo_id: str,
    base: str | None,
    revision: str | None,
    private: bool | None,
    token: str | bool | None,
    commit_message: str,
) -> Any:
    """Publishes a model's exits, see `ExitSetsMixin.push_exits_to_hub`.

    Raises:
        ValueError: as `save_exits`, and where the base is a folder of this machine.
        TimeoutError: the server has sent nothing for `STALL_SECONDS`.
    """
    base = base or model.name_or_path
    if base and os.path.exists(base):
        raise ValueError(
            f"`base`={base!r} is a folder of this machine, which nobody else can load; accepted is the base's name on "
            "the Hub."
        )
    with tempfile.TemporaryDirectory() as folder, stalls_end():
        save_exits(model, folder, base, card_name=repo_id, revision=revision, token=token)
        api = HfApi(token=token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        files = ["config.json", WEIGHTS, REMOTE_CODE_FILE]
        if not api.file_exists(repo, CARD):
            files.append(CARD)
        assert all((Path(folder) / name).exists() for name in files)
        return api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=files, commit_message=commit_message)


__all__ = ["push_exits"]
