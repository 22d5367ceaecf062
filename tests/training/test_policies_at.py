# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Policies for several prices of a layer from one model."""

from __future__ import annotations

import pytest
from tiny import changed, tiny_text_trainer, tiny_trainer, weights

from transformers_cee.evaluation.operating_points import hindsight_point
from transformers_cee.stores.scoring import score_exits
from transformers_cee.training.rewards import REWARDS


@pytest.mark.parametrize("make", [tiny_trainer, tiny_text_trainer])
def test_a_higher_price_gives_a_shallower_policy_and_leaves_the_model_alone(make, tmp_path):
    # Untrained heads have memorised nothing, and what is as hard as can be pays no price.
    fields = {"reward": "per_layer", "policy_num_train_epochs": 40, "policy_learning_rate": 2e-2}
    trainer = make(tmp_path, phases=["policy"], **fields)
    before = weights(trainer.model)
    family = trainer.train_policies_at([0.0, 3.0])
    assert list(family) == [0.0, 3.0]
    assert changed(before, weights(trainer.model)) == set()
    store = trainer.collect_exits(trainer.train_dataset)
    depths = [
        hindsight_point("policy", 0.5, score_exits("policy", store, policies), store, None).depth
        for policies in family.values()
    ]
    assert depths[1] < depths[0]


def test_a_negative_price_is_refused_before_any_work(tmp_path):
    trainer = tiny_trainer(tmp_path)
    with pytest.raises(ValueError, match=r"`alphas`=\[0.1, -0.2\] must not be negative; got -0.2"):
        trainer.train_policies_at([0.1, -0.2])
    assert not list(tmp_path.iterdir())


def test_an_own_reward_gets_each_price(tmp_path, monkeypatch):
    asked = []

    def own(step):
        asked.append(step.alpha)
        return -step.losses

    monkeypatch.setitem(REWARDS, "own", own)
    tiny_trainer(tmp_path, rows=8, reward="own").train_policies_at([0.3, 0.7])
    assert asked[-2:] == [0.3, 0.7]
