# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Every field of a saved config with every kind of wrong value: it loads, or a `ValueError` names the field."""

from __future__ import annotations

import json

import pytest
import torch
from mutations import mutated
from tiny import tiny_config, tiny_llama_config

from transformers_cee import BertForConsistentEE, LlamaForConsistentEECausalLM
from transformers_cee.exits.configuration import DecoderExitConfigMixin, EncoderExitConfigMixin
from transformers_cee.exits.estimators import ESTIMATORS


POINT = {
    "criterion": "policy", "thresholds": [0.5, 0.5, 1.0], "promise": "budget", "method": "scan", "rows": 9,
    "levels": {"budget": 2.0, "costs": [1.0, 2.0, 3.0], "unit": "layers", "delta": 0.1}, "alpha": 0.1,
}  # fmt: skip
FIELDS = {
    "exit_layers": [1, 3], "exit_operating_points": {"half": POINT}, "exit_threshold": [0.5, 0.5, 1.0],
    "exit_budgets": [[0.3, 0.2, 0.5], [1.0, 0.1, 0.5]], "exit_estimators": sorted(ESTIMATORS),
    "policy_condition": "film",
}  # fmt: skip
MODELS = {
    "bert": (BertForConsistentEE, lambda: tiny_config(num_hidden_layers=4, **FIELDS), EncoderExitConfigMixin),
    "llama": (
        LlamaForConsistentEECausalLM,
        lambda: tiny_llama_config(min_exit_layer=1, exit_budget=0.5, **FIELDS),
        DecoderExitConfigMixin,
    ),
}


@pytest.fixture(params=list(MODELS))
def saved(request, tmp_path):
    """Model class, names of the exits' fields, and the fields of a saved config."""
    model_class, make, mixin = MODELS[request.param]
    make().save_pretrained(tmp_path)
    return model_class, set(mixin.__dataclass_fields__), json.loads((tmp_path / "config.json").read_text())


def refusal(load, values):
    """The message of a `ValueError`, or None. Anything else that is raised fails the test."""
    try:
        load(values)
    except ValueError as error:
        return str(error)
    return None


def test_one_wrong_field(saved):
    model_class, own, values = saved
    config_class, refused = model_class.config_class, 0
    for path, changed in mutated(values):
        if len(path) > 1 and path[0] not in own:
            continue
        message = refusal(config_class.from_dict, json.loads(json.dumps(changed)))
        if message is not None:
            refused += 1
            assert path[0] in message or "`num_hidden_layers`" in message or "`exit_layers`" in message, (
                path,
                changed.get(path[0]),
                message,
            )
    assert refused > 1000


def test_what_loads_makes_a_model(saved):
    """Exit fields that a config accepts make a model, on no device: sizes may be large."""
    model_class, own, values = saved
    made = 0
    for path, changed in mutated(values):
        if path[0] in own and refusal(model_class.config_class.from_dict, changed) is None:
            with torch.device("meta"):
                model_class(model_class.config_class.from_dict(changed))
            made += 1
    assert made > 30


def test_wrong_fields_given_on_loading(saved, tmp_path):
    model_class, own, values = saved
    (tmp_path / "config.json").write_text(json.dumps(values))
    for path, changed in mutated({name: value for name, value in values.items() if name in own}):
        if len(path) == 1 and path[0] in changed and path[0] != "extra":
            message = refusal(lambda fields: model_class.config_class.from_pretrained(tmp_path, **fields), changed)
            assert message is None or path[0] in message or "exit_" in message, (path, changed[path[0]], message)


def test_keywords_are_to_blame_where_the_file_is_sound(saved):
    model_class, _, values = saved
    with pytest.raises(ValueError, match=r"`hidden_size`='x' is not accepted"):
        model_class.config_class.from_dict(values, hidden_size="x", exit_threshold=1.0)
    with pytest.raises(ValueError, match=r"`hidden_size`='y' of a"):
        model_class.config_class.from_dict({**values, "hidden_size": "y"}, exit_threshold=1.0)


@pytest.mark.parametrize("layers", [10**8, 10**30])
def test_too_many_layers(saved, layers):
    """Refused before a list of them is made."""
    model_class, _, values = saved
    for fields in ({}, {"exit_layers": None, "exit_operating_points": {}, "exit_threshold": 1.0}):
        with pytest.raises(ValueError, match="num_hidden_layers"):
            model_class.config_class.from_dict({**values, **fields, "num_hidden_layers": layers})
