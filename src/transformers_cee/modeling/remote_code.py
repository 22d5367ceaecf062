# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Makes a saved folder load with `trust_remote_code=True` and without `import transformers_cee`.

The folder gets one small file that hands out the classes of the installed package; `auto_map` in config.json points
to it. No model code is copied: the package stays the only place that it lives in.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers_cee.auto import register_family
from transformers_cee.families import MODELS, class_hint
from transformers_cee.files import REMOTE_CODE_FILE, write_text


# transformers scans the imports of a remote file and reports what is missing in its own words; it leaves out what
# stands in a `try`, so that this message is what a user sees.
_REMOTE_CODE = '''"""Hands out the classes of {package}, which is installed; no model code lives here."""

try:
    {imports}
except ModuleNotFoundError as error:
    if error.name != "{root}":
        raise
    raise ImportError(
        "This checkpoint is an early-exit model of {package}, which is not installed.{way}"
    ) from error
'''


def remote_auto_map(model_type: str) -> dict[str, str]:
    """The `auto_map` of config.json for a model type of this package: Auto class to `file.Class`."""
    module = Path(REMOTE_CODE_FILE).stem
    entry = MODELS[model_type]
    classes = {"AutoConfig": entry.config, **dict.fromkeys(("AutoModel", *entry.auto_classes), entry.model)}
    return {auto_class: f"{module}.{_class_name(cls)}" for auto_class, cls in classes.items()}


def write_remote_code(save_directory: str | os.PathLike[str], model_type: str) -> Path:
    """Writes the file that `remote_auto_map` points to into a folder, which is made when missing.

    Returns:
        `Path`: the file.
    """
    entry = MODELS[model_type]
    imports = [f"from {cls.rpartition('.')[0]} import {_class_name(cls)}" for cls in (entry.config, entry.model)]
    root = entry.model.partition(".")[0]
    ours = root == __name__.partition(".")[0]
    package = "the package transformers-cee" if ours else f"the module {root}"
    way = " Run `pip install transformers-cee`." if ours else ""
    path = Path(save_directory) / REMOTE_CODE_FILE
    write_text(path, _REMOTE_CODE.format(imports="\n    ".join(imports), root=root, package=package, way=way))
    return path


def _class_name(full_name: str) -> str:
    return full_name.rpartition(".")[2]


class RemoteCodeConfigMixin:
    """Config of a family that the Auto classes find, and whose saved folder also loads with `trust_remote_code=True`;
    mix in before `PreTrainedConfig`.

    A model saves its config with it, so this covers `model.save_pretrained`, `push_to_hub` and `Trainer`.
    """

    model_type: str

    @classmethod
    def class_hint(cls, model_type: Any) -> str:
        """Names the class for checkpoints of another model type."""
        return class_hint(model_type)

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        register_family(type(self).model_type)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Saves config.json, with an `auto_map`, and the file that it points to.

        Args:
            save_directory (`str` or `os.PathLike`): folder, made when missing.
            push_to_hub (`bool`, *optional*, defaults to `False`):
                Also push both to the Hub, to `repo_id` or else a repository named like the folder.
            kwargs: arguments of `push_to_hub`.
        """
        self.auto_map = remote_auto_map(self.model_type)
        super().save_pretrained(save_directory)  # type: ignore[misc]
        write_remote_code(save_directory, self.model_type)
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", Path(save_directory).name)
            self.push_to_hub(repo_id, **kwargs)  # type: ignore[attr-defined]

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Does nothing. `AutoConfig` calls it after it loaded this class through the remote file, and a class marked
        that way would copy its source file, without the modules that it imports, into every folder it is saved to.
        """
