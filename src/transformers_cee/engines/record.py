# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What the config of an exported model says of its folder: engine, precision, criterion, and the files that are its
own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from transformers_cee.exits.criteria import CRITERIA
from transformers_cee.exits.fields import Kind, check_field, check_fields, choice, flag, listed, mapping, text, whole


# Field of the config, file of the policies and estimators, and folder of the engine's own files.
RECORD = "exit_engine"
EXITS = "exits.safetensors"
GRAPHS = "engine"


def is_own_file(name: Any) -> bool:
    """Is this the name of a file of the folder or of its graphs, and no way out of it?"""
    return isinstance(name, str) and re.fullmatch(rf"({GRAPHS}/)?\w[\w.-]*", name) is not None


_FIELDS = {
    "engine": text,
    "precision": text,
    "criterion": choice(CRITERIA).or_none(),
    "most_tokens": whole(1).or_none(),
    "reads_longer": flag,
    "files": listed(Kind(is_own_file, "the name of a file of the folder")),
}


def check_record(record: Any) -> dict[str, Any]:
    """The record of an exported model.

    Raises:
        ValueError: a field that is missing, unknown or not of its kind, or a file outside of the folder.
    """
    check_field(RECORD, record, mapping)
    check_fields(record, _FIELDS, [name for name in _FIELDS if name != "reads_longer"], RECORD)
    checked: dict[str, Any] = record
    return checked


def exported_files(folder: Path) -> list[str]:
    """Files of a folder that belong to an exported model, beside those of every model; none of any other folder."""
    try:
        values = json.loads((folder / "config.json").read_text("utf-8"))
        return [EXITS, *check_record(values[RECORD])["files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
