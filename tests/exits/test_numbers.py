# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from tiny import pad, random_rows, tiny_config, tiny_llama, tiny_llama_config, tiny_model

from transformers_cee.exits.criteria import check_thresholds
from transformers_cee.exits.deciding import price_of_budget
from transformers_cee.exits.numbers import number, plain, share, whole


SCALARS = [np.float32, np.float64, np.array, torch.tensor, lambda value: torch.tensor(value, dtype=torch.float64)]


class TestOne:
    @pytest.mark.parametrize("kind", SCALARS)
    def test_scalars_of_all_kinds(self, kind):
        found = number("x", kind(0.5))
        assert found == 0.5 and type(found) is float
        assert share("x", kind(0.25)) == 0.25
        assert type(number("x", kind(math.inf))) is float

    @pytest.mark.parametrize("value", [None, True, np.bool_(True), "0.5", [0.5], torch.tensor([0.5])])
    def test_what_is_no_number(self, value):
        with pytest.raises(ValueError, match=r"`x`=.* must be a number\."):
            number("x", value)

    @pytest.mark.parametrize("value", [0.0, 1.0, math.nan, -0.1, np.float32(1.5), None, "0.5"])
    def test_what_is_no_share(self, value):
        with pytest.raises(ValueError, match=r"`x`=.* must be a number strictly between 0 and 1"):
            share("x", value)

    @pytest.mark.parametrize("value", [2, 2.0, np.int64(2), np.float32(2.0), torch.tensor(2), torch.tensor(2.0)])
    def test_whole_numbers_however_they_are_written(self, value):
        assert whole(value) == 2 and type(whole(value)) is int

    @pytest.mark.parametrize("value", [2.5, "2", None, True, math.inf])
    def test_what_is_not_whole_stays(self, value):
        assert whole(value) is value

    def test_lists(self):
        assert plain([np.float64(0.5), torch.tensor(1), "name", None]) == [0.5, 1, "name", None]
        assert plain((np.array([1.0, 2.0]), 3)) == [[1.0, 2.0], 3]


THRESHOLDS = [0.9, 0.5, 0.5, 0.5, 0.5, 0.5]


class TestThresholds:
    @pytest.mark.parametrize(
        "kind", [np.array, torch.tensor, tuple, lambda values: [np.float64(one) for one in values]]
    )
    def test_one_per_exit(self, kind):
        assert check_thresholds("policy", kind(THRESHOLDS), 6) == pytest.approx(THRESHOLDS)

    @pytest.mark.parametrize(
        "wrong",
        [[None, 0.5, 0.5], np.array([None, 0.5, 0.5]), ["a", 0.5, 0.5], [[0.5], 0.5, 0.5]],
    )
    def test_what_is_no_list_of_numbers(self, wrong):
        with pytest.raises(ValueError, match=r"`exit_threshold`=.* must be a number or a list of numbers"):
            check_thresholds("policy", wrong, 3)

    @pytest.mark.parametrize("kind", [np.array, torch.tensor, np.float64])
    def test_forward_and_generate(self, kind):
        model, batch = tiny_model(), pad(random_rows(8, seed=0))
        values = 0.5 if kind is np.float64 else THRESHOLDS
        expected = model(**batch, exit_threshold=values).exit_layers
        assert model(**batch, exit_threshold=kind(values)).exit_layers.tolist() == expected.tolist()
        decoder, ids = tiny_llama(), torch.tensor([[5, 6, 7]])
        values = 0.5 if kind is np.float64 else THRESHOLDS[:4]
        options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
        expected = decoder.generate(ids, exit_threshold=values, **options)
        found = decoder.generate(ids, exit_threshold=kind(values), **options)
        assert found.exit_layers.tolist() == expected.exit_layers.tolist()
        known = decoder(ids, exit_threshold=kind(values)).exit_layers
        assert known.tolist() == decoder(ids, exit_threshold=values).exit_layers.tolist()


class TestConfigs:
    def test_numbers_become_pythons_own(self, tmp_path):
        fields = {
            "exit_layers": np.array([2, 4]),
            "exit_threshold": torch.tensor([0.5, 0.25, 0.75]),
            "exit_patience": 2.0,
            "policy_hidden_size": np.int64(8),
            "policy_alphas": np.array([0.5, 1.0]),
            "exit_budgets": np.array([[0.5, 0.1, 0.5]]),
            "reward_alpha": np.float32(0.5),
        }
        config = tiny_config(**fields)
        assert config.exit_layers == [2, 4] and config.exit_threshold == [0.5, 0.25, 0.75]
        config.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        assert saved["exit_patience"] == 2 and saved["policy_hidden_size"] == 8
        assert saved["policy_alphas"] == [0.5, 1.0] and saved["exit_budgets"] == [[0.5, 0.1, 0.5]]
        assert type(config).from_pretrained(tmp_path).exit_layers == [2, 4]

    @pytest.mark.parametrize("layers", [2.0, [2.0, 4.0], (2.0, 4), np.float64(2), torch.tensor([2, 4])])
    def test_layers_may_have_a_point(self, layers):
        config = tiny_config(exit_layers=layers)
        assert config.exit_layer_numbers == [2, 4, 6]
        assert all(type(layer) is int for layer in config.exit_layer_numbers)

    def test_a_fraction_is_no_layer(self):
        with pytest.raises(ValueError, match=r"\[2\.5\] are no layers of 1\.\.6"):
            tiny_config(exit_layers=[2.5, 4])
        with pytest.raises(ValueError, match=r"`exit_patience`=2\.5 must be a whole number"):
            tiny_config(exit_patience=2.5)

    def test_of_a_decoder(self):
        config = tiny_llama_config(min_exit_layer=2.0, exit_head="low_rank", exit_head_rank=np.int32(4))
        assert (config.min_exit_layer, config.exit_head_rank) == (2, 4)
        assert tiny_llama(min_exit_layer=2.0, exit_head="low_rank", exit_head_rank=4.0).config.exit_head_rank == 4


@pytest.mark.parametrize("kind", SCALARS)
def test_budgets(kind):
    points = [[0.25, 0.5, 0.0], [0.75, 0.1, 0.5]]
    assert price_of_budget(points, kind(0.5)) == price_of_budget(points, 0.5)
