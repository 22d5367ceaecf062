# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Phases of `ConsistentEETrainer`: what each learns, leaves alone, keeps and reports."""

from __future__ import annotations

import logging
import os
from itertools import accumulate, count

import pytest
import torch
from clocks import steady_clock
from safetensors import safe_open
from tiny import (
    accuracy,
    changed,
    collate,
    pad,
    task,
    tiny_llama,
    tiny_model,
    tiny_text_trainer,
    tiny_trainer,
    training_arguments,
    weights,
)
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    TrainerCallback,
    TrainingArguments,
)

from transformers_cee import BertForConsistentEE, ConsistentEETrainer
from transformers_cee.evaluation import timing
from transformers_cee.exits.policy import all_features, exit_log_distribution
from transformers_cee.training.hardness import memorized_layers
from transformers_cee.training.objectives import policy_exact
from transformers_cee.training.policy_phase import StoredRewards
from transformers_cee.training.rewards import REWARDS, RewardStep, hardness_guided


SGD = {
    "optim": "sgd",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "weight_decay": 0.0,
}


def is_policy(name: str) -> bool:
    return name.startswith("exit_policies.")


class Recorder(TrainerCallback):
    """Keeps what callbacks see, by the folder of the phase."""

    def __init__(self) -> None:
        self.metrics: list[tuple[str, dict]] = []
        self.groups: dict[str, list] = {}
        self.steps: dict[str, int] = {}

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.metrics.append((os.path.basename(args.output_dir), metrics))

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        groups = [([id(p) for p in g["params"]], g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
        self.groups[os.path.basename(args.output_dir)] = groups

    def on_step_end(self, args, state, control, **kwargs):
        self.steps[os.path.basename(args.output_dir)] = state.global_step


class TestRun:
    def test_all_phases(self, tmp_path):
        recorder = Recorder()
        trainer = tiny_trainer(
            tmp_path, eval_strategy="epoch", consistent_num_rounds=2, trainer={"callbacks": [recorder]}
        )
        before = weights(trainer.model)
        results = trainer.train()
        steps = [
            "heads",
            "hardness",
            "policy",
            "consistent-1-model",
            "consistent-1-policy",
            "consistent-2-model",
            "consistent-2-policy",
        ]
        assert list(results.phases) == steps
        assert results.phases["hardness"].shape == (48,)
        assert recorder.steps == {
            "heads": 6,
            "policy": 6,
            "consistent-1-model": 6,
            "consistent-1-policy": 6,
            "consistent-2-model": 6,
            "consistent-2-policy": 6,
        }
        assert len(changed(before, trainer.model.state_dict())) > 60
        by_phase = dict(recorder.metrics)
        assert by_phase["heads"]["eval_depth"] == 4.0, "heads are judged at full depth"
        assert 1.0 <= by_phase["consistent-1-model"]["eval_depth"] <= 4.0
        policy = by_phase["consistent-2-policy"]
        assert policy["eval_reward"] == -policy["eval_loss"] and "eval_accuracy" in policy and "eval_depth" in policy
        assert [folder.parent.name for folder in (tmp_path / "phases").glob("*/finished")] == ["consistent-2-policy"]
        # Nothing of a phase stays behind.
        assert trainer.args.output_dir == str(tmp_path) and len(trainer.train_dataset) == 48
        assert all(parameter.requires_grad for parameter in trainer.model.parameters())

    def test_phases_by_choice(self, tmp_path):
        trainer = tiny_trainer(tmp_path, phases=["hardness", "policy"])
        before = weights(trainer.model)
        assert list(trainer.train().phases) == ["hardness", "policy"]
        assert all(is_policy(name) for name in changed(before, trainer.model.state_dict()))

    def test_an_earlier_run_is_moved_aside(self, tmp_path):
        for _ in range(2):
            tiny_trainer(tmp_path, phases=["hardness"], rows=8).train()
        assert len([name for name in os.listdir(tmp_path) if name.startswith("phases")]) == 2

    def test_phases_alone(self, tmp_path):
        trainer = tiny_trainer(tmp_path, rows=16)
        assert trainer.train_heads().global_step == 2
        assert trainer.compute_hardness().shape == (16,)
        assert trainer.train_policy().global_step == 2
        assert list(trainer.train_consistent().phases) == ["consistent-1-model", "consistent-1-policy"]

    @pytest.mark.parametrize("rows", [None, iter([])])
    def test_rows_must_come_by_number(self, tmp_path, rows):
        trainer = tiny_trainer(tmp_path)
        trainer.train_dataset = rows
        for call in (trainer.train, trainer.train_heads, trainer.compute_hardness, trainer.train_policy):
            with pytest.raises(ValueError, match=rf"`train_dataset` of type {type(rows).__name__} must have a length"):
                call()
        assert not list(tmp_path.iterdir())

    def test_workers_of_the_heads_are_none_of_the_policies(self, tmp_path):
        options = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 2}
        results = tiny_trainer(tmp_path, rows=8, phases=["policy"], neftune_noise_alpha=5, **options).train()
        assert results.global_step == 2

    def test_metrics_of_policies_know_logits_and_labels_only(self, tmp_path):
        trainer = tiny_trainer(tmp_path, eval_strategy="epoch", include_for_metrics=["inputs"])
        with pytest.raises(
            ValueError, match=r"`include_for_metrics`=\['inputs'\] is not supported .* accepted is \[\]"
        ):
            trainer.train()
        assert not list(tmp_path.iterdir())

    def test_several_evaluation_sets(self, tmp_path):
        data = {"one": task(6, seed=3), "two": task(9, seed=4)}
        trainer = tiny_trainer(tmp_path, rows=16, eval_strategy="epoch", trainer={"eval_dataset": data})
        assert trainer.train().phases["policy"].global_step == 2

    def test_learning_pays(self, tmp_path):
        """The losses that the phases minimise go down."""
        trainer = tiny_trainer(tmp_path, rows=96, learning_rate=2e-3, num_train_epochs=6, policy_num_train_epochs=10)
        first = trainer.collect_exits(trainer.train_dataset)
        trainer.train_heads()
        second = trainer.collect_exits(trainer.train_dataset)
        assert bool((second.losses.mean(0) < 0.9 * first.losses.mean(0)).all())
        memorized = memorized_layers(second.correct, second.layers)
        rewards = hardness_guided(RewardStep(second.losses, second.layers, memorized, 4, 0.02))

        def earned() -> float:
            with torch.no_grad():
                logits = trainer.model.exit_policies(second.states)
                return -float(policy_exact(exit_log_distribution(logits), rewards))

        before = earned()
        trainer.train_policy()
        assert earned() > before + 0.02

    def test_arguments_that_are_refused(self, tmp_path):
        trainer = tiny_trainer(tmp_path, rows=8)
        with pytest.raises(ValueError, match=r"ignore_keys_for_eval"):
            trainer.train(ignore_keys_for_eval=[])
        with pytest.raises(ValueError, match=r"`trial`=1 needs a `model_init`"):
            trainer.train(trial=1)
        optimizer = torch.optim.SGD([torch.zeros(1)])
        with pytest.raises(ValueError, match=r"optimizers.*args.optim"):
            tiny_trainer(tmp_path, trainer={"optimizers": (optimizer, None)})
        one_exit = tiny_model(num_hidden_layers=4, exit_layers=[4])
        with pytest.raises(ValueError, match=r"exit_layers.*only exit"):
            tiny_trainer(tmp_path, one_exit).train_policy()
        stock = BertForSequenceClassification(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
        with pytest.raises(ValueError, match=r"BertForSequenceClassification.*BertForConsistentEE"):
            ConsistentEETrainer(stock, training_arguments(tmp_path))
        with pytest.raises(ValueError, match=r"args.*ConsistentEETrainingArguments"):
            ConsistentEETrainer(tiny_model(), TrainingArguments(tmp_path))


class TestWhatStaysAsItIs:
    @pytest.mark.parametrize("objective", ["layer_weighted", "uniform", "last"])
    def test_heads_leave_policies(self, tmp_path, objective):
        trainer = tiny_trainer(tmp_path, rows=16, heads_objective=objective)
        before = weights(trainer.model)
        trainer.train_heads()
        names = changed(before, trainer.model.state_dict())
        assert not any(map(is_policy, names))
        heads = {name for name in before if name.startswith("exit_heads.")}
        assert "classifier.weight" in names and "bert.encoder.layer.0.output.dense.weight" in names
        assert heads <= names if objective != "last" else not heads & names

    @pytest.mark.parametrize("inputs", ["state", "confidence", "both"])
    def test_policy_leaves_the_rest(self, tmp_path, inputs):
        model = tiny_model(num_hidden_layers=4, policy_inputs=inputs)
        trainer = tiny_trainer(tmp_path, model, rows=16, weight_decay=0.1)
        before = weights(model)
        trainer.train_policy()
        names = changed(before, model.state_dict())
        assert names == {name for name in before if is_policy(name)}

    def test_consistent_model_leaves_policies(self, tmp_path):
        trainer = tiny_trainer(tmp_path, rows=16)
        before = weights(trainer.model)
        trainer._consistent_model(str(tmp_path / "one"), None)
        assert not any(map(is_policy, changed(before, trainer.model.state_dict())))


class TestGradients:
    """One step of plain SGD shows the gradient."""

    def step(self, folder, **fields):
        fields = {"max_steps": 1, "train_sampling_strategy": "sequential", **SGD, **fields}
        return tiny_trainer(folder, rows=8, phases=["heads"], **fields)

    def manual(self, loss_of) -> dict:
        model = tiny_model(num_hidden_layers=4).train()
        batch = collate(list(task(8, seed=1)))
        loss_of(model, batch).backward()
        return {
            name: parameter.detach() - (0.0 if parameter.grad is None else 0.1 * parameter.grad)
            for name, parameter in model.named_parameters()
        }

    def compare(self, trainer, expected, atol=2e-6):
        for name, parameter in trainer.model.named_parameters():
            torch.testing.assert_close(parameter.detach(), expected[name], rtol=0, atol=atol, msg=name)

    @pytest.mark.parametrize("accumulation", [1, 2, 4])
    def test_heads(self, tmp_path, accumulation):
        """The same for one batch of 8 rows and for micro-batches: no factor by accumulation steps."""
        trainer = self.step(
            tmp_path, per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation
        )
        trainer.train_heads()

        def loss(model, batch):
            logits = model(**batch, output_all_exits=True).all_exit_logits
            losses = [F.cross_entropy(logits[:, index], batch["labels"]) for index in range(4)]
            return sum((index + 1) * one for index, one in enumerate(losses)) / 10

        expected = self.manual(loss)
        start = tiny_model(num_hidden_layers=4)
        assert max(float((expected[n] - p.detach()).abs().max()) for n, p in start.named_parameters()) > 1e-3
        self.compare(trainer, expected)

    @pytest.mark.parametrize("accumulation", [1, 2])
    def test_consistent(self, tmp_path, accumulation):
        trainer = self.step(
            tmp_path, per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation
        )
        trainer._consistent_model(str(tmp_path / "one"), None)

        def loss(model, batch):
            output = model(**batch, output_all_exits=True)
            total = 0.0
            for row in range(8):
                reached = 1.0
                for index in range(4):
                    p = 1.0
                    if index < 3:
                        state = output.all_exit_states[row, index].detach()
                        p = float(model.exit_policies.networks[index](state).sigmoid().detach())
                    one = F.cross_entropy(output.all_exit_logits[row, index][None], batch["labels"][row][None])
                    total = total + reached * p * one / 8
                    reached *= 1 - p
            return total

        self.compare(trainer, self.manual(loss))

    def test_consistent_sampled(self, tmp_path):
        """With many draws the sampled objective takes the step of the expected one."""
        trainers = {}
        for objective in ("expected", "sampled"):
            trainer = self.step(tmp_path, consistent_objective=objective, consistent_samples=20_000)
            trainer._consistent_model(str(tmp_path / objective), None)
            trainers[objective] = weights(trainer.model)
        start = weights(tiny_model(num_hidden_layers=4))
        for name, value in trainers["expected"].items():
            step = float((value - start[name]).abs().max())
            assert float((trainers["sampled"][name] - value).abs().max()) <= 0.05 * step + 1e-7, name

    @pytest.mark.parametrize("reward_loss,hardness", [("ce", True), ("error", False)])
    def test_policy(self, tmp_path, reward_loss, hardness):
        """One step of the policy phase against the gradient of the expected reward, row by row."""
        model = tiny_model(num_hidden_layers=4, reward_alpha=0.3)
        fields = {**SGD, "policy_learning_rate": 0.5, "policy_batch_size": 8, "policy_num_train_epochs": 1}
        reward = "hardness_guided" if hardness else "per_layer"
        trainer = tiny_trainer(tmp_path, model, rows=8, reward=reward, reward_loss=reward_loss, **fields)
        twin = tiny_model(num_hidden_layers=4)
        batch = collate(list(task(8, seed=1)))
        with torch.no_grad():
            output = twin(**batch, output_all_exits=True)
        correct = output.all_exit_logits.argmax(-1) == batch["labels"][:, None]
        expected = 0.0
        for row in range(8):
            memorized = next((layer for layer in range(1, 5) if bool(correct[row, layer - 1 :].all())), 4)
            reached = 1.0
            for index in range(4):
                p = (
                    twin.exit_policies.networks[index](output.all_exit_states[row, index]).sigmoid()
                    if index < 3
                    else 1.0
                )
                cost = float(F.cross_entropy(output.all_exit_logits[row, index], batch["labels"][row]))
                cost = cost if reward_loss == "ce" else float(not correct[row, index])
                price = 0.3 * (1 - memorized / 4) if hardness else 0.3
                expected = expected + reached * p * (-cost - price * (index + 1)) / 8
                reached = reached * (1 - p)
        (-expected).backward()
        trainer.train_policy()
        for (name, parameter), (_, own) in zip(
            model.exit_policies.named_parameters(), twin.exit_policies.named_parameters(), strict=True
        ):
            wanted = own.detach() - 0.5 * own.grad.reshape(own.shape)
            torch.testing.assert_close(parameter.detach(), wanted, rtol=0, atol=2e-6, msg=name)

    def test_reinforce(self, tmp_path):
        """With many draws the policies end where the exact gradient leads."""
        ends = {}
        for gradient in ("exact", "reinforce"):
            model = tiny_model(num_hidden_layers=4, reward_alpha=0.3)
            fields = {**SGD, "policy_learning_rate": 0.5, "policy_batch_size": 16, "policy_num_train_epochs": 3}
            tiny_trainer(
                tmp_path, model, rows=16, policy_gradient=gradient, policy_samples=20_000, **fields
            ).train_policy()
            ends[gradient] = torch.cat([p.detach().flatten() for p in model.exit_policies.parameters()])
        start = torch.cat([p.detach().flatten() for p in tiny_model(num_hidden_layers=4).exit_policies.parameters()])
        moved = (ends["exact"] - start).norm()
        assert float(moved) > 0.01
        assert float((ends["reinforce"] - ends["exact"]).norm() / moved) < 0.05
        assert not torch.equal(ends["reinforce"], ends["exact"])


class TestGroups:
    def names(self, trainer, recorder, phase="heads"):
        by_id = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
        return [({by_id[i] for i in group}, rate, decay) for group, rate, decay in recorder.groups[phase]]

    @pytest.mark.parametrize("pooling,norm", [("cls", "none"), ("mean", "layer_norm")])
    def test_exit_learning_rate(self, tmp_path, pooling, norm):
        recorder = Recorder()
        model = tiny_model(num_hidden_layers=4, exit_pooling=pooling, exit_norm=norm)
        options = {"lr_scheduler_type": "constant", "weight_decay": 0.1, "exit_learning_rate": 0.02}
        trainer = tiny_trainer(tmp_path, model, rows=8, trainer={"callbacks": [recorder]}, **options)
        trainer.train_heads()
        trainer.train_consistent()
        for phase in ("heads", "consistent-1-model"):
            rates = {}
            for group, rate, decay in self.names(trainer, recorder, phase):
                for name in group:
                    assert name not in rates
                    rates[name] = rate
                    assert decay == (0.0 if name.endswith("bias") or "norm" in name.lower() else 0.1), name
            own = ("exit_heads.", "exit_norms.", "classifier.", "bert.pooler.")
            assert rates == {
                name: 0.02 if name.startswith(own) else 1e-3
                for name, _ in model.named_parameters()
                if not is_policy(name)
            }

    def test_learning_rates_of_phases(self, tmp_path):
        recorder = Recorder()
        options = {"lr_scheduler_type": "constant", "heads_learning_rate": 0.01, "consistent_learning_rate": 0.02}
        trainer = tiny_trainer(
            tmp_path,
            rows=16,
            policy_learning_rate=0.03,
            policy_batch_size=8,
            heads_num_train_epochs=2,
            consistent_num_train_epochs=3,
            policy_num_train_epochs=5,
            trainer={"callbacks": [recorder]},
            **options,
        )
        trainer.train()
        rates = {phase: {rate for params, rate, _ in groups if params} for phase, groups in recorder.groups.items()}
        assert rates == {
            "heads": {0.01},
            "policy": {0.03},
            "consistent-1-model": {0.02},
            "consistent-1-policy": {0.03},
        }
        assert recorder.steps == {"heads": 4, "policy": 10, "consistent-1-model": 6, "consistent-1-policy": 10}


class TestHardness:
    def file(self, folder):
        path = folder / "hardness.safetensors"
        with safe_open(path, framework="pt") as file:
            return file.get_tensor("memorized_layers"), file.metadata()["fingerprint"], path.stat().st_mtime_ns

    def test_definition(self, tmp_path):
        trainer = tiny_trainer(tmp_path, rows=20)
        layers = trainer.compute_hardness()
        model, rows = trainer.model.eval(), list(trainer.train_dataset)
        for row, layer in zip(rows, layers.tolist(), strict=True):
            with torch.no_grad():
                logits = model(**collate([row]), output_all_exits=True).all_exit_logits[0]
            right = [int(one.argmax()) == row["labels"] for one in logits]
            assert layer == next((number for number in range(1, 5) if all(right[number - 1 :])), 4)
        assert len(set(layers.tolist())) >= 2

    def test_kept_and_computed_again(self, tmp_path, monkeypatch):
        model = tiny_model(num_hidden_layers=4)
        calls = []
        monkeypatch.setattr(
            ConsistentEETrainer,
            "collect_exits",
            lambda self, *args, original=ConsistentEETrainer.collect_exits: calls.append(1) or original(self, *args),
        )
        first = tiny_trainer(tmp_path, model, rows=12).compute_hardness()
        kept, *mark = self.file(tmp_path)
        assert torch.equal(kept, first) and len(calls) == 1
        again = tiny_trainer(tmp_path, model, rows=12).compute_hardness()
        assert torch.equal(again, first) and len(calls) == 1 and list(self.file(tmp_path)[1:]) == mark
        with torch.no_grad():
            model.exit_policies.networks[0][0].weight.add_(1.0)
        tiny_trainer(tmp_path, model, rows=12).compute_hardness()
        assert len(calls) == 1, "policies do not matter"
        with torch.no_grad():
            for head in (*model.exit_heads.heads, model.classifier):
                head.weight.zero_()
                head.bias.copy_(torch.tensor([9.0, 0.0, 0.0]))
        second = tiny_trainer(tmp_path, model, rows=12).compute_hardness()
        assert len(calls) == 2 and self.file(tmp_path)[1] != mark[0]
        assert second.tolist() == [1 if label == 0 else 4 for label in task(12, seed=1)["labels"]]
        assert len(tiny_trainer(tmp_path, model, rows=13).compute_hardness()) == 13
        assert len(calls) == 3

    def test_exits_elsewhere(self, tmp_path):
        """Weights of exits that share one head do not tell where these are; hardness does depend on it."""
        found = [
            tiny_text_trainer(tmp_path, tiny_llama(exit_head="shared", exit_layers=layers), rows=12).compute_hardness()
            for layers in ([1, 2], [2, 3], [1, 2])
        ]
        assert [
            set(layers.tolist()) <= {*kept, 4} for layers, kept in zip(found, ((1, 2), (2, 3), (1, 2)), strict=True)
        ]
        assert 1 in found[0] and 1 not in found[1] and torch.equal(found[0], found[2])

    def test_other_tolerance(self, tmp_path):
        """What counts as right in regression belongs to hardness: a new tolerance, a new computation."""
        model = tiny_model(num_hidden_layers=4, num_labels=1)
        rows = task(12, seed=1).map(lambda row: {"labels": float(row["labels"])})
        strict, lax = (
            tiny_trainer(
                tmp_path, model, hardness_tolerance=tolerance, trainer={"train_dataset": rows, "compute_metrics": None}
            ).compute_hardness()
            for tolerance in (0.0, 100.0)
        )
        assert strict.tolist() == [4] * 12
        assert lax.tolist() == [1] * 12

    def test_dropout_is_off(self, tmp_path):
        model = tiny_model(num_hidden_layers=4, hidden_dropout_prob=0.5).train()
        first = tiny_trainer(tmp_path / "a", model).compute_hardness()
        assert torch.equal(first, tiny_trainer(tmp_path / "b", model).compute_hardness())


class TestHoldout:
    @pytest.mark.parametrize("share,held", [(0.0, 0), (0.25, 12), (0.5, 24)])
    def test_disjoint(self, tmp_path, share, held):
        trainer = tiny_trainer(tmp_path, policy_holdout=share)
        heads, policies = (set(rows.tolist()) for rows in trainer._split())
        if held == 0:
            assert heads == policies == set(range(48))
        else:
            assert len(policies) == held and not heads & policies and heads | policies == set(range(48))
        same = tiny_trainer(tmp_path, policy_holdout=share)._split()
        assert set(same[1].tolist()) == policies

    @pytest.mark.parametrize("kind", ["dataset", "list"])
    def test_heads_never_see_them(self, tmp_path, kind):
        rows = [{**row, "input_ids": [*row["input_ids"], 40 + number]} for number, row in enumerate(task(16, seed=1))]
        rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
        dataset = rows if kind == "list" else task(1, seed=1).from_list(rows)
        seen = []

        def watch(batch):
            seen.extend(row["input_ids"][-1] - 40 for row in batch)
            return collate(batch)

        trainer = tiny_trainer(
            tmp_path,
            policy_holdout=0.5,
            per_device_train_batch_size=4,
            trainer={"train_dataset": dataset, "data_collator": watch},
        )
        heads, policies = (rows.tolist() for rows in trainer._split())
        for run in (trainer.train_heads, lambda: trainer._consistent_model(str(tmp_path / "one"), None)):
            seen.clear()
            run()
            # The loss asks for the first row's labels on the way, to learn their kind.
            assert set(seen) - {heads[0]} == set(heads) - {heads[0]}
        used = []
        from transformers_cee.training import policy_phase

        original = policy_phase.StoredRewards.__getitems__
        try:
            policy_phase.StoredRewards.__getitems__ = lambda self, indices: (
                used.extend(self.store.rows[self.entries[indices]].tolist()) or original(self, indices)
            )
            trainer.train_policy()
        finally:
            policy_phase.StoredRewards.__getitems__ = original
        assert set(used) == set(policies)


class TestOwnReward:
    def test_is_asked(self, tmp_path, monkeypatch):
        asked = []

        def own(step):
            asked.append((step.losses.shape, step.layers.tolist(), step.memorized_layers.shape, step.num_layers))
            return torch.where(torch.arange(4) == 2, 0.0, -1.0).expand(len(step.losses), 4)

        monkeypatch.setitem(REWARDS, "own", own)
        fields = {"policy_num_train_epochs": 60, "policy_learning_rate": 0.02}
        trainer = tiny_trainer(tmp_path, rows=16, reward="own", **fields)
        trainer.train_policy()
        assert asked[1:] == [((16, 4), [1, 2, 3, 4], (16,), 4)], "tried on made-up rows, then asked once"
        with torch.no_grad():
            output = trainer.model.eval()(**collate(list(trainer.train_dataset)), exit_threshold=0.5)
        assert output.exit_layers.tolist() == [3] * 16, "the only exit that is rewarded"

    def test_gets_errors_on_request(self, tmp_path, monkeypatch):
        seen = []
        monkeypatch.setitem(REWARDS, "own", lambda step: seen.append(step.losses) or -step.losses)
        trainer = tiny_trainer(tmp_path, rows=8, reward_loss="error", reward="own")
        trainer.train_policy()
        assert set(seen[-1].flatten().tolist()) == {0.0, 1.0}


class TestStores:
    def test_memory_mapped_policies_are_the_same(self, tmp_path):
        ends = []
        for folder, limit in (("memory", 2048), ("mapped", 0)):
            trainer = tiny_trainer(tmp_path / folder, phases=["policy", "consistent"], store_memory_limit_mb=limit)
            trainer.train()
            ends.append(weights(trainer.model))
        assert not changed(*ends)
        assert not (tmp_path / "memory" / "exit_store").exists()
        assert list((tmp_path / "mapped" / "exit_store" / "train").iterdir())

    def test_rows_of_the_policy_phase(self, tmp_path):
        store = tiny_trainer(tmp_path, rows=6).collect_exits(task(6, seed=1))
        rewards = torch.randn(6, 4)
        some = StoredRewards(store, rewards, torch.tensor([4, 1]))
        assert len(some) == 2 and len(StoredRewards(store, rewards)) == 6
        row = some[1]
        assert torch.equal(row["states"], store.states[1]) and torch.equal(row["rewards"], rewards[1])
        assert "features" not in row, "policies look at states only"
        assert torch.equal(some.__getitems__([1, 0])["rewards"], rewards[[1, 4]])
        model = tiny_model(num_hidden_layers=4, policy_inputs="both")
        store = tiny_trainer(tmp_path, model, rows=6).collect_exits(task(6, seed=1))
        assert torch.equal(StoredRewards(store, rewards)[2]["features"], all_features(store.logits)[2])

    def test_the_backbone_runs_once(self, tmp_path):
        trainer = tiny_trainer(tmp_path, rows=16, policy_num_train_epochs=7)
        passes = []
        trainer.model.bert.embeddings.register_forward_hook(lambda *_: passes.append(1))
        trainer.compute_hardness()
        trainer.train_policy()
        assert len(passes) == 2 + 2, "two batches of 8 rows, whatever the epochs, and one before each phase"

    @pytest.mark.parametrize("columns", ["dataset", "list"])
    def test_columns_that_the_model_does_not_take(self, tmp_path, columns):
        """Data sets may carry their texts along, as in Trainer."""
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(55))]
        tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
        train = task(12, seed=1, sentence=[f"text {number}" for number in range(12)])
        evaluation = task(6, seed=2, sentence=["text"] * 6)
        if columns == "list":
            train, evaluation = list(train), list(evaluation)
        trainer = tiny_trainer(
            tmp_path,
            eval_strategy="epoch",
            trainer={
                "train_dataset": train,
                "eval_dataset": evaluation,
                "data_collator": DataCollatorWithPadding(tokenizer),
                "processing_class": tokenizer,
            },
        )
        trainer.train()
        assert trainer.evaluate()["eval_depth"] >= 1.0


class TestEvaluate:
    def test_keys_and_points(self, tmp_path, monkeypatch):
        steady_clock(monkeypatch)
        trainer = tiny_trainer(tmp_path, eval_exit_thresholds=[0.3, 0.5, 0.6], eval_timing_rows=16)
        trainer.model.config.exit_threshold = 0.45
        metrics = trainer.evaluate()
        expected = {
            "eval_loss",
            "eval_accuracy",
            "eval_depth",
            "eval_saved_layers",
            "eval_layer_speedup",
            "eval_wall_clock_speedup",
            "eval_wall_clock_spread",
        }
        assert expected <= metrics.keys()
        assert (metrics["eval_wall_clock_speedup"], metrics["eval_wall_clock_spread"]) == (1.0, 0.0)
        own, *points = (point.to_dict() for point in trainer.operating_points["eval"])
        assert [point["exit_threshold"] for point in points] == [0.3, 0.5, 0.6]
        batch = collate(list(trainer.eval_dataset))
        labels = batch.pop("labels")
        first = {
            "exit_threshold": 0.45,
            "depth": metrics["eval_depth"],
            "saved_layers": metrics["eval_saved_layers"],
            "layer_speedup": metrics["eval_layer_speedup"],
            "exit_histogram": own["exit_histogram"],
            "metrics": {"accuracy": metrics["eval_accuracy"], "loss": metrics["eval_loss"]},
            "wall_clock_speedup": 1.0,
        }
        depths = set()
        for point in [first, *points]:
            with torch.no_grad():
                output = trainer.model.eval()(**batch, exit_threshold=point["exit_threshold"])
            layers = output.exit_layers
            depths.add(float(layers.float().mean()))
            assert point["depth"] == pytest.approx(float(layers.float().mean()))
            assert point["saved_layers"] == pytest.approx(1 - point["depth"] / 4)
            assert point["layer_speedup"] == pytest.approx(4 / point["depth"])
            assert point["exit_histogram"] == {str(n): int((layers == n).sum()) for n in range(1, 5)}
            assert sum(point["exit_histogram"].values()) == 24
            assert point["metrics"]["accuracy"] == pytest.approx(
                float((output.logits.argmax(-1) == labels).float().mean())
            )
            loss = float(F.cross_entropy(output.logits, labels))
            assert point["metrics"]["loss"] == pytest.approx(loss, rel=1e-4)
            assert point["wall_clock_speedup"] == 1.0
        assert len(depths) >= 3

    def test_noise_is_no_metric(self, tmp_path, monkeypatch, caplog):
        """Every look at the clock is further from the one before: rounds that lie far apart."""
        times = accumulate(2.0**number for number in count())
        monkeypatch.setattr(timing, "perf_counter", lambda: next(times))
        trainer = tiny_trainer(tmp_path, eval_exit_thresholds=[], eval_timing_rows=8)
        logger = logging.getLogger("transformers_cee.training.early_exit_trainer")
        logger.addHandler(caplog.handler)
        try:
            metrics = trainer.evaluate()
        finally:
            logger.removeHandler(caplog.handler)
        assert any("The wall-clock speed-up is noise" in record.getMessage() for record in caplog.records)
        assert not any("wall_clock" in name for name in metrics)
        point = trainer.operating_points["eval"][0].to_dict()
        assert point["wall_clock_speedup"] is None and point["noisy_wall_clock_speedup"] is not None

    def test_no_timing(self, tmp_path):
        trainer = tiny_trainer(tmp_path, eval_exit_thresholds=[0.5])
        assert "test_wall_clock_speedup" not in trainer.evaluate(metric_key_prefix="test")
        assert [point.wall_clock_speedup for point in trainer.operating_points["test"]] == [None, None]

    def test_own_data_and_criterion(self, tmp_path):
        trainer = tiny_trainer(tmp_path, eval_exit_thresholds=[])
        trainer.model.config.exit_criterion, trainer.model.config.exit_threshold = "patience", 1
        trainer.evaluate(task(10, seed=5))
        (point,) = trainer.operating_points["eval"]
        assert sum(point.exit_histogram.values()) == 10 and point.exit_histogram["1"] == 0

    def test_without_metrics(self, tmp_path):
        """Depth and its kin need no `compute_metrics`."""
        trainer = tiny_trainer(tmp_path, trainer={"compute_metrics": None})
        assert 1.0 <= trainer.evaluate()["eval_depth"] <= 4.0
        assert sum(trainer.operating_points["eval"][0].exit_histogram.values()) == 24

    @pytest.mark.parametrize("option", ["batch_eval_metrics", "prediction_loss_only"])
    def test_options_that_hide_exit_layers_are_refused(self, tmp_path, option):
        with pytest.raises(ValueError, match=option):
            tiny_trainer(tmp_path, **{option: True})

    def test_metrics_may_want_inputs(self, tmp_path):
        seen = []
        tiny_trainer(
            tmp_path,
            include_for_metrics=["inputs", "loss"],
            eval_exit_thresholds=[],
            trainer={"compute_metrics": lambda prediction: seen.append((prediction.inputs, prediction.losses)) or {}},
        ).evaluate()
        assert seen[0][0] is not None and seen[0][1] is not None

    def test_preprocessed_logits(self, tmp_path):
        trainer = tiny_trainer(
            tmp_path,
            trainer={
                "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
                "compute_metrics": lambda p: {"accuracy": float((p.predictions == p.label_ids).mean())},
            },
        )
        plain = tiny_trainer(tmp_path)
        first, second = trainer.evaluate(), plain.evaluate()
        assert first["eval_accuracy"] == second["eval_accuracy"] and first["eval_depth"] == second["eval_depth"]
        # Of stored exits, too.
        found = []
        for one in (trainer, plain):
            recorder = Recorder()
            one.add_callback(recorder)
            one.args.eval_strategy = "epoch"
            one.train_policy()
            found.append([metrics["eval_accuracy"] for _, metrics in recorder.metrics])
        assert found[0] == found[1] and found[0]

    def test_predict(self, tmp_path):
        trainer = tiny_trainer(tmp_path)
        output = trainer.predict(trainer.eval_dataset)
        assert output.predictions.shape == (24, 3)
        with torch.no_grad():
            logits = trainer.model.eval()(**collate(list(trainer.eval_dataset))).logits
        torch.testing.assert_close(torch.from_numpy(output.predictions), logits, rtol=1e-4, atol=1e-5)
        assert output.metrics["test_depth"] >= 1.0
        unlabelled = trainer.eval_dataset.remove_columns("labels")
        trainer.data_collator = lambda rows: {
            n: v for n, v in collate([{**r, "labels": 0} for r in rows]).items() if n != "labels"
        }
        assert trainer.predict(unlabelled).predictions.shape == (24, 3)

    def test_several_data_sets(self, tmp_path):
        data = {"one": task(6, seed=3), "two": task(9, seed=4)}
        metrics = tiny_trainer(tmp_path, trainer={"eval_dataset": data}).evaluate()
        assert {"eval_one_depth", "eval_two_depth", "eval_one_accuracy"} <= metrics.keys()


class TestKinds:
    @pytest.mark.parametrize("kind", ["multi_label_classification", "regression"])
    @pytest.mark.parametrize("named", [True, False])
    def test_problem_types(self, tmp_path, kind, named):
        labels = 1 if kind == "regression" else 2
        model = tiny_model(num_hidden_layers=4, num_labels=labels, problem_type=kind if named else None)
        turn = (
            (lambda row: {"labels": float(row["labels"])})
            if labels == 1
            else (lambda row: {"labels": [float(row["labels"] > 0), float(row["labels"] > 1)]})
        )
        trainer = tiny_trainer(
            tmp_path,
            model,
            eval_strategy="epoch",
            trainer={
                "train_dataset": task(16, seed=1).map(turn),
                "eval_dataset": task(8, seed=2).map(turn),
                "compute_metrics": lambda p: {"shape": float(p.predictions.shape[1])},
            },
        )
        before = weights(model)
        results = trainer.train()
        # As stock models do: without labels nothing else would tell what the logits mean.
        model.save_pretrained(tmp_path / "model")
        assert BertForConsistentEE.from_pretrained(tmp_path / "model").config.problem_type == kind
        assert set(results.phases["hardness"].tolist()) <= {1, 2, 3, 4}
        assert any(is_policy(name) for name in changed(before, model.state_dict()))
        assert trainer.evaluate()["eval_shape"] == labels

    def test_bfloat16_autocast(self, tmp_path):
        trainer = tiny_trainer(tmp_path, rows=16, bf16=True, eval_strategy="epoch")
        trainer.train()
        assert all(value.isfinite().all() for value in trainer.model.state_dict().values())


def test_policies_beside_another_criterion(tmp_path):
    """The config's threshold may be one that policies do not know."""
    model = tiny_model(num_hidden_layers=4, exit_criterion="patience", exit_threshold=3)
    trainer = tiny_trainer(tmp_path, model, rows=16, eval_strategy="epoch")
    trainer.train_policy()
    trainer._consistent_model(str(tmp_path / "one"), None)
    assert trainer.evaluate()["eval_depth"] >= 3.0


class TestEarlyStopping:
    def test_in_heads_and_policy(self, tmp_path):
        """Nothing improves without learning: one evaluation to compare with, one without gain, stop."""
        recorder = Recorder()
        trainer = tiny_trainer(
            tmp_path,
            rows=16,
            learning_rate=0.0,
            policy_learning_rate=0.0,
            num_train_epochs=9,
            policy_num_train_epochs=9,
            consistent_num_train_epochs=9,
            policy_batch_size=8,
            eval_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model="accuracy",
            trainer={"callbacks": [recorder, EarlyStoppingCallback(1)]},
        )
        trainer.train()
        assert recorder.steps == {"heads": 4, "policy": 4, "consistent-1-model": 4, "consistent-1-policy": 4}

    def test_best_weights_come_back(self, tmp_path):
        """With a learning rate that ruins the model, the first epoch is the best one."""
        recorder = Recorder()
        trainer = tiny_trainer(
            tmp_path,
            rows=32,
            phases=["heads"],
            learning_rate=0.5,
            num_train_epochs=4,
            eval_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model="loss",
            greater_is_better=False,
            trainer={"callbacks": [recorder]},
        )
        trainer.train()
        losses = [metrics["eval_loss"] for _, metrics in recorder.metrics]
        with torch.no_grad():
            output = trainer.model.eval()(**collate(list(trainer.eval_dataset)), exit_threshold=1.0)
        assert float(output.loss) == pytest.approx(min(losses), rel=1e-3) and min(losses) < max(losses)


class TestCard:
    def test_shows_the_operating_points(self, tmp_path):
        trainer = tiny_trainer(tmp_path, eval_exit_thresholds=[0.3, 0.6])
        trainer.create_model_card(model_name="tiny")
        assert "accuracy" not in (tmp_path / "README.md").read_text(), "nothing is known yet"
        trainer.evaluate()
        trainer.create_model_card(model_name="tiny", dataset=["one", "two"])
        card = (tmp_path / "README.md").read_text()
        assert "one, two" in card
        for point in trainer.operating_points["eval"]:
            assert f"{point.depth:.2f}" in card

    def test_every_evaluation_set_has_its_own_figures(self, tmp_path):
        sets = {"first": task(8, seed=1), "second": task(24, seed=2)}
        trainer = tiny_trainer(tmp_path, trainer={"eval_dataset": sets}, eval_exit_thresholds=[0.4])
        metrics = trainer.evaluate()
        trainer.create_model_card(model_name="tiny")
        card = (tmp_path / "README.md").read_text()
        assert "Trained and measured on the evaluation sets." in card
        assert "Measured on the first rows;" in card
        parts = dict(zip(sets, card.split("On the second rows:"), strict=True))
        for name, part in parts.items():
            for point in trainer.operating_points[f"eval_{name}"]:
                assert f"{point.metrics['accuracy']:.4f}" in part
            assert f"{metrics[f'eval_{name}_accuracy']:.4f}" in part
        assert "language:" not in card
        # One set alone afterwards: the card is about that one.
        trainer.evaluate(sets["second"])
        trainer.create_model_card(model_name="tiny")
        assert "Measured on the evaluation rows;" in (tmp_path / "README.md").read_text()

    def test_of_a_trainer_that_only_evaluates(self, tmp_path):
        trainer = tiny_trainer(tmp_path, trainer={"train_dataset": None}, eval_exit_thresholds=[])
        trainer.evaluate()
        trainer.create_model_card()
        assert (tmp_path / "README.md").is_file()


class TestLogs:
    def test_loss_of_heads_is_logged(self, tmp_path):
        trainer = tiny_trainer(tmp_path, rows=16, logging_strategy="steps", logging_steps=1)
        trainer.train_heads()
        logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert len(logged) == 2
        with torch.no_grad():
            store = tiny_trainer(tmp_path, rows=16).collect_exits(task(16, seed=1))
        mean = float((store.losses * torch.tensor([0.1, 0.2, 0.3, 0.4])).sum(1).mean())
        assert logged[0] == pytest.approx(mean, rel=0.5)


def test_accuracy_of_the_helper():
    """The tests' own metric."""

    class Prediction:
        predictions = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).numpy()
        label_ids = torch.tensor([0, 0]).numpy()

    assert accuracy(Prediction) == {"accuracy": 0.5}
    assert pad([{"input_ids": torch.tensor([1, 2])}], "left", 1)["attention_mask"].tolist() == [[0, 1, 1]]
