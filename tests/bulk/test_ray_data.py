# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Workers give what one process gives, in the same order, whatever dies."""

from __future__ import annotations

import csv
import json
import os
import signal
import sys
from importlib.util import find_spec
from typing import Any

import psutil
import pytest
from bulk_reference import draw_texts, thresholds_of, tokenizer_for
from datasets import Dataset

from transformers_cee import BertForConsistentEE, classify, classify_on_ray, cli
from transformers_cee.bulk import ray_data
from transformers_cee.bulk.texts import find_texts


pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="there is no Ray for this Python")

TEXTS = draw_texts(60)


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    root = tmp_path_factory.mktemp("ray")
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    (root / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    with open(root / "texts.csv", "w", newline="") as file:
        csv.writer(file).writerows([["id", "words"], *([str(number), text] for number, text in enumerate(TEXTS))])
    (root / "texts.jsonl").write_text("\n".join(json.dumps({"words": text}) for text in TEXTS))
    return root


@pytest.fixture(scope="module")
def asked(folder):
    model = BertForConsistentEE.from_pretrained(folder / "model")
    threshold = thresholds_of(model, tokenizer_for(model), TEXTS[:40], "policy", 0.9999)
    return {"exit_threshold": threshold, "batch_size": 2, "window": 4, "disable_tqdm": True}


@pytest.fixture(scope="module")
def expected(folder, asked):
    return list(classify(BertForConsistentEE.from_pretrained(folder / "model"), TEXTS, **asked))


@pytest.fixture(scope="module")
def cluster():
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def same(found, expected):
    assert [(one["label"], int(one["exit_layer"])) for one in found] == [
        (one["label"], one["exit_layer"]) for one in expected
    ]
    assert [float(one["score"]) for one in found] == pytest.approx([one["score"] for one in expected], abs=1e-6)


def workers() -> list[psutil.Process]:
    return [
        one for one in psutil.Process().children(recursive=True) if any("MapWorker" in part for part in one.cmdline())
    ]


@pytest.mark.parametrize("kind", ["texts.txt", "texts.csv", "texts.jsonl", "list", "dataset"])
def test_windows(kind, folder):
    source: Any = {"list": TEXTS, "dataset": Dataset.from_dict({"words": TEXTS})}.get(kind, folder / kind)
    blocks = list(ray_data._blocks(find_texts(source, "words"), 8, False))
    assert [block.num_rows for block in blocks] == [1] * 8
    assert [block["number"].to_pylist() for block in blocks] == [[number] for number in range(8)]
    assert [block["texts"].to_pylist() for block in blocks] == [
        [TEXTS[first : first + 8]] for first in range(0, 60, 8)
    ]


@pytest.mark.slow
def test_an_error_of_a_worker_shuts_down_what_was_started(folder, tmp_path, monkeypatch):
    import ray

    class FailsElsewhere:
        """Texts, the third of which other processes cannot read."""

        def __init__(self) -> None:
            self.process = os.getpid()

        def __iter__(self):
            yield from ["w11", "w12", "w13" if os.getpid() == self.process else 13]

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    environment = dict(os.environ)
    with pytest.raises(ValueError, match=r"^Row 3 of `texts` holds 13 of type int; every row must be a text\.$"):
        classify_on_ray(folder / "model", FailsElsewhere(), output=tmp_path / "out.csv", workers=1, disable_tqdm=True)
    assert not ray.is_initialized() and list(tmp_path.iterdir()) == [] and dict(os.environ) == environment


def test_a_killed_worker_loses_nothing(folder, asked, expected, cluster, tmp_path, monkeypatch):
    import ray

    write, killed = ray_data.written, []

    def write_and_kill(found, *rest):
        def with_a_kill():
            yield next(found)
            killed.append(workers()[0].pid)
            os.kill(killed[0], signal.SIGKILL)
            yield from found

        return write(with_a_kill(), *rest)

    monkeypatch.setattr(ray_data, "written", write_and_kill)
    monkeypatch.chdir(folder)
    summary = classify_on_ray("model", "texts.csv", output=tmp_path / "out.jsonl", text_column="words", **asked)
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    same(found, expected)
    assert len({one["exit_layer"] for one in found}) > 2
    assert killed and summary.rows == len(TEXTS) and ray.is_initialized()
    assert summary.depth == pytest.approx(sum(one["exit_layer"] for one in expected) / len(TEXTS))


def test_no_texts_need_no_worker(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_data, "_cluster", lambda workers: pytest.fail("Ray was asked."))
    (tmp_path / "none.txt").write_text("")
    summary = classify_on_ray(folder / "model", tmp_path / "none.txt", output=tmp_path / "out.csv", disable_tqdm=True)
    assert summary.rows == 0 and (tmp_path / "out.csv").read_text().split() == ["label,score,exit_layer"]


@pytest.mark.slow
def test_reading_waits_for_the_workers(folder, cluster, tmp_path, monkeypatch):
    class Logged:
        """100 windows of one text; each that is read is a byte in a file."""

        def __init__(self) -> None:
            self.log = tmp_path / "read"

        def __iter__(self):
            for _ in range(100):
                with open(self.log, "ab") as file:
                    file.write(b".")
                yield "w11 " * 10_000

    write, ahead = ray_data.written, []

    def write_and_look(found, *rest):
        def looked_at():
            for done, some in enumerate(found, start=1):
                # They have been read once before Ray started.
                ahead.append((tmp_path / "read").stat().st_size - 100 - done)
                yield some

        return write(looked_at(), *rest)

    monkeypatch.setattr(ray_data, "written", write_and_look)
    monkeypatch.setattr(ray_data, "BYTES", 1)
    asked = {"workers": 1, "window": 1, "max_length": 4, "disable_tqdm": True}
    classify_on_ray(folder / "model", Logged(), output=tmp_path / "out.csv", **asked)
    # Four windows of four bytes for each letter, whose letters take one byte, and those that are on their way.
    assert len(ahead) == 100 and max(ahead) < 32


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["texts.txt", "texts.jsonl"])
def test_the_command(kind, folder, asked, expected, cluster, tmp_path, capsys):
    given = ["--workers", "2", "--text_column", "words", "--window", "4", "--batch_size", "2", "--disable_tqdm"]
    threshold = ",".join(map(str, asked["exit_threshold"]))
    out = tmp_path / "out.csv"
    arguments = [str(folder / "model"), str(folder / kind), "--output", str(out), "--exit_threshold", threshold]
    assert cli.main(["classify", *arguments, *given]) == 0
    with open(out, newline="") as file:
        same(list(csv.DictReader(file)), expected)
    assert json.loads(capsys.readouterr().out)["rows"] == len(TEXTS)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"workers": 0}, ValueError, "`workers`=0 must be a whole number"),
        ({"workers": 2.0}, ValueError, "`workers`=2.0 must be a whole number"),
        ({"window": 0}, ValueError, "`window`=0 must be a whole number"),
        ({"batch_size": 0}, ValueError, "`batch_size`=0 must be a whole number"),
        ({"exit_threshold": "fast"}, ValueError, "`exit_threshold`='fast'"),
        ({"output": "out.txt"}, ValueError, "must be a file of .jsonl, .csv"),
        ({"texts": "no.txt"}, FileNotFoundError, "there is no such file"),
        ({"texts": ["w11", None]}, ValueError, "Row 2 of `texts` holds None"),
        ({"texts": ["w11", " "]}, ValueError, "Row 2 of `texts` is empty"),
        ({"texts": iter(["w11"])}, TypeError, "`texts` of type list_iterator can be read only once"),
        ({"model": "no/such/folder"}, OSError, "no/such/folder"),
    ],
)
def test_refused_before_ray_starts(changed, error, message, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_data, "_cluster", lambda workers: pytest.fail("Ray was asked."))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = {"model": folder / "model", "texts": TEXTS, "output": tmp_path / "out.csv", **changed}
    with pytest.raises(error, match=message):
        classify_on_ray(**asked)


def test_a_model_is_named(model):
    with pytest.raises(TypeError, match=r"`model` of type BertForConsistentEE must be a name.* give the folder"):
        classify_on_ray(model, TEXTS, output="out.csv")


def test_without_ray(folder, monkeypatch, capsys):
    for name in ("ray", "ray.data"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'transformers-cee\[ray\]'"):
        classify_on_ray(folder / "model", TEXTS, output="out.csv")
    arguments = [str(folder / "model"), str(folder / "texts.txt"), "--output", "out.csv", "--workers", "2"]
    assert cli.main(["classify", *arguments]) == 2
    assert "transformers-cee[ray]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("nodes", "workers", "cpus"), [([16], 2, 8), ([16], 3, 5), ([8, 8, 8], 2, 8), ([2, 8], 3, 2), ([1, 1], 2, 1)]
)
def test_workers_share_the_cpus(nodes, workers, cpus):
    assert ray_data._cpus(workers, nodes) == cpus


def test_more_workers_than_cpus():
    with pytest.raises(ValueError, match="`workers`=3 must be at most 2, the CPUs of the cluster"):
        ray_data._cpus(3, [1, 1])
