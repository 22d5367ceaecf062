# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Calibrated thresholds: figures on other rows against loops, JSON, and operating points of real models."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from populations import population
from tiny import collate, collate_text, instructions, pad, random_rows, task, tiny_llama, tiny_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from transformers_cee import CalibratedPoint, calibrate_agreement, calibrate_budget, calibrate_risk, score_store
from transformers_cee.calibration.budget import with_rejection
from transformers_cee.evaluation.operating_points import hindsight_point
from transformers_cee.stores.filling import collect_exits
from transformers_cee.stores.store import ExitStore


def stored(model, rows, collator):
    options = {"problem_type": "single_label_classification", "disable_tqdm": True}
    return collect_exits(model, rows, collator, Accelerator(cpu=True), **options)


class TestCheck:
    def test_against_a_loop(self):
        fitted, others = population(300, seed=1), population(200, seed=2)
        costs = [2.0, 3.0, 5.0, 6.0, 7.0, 8.0, 9.0, 20.0]
        found = calibrate_budget(fitted, 8.0, costs)
        figures = found.check(others).held_out
        depth = agreement = risk = cost = 0.0
        for row in range(200):
            taken = 7
            for index in reversed(range(7)):
                if float(others.scores[row, index]) > found.thresholds[index]:
                    taken = index
            depth += (taken + 1) / 200
            agreement += (not bool(others.disagrees[row, taken])) / 200
            risk += float(others.losses[row, taken]) / 200
            cost += costs[taken] / 200
        expected = {"depth": depth, "agreement": agreement, "risk": risk, "mean_cost": cost, "used_budget": cost / 8}
        assert {name: figures[name] for name in expected} == pytest.approx(expected)
        assert figures["rows"] == 200 and figures["kept"] == (cost <= 8)

    @pytest.mark.parametrize(
        "promise,levels", [("agreement", {"epsilon": 0.5}), ("risk", {"level": 0.5, "delta": 0.1, "risk": "error"})]
    )
    def test_kept_turns_at_the_level(self, promise, levels):
        rows = population(100, exits=2)
        disagrees = torch.zeros(100, 2, dtype=torch.bool)
        for wrong in (49, 50, 51):
            disagrees[:wrong, 0] = True
            some = replace(rows, disagrees=disagrees, losses=disagrees.float())
            found = CalibratedPoint("max_probability", [0.0, 1.0], promise, levels, "test", 1)
            assert found.check(some).held_out["kept"] == (wrong <= 50)

    def test_groups(self):
        rows = replace(population(6, exits=2), groups=torch.tensor([0, 0, 0, 0, 0, 1]))
        rows = replace(rows, disagrees=torch.tensor([[False, False]] * 5 + [[True, False]]))
        found = CalibratedPoint("max_probability", [0.0, 1.0], "agreement", {"epsilon": 0.1}, "test", 1)
        assert found.check(rows).held_out["agreement"] == 0.5

    def test_errors(self):
        rows = population(50)
        found = calibrate_risk(rows, 0.9)
        with pytest.raises(ValueError, match="do not belong to thresholds of 'max_probability' at 8"):
            found.check(population(50, criterion="entropy"))
        with pytest.raises(ValueError, match="do not belong"):
            found.check(population(50, exits=4))
        with pytest.raises(ValueError, match=r"`scores.alpha`=0.1 must be None"):
            found.check(replace(rows, alpha=0.1))
        with pytest.raises(ValueError, match="'excess_error' must be 'error'"):
            found.check(replace(rows, risk="excess_error"))
        with pytest.raises(ValueError, match="promise`='speed' must be one of agreement, budget, risk"):
            replace(found, promise="speed")
        with pytest.raises(ValueError, match="must be numbers in"):
            replace(found, thresholds=[2.0] * 8)


class TestJson:
    def test_round_trip(self):
        rows = replace(population(400), alpha=0.01)
        with pytest.warns(UserWarning, match="Exits are off"):
            off = calibrate_risk(rows, 0.01)
        rejecting = with_rejection(calibrate_budget(rows, 4.0), rows, 0.1).check(rows)
        for found in (calibrate_agreement(rows, 0.1), rejecting, off):
            again = CalibratedPoint.from_dict(json.loads(json.dumps(found.to_dict())))
            assert again == found and again.alpha == 0.01
        assert "held_out" not in off.to_dict() and "reason" not in rejecting.to_dict()

    def test_errors(self):
        values = calibrate_agreement(population(400), 0.1).to_dict()
        with pytest.raises(ValueError, match="`values` has the fields"):
            CalibratedPoint.from_dict({**values, "speed": 2})
        del values["method"]
        with pytest.raises(ValueError, match="`values` has the fields"):
            CalibratedPoint.from_dict(values)


class TestOperatingPoints:
    @pytest.mark.parametrize("criterion", ["policy", "margin", "entropy", "patience"])
    @torch.no_grad()
    def test_of_an_encoder(self, criterion, tmp_path):
        model = tiny_model(num_hidden_layers=4)
        scores = score_store(stored(model, task(120, seed=1), collate), criterion, model)
        # Random exits rarely agree.
        found = calibrate_budget(scores, 3.95 if criterion == "patience" else 3.0).check(scores)
        assert 1 < found.held_out["depth"] < 4
        found.save_to(model, "budget-3")
        calibrate_agreement(scores, 0.2, "running").save_to(model, "agreement-0.8")
        model.save_pretrained(tmp_path)
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        assert CalibratedPoint.from_dict(again.config.exit_operating_points["budget-3"]) == found
        batch = pad(random_rows(20, seed=3))
        named = again(**batch, exit_threshold="budget-3")
        numbers = model(**batch, exit_criterion=criterion, exit_threshold=found.thresholds)
        assert torch.equal(named.exit_layers, numbers.exit_layers) and len(set(named.exit_layers.tolist())) > 1
        assert torch.allclose(named.logits, numbers.logits, atol=1e-5)
        with pytest.raises(ValueError, match=r"'agreement-0.9'.*'agreement-0.8', 'budget-3'"):
            again(**batch, exit_threshold="agreement-0.9")

    def test_of_a_decoder(self, tmp_path):
        model = tiny_llama(policy_inputs="both")
        store = stored(model, instructions(60, seed=1), collate_text)
        scores = score_store(store, "margin")
        found = calibrate_budget(scores, 2.5).check(scores)
        # Tokens that may not leave early count neither here nor in the operating point.
        point = hindsight_point("margin", found.thresholds, scores_of_all(store), store, None)
        assert found.held_out["depth"] == pytest.approx(point.depth) and 1 < point.depth < 4
        found.save_to(model.config, "budget-2.5")
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
        batch = pad([{"input_ids": row["input_ids"]} for row in random_rows(3, seed=5)], side="left")
        named = again.generate(**batch, exit_threshold="budget-2.5", **options)
        numbers = model.generate(**batch, exit_criterion="margin", exit_threshold=found.thresholds, **options)
        assert torch.equal(named.sequences, numbers.sequences)
        assert torch.equal(named.exit_layers, numbers.exit_layers)
        assert int(named.exit_layers[named.exit_layers > 0].min()) < 4
        with pytest.raises(ValueError, match=r"'budget-1'.*'budget-2.5'"):
            again.generate(**batch, exit_threshold="budget-1", **options)

    @torch.no_grad()
    def test_belongs_to_what_it_was_fitted_on(self, tmp_path):
        model, rows, batch = tiny_model(num_hidden_layers=4), task(120, seed=1), pad(random_rows(3, seed=3))
        own = calibrate_budget(score_store(stored(model, rows, collate), "margin", model), 3.0)
        assert own.fitted_on is None and "fitted_on" not in own.to_dict()
        own.save_to(model, "own")
        # The same weights on an engine.
        model.config.exit_engine = {"engine": "some", "precision": "int8"}
        with pytest.raises(ValueError, match=r"'own' was fitted on the model itself.*the engine 'some int8'.*anew"):
            model(**batch, exit_threshold="own")
        with pytest.raises(ValueError, match="'again' was fitted on the model itself"):
            own.save_to(model, "again")
        store = stored(model, rows, collate)
        store.save(tmp_path / "store")
        store = ExitStore.load(tmp_path / "store").select(torch.arange(100))
        scores = score_store(store, "margin", model).select(torch.arange(90))
        points = [
            calibrate_budget(scores, 3.0),
            calibrate_budget(scores, 4.0),
            calibrate_agreement(scores, 0.1),
            calibrate_risk(scores, 0.99, grid=[1.0, 0.5]),
        ]
        assert [point.fitted_on for point in points] == ["some int8"] * 4
        points[0].save_to(model, "there")
        assert CalibratedPoint.from_dict(model.config.exit_operating_points["there"]) == points[0]
        model(**batch, exit_threshold="there")
        model.config.exit_engine = {"engine": "some", "precision": "float32"}
        for refused in (lambda: model(**batch, exit_threshold="there"), lambda: score_store(store, "margin", model)):
            with pytest.raises(ValueError, match=r"'some int8'.*'some float32'"):
                refused()
        del model.config.exit_engine
        with pytest.raises(ValueError, match=r"'there' was fitted on the engine 'some int8'"):
            model(**batch, exit_threshold="there")
        model(**batch, exit_threshold="own")

    def test_errors(self):
        found = calibrate_agreement(population(400), 0.1)
        with pytest.raises(ValueError, match="`model` has 4 exits, the thresholds are for 8"):
            found.save_to(tiny_model(num_hidden_layers=4), "some")
        with pytest.raises(ValueError, match="`name`=''"):
            found.save_to(tiny_model(num_hidden_layers=8), "")


def scores_of_all(store):
    from transformers_cee.stores.scoring import score_exits

    return score_exits("margin", store)
