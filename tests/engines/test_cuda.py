# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The engine `torch` on a GPU."""

import pytest
import torch

from transformers_cee.engines.loading import load_exported


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.06}
WAYS = [{"cuda_graphs": False}, {"cuda_graphs": True}]


@pytest.fixture(params=list(TOLERANCES))
def precision(request):
    return request.param


@pytest.fixture
def folder(make_model, precision, tmp_path):
    make_model(policy_inputs="both", policy_condition="film").export(
        tmp_path / "out", engine="torch", precision=precision
    )
    return tmp_path / "out"


def batch_of(tokenizer, texts, rows, side="right"):
    return tokenizer(texts[:rows], padding=True, return_tensors="pt", padding_side=side)


def exits_of(model, batch):
    found = model(**batch, output_all_exits=True)
    return found.all_exit_logits, found.all_exit_states


@torch.no_grad()
def test_gives_what_the_cpu_gives(folder, precision, tokenizer, texts):
    close = {"rtol": TOLERANCES[precision], "atol": TOLERANCES[precision]}
    on_cpu = load_exported(folder)
    for way in WAYS:
        exported = load_exported(folder, device="cuda", **way)
        assert exported.device.type == "cuda"
        for rows, side in ((12, "right"), (12, "left"), (1, "right"), (5, "right")):
            batch = batch_of(tokenizer, texts, rows, side)
            expected = exits_of(on_cpu, batch)
            for given in (batch, {name: value.cuda() for name, value in batch.items()}):
                found = exits_of(exported, given)
                assert all(one.device.type == "cuda" for one in found)
                torch.testing.assert_close([one.cpu() for one in found], list(expected), **close)


@torch.no_grad()
def test_graphs_give_what_blocks_give(folder, precision, tokenizer, texts):
    close = {"rtol": TOLERANCES[precision], "atol": TOLERANCES[precision]}
    eager, graphs = (load_exported(folder, device="cuda", **way) for way in WAYS)
    kept = []
    # Shapes come again, in another order: what graphs have given stays as it is.
    for rows in (5, 12, 3, 5, 12):
        batch = batch_of(tokenizer, texts, rows)
        kept.append((exits_of(eager, batch), exits_of(graphs, batch)))
    for expected, found in kept:
        torch.testing.assert_close(found, expected, **close)


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS, ids=["blocks", "graphs"])
def test_rows_do_not_mix(folder, precision, way, tokenizer, texts):
    exported = load_exported(folder, device="cuda", **way)
    batch = batch_of(tokenizer, texts, 12)
    together, _ = exits_of(exported, batch)
    changed = {name: value.clone() for name, value in batch.items()}
    changed["input_ids"][1:] = changed["input_ids"][1:].flip(0)
    changed["attention_mask"][1:] = changed["attention_mask"][1:].flip(0)
    # In the same shape, to the last bit.
    assert torch.equal(exits_of(exported, changed)[0][0], together[0])
    for row in range(3):
        alone, _ = exits_of(exported, {name: value[row : row + 1] for name, value in batch.items()})
        torch.testing.assert_close(alone[0], together[row], rtol=TOLERANCES[precision], atol=TOLERANCES[precision])


@torch.no_grad()
@pytest.mark.parametrize("way", [*WAYS, {"compile": True}], ids=["blocks", "graphs", "compiled"])
def test_walks_as_the_model(make_model, tokenizer, texts, tmp_path, way):
    model = make_model(policy_inputs="both", policy_condition="film")
    model.export(tmp_path / "out", engine="torch", precision="float32")
    exported = load_exported(tmp_path / "out", device="cuda", **way)
    batch = batch_of(tokenizer, texts, 12)
    for criterion in ("policy", "max_probability"):
        asked = {"exit_criterion": criterion}
        scores = model(**batch, **asked, exit_threshold=0.9999).exit_probabilities[:, 0].sort().values
        # In the widest gap of the middle of the first exit's scores: rounding moves no row over it.
        place = 3 + int(scores[3:-3].diff().argmax())
        asked["exit_threshold"] = float(scores[place : place + 2].mean())
        found, expected = exported(**batch, **asked), model(**batch, **asked)
        assert len(expected.exit_layers.unique()) > 1
        assert found.exit_layers.tolist() == expected.exit_layers.tolist()
        torch.testing.assert_close(found.logits.cpu(), expected.logits, rtol=1e-4, atol=1e-4)
    labels = torch.zeros(12, dtype=torch.long)
    torch.testing.assert_close(
        exported(**batch, labels=labels).loss.cpu(), model(**batch, labels=labels).loss, rtol=1e-4, atol=1e-4
    )


def test_costs_of_the_cpu_are_not_those_of_a_gpu(make_model, tokenizer, texts, tmp_path):
    asked = {"calibration_texts": texts, "processing_class": tokenizer}
    model = make_model().export(tmp_path / "out", engine="torch", precision="float32", **asked)
    assert model.costs is not None
    assert load_exported(tmp_path / "out", device="cuda").costs is None
