# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The border between a criterion's own scores and oriented ones, and what a store turns into."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from populations import population, slow_exit
from tiny import collate, collate_text, instructions, task, tiny_llama, tiny_model

from transformers_cee.calibration.agreement import calibrate_agreement
from transformers_cee.calibration.budget import calibrate_budget
from transformers_cee.calibration.risk import calibrate_risk
from transformers_cee.calibration.scores import (
    ExitScores,
    boldest_threshold,
    excess_risk,
    just_below,
    leave_at,
    orient,
    own_thresholds,
    score_store,
)
from transformers_cee.exits.criteria import CRITERIA
from transformers_cee.exits.deciding import criterion_settings
from transformers_cee.exits.estimators import ESTIMATORS
from transformers_cee.stores.filling import collect_exits
from transformers_cee.stores.scoring import exits_taken, score_exits
from transformers_cee.stores.store import ExitStore


def store_of(model, rows, collator, **options):
    return collect_exits(
        model,
        rows,
        collator,
        Accelerator(cpu=True),
        problem_type="single_label_classification",
        disable_tqdm=True,
        **options,
    )


class TestBorder:
    @given(st.data())
    def test_the_criterion_leaves_where_the_oriented_walk_does(self, data):
        name = data.draw(st.sampled_from(["policy", "max_probability", "entropy", "patience"]))
        values = st.integers(0, 4).map(float) if name == "patience" else st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])
        rows = data.draw(st.lists(st.tuples(values, values, values), min_size=1, max_size=8))
        scores = torch.tensor(rows)
        oriented = orient(name, scores)
        marks = [-math.inf, math.inf, *oriented.flatten().tolist()]
        marks += just_below(oriented).flatten().tolist()
        found = data.draw(st.lists(st.sampled_from(marks), min_size=3, max_size=3))
        own = [*own_thresholds(name, found, oriented), CRITERIA[name].off]
        expected = [slow_exit(row, found) for row in oriented.tolist()]
        assert leave_at(oriented, found).tolist() == expected
        assert exits_taken(name, own, scores).tolist() == expected

    @pytest.mark.parametrize("name", sorted(CRITERIA))
    def test_directions(self, name):
        cls, bold = CRITERIA[name], boldest_threshold(name)
        scores = torch.tensor([[0.2], [0.7], [3.0]]) if name == "patience" else torch.tensor([[0.2], [0.7], [0.9]])
        assert cls.check(bold)
        own = own_thresholds(name, [math.inf], orient(name, scores))
        assert own == [cls.off]
        assert own_thresholds(name, [-math.inf], orient(name, scores)) == [bold]
        surest = int(orient(name, scores).flatten().argmax())
        assert surest == (2 if cls.higher_is_deeper else 0)

    def test_a_score_beyond_the_range_keeps_rows_in(self):
        # Rounding may lift a similarity above 1.
        assert own_thresholds("max_probability", [1.0000001], torch.tensor([[1.0000001]])) == [1.0]
        assert own_thresholds("entropy", [1e-9], torch.tensor([[1e-9]])) == [0.0]


class TestStores:
    @pytest.mark.parametrize("name", ["policy", "max_probability", "margin", "entropy", "patience"])
    def test_of_rows(self, name):
        model = tiny_model(num_hidden_layers=4)
        store = store_of(model, task(20, seed=1), collate)
        scores = score_store(store, name, model)
        assert torch.equal(scores.scores, score_exits(name, store, model.exit_policies))
        predictions = store.logits.argmax(-1)
        for row in range(20):
            for index in range(4):
                assert bool(scores.disagrees[row, index]) == bool(predictions[row, index] != predictions[row, -1])
                assert float(scores.losses[row, index]) == float(predictions[row, index] != store.labels[row])
        assert scores.layers.tolist() == [1, 2, 3, 4]
        if name in ("max_probability", "margin"):
            top = store.logits[:, -1].softmax(-1).sort(descending=True).values
            expected = top[:, 0] if name == "max_probability" else top[:, 0] - top[:, 1]
            assert torch.allclose(scores.last_scores, expected)
        else:
            assert (scores.last_scores is None) == (name != "entropy")

    def test_of_tokens(self):
        model = tiny_llama()
        store = store_of(model, instructions(12, seed=1), collate_text)
        scores = score_store(store, "policy", model)
        may = store.may_exit.nonzero().squeeze(1).tolist()
        assert len(scores) == len(may) < len(store)
        for place, token in enumerate(may):
            expected = (store.predictions[token] != store.predictions[token, -1]).tolist()
            assert scores.disagrees[place].tolist() == expected
            assert int(scores.groups[place]) == int(store.rows[token])
        closed = score_store(store, "policy", model, min_exit_layer=3).oriented
        assert bool((closed[:, :2] == -torch.inf).all())
        torch.testing.assert_close(closed[:, 2], scores.oriented[:, 2])
        values = torch.rand(len(scores), generator=torch.Generator().manual_seed(0))
        by_text = {}
        for place, value in enumerate(values.tolist()):
            by_text.setdefault(int(scores.groups[place]), []).append(value)
        means = [sum(some) / len(some) for some in by_text.values()]
        assert scores.mean(values) == pytest.approx(sum(means) / len(means))

    @pytest.mark.parametrize("name", sorted({*CRITERIA} - {"oracle", "token_hash"}))
    def test_tokens_by_every_criterion(self, name):
        """Also by those that look at logits, which a store of tokens has not: scores are those of walks."""
        model = tiny_llama(exit_head="untied", exit_estimators=sorted({*ESTIMATORS} - {"token_hash"}))
        generator = torch.Generator().manual_seed(0)
        for weight in (*model.exit_heads.parameters(), *model.exit_estimators.parameters()):
            weight.data = torch.randn(weight.shape, generator=generator)
        store = store_of(model, instructions(6, seed=1), collate_text)
        scores = score_store(store, name, model.train())
        assert model.training, "left as it was"
        kept = [index for index in range(len(store)) if store.may_exit[index]]
        logits = torch.stack([model.exit_logits(store.states[:, index], index) for index in range(4)], dim=1)
        rows = replace(store, logits=logits.detach(), token_losses=None, predictions=None, features=None)
        expected = score_exits(name, rows, model.exit_policies, criterion_settings(model))[kept]
        torch.testing.assert_close(scores.scores, expected, rtol=1e-4, atol=1e-5)
        assert len(calibrate_agreement(scores, epsilon=0.5, method="running").thresholds) == 4

    @pytest.mark.parametrize("criterion", ["max_probability", "entropy", "patience"])
    def test_exits_that_were_closed_stay_so(self, criterion):
        """A promise made for walks that leave late is not used for others, whatever the config says by then."""
        rows, model = task(40, seed=1), tiny_model(num_hidden_layers=4, min_exit_layer=3).eval()
        store = store_of(model, rows, collate)
        scores = score_store(store, criterion, model)
        for point in (
            calibrate_agreement(scores, epsilon=0.9, method="conformal"),
            calibrate_agreement(scores, epsilon=0.9, method="running"),
            calibrate_budget(scores, budget=3.99),
        ):
            point.save_to(model, "late")
            model.config.min_exit_layer = 3
            with torch.no_grad():
                expected = model(**collate(list(rows)), exit_threshold="late").exit_layers
                model.config.min_exit_layer = None
                found = model(**collate(list(rows)), exit_threshold="late").exit_layers
            assert torch.equal(found, expected) and 3 in found

    def test_the_models_own_walk(self):
        """Patience and the first layer to leave at are the model's, so that the promise is that of its walks."""
        rows = task(40, seed=1)
        model = tiny_model(num_hidden_layers=6, exit_patience=4)
        store = store_of(model, rows, collate)
        scores = score_store(store, "entropy_patience", model)
        assert bool((scores.oriented[:, :3] == -torch.inf).all())
        assert not torch.equal(scores.scores, score_store(store, "entropy_patience").scores)
        limit = float(scores.scores[:, 3:].quantile(0.7))
        taken = store.layers[exits_taken("entropy_patience", limit, scores.scores)]
        with torch.no_grad():
            walked = model(**collate(list(rows)), exit_criterion="entropy_patience", exit_threshold=limit).exit_layers
        assert torch.equal(taken, walked) and 4 in walked
        decoder = tiny_llama(min_exit_layer=3)
        text = store_of(decoder, instructions(6, seed=1), collate_text)
        assert bool((score_store(text, "policy", decoder).oriented[:, :2] == -torch.inf).all())
        assert bool((score_store(text, "policy", decoder, min_exit_layer=1).oriented > -torch.inf).all())

    def test_without_labels(self):
        """Agreement and budgets know as much as with labels; risks are refused."""
        model, rows = tiny_model(num_hidden_layers=4), task(120, seed=1)
        blind = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in rows]

        def collate_blind(some):
            batch = collate([{**row, "labels": 0} for row in some])
            return {name: batch[name] for name in batch if name != "labels"}

        store = store_of(model, blind, collate_blind, needs_labels=False)
        known = store_of(model, rows, collate)
        assert known.has_labels and not store.has_labels
        for name in ("policy", "margin", "entropy"):
            scores, full = (score_store(one, name, model) for one in (store, known))
            # Rows come in other batches, whose products may differ in the last digits.
            torch.testing.assert_close(scores.scores, full.scores)
            assert torch.equal(scores.disagrees, full.disagrees)
            assert bool(scores.losses.isnan().all())
        found = calibrate_agreement(scores, 0.3, "running")
        assert_alike(found, calibrate_agreement(full, 0.3, "running"))
        assert "risk" not in found.check(scores).held_out and "risk" in found.check(full).held_out
        risks = full.losses.double().mean(0)
        assert_alike(calibrate_budget(scores, 3.0, risks=risks), calibrate_budget(full, 3.0))
        with pytest.raises(ValueError, match="NaN stands for rows without labels"):
            calibrate_risk(scores, 0.5)
        with pytest.raises(ValueError, match="on rows with labels only"):
            calibrate_risk(full, 0.9).check(scores)
        with pytest.raises(ValueError, match="`labels` of the store are not known"):
            store.correct  # noqa: B018
        with pytest.raises(ValueError, match="'oracle' needs the true labels"):
            score_exits("oracle", store)

    def test_risks(self):
        store = store_of(tiny_model(num_hidden_layers=4), task(20, seed=1), collate)
        errors = score_store(store, "margin").losses
        excess = score_store(store, "margin", risk="excess_error")
        assert excess.risk == "excess_error"
        for row, losses in zip(excess.losses.tolist(), errors.tolist(), strict=True):
            assert row == [max(0.0, loss - losses[-1]) for loss in losses]
        assert torch.equal(excess_risk(errors), excess.losses)
        own = score_store(store, "margin", risk=lambda store: store.losses.clamp_max(1.0))
        assert own.risk == "own" and torch.equal(own.losses, store.losses.clamp_max(1.0))
        assert torch.equal(score_store(store, "margin", risk=own.losses).losses, own.losses)

    def test_problem_types(self):
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(6, 3, 2, generator=generator)
        states, layers = torch.zeros(6, 3, 4), torch.tensor([1, 2, 3])
        many = ExitStore(states, logits, torch.zeros(6, 2), layers, "multi_label_classification")
        number = ExitStore(states, logits[..., :1], torch.zeros(6), layers, "regression", tolerance=0.7)
        for row in range(6):
            for index in range(3):
                signs = [bool((logits[row, index, k] > 0) != (logits[row, -1, k] > 0)) for k in range(2)]
                assert bool(many.disagrees[row, index]) == any(signs)
                far = abs(float(logits[row, index, 0] - logits[row, -1, 0])) > 0.7
                assert bool(number.disagrees[row, index]) == far


def assert_alike(one, other):
    """The same calibration, up to the last digits of its thresholds."""
    assert one.thresholds == pytest.approx(other.thresholds, abs=1e-5)
    assert replace(one, thresholds=other.thresholds) == other


@pytest.mark.parametrize(
    "change,message",
    [
        ({"criterion": "unknown"}, "`criterion`='unknown' is unknown"),
        ({"scores": torch.zeros(0, 7)}, "`scores` of shape"),
        ({"scores": torch.full((5, 7), math.nan)}, "NaN"),
        ({"losses": torch.zeros(5, 7)}, "`losses` of shape"),
        ({"layers": torch.arange(3)}, "`layers` of shape"),
        ({"groups": torch.zeros(4)}, "`groups` of shape"),
    ],
)
def test_errors(change, message):
    with pytest.raises(ValueError, match=message):
        replace(population(5), **change)


def test_unknown_criterion():
    store = store_of(tiny_model(num_hidden_layers=4), task(4, seed=1), collate)
    with pytest.raises(ValueError, match="`exit_criterion`='confidence' is unknown; accepted are calibrated"):
        score_store(store, "confidence")


def test_unknown_risk():
    store = store_of(tiny_model(num_hidden_layers=4), task(4, seed=1), collate)
    with pytest.raises(ValueError, match="`risk`='rouge' is unknown"):
        score_store(store, "margin", risk="rouge")


class TestOtherExits:
    """A store belongs to the exits that it was collected from."""

    @pytest.mark.parametrize("layers,size", [([2, 4], 32), ([1, 2, 4], 32), (None, 16)])
    @pytest.mark.parametrize("criterion", ["policy", "margin"])
    def test_of_a_model(self, layers, size, criterion):
        model = tiny_model(num_hidden_layers=4, exit_layers=[1, 3, 4])
        other = tiny_model(num_hidden_layers=4, exit_layers=layers, hidden_size=size)
        store = store_of(other, task(8, seed=1), collate)
        with pytest.raises(ValueError, match=r"`store` has exits at layers .* this model has \[1, 3, 4\] and 32"):
            score_store(store, criterion, model)

    def test_of_policies(self):
        store = store_of(tiny_model(num_hidden_layers=4, exit_layers=[2, 4]), task(8, seed=1), collate)
        policies = tiny_model(num_hidden_layers=4).exit_policies
        with pytest.raises(ValueError, match=r"`policies` decide at 3 exits; `store` has 1 before its last one"):
            score_exits("policy", store, policies)


def test_scores_at_some_layers():
    scores = replace(population(9, 4), layers=torch.tensor([2, 4, 5, 8]), alpha=0.5)
    some = scores.at_layers([4, 8])
    assert torch.equal(some.scores, scores.scores[:, 1:2]) and some.layers.tolist() == [4, 8] and some.alpha == 0.5
    for name in ("disagrees", "losses"):
        assert torch.equal(getattr(some, name), getattr(scores, name)[:, [1, 3]])
    assert torch.equal(some.last_scores, scores.last_scores) and isinstance(some, ExitScores)
    for layers in ([4], [3, 8], [8, 4], [4, 4, 8], []):
        with pytest.raises(ValueError, match="`layers`="):
            scores.at_layers(layers)


def test_scores_know_whether_they_have_memory():
    scores = population(4, 4)
    assert scores.has_memory is False and replace(scores, has_memory=True).select(torch.arange(2)).has_memory
    patience = ExitScores("patience", scores.scores, scores.layers, scores.disagrees, scores.losses)
    assert patience.has_memory is True


@pytest.mark.parametrize(("inputs", "has_memory"), [("state", False), ("both", True)])
def test_policies_that_look_at_confidences_have_memory(inputs, has_memory):
    model = tiny_llama(policy_inputs=inputs)
    store = store_of(model, instructions(6, seed=1), collate_text)
    assert score_store(store, "policy", model).has_memory is has_memory
    assert score_store(store, "exit_cdf", model).has_memory is True
    assert score_store(store, "margin", model).has_memory is False
