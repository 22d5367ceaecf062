# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Hardness, rewards and policies of decoders, against loops over single tokens of unpadded rows."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from text_reference import text_tokens
from text_steps import ROWS, SGD, is_policy
from tiny import changed, collate_text, instructions, tiny_llama, tiny_text_trainer, weights

from transformers_cee.training.policy_phase import PolicyObjective, StoredRewards
from transformers_cee.training.rewards import REWARDS


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """Makes models whose exits know some of the answers, so that hardness differs from token to token."""
    teacher = tiny_llama()
    options = {"num_train_epochs": 8, "learning_rate": 5e-3}
    tiny_text_trainer(tmp_path_factory.mktemp("learned"), teacher, rows=ROWS, **options).train_heads()
    known = {name: value for name, value in weights(teacher).items() if not is_policy(name)}

    def make(**fields):
        model = tiny_llama(**fields)
        model.load_state_dict(known, strict=False)
        return model

    return make


def rewards_of(tokens, alpha: float, hardness: bool, loss: str = "ce") -> list[list[float]]:
    """Reward of each token at each of 4 exits, by the formula."""
    table = []
    for token in tokens:
        memorized = token.memorized_layer([1, 2, 3, 4])
        price = alpha * (1 - memorized / 4) if hardness else alpha
        costs = [float(ce) for ce in token.losses]
        if loss == "error":
            costs = [float(prediction != token.label) for prediction in token.predictions]
        if loss == "disagreement":
            costs = [float(prediction != token.predictions[-1]) for prediction in token.predictions]
        table.append([-cost - price * layer for cost, layer in zip(costs, (1, 2, 3, 4), strict=True)])
    return table


class TestPolicy:
    @pytest.mark.parametrize("inputs", ["state", "confidence", "both"])
    @pytest.mark.parametrize("loss,hardness", [("ce", True), ("error", False), ("disagreement", True)])
    def test_step(self, tmp_path, learned, inputs, loss, hardness):
        """One step on all tokens that may leave, against the gradient of the expected reward, token by token."""
        model = learned(policy_inputs=inputs, reward_alpha=0.3)
        twin, rows = copy.deepcopy(model), instructions(ROWS, seed=1)
        with torch.no_grad():
            tokens = text_tokens(twin, rows)
        stored = tiny_text_trainer(tmp_path, twin).collect_exits(rows).features
        expected, count = 0.0, 0
        for number, (token, rewards) in enumerate(zip(tokens, rewards_of(tokens, 0.3, hardness, loss), strict=True)):
            if not token.may_exit:
                continue
            count += 1
            features = None if stored is None else stored[number]
            reached = 1.0
            for index in range(4):
                p = 1.0
                if index < 3:
                    seen = [token.states[index]] if inputs != "confidence" else []
                    seen += [] if features is None else [features[index]]
                    p = twin.exit_policies.networks[index](torch.cat(seen)).sigmoid()
                expected = expected + reached * p * rewards[index]
                reached = reached * (1 - p)
        (-expected / count).backward()
        options = {**SGD, "policy_learning_rate": 0.5, "policy_batch_size": 1000, "policy_num_train_epochs": 1}
        rule = "hardness_guided" if hardness else "per_layer"
        trainer = tiny_text_trainer(tmp_path, model, rows=ROWS, reward=rule, reward_loss=loss, **options)
        trainer.train_policy()
        pairs = zip(model.exit_policies.named_parameters(), twin.exit_policies.parameters(), strict=True)
        for (name, parameter), own in pairs:
            wanted = own.detach() - 0.5 * own.grad.reshape(own.shape)
            torch.testing.assert_close(parameter.detach(), wanted, rtol=0, atol=5e-6, msg=name)
        assert count == sum(token.may_exit for token in tokens) < len(tokens)

    def test_what_counts(self, tmp_path, learned):
        """Memorized layers, rewards and what the policies learn from, token by token."""
        model = learned(reward_alpha=0.3)
        trainer = tiny_text_trainer(tmp_path, model, rows=ROWS)
        with torch.no_grad():
            tokens = text_tokens(model, trainer.train_dataset)
        memorized = trainer.compute_hardness()
        assert memorized.tolist() == [token.memorized_layer([1, 2, 3, 4]) for token in tokens]
        assert len(set(memorized.tolist())) > 2
        store = trainer._store("train", trainer.train_dataset, trainer._stores["train"][0])
        rewards = StoredRewards.of(store, memorized, model.config).rewards
        torch.testing.assert_close(rewards, torch.tensor(rewards_of(tokens, 0.3, True)), rtol=1e-4, atol=1e-5)
        used = StoredRewards(store, rewards, store.deciding())
        expected = [number for number, token in enumerate(tokens) if token.may_exit]
        assert used.entries.tolist() == expected and len(used) == len(expected) < len(tokens)

    @pytest.mark.parametrize("samples", [2, 8])
    def test_mean_of_reinforce_is_exact(self, tmp_path, samples):
        """On a store of tokens: the mean of many estimates lies within 5 of its own standard errors of the exact
        gradient; a token's own draws are its baseline."""
        model = tiny_llama(policy_inputs="both", reward_alpha=0.3)
        trainer = tiny_text_trainer(tmp_path, model, rows=4)
        store = trainer.collect_exits(trainer.train_dataset)
        rewards = StoredRewards.of(store, trainer.compute_hardness(), model.config).rewards
        batch = StoredRewards(store, rewards, store.deciding()).__getitems__(list(range(len(store.deciding()))))
        weight = model.exit_policies.networks[1][-1].weight

        def gradient(**options) -> torch.Tensor:
            objective = PolicyObjective(model.exit_policies, **options).train()
            return torch.autograd.grad(objective(**batch)["loss"], weight)[0]

        exact = gradient(gradient="exact")
        torch.manual_seed(0)
        estimates = torch.stack([gradient(gradient="reinforce", samples=samples) for _ in range(3000)])
        mean, error = estimates.mean(0), estimates.std(0) / len(estimates) ** 0.5
        assert bool(((mean - exact).abs() < 5 * error).all())
        assert float(error.norm() / exact.norm()) < 0.1, "so small that the test says something"

    @pytest.mark.parametrize("gradient", ["exact", "reinforce"])
    def test_leaves_the_rest(self, tmp_path, gradient):
        model = tiny_llama(policy_inputs="both")
        before = weights(model)
        tiny_text_trainer(tmp_path, model, policy_gradient=gradient, weight_decay=0.1).train_policy()
        assert changed(before, model.state_dict()) == {name for name in before if is_policy(name)}

    def test_first_layer(self, tmp_path):
        """Exits before `min_exit_layer` earn nothing, so their policies do not learn, and the rest learn for it."""
        model = tiny_llama(min_exit_layer=3, reward_alpha=0.0)
        before = weights(model)
        trainer = tiny_text_trainer(tmp_path, model, eval_strategy="epoch", policy_entropy_bonus=0.1)
        trainer.train_policy()
        names = changed(before, model.state_dict())
        assert names and all(name.startswith("exit_policies.networks.layer_3.") for name in names)
        assert all(3.0 <= entry.get("eval_depth", 4.0) <= 4.0 for entry in trainer.state.log_history)

    def test_user_reward(self, tmp_path, monkeypatch):
        asked = []

        def own(step):
            asked.append((step.losses.shape, step.layers.tolist(), step.memorized_layers.shape, step.num_layers))
            return torch.where(torch.arange(4) == 1, 0.0, -1.0).expand(len(step.losses), 4)

        monkeypatch.setitem(REWARDS, "own", own)
        fields = {"policy_num_train_epochs": 60, "policy_learning_rate": 0.05}
        trainer = tiny_text_trainer(tmp_path, rows=ROWS, reward="own", **fields)
        trainer.train_policy()
        tokens = sum(label != -100 for labels in trainer.train_dataset["labels"] for label in labels)
        assert asked[-1] == ((tokens, 4), [1, 2, 3, 4], (tokens,), 4)
        trainer.evaluate(trainer.train_dataset)
        point = next(one for one in trainer.operating_points["eval"] if one.exit_threshold == 0.5)
        assert point.depth == 2.0, "the only exit that is rewarded"

    def test_sample(self, tmp_path):
        """`policy_max_tokens` bounds what is stored, from the rows of the policies only."""
        trainer = tiny_text_trainer(
            tmp_path, rows=20, policy_max_tokens=9, policy_holdout=0.5, eval_strategy="epoch", eval_exit_thresholds=[]
        )
        assert len(trainer.compute_hardness()) == 9
        trainer.train_policy()
        store = trainer._stores["train"][1]
        assert len(store) == 9 and set(store.rows.tolist()) <= set(trainer._split()[1].tolist())
        assert len(trainer._stores["eval"][1]) == 9
        again = tiny_text_trainer(tmp_path, trainer.model, rows=20, policy_max_tokens=10, policy_holdout=0.5)
        assert len(again.compute_hardness()) == 10, "another sample, another hardness"

    def test_held_out_rows(self, tmp_path):
        trainer = tiny_text_trainer(tmp_path, rows=12, policy_holdout=0.25)
        trainer.train_policy()
        store, rows = trainer._stores["train"][1], trainer._split()[1]
        used = set(store.rows[store.deciding(rows)].tolist())
        assert used and used <= set(rows.tolist()) and len(rows) == 3

    def test_hardness_of_another_collator(self, tmp_path):
        """Kept hardness that does not fit the tokens that count now is computed again."""
        model = tiny_llama()
        tiny_text_trainer(tmp_path, model, rows=ROWS).train_policy()

        def everything(rows):
            batch = collate_text(rows)
            return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

        trainer = tiny_text_trainer(tmp_path, model, rows=ROWS, trainer={"data_collator": everything})
        trainer.train_policy()
        assert len(trainer.compute_hardness()) == len(trainer._stores["train"][1])

    def test_nothing_may_leave(self, tmp_path):
        rows = Dataset.from_list(
            [{"input_ids": [5, 6, 7], "attention_mask": [1] * 3, "labels": [-100, -100, 7]} for _ in range(4)]
        )
        with pytest.raises(ValueError, match=r"train_dataset.*no token that may leave"):
            tiny_text_trainer(tmp_path, trainer={"train_dataset": rows}).train_policy()
