# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

from transformers_cee import BertForConsistentEE, CalibratedPoint
from transformers_cee.calibration.cost_table import CostTable, MeasuredBatch
from transformers_cee.calibration.exit_plans import known_plan, plan_exits
from transformers_cee.calibration.scores import score_store
from transformers_cee.engines import model as model_module
from transformers_cee.engines.costs import measure_costs
from transformers_cee.engines.promises import exits_of
from transformers_cee.engines.serving import rates_of
from transformers_cee.evaluation.timing import Timer
from transformers_cee.exits.criteria import build_criterion
from transformers_cee.exits.deciding import criterion_settings
from transformers_cee.exits.estimators import ESTIMATORS


def costs(check):
    layers = dict.fromkeys(range(1, 5), 1.0)
    checks = {1: check, 2: check, 3: check, 4: 0.0}
    return CostTable("openvino", "float32", "a processor", 1, [MeasuredBatch(1, 16, layers, 0.0, checks, 0.0)])


@pytest.fixture(scope="module")
def exported(make_model, tokenizer, texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "out"
    options = {"precision": "float32", "calibration_texts": texts, "processing_class": tokenizer}
    return make_model(exit_criterion="max_probability").export(folder, **options)


@torch.no_grad()
def test_exits_that_cannot_pay_are_not_asked(exported, tokenizer, texts):
    batch = tokenizer(texts[:12], padding=True, return_tensors="pt")
    middle = float(exported.rates[0].scores.median())
    exported.costs = costs(0.0)
    early = exported(**batch, exit_threshold=middle)
    exported.costs = costs(10.0)
    late = exported(**batch, exit_threshold=middle)
    full = exported(**batch, exit_threshold=1.0)
    assert early.exit_layers.float().mean() < 4 and late.exit_layers.tolist() == [4] * 12
    torch.testing.assert_close(late.logits, full.logits)
    assert bool(late.exit_probabilities.isnan().all()) and late.exit_probabilities.shape == (12, 4)


@torch.no_grad()
@pytest.mark.parametrize(
    ("limit", "check", "beside"),
    [("LEAST_GAIN", 0.0, "full_seconds"), ("LEAST_RETURN", 0.1, "in_vain")],
    ids=["saves next to nothing", "might cost much more than it saves"],
)
def test_plans_that_return_too_little_are_not_followed(limit, check, beside, exported, tokenizer, texts, monkeypatch):
    batch = tokenizer(texts[:12], padding=True, return_tensors="pt")
    middle = float(exported.rates[0].scores.median())
    exported.costs = costs(check)
    plan = plan_exits(exported.rates[0], [middle] * 4, exported.costs, 12, 16)
    saved = (plan.full_seconds - plan.seconds) / getattr(plan, beside)
    assert getattr(plan, beside) > 0 and saved > 0
    for least, is_asked in ((0.99 * saved, True), (1.01 * saved, False)):
        monkeypatch.setattr(model_module, limit, least)
        assert bool((exported(**batch, exit_threshold=middle).exit_layers < 4).any()) == is_asked


@torch.no_grad()
def test_promises_made_for_all_exits_ask_all(exported, tokenizer, texts):
    batch = tokenizer(texts[:12], padding=True, return_tensors="pt")
    exported.costs = costs(10.0)
    middle = float(exported.rates[0].scores.median())
    point = CalibratedPoint(
        "max_probability", [middle] * 4, "agreement", {"epsilon": 0.1}, "certified", 60, fitted_on="openvino float32"
    )
    point.save_to(exported, "all")
    replace(point, method="chosen_by_cost_any_of_them").save_to(exported, "any")
    assert float(exported(**batch, exit_threshold="all").exit_layers.float().mean()) < 4
    assert exported(**batch, exit_threshold="any").exit_layers.tolist() == [4] * 12


@pytest.mark.parametrize("columns", range(1, 61))
def test_lengths_are_planned_as_they_are(columns, exported, monkeypatch):
    """Up to an eighth of a doubling: a plan for longer texts overrates what layers save."""
    seen = []
    monkeypatch.setattr(model_module, "known_plan", lambda *given: seen.append(given[-1]) or known_plan(*given))
    exported.costs = costs(0.0)
    ids = torch.full((2, columns), 7)
    exported(input_ids=ids, exit_threshold=float(exported.rates[0].scores.median()))
    assert abs(math.log2(seen[0] / columns)) <= 1 / 8 + 1e-9


@torch.no_grad()
def test_rates_are_those_of_the_price_that_is_asked(make_model, tokenizer, texts, tmp_path):
    """Prices far apart leave other shares of rows at each exit."""
    model = make_model(policy_condition="film", policy_inputs="confidence", policy_alphas=[0.001, 0.5])
    for networks in model.exit_policies.networks:
        for weight in networks.parameters():
            torch.nn.init.normal_(weight, std=0.3)
    # As they are fitted: many thresholds at the lowest price.
    deep = [[0.7 + number / 100, 0.001, 0.5 + number / 100] for number in range(30)]
    model.config.exit_budgets = [[0.3, 0.5, 0.5], [0.6, 0.02, 0.5], *deep]
    options = {"precision": "float32", "processing_class": tokenizer, "calibration_texts": texts, "measure": False}
    exported = model.export(tmp_path / "out", engine="torch", **options)
    rows = tokenizer(texts)
    store = exits_of(exported, Dataset.from_dict(dict(rows)), tokenizer)
    exported.rates = rates_of(exported, store)
    assert [rates.alpha for rates in exported.rates] == [0.001, 0.02, 0.5]
    for alpha in (None, 0.5, 0.1, 0.02):
        settings = criterion_settings(exported, alpha)
        true = score_store(store, "policy", exported, settings).scores
        criterion = build_criterion("policy", 0.5, 4, "single_label_classification", exported.exit_policies, settings)
        tolerance = 0.02 if alpha == 0.1 else 1e-5
        torch.testing.assert_close(exported._rates_of(criterion).scores, true, atol=tolerance, rtol=0)


def test_costs_and_rates_are_kept(exported):
    again = BertForConsistentEE.from_pretrained(exported.name_or_path)
    assert again.costs.exit_layers == [1, 2, 3, 4] and again.costs.engine == "openvino"
    torch.testing.assert_close(again.rates[0].scores, exported.rates[0].scores)
    fewer = BertForConsistentEE.from_pretrained(exported.name_or_path, exit_layers=[2])
    assert fewer.layer_numbers == [2, 4]
    torch.testing.assert_close(fewer.rates[0].scores, exported.rates[0].scores[:, 1:2])


@torch.no_grad()
def test_fewer_exits_are_those_of_their_layers(exported, tokenizer, texts):
    fewer = BertForConsistentEE.from_pretrained(exported.name_or_path, exit_layers=[2])
    batch = tokenizer(texts[:6], padding=True, return_tensors="pt")
    every, some = exported(**batch, output_all_exits=True), fewer(**batch, output_all_exits=True)
    torch.testing.assert_close(some.all_exit_logits, every.all_exit_logits[:, [1, 3]], rtol=1e-5, atol=1e-5)


def test_sizes_that_are_measured(make_model, tokenizer, texts, tmp_path):
    made = make_model(exit_criterion="max_probability", max_position_embeddings=20)
    options = {"engine": "torch", "precision": "float32", "calibration_texts": texts, "processing_class": tokenizer}
    exported = made.export(tmp_path / "out", **options)
    assert {batch.length for batch in exported.costs.batches} == {8, 20}
    few = measure_costs(exported, batch_sizes=[4], lengths=[16], timer=Timer(3, 1), disable_tqdm=True)
    assert [batch.batch_size for batch in few.batches] == [1, 4]


class CountingTimer:
    """A layer takes a second, the embeddings three, an internal exit a quarter and the first one half a second more,
    whatever this machine is doing."""

    def __init__(self, model) -> None:
        self.seconds = 0.0
        block = model.engine.block
        model.engine.block = lambda cut: self.counting(block(cut), cut, model.config.num_hidden_layers)
        model.blocks.clear()

    def counting(self, run, cut, last):
        def counted(given):
            first, internal = cut.start == 0, cut.stop < last
            self.seconds += cut.stop - cut.start + 3.0 * first + 0.25 * internal + 0.5 * (first and internal)
            return run(given)

        return counted

    def time(self, variants, baseline, device):
        seconds = {}
        for name, runs in variants.items():
            self.seconds = 0.0
            for run in runs:
                run()
            seconds[name] = self.seconds
        return self.told(seconds, baseline)

    def told(self, seconds, baseline):
        over = {
            name: SimpleNamespace(median=seconds[baseline] / one if one else math.inf) for name, one in seconds.items()
        }
        return SimpleNamespace(
            seconds={name: SimpleNamespace(median=one) for name, one in seconds.items()},
            speedups={baseline: {name: one for name, one in over.items() if name != baseline}},
        )


@pytest.mark.parametrize(
    "fields",
    [
        {"exit_criterion": "max_probability"},
        {"exit_criterion": "policy"},
        # Features of these policies look back, so all exits before the one that is left at are asked, too.
        {"exit_criterion": "policy", "policy_inputs": "confidence"},
    ],
    ids=["max_probability", "policy", "looks_back"],
)
def test_layers_and_checks_are_told_apart(fields, make_model, tokenizer, texts, tmp_path):
    options = {"precision": "float32", "processing_class": tokenizer, "calibration_texts": texts, "measure": False}
    exported = make_model(**fields).export(tmp_path / "out", engine="torch", **options)
    timer = CountingTimer(exported)
    table = measure_costs(exported, batch_sizes=[1, 4], lengths=[16], timer=timer, disable_tqdm=True)
    for batch in table.batches:
        assert batch.layer_seconds == pytest.approx({1: 4.0, 2: 1.0, 3: 1.0, 4: 1.0})
        assert batch.check_seconds == pytest.approx({1: 0.25, 2: 0.25, 3: 0.25, 4: 0.0})
        assert batch.walk_seconds == pytest.approx(0.5)


def test_noise_makes_no_layer_dearer_than_the_whole_allows(make_model, tokenizer, texts, tmp_path):
    fields = {"exit_criterion": "policy", "policy_inputs": "confidence"}
    options = {"precision": "float32", "processing_class": tokenizer, "calibration_texts": texts, "measure": False}
    exported = make_model(**fields).export(tmp_path / "out", engine="torch", **options)

    class NoisyTimer(CountingTimer):
        def told(self, seconds, baseline):
            return super().told(seconds | {"half": 0.1}, baseline)

    table = measure_costs(exported, batch_sizes=[1], lengths=[16], timer=NoisyTimer(exported), disable_tqdm=True)
    assert table.batches[0].layer_seconds == pytest.approx(dict.fromkeys(range(1, 5), 7 / 4))


def test_nothing_to_measure(exported):
    last = BertForConsistentEE.from_pretrained(exported.name_or_path, exit_layers=[4])
    with pytest.raises(ValueError, match="no checks to measure"):
        measure_costs(last)


@pytest.mark.slow
@torch.no_grad()
def test_exits_are_chosen_by_cost(make_model, tokenizer, texts, tmp_path):
    model = make_model(exit_criterion="max_probability")
    options = {"precision": "float32", "processing_class": tokenizer, "exit_layers": "auto"}
    few = model.export(tmp_path / "few", calibration_texts=texts, agreement=0.999, **options)
    assert few.layer_numbers == [4]
    assert few.config.exit_operating_points["agreement-0.999"]["reason"]
    loose = model.export(tmp_path / "loose", calibration_texts=texts * 8, agreement=0.05, **options)
    assert loose.config.exit_threshold == "agreement-0.05"
    batch = tokenizer(texts[:6], padding=True, return_tensors="pt")
    assert set(loose(**batch).exit_layers.tolist()) <= set(loose.layer_numbers)
    with pytest.raises(ValueError, match="`exit_layers`='auto' takes"):
        model.export(tmp_path / "none", precision="float32", exit_layers="auto")


def test_arguments_without_effect_are_refused(exported):
    with pytest.raises(TypeError, match="`thread`=1 is no argument of an exported model"):
        BertForConsistentEE.from_pretrained(exported.name_or_path, thread=1)
    with pytest.raises(TypeError, match="`device_map`='cpu'"):
        AutoModelForSequenceClassification.from_pretrained(exported.name_or_path, device_map="cpu")


def test_an_estimator_fitted_anew_is_asked_outside_of_the_graphs(make_model, tokenizer, texts, tmp_path):
    model = make_model(exit_criterion="calibrated_probability")
    inputs = tokenizer(texts[:12], padding=True, return_tensors="pt")
    for temperature in (1.0, 0.2):
        estimator = ESTIMATORS["calibrated_probability"](model.config)
        with torch.no_grad():
            for value in (*estimator.parameters(), *estimator.buffers()):
                value.fill_(temperature)
        model.exit_estimators["calibrated_probability"] = estimator.eval()
        model.config.exit_estimators = ["calibrated_probability"]
        if temperature == 1.0:
            exported = model.export(tmp_path / "out", engine="torch", precision="float32")
            assert exported.record["criterion"] == "calibrated_probability"
    exported.exit_estimators["calibrated_probability"].load_state_dict(estimator.state_dict())
    exported.estimator_changed("calibrated_probability")
    asked = {"exit_criterion": "calibrated_probability", "exit_threshold": 0.999999}
    with torch.no_grad():
        mine, theirs = exported(**inputs, **asked), model(**inputs, **asked)
    torch.testing.assert_close(mine.exit_probabilities, theirs.exit_probabilities, equal_nan=True)
    fewer = BertForConsistentEE.from_pretrained(tmp_path / "out", exit_layers=[2])
    assert fewer.layer_numbers == [2, 4]


@torch.no_grad()
def test_calls_may_leave_before_the_first_layer_of_the_config(make_model, tokenizer, texts, tmp_path):
    """Plans know how many rows leave at every exit, also at those that the config closes."""
    options = {"precision": "float32", "calibration_texts": texts, "processing_class": tokenizer, "measure": False}
    model = make_model(exit_criterion="max_probability", min_exit_layer=3)
    planned = model.export(tmp_path / "out", **options)
    rows = Dataset.from_dict(dict(tokenizer(texts)))
    planned.rates = rates_of(planned, exits_of(planned, rows, tokenizer))
    batch = tokenizer(texts[:12], padding=True, return_tensors="pt")
    middle = float(planned.rates[0].scores.flatten().median())
    planned.costs = costs(0.0)
    for first in (1, 2, 3, None):
        asked = {"exit_threshold": middle, "min_exit_layer": first}
        expected, found = model(**batch, **asked), planned(**batch, **asked)
        assert found.exit_layers.tolist() == expected.exit_layers.tolist()
        assert int(found.exit_layers.min()) >= (first or 3)
    assert int(planned(**batch, exit_threshold=middle, min_exit_layer=1).exit_layers.min()) < 3
