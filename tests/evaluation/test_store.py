# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Stored exits against the reference, in the data set's order, in memory and mapped."""

from __future__ import annotations

from itertools import chain

import pytest
import reference
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from tiny import collate, task, tiny_model

from transformers_cee.evaluation.store import ExitStore, collect_exits, length_sorted_batches


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def collect(model, dataset, accelerator, **options):
    options = {"problem_type": "single_label_classification", "batch_size": 4, "disable_tqdm": True, **options}
    return collect_exits(model, dataset, collate, accelerator, **options)


class TestCollect:
    @torch.no_grad()
    @pytest.mark.parametrize("kind", ["dataset", "list"])
    def test_against_reference(self, kind, accelerator):
        model = tiny_model(exit_layers=[2, 3, 5], exit_norm="layer_norm")
        dataset = task(11, seed=1)
        store = collect(model, dataset if kind == "dataset" else list(dataset), accelerator)
        assert store.layers.tolist() == [2, 3, 5, 6] and len(store) == 11
        assert store.labels.tolist() == dataset["labels"]
        for row in range(11):
            walk = reference.walk(model, torch.tensor(dataset[row]["input_ids"]), "policy", 1.0)
            torch.testing.assert_close(store.states[row], torch.stack(walk.all_states), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(store.logits[row], torch.stack(walk.all_logits), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("training", [True, False])
    def test_in_evaluation_mode(self, training, accelerator):
        """Dropout is off, and the model is left as it was."""
        model = tiny_model(hidden_dropout_prob=0.5).train(training)
        first, second = collect(model, task(6, seed=1), accelerator), collect(model, task(6, seed=1), accelerator)
        assert torch.equal(first.states, second.states) and torch.equal(first.logits, second.logits)
        assert model.training is training
        assert not first.states.requires_grad

    def test_left_as_it_was_after_an_error(self, accelerator):
        model = tiny_model().train()
        with pytest.raises(KeyError):
            collect(model, [{"input_ids": [5], "attention_mask": [1]}], accelerator)
        assert model.training

    def test_memory_mapped(self, tmp_path, accelerator):
        model, dataset = tiny_model(), task(9, seed=1)
        plain = collect(model, dataset, accelerator, directory=str(tmp_path / "deep" / "store"))
        assert not (tmp_path / "deep").exists()
        mapped = collect(model, dataset, accelerator, directory=str(tmp_path / "deep" / "store"), memory_limit_mb=0)
        (file,) = (tmp_path / "deep" / "store").iterdir()
        assert file.stat().st_size > 9 * 6 * 32 * 4
        assert torch.equal(plain.states, mapped.states) and torch.equal(plain.logits, mapped.logits)

    def test_the_limit_is_in_megabytes(self, tmp_path, accelerator):
        model = tiny_model()
        rows = 2**20 // (4 * 6 * 32)
        collect(model, task(3, seed=1), accelerator, directory=str(tmp_path), memory_limit_mb=1)
        assert not list(tmp_path.iterdir())
        many = [task(1, seed=1)[0]] * (rows + 1)
        collect(model, many, accelerator, directory=str(tmp_path), memory_limit_mb=1, batch_size=512)
        assert len(list(tmp_path.iterdir())) == 1

    def test_a_second_store_leaves_the_first_alone(self, tmp_path, accelerator):
        model = tiny_model()
        first = collect(model, task(9, seed=1), accelerator, directory=str(tmp_path), memory_limit_mb=0)
        before = first.states.clone()
        collect(model, task(9, seed=2), accelerator, directory=str(tmp_path), memory_limit_mb=0)
        assert torch.equal(first.states, before)

    def test_half_precision_is_stored_in_float32(self, accelerator):
        store = collect(tiny_model().to(torch.bfloat16), task(3, seed=1), accelerator)
        assert store.states.dtype == store.logits.dtype == torch.float32

    def test_empty(self, accelerator):
        with pytest.raises(ValueError, match=r"dataset.*empty"):
            collect(tiny_model(), [], accelerator)

    def test_no_labels(self, accelerator):
        rows = [{"input_ids": torch.tensor([5, 6])}]
        with pytest.raises(ValueError, match=r"labels.*input_ids"):
            collect_exits(
                tiny_model(),
                rows,
                lambda some: {"input_ids": some[0]["input_ids"][None]},
                accelerator,
                problem_type="regression",
            )


class TestStore:
    def test_losses_errors_correct(self):
        logits = torch.tensor([[[2.0, 1.0], [0.0, 3.0]], [[1.0, 0.0], [4.0, 0.0]]])
        store = ExitStore(
            torch.zeros(2, 2, 1), logits, torch.tensor([1, 0]), torch.tensor([1, 2]), "single_label_classification"
        )
        assert store.correct.tolist() == [[False, True], [True, True]]
        assert store.errors.tolist() == [[1.0, 0.0], [0.0, 0.0]]
        expected = -torch.stack([logits[0].log_softmax(-1)[:, 1], logits[1].log_softmax(-1)[:, 0]])
        torch.testing.assert_close(store.losses, expected)

    def test_multi_label_needs_every_label(self):
        logits = torch.tensor([[[2.0, -1.0], [2.0, 1.0]]])
        store = ExitStore(
            torch.zeros(1, 2, 1),
            logits,
            torch.tensor([[1.0, 1.0]]),
            torch.tensor([1, 2]),
            "multi_label_classification",
        )
        assert store.correct.tolist() == [[False, True]]

    @pytest.mark.parametrize("tolerance,expected", [(0.0, [0, 0]), (0.5, [0, 1]), (2.0, [1, 1])])
    def test_regression_has_a_tolerance(self, tolerance, expected):
        logits = torch.tensor([[[2.0], [1.25]]])
        store = ExitStore(
            torch.zeros(1, 2, 1), logits, torch.tensor([1.0]), torch.tensor([1, 2]), "regression", tolerance
        )
        assert store.correct.int().tolist() == [expected]

    def test_select(self):
        store = ExitStore(
            torch.arange(8.0).view(4, 2, 1),
            torch.arange(8.0).view(4, 2, 1),
            torch.arange(4),
            torch.tensor([1, 2]),
            "regression",
            0.1,
        )
        some = store.select(torch.tensor([3, 1]))
        assert some.states[:, 0, 0].tolist() == [6.0, 2.0] and some.labels.tolist() == [3, 1] and some.tolerance == 0.1
        assert len(some) == 2 and some.losses[:, 0].tolist() == store.losses[[3, 1], 0].tolist()


@given(st.integers(1, 30), st.integers(1, 9), st.integers(0, 99))
def test_batches(rows, batch_size, seed):
    dataset = task(rows, seed)
    batches = length_sorted_batches(dataset, batch_size)
    assert sorted(chain.from_iterable(batches)) == list(range(rows))
    assert all(len(batch) == batch_size for batch in batches[:-1]) and 1 <= len(batches[-1]) <= batch_size
    lengths = [len(dataset[row]["input_ids"]) for row in list(chain.from_iterable(batches))]
    assert lengths == sorted(lengths, reverse=True)
    assert list(chain.from_iterable(length_sorted_batches(list(dataset), batch_size))) == list(range(rows))
