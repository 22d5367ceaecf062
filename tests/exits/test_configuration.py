# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Exit fields of encoders and decoders: defaults, what is refused, what is saved."""

from __future__ import annotations

import json

import pytest

from transformers_cee import BertCeeConfig, LlamaCeeConfig
from transformers_cee.exits import config_loading
from transformers_cee.exits.cache_name import CACHE_NAME
from transformers_cee.exits.configuration import (
    DecoderExitConfigMixin,
    EncoderExitConfigMixin,
    ExitConfigMixin,
    check_min_exit_layer,
    check_skipped_kv,
)


SHARED = {
    "exit_layers": None,
    "exit_criterion": "policy",
    "policy_hidden_size": 32,
    "policy_activation": "gelu",
    "policy_inputs": "state",
    "reward_alpha": 0.02,
}
OWN = {
    BertCeeConfig: {"exit_threshold": None, "exit_pooling": "cls", "exit_norm": "none"},
    LlamaCeeConfig: {
        "exit_head": "norm",
        "exit_head_rank": 64,
        "min_exit_layer": None,
        "skipped_kv": "copy",
    },
}


@pytest.mark.parametrize("config", OWN)
def test_defaults_are_saved(config, tmp_path):
    assert issubclass(config, ExitConfigMixin)
    made = config(num_hidden_layers=4)
    made.save_pretrained(tmp_path)
    for one in (made, config.from_pretrained(tmp_path)):
        assert {name: getattr(one, name) for name in {**SHARED, **OWN[config]}} == {**SHARED, **OWN[config]}
        assert one.exit_layer_numbers == [1, 2, 3, 4]


def test_each_kind_has_its_own_fields():
    assert issubclass(BertCeeConfig, EncoderExitConfigMixin) and not issubclass(BertCeeConfig, DecoderExitConfigMixin)
    assert issubclass(LlamaCeeConfig, DecoderExitConfigMixin) and not issubclass(
        LlamaCeeConfig, EncoderExitConfigMixin
    )
    assert not hasattr(LlamaCeeConfig(), "exit_pooling") and not hasattr(BertCeeConfig(), "skipped_kv")


@pytest.mark.parametrize("config", OWN)
@pytest.mark.parametrize(
    "exit_layers,expected", [(None, [1, 2, 3, 4, 5]), (2, [1, 3, 5]), (3, [2, 5]), ([4, 2], [2, 4, 5]), ([5], [5])]
)
def test_exit_layers(config, exit_layers, expected):
    assert config(num_hidden_layers=5, exit_layers=exit_layers).exit_layer_numbers == expected


@pytest.mark.parametrize("config", OWN)
@pytest.mark.parametrize(
    "fields,message",
    [
        ({"exit_layers": 0}, r"`exit_layers`=0 as a stride must lie in 1\.\.4"),
        ({"exit_layers": [0, 2]}, r"`exit_layers`=\[0, 2\]: \[0\] are no layers of 1\.\.4"),
        ({"exit_layers": [1.5, 2]}, r"`exit_layers`=\[1.5, 2\]: \[1.5\] are no layers of 1\.\.4"),
        ({"exit_layers": "2"}, r"`exit_layers`='2' must be a stride or a list of layers"),
        ({"exit_patience": 2.5}, r"`exit_patience`=2.5 must be a whole number of at least 1"),
        ({"exit_estimators": None}, r"`exit_estimators`=None must be a list of names"),
        ({"exit_criterion": "mood"}, r"`exit_criterion`='mood'"),
        ({"exit_threshold": 1.5}, r"`exit_threshold`=1.5"),
        ({"exit_threshold": [0.5]}, r"1 values.*\(4\)"),
        ({"policy_inputs": "smell"}, r"`policy_inputs`='smell'.*'state', 'confidence', 'log_confidence', 'both'"),
        ({"policy_hidden_size": 0}, r"`policy_hidden_size`=0"),
        ({"policy_activation": "cubic"}, r"`policy_activation`='cubic'"),
        ({"reward_alpha": -1.0}, r"`reward_alpha`=-1.0"),
        ({"exit_estimators": ["consistency", "luck"]}, r"`exit_estimators`=.*'luck'.*state_classifier, token_hash"),
    ],
)
def test_refused(config, fields, message):
    with pytest.raises(ValueError, match=message):
        config(num_hidden_layers=4, **fields)


@pytest.mark.parametrize(
    "fields,message",
    [
        (
            {"exit_head": "mine"},
            r"`exit_head`='mine' is unknown; accepted are layernorm_linear, low_rank, norm, shared, untied",
        ),
        ({"exit_head_rank": 0}, r"`exit_head_rank`=0 must be a whole number in 1\.\."),
        ({"skipped_kv": "guess"}, r"`skipped_kv`='guess'.*'copy', 'deferred'"),
        ({"min_exit_layer": 0}, r"`min_exit_layer`=0 must lie in 1\.\.4"),
        ({"min_exit_layer": 5}, r"`min_exit_layer`=5"),
    ],
)
def test_refused_of_decoders(fields, message):
    with pytest.raises(ValueError, match=message):
        LlamaCeeConfig(num_hidden_layers=4, **fields)


def test_checks_alone():
    for layer in (None, 1, 4):
        check_min_exit_layer(layer, 4)
    for name in ("copy", "deferred"):
        check_skipped_kv(name)
    with pytest.raises(ValueError, match=r"`min_exit_layer`=5"):
        check_min_exit_layer(5, 4)
    with pytest.raises(ValueError, match=r"`skipped_kv`='guess'"):
        check_skipped_kv("guess")


def test_what_trainer_leaves_out_of_predictions():
    assert {CACHE_NAME, "all_exit_features", "token_labels", "may_exit", "exit_layers"} <= set(
        LlamaCeeConfig.keys_to_ignore_at_inference
    )
    assert CACHE_NAME not in BertCeeConfig.keys_to_ignore_at_inference


class TestFieldsThatTrainingHasNow:
    """Configs of older folders, which have them, go on to load."""

    @pytest.mark.parametrize("config", OWN)
    @pytest.mark.parametrize("value", [True, False])
    @pytest.mark.parametrize(
        "name,now", [("reward_hardness", "reward"), ("copy_exit_states", "consistent_copy_states")]
    )
    def test_are_dropped(self, config, value, name, now, tmp_path, caplog):
        config_loading.logger.warning_once.cache_clear()
        config(num_hidden_layers=4).save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
        for _ in range(3):
            loaded = config.from_pretrained(tmp_path)
        assert not hasattr(loaded, name) and name not in loaded.to_dict()
        said = [one for one in caplog.messages if name in one]
        warning = f"`{name}`=False of a config is ignored: `{now}` of `ConsistentEETrainingArguments`"
        # Once, and only what would have made a difference.
        assert len(said) == (0 if value else 1) and all(one.startswith(warning) for one in said)


@pytest.mark.parametrize("config_class", list(OWN))
@pytest.mark.parametrize("threshold", [5, "nobody"])
def test_what_could_not_be_loaded_is_not_saved(config_class, threshold, tmp_path):
    config = config_class()
    config.exit_threshold = threshold
    with pytest.raises(ValueError, match="`exit_threshold`="):
        config.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
