# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
from __future__ import annotations

import pytest
import torch
from fitted import fitted_model
from tiny import pad, random_rows, tiny_config, tiny_llama, tiny_model
from transformers import GenerationConfig

from transformers_cee import BertCeeConfig, LlamaCeeConfig
from transformers_cee.exits.criteria import CRITERIA
from transformers_cee.exits.deciding import default_arguments, price_of_budget, resolve_decision
from transformers_cee.exits.estimators import ESTIMATORS


# The oracle looks at labels, which no model has.
NAMES = sorted(set(CRITERIA) - {"oracle"})
NEEDY = sorted(name for name, cls in CRITERIA.items() if cls.needs_classes)
# Those that need no estimator.
PLAIN = [name for name in NAMES if "_Fitted" not in [cls.__name__ for cls in CRITERIA[name].__mro__]]
IDS = torch.tensor([[5, 6, 7], [9, 4, 8]])
OPTIONS = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}


@pytest.mark.parametrize("name", NAMES)
class TestEncoder:
    def test_a_config_with_a_criterion_alone(self, name):
        model, batch = fitted_model(exit_criterion=name, exit_threshold=None), pad(random_rows(8, seed=0))
        expected = model(**batch, exit_criterion="policy", exit_threshold=1.0)
        for asked in ({}, {"exit_criterion": name}, {"exit_threshold": None}):
            output = model(**batch, **asked)
            assert output.exit_layers.tolist() == [6] * 8
            torch.testing.assert_close(output.logits, expected.logits)
        assert 6 in model(**batch, **default_arguments(model.config)).exit_layers.unique().tolist()

    def test_a_call_with_another_criterion_than_the_configs(self, name):
        """0.5 belongs to the criterion that the config names it for."""
        other = "margin" if name != "margin" else "policy"
        model = fitted_model(exit_criterion=other, exit_threshold=0.0 if other == "policy" else 0.5)
        batch = pad(random_rows(8, seed=0))
        assert model(**batch, exit_criterion=name).exit_layers.tolist() == [6] * 8
        assert min(model(**batch).exit_layers) < 6
        assert model(**batch, exit_criterion=other).exit_layers.tolist() == model(**batch).exit_layers.tolist()


@pytest.mark.parametrize("name", PLAIN)
class TestDecoder:
    def layers(self, model, **options):
        return set(model.generate(IDS, **OPTIONS, **options).exit_layers.flatten().tolist())

    def test_a_config_with_a_criterion_alone(self, name):
        model = tiny_llama(exit_criterion=name, eos_token_id=None)
        assert self.layers(model) == {4}
        assert self.layers(model, exit_criterion=name) == {4}
        assert set(model(IDS).exit_layers.flatten().tolist()) == {4}
        assert set(model(IDS, exit_criterion=name).exit_layers.flatten().tolist()) == {4}

    def test_a_call_with_another_criterion_than_the_configs(self, name):
        other = "margin" if name != "margin" else "policy"
        model = tiny_llama(exit_criterion=other, exit_threshold=0.0, eos_token_id=None)
        assert 1 in self.layers(model)
        assert self.layers(model, exit_criterion=name) == {4}
        asked = GenerationConfig(exit_criterion=name, max_new_tokens=5)
        assert self.layers(model, generation_config=asked) == {4}
        model.generation_config.exit_criterion, model.generation_config.exit_threshold = other, 0.0
        assert self.layers(model, exit_criterion=name) == {4}


@pytest.mark.parametrize("name", sorted(CRITERIA))
class TestNothingIsAsked:
    """Off needs nothing: neither what the criterion was to be fitted with nor labels."""

    def test_encoder(self, name):
        model, batch = tiny_model(exit_criterion=name, exit_threshold=None), pad(random_rows(4, seed=0))
        expected = model(**batch, exit_criterion="policy", exit_threshold=1.0).logits
        for asked in ({}, {"exit_criterion": name}, default_arguments(model.config)):
            output = model(**batch, **asked)
            assert output.exit_layers.tolist() == [6] * 4
            torch.testing.assert_close(output.logits, expected)

    def test_regression(self, name):
        model = tiny_model(exit_criterion=name, exit_threshold=None, num_labels=1)
        batch = pad(random_rows(4, seed=0))
        assert model(**batch).exit_layers.tolist() == [6] * 4
        assert model(**batch, exit_criterion=name).exit_layers.tolist() == [6] * 4

    def test_decoder(self, name):
        model = tiny_llama(exit_criterion=name, eos_token_id=None)
        expected = model.generate(IDS, **OPTIONS, exit_criterion="policy", exit_threshold=1.0).sequences
        for asked in ({}, {"exit_criterion": name}):
            output = model.generate(IDS, **OPTIONS, **asked)
            assert torch.equal(output.sequences, expected) and set(output.exit_layers.flatten().tolist()) == {4}


@pytest.mark.parametrize("name", [*sorted(ESTIMATORS), "oracle"])
def test_what_a_criterion_needs_is_missed_once_it_is_asked(name):
    model, batch = tiny_model(exit_criterion=name, exit_threshold=None), pad(random_rows(2, seed=0))
    with pytest.raises(ValueError, match=f"{name!r} needs"):
        model(**batch, exit_threshold=0.5)
    with pytest.raises(ValueError, match=f"{name!r} needs"):
        tiny_llama(exit_criterion=name).generate(IDS, max_new_tokens=2, exit_threshold=0.5)


@pytest.mark.parametrize("name", NEEDY)
def test_class_probabilities_are_missed_once_they_are_asked(name):
    model = tiny_model(exit_criterion=name, exit_threshold=None, num_labels=1)
    with pytest.raises(ValueError, match=f"`exit_criterion`={name!r}"):
        model(**pad(random_rows(2, seed=0)), exit_threshold=0.5)


def test_unknown_criteria_are_refused_with_exits_off():
    with pytest.raises(ValueError, match="`exit_criterion`='mood' is unknown"):
        tiny_model(exit_threshold=None)(**pad(random_rows(2, seed=0)), exit_criterion="mood")
    with pytest.raises(ValueError, match="`exit_criterion`='mood' is unknown"):
        tiny_llama().generate(IDS, max_new_tokens=2, exit_criterion="mood")


def test_nothing_is_the_default_and_is_saved(tmp_path):
    for config in (BertCeeConfig(), LlamaCeeConfig()):
        assert config.exit_threshold is None
        config.save_pretrained(tmp_path)
        assert type(config).from_pretrained(tmp_path).exit_threshold is None
    decision = resolve_decision(tiny_config(exit_criterion="patience", exit_threshold=None))
    assert decision.threshold == CRITERIA["patience"].off


def test_a_threshold_in_the_config_is_asked_for():
    assert min(tiny_model(exit_threshold=0.5)(**pad(random_rows(8, seed=0))).exit_layers) < 6


class TestBudgetsOutOfReach:
    POINTS = ((0.36, 0.5, 0.25), (0.9, 0.01, 0.75))

    @pytest.mark.parametrize("budget", [0.01, 0.3])
    def test_less_than_is_reached(self, budget):
        with pytest.raises(
            ValueError, match=rf"`exit_budget`={budget} is less than this model reaches.*begin at 0\.36"
        ):
            price_of_budget(self.POINTS, budget)

    def test_rounded_is_reached(self):
        assert price_of_budget(self.POINTS, 0.358) == self.POINTS[0][1:]
        assert price_of_budget(self.POINTS, 0.95) == self.POINTS[1][1:]
        assert price_of_budget(self.POINTS, 1.0) == (0.01, 1.0)

    def test_before_any_layer_runs(self):
        model = tiny_model(policy_condition="film", exit_budgets=[list(point) for point in self.POINTS])
        model.bert.embeddings.register_forward_hook(lambda *_: pytest.fail("ran"))
        with pytest.raises(ValueError, match=r"`exit_budget`=0\.01 is less"):
            model(**pad(random_rows(2, seed=0)), exit_budget=0.01)
        with pytest.raises(ValueError, match=r"`exit_budget`=0\.2 is less"):
            tiny_config(policy_condition="film", exit_budgets=[[0.36, 0.5, 0.25]], exit_budget=0.2)
