# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
from __future__ import annotations

import json

import pytest
from tiny_models import run_python, tiny_config, tiny_model
from transformers import AutoModelForSequenceClassification
from transformers.dynamic_module_utils import get_imports

from transformers_cee.files import REMOTE_CODE_FILE
from transformers_cee.modeling.remote_code import remote_auto_map, write_remote_code


def test_file_is_short_and_hides_no_requirement(tmp_path):
    path = write_remote_code(tmp_path / "new", "bert_cee")
    assert path.name == REMOTE_CODE_FILE
    assert len(path.read_text().splitlines()) < 25
    # Imports that transformers would report in its own words when they are missing.
    assert get_imports(path) == []


def test_config_alone_and_model_save_the_file(tmp_path):
    tiny_config().save_pretrained(tmp_path / "config")
    tiny_model().save_pretrained(tmp_path / "model")
    for folder in ("config", "model"):
        assert json.loads((tmp_path / folder / "config.json").read_text())["auto_map"] == remote_auto_map("bert_cee")
        assert (tmp_path / folder / REMOTE_CODE_FILE).is_file()


def test_marking_the_config_copies_no_source(tmp_path):
    config = tiny_config()
    type(config).register_for_auto_class()
    config.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.py")] == [REMOTE_CODE_FILE]


def test_config_is_pushed_with_the_file(tmp_path, monkeypatch):
    config, pushed = tiny_config(), []
    monkeypatch.setattr(type(config), "push_to_hub", lambda self, repo, **kwargs: pushed.append((repo, kwargs)))
    config.save_pretrained(tmp_path / "name", push_to_hub=True, private=True)
    config.save_pretrained(tmp_path / "name", push_to_hub=True, repo_id="org/other")
    assert pushed == [("name", {"private": True}), ("org/other", {})]


def test_local_classes_win_over_the_file(saved):
    model = AutoModelForSequenceClassification.from_pretrained(saved, trust_remote_code=True)
    assert type(model).__module__ == "transformers_cee.models.bert_cee.modeling_bert_cee"


def test_error_of_a_dependency_is_not_hidden(tmp_path):
    path = write_remote_code(tmp_path, "bert_cee")
    (tmp_path / "transformers_cee.py").write_text("import no_such_dependency")
    done = run_python(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); exec(open({str(path)!r}).read())")
    assert done.returncode != 0
    assert "No module named 'no_such_dependency'" in done.stderr
    assert "pip install" not in done.stderr


def test_unknown_model_type():
    with pytest.raises(KeyError, match="bert_dee"):
        remote_auto_map("bert_dee")
