# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
from __future__ import annotations

import pytest
import torch
from tiny import pad, random_rows, tiny_llama, tiny_model
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from transformers_cee import BertCeeModel, LlamaCeeModel


IDS = torch.tensor([[5, 6, 7]])
MISSPELT = {
    "exit_thresold": "exit_threshold",
    "exit_criteria": "exit_criterion",
    "exit_budgets": "exit_budget",
    "threshold": "exit_threshold",
    "lables": "labels",
}


@pytest.mark.parametrize("make", [tiny_model, tiny_llama])
class TestForward:
    @pytest.mark.parametrize("name", MISSPELT)
    def test_the_nearest_name_is_told(self, make, name):
        with pytest.raises(TypeError, match=rf"`{name}`=0\.5 is no argument: did you mean `{MISSPELT[name]}`\?"):
            make()(IDS, **{name: 0.5})

    def test_without_a_near_name_all_are_told(self, make):
        with pytest.raises(TypeError, match=r"`zzz`=1 is no argument: accepted are .*exit_threshold.*labels"):
            make()(IDS, zzz=1)

    def test_what_transformers_hands_on_is_taken(self, make):
        model = make()
        expected = model(IDS).logits
        more = {
            "return_dict": True,
            "output_attentions": False,
            "output_hidden_states": False,
            "num_items_in_batch": torch.tensor(3),
            "token_type_ids": torch.zeros_like(IDS),
            "special_tokens_mask": torch.zeros_like(IDS),
            "use_cache": False,
            "any_name": None,
        }
        torch.testing.assert_close(model(IDS, **more).logits, expected)

    def test_attention_of_a_users_own_takes_its_own(self, make):
        seen = []

        def attention(*args, my_number=None, **kwargs):
            seen.append(my_number)
            return sdpa_attention_forward(*args, **kwargs)

        AttentionInterface.register("tests_own", attention)
        model = make(attn_implementation="tests_own")
        model(IDS, my_number=3)
        assert seen and set(seen) == {3}
        with pytest.raises(TypeError, match="my_nmber"):
            model(IDS, my_nmber=3)


def test_no_layer_has_run():
    model = tiny_model()
    model.bert.embeddings.register_forward_hook(lambda *_: pytest.fail("ran"))
    with pytest.raises(TypeError, match="exit_thresold"):
        model(**pad(random_rows(2, seed=0)), exit_thresold=0.5)


def test_generate_refuses_them_too():
    with pytest.raises(ValueError, match="exit_thresold"):
        tiny_llama().generate(IDS, exit_thresold=0.5, max_new_tokens=2)


@pytest.mark.parametrize(("make", "base"), [(tiny_model, BertCeeModel), (tiny_llama, LlamaCeeModel)])
def test_states_alone_know_no_exits(make, base, tmp_path):
    make().save_pretrained(tmp_path)
    model = base.from_pretrained(tmp_path)
    assert model(IDS, output_hidden_states=True).last_hidden_state.shape == (1, 3, 32)
    with pytest.raises(TypeError, match=r"`exit_threshold`=0\.5 is no argument"):
        model(IDS, exit_threshold=0.5)
