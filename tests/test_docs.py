# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The Python code of README.md, CONTRIBUTING.md and docs/ runs as it stands; only names of models and folders become
local ones."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny import tiny_llama
from tiny_lm import SPECIAL, WORDS, word_tokenizer
from tiny_models import run_python, tiny_config, tiny_model, tiny_tokenizer
from transformers import BertConfig, BertModel

import transformers_cee


ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
SENTENCES = ["a film with heart", "not a single joke lands", "the plot is worse", "heart"]
PREPARE = """
from datasets import load_from_disk
train, dev = load_from_disk("train"), load_from_disk("train")
"""


def python_blocks(path: Path) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with trained models under the demos' names, a stock encoder and a data set."""
    root = tmp_path_factory.mktemp("docs")
    tokenizer = tiny_tokenizer()
    tiny_model(exit_pooling="mean").save_pretrained(root / "runs" / "demo")
    tokenizer.save_pretrained(root / "runs" / "demo")
    stock = {name: value for name, value in tiny_config().to_dict().items() if name in BertConfig().to_dict()}
    torch.manual_seed(0)
    BertModel(BertConfig(**{**stock, "model_type": "bert"})).save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    tiny_llama(vocab_size=len(WORDS) + len(SPECIAL), eos_token_id=2).save_pretrained(root / "runs" / "demo-llm")
    word_tokenizer().save_pretrained(root / "runs" / "demo-llm")
    encoded = tokenizer(SENTENCES * 4)
    Dataset.from_dict({**encoded, "labels": [1, 0, 0, 1] * 4}).save_to_disk(str(root / "train"))
    return root


@pytest.mark.parametrize("name", DOCUMENTS)
def test_code_in_documents_runs(name: str, folder: Path) -> None:
    code = python_blocks(ROOT / name)
    assert code
    code = code.replace('"google-bert/bert-base-uncased"', '"base"')
    done = run_python(PREPARE + code, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_import_from_the_top(name: str) -> None:
    for node in ast.walk(ast.parse(python_blocks(ROOT / name))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers_cee"):
            assert node.module == "transformers_cee", node.module
            assert {one.name for one in node.names} <= {*transformers_cee.__all__}


def test_links_in_documents_lead_somewhere() -> None:
    for document in map(ROOT.joinpath, DOCUMENTS):
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
