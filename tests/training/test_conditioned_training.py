# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Training of policies conditioned on the price of a layer, and the budgets that come out of it."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from tiny import collate, pad, random_rows, task, tiny_llama, tiny_model, tiny_text_trainer, tiny_trainer

from transformers_cee import BertForConsistentEE
from transformers_cee.evaluation.comparison import budget_curve
from transformers_cee.evaluation.exit_budget import fit_exit_budgets
from transformers_cee.evaluation.wall_clock import measure_wall_clock
from transformers_cee.exits.policy import ExitPolicies
from transformers_cee.training.policy_phase import JUDGED_ALPHAS, PolicyObjective, StoredRewards
from transformers_cee.training.rewards import REWARDS


def slow_loss(policies, states, rewards, prices, alphas, num_layers):
    """Row by row: the negative expected reward under the exit distribution, weighted by the row's price."""
    total = 0.0
    for row, alpha in enumerate(alphas):
        stay = 1.0
        for index in range(states.shape[1]):
            reward = (float(rewards[row, index]) - alpha * float(prices[row, index])) / (1 + alpha * num_layers)
            leave = 1.0
            if index < states.shape[1] - 1:
                leave = float(policies.exit_logit(states[row : row + 1, index], None, index, alpha).sigmoid())
            total -= stay * leave * reward
            stay *= 1 - leave
    return total / len(states)


@pytest.mark.parametrize("condition", ["input", "film"])
class TestObjective:
    def parts(self, condition):
        torch.manual_seed(0)
        policies = ExitPolicies([1, 2, 3], 8, 4, "gelu", condition=condition, alphas=(0.01, 1.0))
        layers = torch.tensor([2.0, 4.0, 6.0, 8.0])
        prices = layers * torch.rand(5, 1)
        return PolicyObjective(policies, num_layers=8), torch.randn(5, 4, 8), -torch.rand(5, 4), prices

    def test_every_row_pays_its_own_price(self, condition):
        objective, states, rewards, prices = self.parts(condition)
        torch.manual_seed(3)
        loss = objective.train()(states, rewards, prices=prices)["loss"].detach()
        torch.manual_seed(3)
        alphas = objective.policies.draw_alphas(5).tolist()
        assert float(loss) == pytest.approx(
            slow_loss(objective.policies, states, rewards, prices, alphas, 8), rel=1e-4
        )

    def test_judged_over_the_whole_range(self, condition):
        objective, states, rewards, prices = self.parts(condition)
        loss = objective.eval()(states, rewards, prices=prices)["loss"].detach()
        step = math.log(100.0) / (JUDGED_ALPHAS - 1)
        alphas = [0.01 * math.exp(step * number) for number in range(JUDGED_ALPHAS)]
        slow = [slow_loss(objective.policies, states, rewards, prices, [alpha] * 5, 8) for alpha in alphas]
        assert float(loss) == pytest.approx(sum(slow) / len(slow), rel=1e-4)


# Untrained heads have memorised nothing, and what is as hard as can be pays no price.
PRICED = {"reward": "per_layer"}


def conditioned(**fields):
    fields = {"policy_condition": "film", "policy_alphas": [0.01, 3.0], **fields}
    return tiny_model(num_hidden_layers=4, **fields)


class TestTrainer:
    def test_one_model_many_depths(self, tmp_path):
        """Trained once, a higher price is a shallower depth, and budgets are kept on the rows they were fitted on."""
        trainer = tiny_trainer(
            tmp_path, conditioned(), phases=["policy"], policy_num_train_epochs=60, policy_learning_rate=2e-2, **PRICED
        )
        trainer.train()
        points = trainer.model.config.exit_budgets
        assert [point[0] for point in points] == sorted(point[0] for point in points) and len(points) > 2
        assert [point[1] for point in points] == sorted((point[1] for point in points), reverse=True)
        assert all(threshold == 0.5 or alpha == pytest.approx(0.01) for _, alpha, threshold in points)
        assert points[-1][0] - points[0][0] > 0.1
        model, batch = trainer.model.eval(), collate([trainer.eval_dataset[row] for row in range(24)])
        batch = {name: value for name, value in batch.items() if name != "labels"}
        for budget, _, _ in points:
            layers = model(**batch, exit_budget=budget).exit_layers
            assert float(layers.float().mean()) / 4 == pytest.approx(budget)
        trainer.save_model()
        again = BertForConsistentEE.from_pretrained(tmp_path).eval()
        assert again.config.exit_budgets == points
        budget = points[1][0]
        wanted, found = (one(**batch, exit_budget=budget) for one in (model, again))
        assert found.exit_layers.tolist() == wanted.exit_layers.tolist()
        (executed,) = measure_wall_clock(again, [batch], [{"exit_budget": budget}])
        assert executed.exit_layers.tolist() == found.exit_layers.tolist()

    def test_curve_by_budget(self, tmp_path):
        trainer = tiny_trainer(tmp_path, conditioned(), phases=["policy"], policy_num_train_epochs=40, **PRICED)
        trainer.train()
        dev = trainer.collect_exits(trainer.eval_dataset)
        curve = budget_curve(trainer.model.exit_policies, dev, dev, trainer.compute_metrics, [1.5, 2.0, 2.5, 4.0])
        depths = [point.depth for point in curve]
        assert depths == sorted(depths) and depths[-1] == 4.0 and len(depths) > 1
        batch = {name: value for name, value in collate(list(task(24, seed=2))).items() if name != "labels"}
        for point in curve:
            layers = trainer.model.eval()(**batch, **point.exit_arguments).exit_layers
            assert float(layers.float().mean()) == pytest.approx(point.depth)

    def test_all_phases(self, tmp_path):
        trainer = tiny_trainer(tmp_path, conditioned(policy_inputs="both"), eval_strategy="epoch", **PRICED)
        results = trainer.train()
        assert list(results.phases) == ["heads", "hardness", "policy", "consistent-1-model", "consistent-1-policy"]
        trainer.evaluate()
        assert len(trainer.operating_points["eval"]) == 6

    @pytest.mark.parametrize("objective", ["expected", "sampled"])
    def test_decoder(self, tmp_path, objective):
        model = tiny_llama(policy_condition="input", policy_alphas=[0.01, 3.0])
        trainer = tiny_text_trainer(
            tmp_path, model, consistent_objective=objective, consistent_samples=2, policy_num_train_epochs=20, **PRICED
        )
        trainer.train()
        points = trainer.model.config.exit_budgets
        assert points
        ids = torch.tensor([[5, 9, 11, 7]])
        output = trainer.model.eval().generate(
            ids, max_new_tokens=4, exit_budget=points[0][0], return_dict_in_generate=True, eos_token_id=None
        )
        assert output.exit_layers.shape == (1, 4) and int(output.exit_layers[:, 0]) == 4

    def test_closed_exits_count_in_budgets(self, tmp_path):
        model = tiny_llama(policy_condition="input", policy_alphas=[0.01, 3.0], min_exit_layer=3)
        trainer = tiny_text_trainer(tmp_path, model, phases=["policy"])
        trainer.train()
        assert all(budget >= 0.75 for budget, _, _ in model.config.exit_budgets)

    @pytest.mark.parametrize("text", [False, True])
    def test_evaluated_at_the_budget_of_the_config(self, tmp_path, text):
        fields = {"policy_condition": "film", "exit_budgets": [[0.25, 3.0, 0.0], [0.9, 0.01, 1.0]]}
        make = tiny_text_trainer if text else tiny_trainer
        trainer = make(tmp_path, tiny_llama(**fields) if text else conditioned(**fields), eval_timing_rows=8)
        trainer.model.config.exit_budget = 0.25
        assert trainer.evaluate()["eval_depth"] == 1.0
        own = trainer.operating_points["eval"][0]
        assert own.depth == 1.0 and own.exit_arguments == {"exit_budget": 0.25}

    @pytest.mark.parametrize("text", [False, True])
    def test_evaluated_at_the_named_point_of_the_config(self, tmp_path, text):
        point = {"criterion": "max_probability", "thresholds": [1.0, 0.0, 0.0, 0.0]}
        fields = {"exit_operating_points": {"second": point}, "exit_threshold": "second"}
        make = tiny_text_trainer if text else tiny_trainer
        model = tiny_llama(**fields) if text else tiny_model(num_hidden_layers=4, **fields)
        trainer = make(tmp_path, model, eval_strategy="epoch", eval_timing_rows=8)
        trainer.train()
        assert trainer.evaluate()["eval_depth"] == 2.0
        own = trainer.operating_points["eval"][0]
        assert (own.criterion, own.exit_threshold, own.depth) == ("max_probability", "second", 2.0)

    def test_budgets_need_rows(self, tmp_path):
        trainer = tiny_trainer(tmp_path, conditioned(), trainer={"eval_dataset": None})
        with pytest.raises(ValueError, match=r"`eval_dataset`=None must be a data set"):
            trainer.fit_exit_budgets()

    def test_an_own_reward(self, tmp_path, monkeypatch):
        """What it costs at α = 1 is the difference that α makes."""

        def own(step):
            return -2 * step.losses - step.alpha * step.layers**2

        monkeypatch.setitem(REWARDS, "own", own)
        trainer = tiny_trainer(tmp_path, conditioned(), reward="own", phases=["policy"])
        trainer.train()
        store = trainer.collect_exits(trainer.train_dataset)
        memorized = trainer.compute_hardness()
        found = StoredRewards.of(store, memorized, trainer.model.config, reward="own", is_conditioned=True)
        assert torch.equal(found.rewards, -2 * store.losses)
        torch.testing.assert_close(found.prices, torch.tensor([[1.0, 4.0, 9.0, 16.0]]).expand(len(store), 4))


def test_budgets_of_one_speed_are_refused(tmp_path):
    trainer = tiny_trainer(tmp_path)
    with pytest.raises(ValueError, match="`policies` have one speed"):
        trainer.fit_exit_budgets()


def test_budgets_need_an_open_threshold():
    with pytest.raises(ValueError, match=r"`exit_threshold`=1\.0 must lie in \[0, 1\)"):
        fit_exit_budgets(ExitPolicies([1, 2, 3], 8, 4, "gelu", condition="film"), None, exit_threshold=1.0)


def test_a_budget_reaches_every_way_to_ask(tmp_path):
    model = conditioned(exit_budgets=[[0.25, 3.0, 0.5], [1.0, 0.01, 0.5]])
    batch = pad(random_rows(8, seed=3))
    shallow, deep = (model(**batch, exit_budget=budget).exit_probabilities for budget in (0.25, 0.99))
    assert not torch.allclose(shallow[:, 0], deep[:, 0])


def test_what_is_older_than_the_weights_is_named(tmp_path, caplog):
    model = conditioned(exit_budgets=[[0.25, 3.0, 0.5], [1.0, 0.01, 0.5]])
    trainer = tiny_trainer(tmp_path, model, rows=16, phases=["policy"], trainer={"eval_dataset": None})
    logger = logging.getLogger("transformers_cee.training.trainer")
    logger.addHandler(caplog.handler)
    try:
        trainer.train_policy()
    finally:
        logger.removeHandler(caplog.handler)
    assert "exit_budgets of the config were fitted before this training" in caplog.text


def test_phases_are_judged_at_the_price_of_a_named_point(tmp_path):
    """Thresholds of one price say nothing at another. What a phase reports is what the model does at the point."""
    depths = []
    for alpha in (0.001, 0.3):
        torch.manual_seed(0)
        model = tiny_model(num_hidden_layers=4, policy_condition="film")
        with torch.no_grad():
            for weight in model.exit_policies.parameters():
                weight.add_(torch.randn_like(weight))
        points = {"named": {"criterion": "policy", "thresholds": [0.5, 0.5, 0.5, 1.0], "alpha": alpha}}
        model.config.exit_operating_points, model.config.exit_threshold = points, "named"
        # Nothing learns.
        rates = {"learning_rate": 0.0, "consistent_learning_rate": 0.0, "policy_learning_rate": 0.0}
        trainer = tiny_trainer(
            tmp_path / str(alpha), model, phases=["policy", "consistent"], eval_strategy="epoch", **rates,
            policy_num_train_epochs=1, consistent_num_train_epochs=1,
        )  # fmt: skip
        expected = trainer.evaluate()["eval_depth"]
        trainer.train()
        found = [one["eval_depth"] for one in trainer.state.log_history if "eval_depth" in one]
        assert found == pytest.approx([expected] * 3)
        depths.append(expected)
    assert abs(depths[0] - depths[1]) > 0.2


@pytest.mark.parametrize("kind", ["reduce_lr_on_plateau", "greedy"])
def test_schedules_go_up_by_the_reward(kind, tmp_path):
    trainer = tiny_trainer(
        tmp_path, phases=["policy"], policy_num_train_epochs=6, eval_strategy="epoch", logging_strategy="epoch",
        lr_scheduler_type=kind, lr_scheduler_kwargs={"patience": 0, "factor": 0.1}, metric_for_best_model="accuracy",
    )  # fmt: skip
    trainer.train()
    rates = [one["learning_rate"] for one in trainer.state.log_history if "learning_rate" in one]
    rewards = [one["eval_reward"] for one in trainer.state.log_history if "eval_reward" in one]
    assert rewards[:3] == sorted(rewards[:3]) and rates[:3] == sorted(rates[:3])


def test_training_of_heads_alone_names_what_is_older(tmp_path, caplog):
    model = tiny_model(num_hidden_layers=4, policy_condition="film")
    model.config.exit_operating_points = {"named": {"criterion": "policy", "thresholds": 0.5, "alpha": 0.1}}
    model.config.exit_budgets = [[0.5, 0.1, 0.5], [1.0, 0.01, 0.5]]
    with caplog.at_level(logging.WARNING):
        tiny_trainer(tmp_path, model, phases=["heads"]).train_heads()
    assert "exit_operating_points and exit_budgets of the config were fitted before this training" in caplog.text
