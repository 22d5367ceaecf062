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
from text_reference import text_tokens
from tiny import collate, collate_text, instructions, task, tiny_llama, tiny_model
from torch.nn.utils.rnn import pad_sequence

from transformers_cee.exits.policy import all_features
from transformers_cee.stores.filling import collect_exits, length_sorted_batches, similar_length_batches


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

    def test_unknown_problem_type(self, accelerator):
        """Before any row is run."""
        model = tiny_model()
        model.register_forward_pre_hook(lambda *_: pytest.fail("ran"))
        with pytest.raises(ValueError, match="`problem_type`='single_label' is unknown; accepted are single_label_cl"):
            collect_exits(model, task(3, seed=1), collate, accelerator, problem_type="single_label")

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


@given(st.integers(1, 30), st.integers(1, 9), st.integers(0, 99))
def test_batches(rows, batch_size, seed):
    dataset = task(rows, seed)
    batches = length_sorted_batches(dataset, batch_size)
    assert sorted(chain.from_iterable(batches)) == list(range(rows))
    assert all(len(batch) == batch_size for batch in batches[:-1]) and 1 <= len(batches[-1]) <= batch_size
    lengths = [len(dataset[row]["input_ids"]) for row in list(chain.from_iterable(batches))]
    assert lengths == sorted(lengths, reverse=True)
    assert list(chain.from_iterable(length_sorted_batches(list(dataset), batch_size))) == list(range(rows))


def test_batches_hold_rows_of_similar_length():
    assert similar_length_batches([4, 7, 9], [2, 30, 8], 2) == [[7, 9], [4]]


KINDS = ("shared", "norm", "low_rank", "untied", "layernorm_linear")


def collect_tokens(model, dataset, accelerator, collator=collate_text, **options):
    options = {"problem_type": "single_label_classification", "batch_size": 4, "disable_tqdm": True, **options}
    return collect_exits(model, dataset, collator, accelerator, **options)


def fields(store) -> dict[str, torch.Tensor]:
    """What a store holds per token."""
    names = ("states", "labels", "token_losses", "predictions", "rows", "may_exit", "features")
    return {name: getattr(store, name) for name in names if getattr(store, name) is not None}


class TestTokens:
    @torch.no_grad()
    @pytest.mark.parametrize("kind,exit_layers", [*((kind, None) for kind in KINDS), ("norm", [2]), ("norm", 2)])
    @pytest.mark.parametrize("inputs", ["state", "both"])
    def test_against_reference(self, kind, exit_layers, inputs, accelerator):
        """Row by row, left to right; neither prompts nor padding are there."""
        model = tiny_llama(exit_head=kind, exit_layers=exit_layers, policy_inputs=inputs)
        dataset = instructions(11, seed=1)
        store = collect_tokens(model, dataset, accelerator)
        tokens = text_tokens(model, dataset)
        assert len(store) == len(tokens) == sum(label != -100 for row in dataset["labels"] for label in row)
        assert store.layers.tolist() == reference.exit_layers(model.config) and store.logits is None
        assert store.labels.tolist() == [token.label for token in tokens]
        assert store.rows.tolist() == [token.row for token in tokens]
        assert store.may_exit.tolist() == [token.may_exit for token in tokens]
        assert 11 == sum(not token.may_exit for token in tokens), "one per row: the prompt's last token"
        for number, token in enumerate(tokens):
            close = {"rtol": 1e-4, "atol": 1e-5}
            torch.testing.assert_close(store.states[number], torch.stack(token.states), **close)
            torch.testing.assert_close(store.losses[number], torch.stack(token.losses), **close)
            assert store.predictions[number].tolist() == token.predictions
            right = [prediction == token.label for prediction in token.predictions]
            assert store.correct[number].tolist() == right
            assert store.errors[number].tolist() == [float(not one) for one in right]
            apart = [float(prediction != token.predictions[-1]) for prediction in token.predictions]
            assert store.disagreements[number].tolist() == apart
        assert (store.features is None) == (inputs == "state")

    @torch.no_grad()
    @pytest.mark.parametrize("max_tokens", [None, 20])
    def test_padding_on_either_side_is_none(self, max_tokens, accelerator):
        """A text's first token is predicted by nothing, also where padding stands before it."""
        model, drawn = tiny_llama(), torch.Generator().manual_seed(0)
        texts = [torch.randint(3, 60, (length,), generator=drawn) for length in (5, 9, 2, 7, 3, 9, 4)]
        rows = [{"input_ids": text} for text in texts]

        def padded(side):
            def collate(some):
                ids = [one["input_ids"] for one in some]
                batch = {"input_ids": ids, "attention_mask": list(map(torch.ones_like, ids)), "labels": ids}
                values = {"input_ids": 0, "attention_mask": 0, "labels": -100}
                return {
                    name: pad_sequence(value, True, values[name], padding_side=side) for name, value in batch.items()
                }

            return collate

        stores = [
            collect_tokens(model, rows, accelerator, padded(side), max_tokens=max_tokens) for side in ("left", "right")
        ]
        assert len(stores[0]) == (20 if max_tokens else sum(len(text) - 1 for text in texts))
        for name, value in fields(stores[0]).items():
            torch.testing.assert_close(value, fields(stores[1])[name], rtol=1e-4, atol=1e-5)

    @torch.no_grad()
    def test_features(self, accelerator):
        """What policies say of stored tokens is what they say on the way."""
        model = tiny_llama(policy_inputs="both")
        dataset = instructions(7, seed=3)
        store = collect_tokens(model, dataset, accelerator)
        leaving = model.exit_policies(store.states, store.features).sigmoid()
        for number, token in enumerate(text_tokens(model, dataset)):
            for index in range(3):
                history = token.logits[: index + 1]
                score = reference.policy_score(model, token.states[index], history, store.problem_type, index)
                assert float(leaving[number, index]) == pytest.approx(score, abs=1e-5)

    @pytest.mark.parametrize("batch_size", [1, 3, 16])
    def test_neighbours_do_not_matter(self, batch_size, accelerator):
        model, dataset = tiny_llama(policy_inputs="confidence"), instructions(9, seed=1)
        first, second = (collect_tokens(model, dataset, accelerator, batch_size=size) for size in (4, batch_size))
        for name, value in fields(first).items():
            torch.testing.assert_close(fields(second)[name], value, rtol=1e-4, atol=1e-5)

    def test_memory_mapped(self, tmp_path, accelerator):
        model, dataset = tiny_llama(), instructions(9, seed=1)
        plain = collect_tokens(model, dataset, accelerator)
        mapped = collect_tokens(model, dataset, accelerator, directory=str(tmp_path), memory_limit_mb=0)
        (file,) = tmp_path.iterdir()
        assert file.stat().st_size > len(plain) * 4 * 32 * 4
        for name, value in fields(plain).items():
            assert torch.equal(fields(mapped)[name], value), name

    @pytest.mark.parametrize("limit", [1, 7, 20, 10_000])
    def test_a_sample(self, limit, accelerator):
        """Tokens of drawn rows: as many as asked for, the same for the same seed, in the data set's order."""
        model, dataset = tiny_llama(), instructions(12, seed=1)
        passes = []
        model.register_forward_pre_hook(lambda *_: passes.append(1))
        whole = collect_tokens(model, dataset, accelerator, batch_size=1)
        assert len(passes) == 12
        some = collect_tokens(model, dataset, accelerator, batch_size=1, max_tokens=limit, seed=5)
        assert len(some) == min(limit, len(whole))
        assert len(passes) - 12 == len(set(some.rows.tolist())), "rows that are not drawn are not run"
        assert some.rows.tolist() == sorted(some.rows.tolist())
        partly = 0
        for row in set(some.rows.tolist()):
            ours, theirs = some.select(some.rows == row), whole.select(whole.rows == row)
            partly += len(ours) < len(theirs)
            torch.testing.assert_close(ours.states, theirs.states[: len(ours)])
            assert torch.equal(ours.labels, theirs.labels[: len(ours)])
        assert partly <= 1
        again = collect_tokens(model, dataset, accelerator, max_tokens=limit, seed=5)
        assert torch.equal(again.rows, some.rows)
        if limit == 7:
            other = collect_tokens(model, dataset, accelerator, max_tokens=limit, seed=6)
            assert not torch.equal(other.rows, some.rows)

    def test_a_sample_of_some_rows(self, accelerator):
        model, dataset = tiny_llama(), instructions(12, seed=1)
        rows = torch.tensor([1, 4, 5])
        some = collect_tokens(model, dataset, accelerator, max_tokens=10_000, rows=rows)
        assert set(some.rows.tolist()) == {1, 4, 5}
        whole = collect_tokens(model, dataset, accelerator)
        assert len(some) == int(torch.isin(whole.rows, rows).sum())

    def test_deciding(self, accelerator):
        store = collect_tokens(tiny_llama(), instructions(6, seed=1), accelerator)
        expected = [number for number in range(len(store)) if store.may_exit[number]]
        assert store.deciding().tolist() == expected
        mine = [number for number in expected if int(store.rows[number]) in (2, 5)]
        assert store.deciding(torch.tensor([5, 2])).tolist() == mine and 0 < len(mine) < len(expected)

    def test_nothing_to_predict(self, accelerator):
        row = {"input_ids": [4, 5, 6], "attention_mask": [1] * 3, "labels": [-100] * 3}
        with pytest.raises(ValueError, match=r"no token to predict"):
            collect_tokens(tiny_llama(), [row, row], accelerator)
        mixed = collect_tokens(tiny_llama(), [row, {**row, "labels": [-100, 5, 6]}, row], accelerator, batch_size=1)
        assert mixed.rows.tolist() == [1, 1] and mixed.may_exit.tolist() == [False, True]

    def test_collators_that_are_refused(self, accelerator):
        dataset = list(instructions(4, seed=1))

        def packed(rows):
            return {name: value.reshape(1, -1) for name, value in collate_text(rows).items()}

        with pytest.raises(ValueError, match=r"data_collator.*1 rows of 4"):
            collect_tokens(tiny_llama(), dataset, accelerator, packed)
        calls = []

        def moody(rows):
            calls.append(1)
            batch = collate_text(rows)
            if len(calls) > 1:
                batch["labels"][:, -1] = -100
            return batch

        with pytest.raises(ValueError, match=r"data_collator.*tokens to predict"):
            collect_tokens(tiny_llama(), dataset, accelerator, moody)


def test_features_of_an_encoder(accelerator):
    """Computed once for all rows, when the policies look at them."""
    assert collect(tiny_model(), task(5, seed=1), accelerator).features is None
    model = tiny_model(policy_inputs="both")
    store = collect(model, task(5, seed=1), accelerator)
    assert torch.equal(store.features, all_features(store.logits))
    assert store.rows.tolist() == list(range(5)) and bool(store.may_exit.all())
