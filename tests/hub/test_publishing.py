# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What is published of a run's folder, with the real client against a hub on the loopback interface, and a server that
stalls."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest
from fake_hub import FakeHub
from huggingface_hub import get_session
from tiny_models import run_python

from transformers_cee.hub.publishing import published_files
from transformers_cee.stalls import stalls_end


TESTS = Path(__file__).resolve().parents[1]
SECRET = "hf_secret_of_the_owner"
MODEL = {"README.md", "config.json", "model.safetensors", "modeling_cee.py", "tokenizer.json", "tokenizer_config.json"}
# What lies in folders of runs, by hand or by accident.
STRAY = (
    ".env",
    "nohup.out",
    "notes.txt",
    "results.json",
    "answers.jsonl",
    "hardness.safetensors",
    "exits-train.safetensors",
    "model.part-7.safetensors",
    ".tmp-model.safetensors",
    "optimizer.pt",
    "pytorch_model.bin",
    "training_args.bin",
    "other.png",
    "old/model.safetensors",
    "phases/heads/finished/model.safetensors",
)

TRAIN = f"""
import sys
sys.path[:0] = [{str(TESTS)!r}, {str(TESTS / "hub")!r}]
from pathlib import Path
from tiny import tiny_model, tiny_trainer, task
from tiny_models import tiny_tokenizer

folder, repo, strategy, blocking = sys.argv[1:]
options = dict(push_to_hub=True, hub_model_id=repo, hub_token="{SECRET}", hub_strategy=strategy)
options |= dict(save_strategy="steps", save_steps=2, store_memory_limit_mb=0)
trainer = tiny_trainer(folder, rows=24, trainer=dict(processing_class=tiny_tokenizer()), **options)
trainer.train()
for name in {STRAY!r}:
    path = Path(folder, name)
    path.parent.mkdir(exist_ok=True, parents=True)
    path.exists() or path.write_text("{SECRET}")
trainer.evaluate()
done = trainer.push_to_hub(blocking=blocking == "True")
blocking == "True" or done.result()
"""

SAVE = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
from pathlib import Path
from tiny import collate, task, tiny_model, training_arguments
from transformers_cee.training.early_exit_trainer import EarlyExitTrainer

options = dict(push_to_hub=True, hub_model_id="org/saved", hub_token="{SECRET}", hub_strategy="every_save")
options |= dict(save_strategy="steps", save_steps=2, hub_always_push=True)
args = training_arguments(sys.argv[1], **options)
trainer = EarlyExitTrainer(tiny_model(), args, train_dataset=task(24, seed=1), data_collator=collate)
trainer.train()
print(sorted(path.name for path in Path(sys.argv[1]).glob("checkpoint-*")))
"""

PUSH = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(TESTS.parent / "examples")!r})
import common
from transformers_cee import ConsistentEETrainingArguments

folder, repo = sys.argv[1:]
common.push(Path(folder), ConsistentEETrainingArguments(folder, hub_model_id=repo, hub_token="{SECRET}"))
"""

STALL = """
import sys
from pathlib import Path
import huggingface_hub, transformers_cee.stalls as stalls
from transformers_cee.hub import publishing

kept = type(huggingface_hub.get_session().timeout)(3.0)
stalls.STALL_SECONDS = 0.5
if sys.argv[2] == "own":
    huggingface_hub.get_session().timeout = kept
try:
    publishing.upload(sys.argv[1], "org/stalled")
except TimeoutError as error:
    print(error)
print(huggingface_hub.get_session().timeout == kept)
"""


@pytest.fixture(scope="module")
def hub():
    with FakeHub() as running:
        yield running


def check_clean(files: dict[str, bytes]) -> None:
    assert not [name for name, content in files.items() if SECRET.encode() in content]


class TestTrainer:
    @pytest.mark.parametrize(
        "strategy,blocking", [("every_save", True), pytest.param("end", False, marks=pytest.mark.slow)]
    )
    def test_the_model_and_its_card(self, hub, tmp_path, strategy, blocking):
        repo = f"org/trained-{strategy.replace('_', '-')}"
        arguments = (str(tmp_path / "run"), repo, strategy, str(blocking))
        done = run_python(TRAIN, *arguments, environment=hub.environment(tmp_path / "home"), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        files = hub.files[repo]
        assert set(files) - {"special_tokens_map.json", "vocab.txt"} == MODEL
        # At the end of `train` and by `push_to_hub`, not for each checkpoint.
        assert len([path for _, path in hub.requests if f"{repo}/commit/" in path]) == 2
        assert b"early-exit" in files["README.md"]
        assert files["model.safetensors"] == (tmp_path / "run" / "model.safetensors").read_bytes()
        check_clean(files)

    @pytest.mark.slow
    def test_checkpoints_stay(self, hub, tmp_path):
        """Also those of a training without phases."""
        done = run_python(SAVE, str(tmp_path / "run"), environment=hub.environment(tmp_path / "home"), cwd=tmp_path)
        assert done.stdout.splitlines()[-1] == "['checkpoint-2', 'checkpoint-3']", done.stderr
        assert not hub.files["org/saved"]

    @pytest.mark.parametrize("strategy", [pytest.param("checkpoint", marks=pytest.mark.slow), "all_checkpoints"])
    def test_checkpoints_are_refused(self, hub, tmp_path, strategy):
        arguments = (str(tmp_path / "run"), "org/refused", strategy, "True")
        done = run_python(TRAIN, *arguments, environment=hub.environment(tmp_path / "home"), cwd=tmp_path)
        assert f"ValueError: `hub_strategy`='{strategy}' would publish" in done.stderr
        assert "accepted are 'end' and 'every_save'" in done.stderr
        assert "org/refused" not in hub.files


class TestScripts:
    def test_the_model_its_card_and_the_pictures_it_shows(self, hub, saved, tmp_path):
        folder = tmp_path / "run"
        for path in saved.iterdir():
            (folder / path.name).parent.mkdir(exist_ok=True)
            (folder / path.name).write_bytes(path.read_bytes())
        for name in STRAY:
            (folder / name).parent.mkdir(exist_ok=True, parents=True)
            (folder / name).write_text(SECRET)
        (folder / "README.md").write_text("![curve](curve.png) ![out](../other.png) ![](https://example.org/x.png)")
        (folder / "curve.png").write_bytes(b"picture")
        done = run_python(
            PUSH, str(folder), "org/pushed", environment=hub.environment(tmp_path / "home"), cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        assert set(hub.files["org/pushed"]) - {"special_tokens_map.json", "vocab.txt"} == MODEL | {"curve.png"}
        check_clean(hub.files["org/pushed"])


class TestPublishedFiles:
    def test_weights_in_several_files_adapters_and_vocabularies(self, tmp_path):
        names = [
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
        ]
        names += ["adapter_model.safetensors", "adapter_config.json", "additional_chat_templates/tool.jinja"]
        for name in (*names, "model-1.safetensors", "vocab.bpe", "additional_chat_templates/.env", *STRAY):
            (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
            (tmp_path / name).touch()
        assert published_files(tmp_path) == sorted(names)
        tokenizer = type("Tokenizer", (), {"vocab_files_names": {"vocab_file": "vocab.bpe"}})()
        assert published_files(tmp_path, tokenizer) == sorted([*names, "vocab.bpe"])

    def test_folders_are_no_files(self, tmp_path):
        (tmp_path / "config.json").mkdir()
        assert published_files(tmp_path) == []


# The client tries again and again, each time for as long.
@pytest.mark.parametrize(
    "limit,seconds,kept", [("none", 0.5, False), pytest.param("own", 3.0, True, marks=pytest.mark.slow)]
)
def test_a_server_that_stalls_is_an_error(tmp_path, limit, seconds, kept):
    """A time limit that the client has already stays."""
    with socket.create_server(("127.0.0.1", 0)) as server, FakeHub() as hub:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        (tmp_path / "config.json").write_text("{}")
        environment = {**hub.environment(tmp_path / "home"), "HF_ENDPOINT": endpoint}
        done = run_python(STALL, str(tmp_path), limit, environment=environment, cwd=tmp_path)
    assert done.stdout.splitlines() == [f"{endpoint} has not answered for {seconds} seconds.", str(kept)], done.stderr


def test_timeouts_of_others_are_theirs():
    """Such as that of a lock, which `datasets` may wait for."""

    class Timeout(OSError):
        pass

    for error in (Timeout("the lock"), TimeoutError("of the system")):
        with pytest.raises(type(error), match=str(error)) as raised, stalls_end():
            raise error
        assert raised.value is error
    client = sys.modules[type(get_session().timeout).__module__.partition(".")[0]]
    for name in ("ConnectTimeout", "ReadTimeout", "WriteTimeout", "PoolTimeout"):
        with pytest.raises(TimeoutError, match="has not answered for"), stalls_end():
            raise getattr(client, name)("")
