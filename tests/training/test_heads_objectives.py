# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Objectives of the phase `heads` against their formulas, row by row, and through the trainer."""

from __future__ import annotations

import math
import os
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import changed, collate, task, tiny_llama, tiny_model, tiny_text_trainer, tiny_trainer, weights
from torch.nn import functional as F
from transformers import EarlyStoppingCallback, TrainerCallback

from transformers_cee.exits.losses import exit_losses
from transformers_cee.exits.policy import all_features, exit_log_distribution
from transformers_cee.exits.runner import RowBatch, collect_states
from transformers_cee.exits.training_options import ExitTraining
from transformers_cee.training import heads_objectives
from transformers_cee.training.heads_objectives import (
    HEADS_OBJECTIVES,
    Alternate,
    CoSEE,
    GradientEquilibrium,
    HeadsStep,
    SelfDistillation,
    TwoStage,
    Variational,
    make_heads_objective,
    normalised_entropy,
)


LOSSES = torch.tensor([[3.0, 2.0, 0.5], [0.1, 0.2, 4.0]])
OF_LOSSES = ("layer_weighted", "uniform", "last", "two_stage", "alternate", "gradient_equilibrium")
KINDS = ("single_label_classification", "multi_label_classification", "regression")
SGD = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}


def random_step(seed: int, kind: str = KINDS[0], rows: int = 6, exits: int = 4, **fields) -> HeadsStep:
    generator = torch.Generator().manual_seed(seed)
    classes = 1 if kind == "regression" else 3
    logits = (2 * torch.randn(rows, exits, classes, generator=generator)).requires_grad_()
    labels = torch.randint(0, 3, (rows,), generator=generator)
    if kind == "multi_label_classification":
        labels = (torch.rand(rows, classes, generator=generator) < 0.5).float()
    elif kind == "regression":
        labels = labels.float()
    return HeadsStep(exit_losses(logits, labels, kind), logits, labels, kind, **fields)


def plain_softmax(values: list[float]) -> list[float]:
    exponentials = [math.exp(value) for value in values]
    return [one / sum(exponentials) for one in exponentials]


def plain_decisions(logits: torch.Tensor, kind: str, temperature: float = 1.0) -> list[list[float]]:
    """Probabilities of each decision that one exit takes for one row."""
    values = [value / temperature for value in logits.tolist()]
    if kind == "multi_label_classification":
        return [plain_softmax([0.0, value]) for value in values]
    return [plain_softmax(values)]


class TestOfLosses:
    def test_names(self):
        assert set(HEADS_OBJECTIVES) == {*OF_LOSSES, "cosee", "variational", "self_distillation"}

    @pytest.mark.parametrize(
        "name,expected",
        [
            ("layer_weighted", ((3 + 4 + 1.5) / 6 + (0.1 + 0.4 + 12) / 6) / 2),
            ("uniform", (3 + 2 + 0.5 + 0.1 + 0.2 + 4) / 6),
            ("last", (0.5 + 4) / 2),
            ("two_stage", (3 + 2 + 0.1 + 0.2) / 2),
            ("gradient_equilibrium", (3 + 2 + 0.5 + 0.1 + 0.2 + 4) / 2),
        ],
    )
    def test_values(self, name, expected):
        assert float(make_heads_objective(name)(HeadsStep(LOSSES))) == pytest.approx(expected)

    def test_alternate(self):
        values = [float(Alternate()(HeadsStep(LOSSES, number=number))) for number in range(4)]
        assert values == pytest.approx([4.5 / 2, 9.8 / 2, 4.5 / 2, 9.8 / 2])

    def test_first_stage(self):
        first = make_heads_objective("two_stage", stage="heads-backbone")
        assert float(first(HeadsStep(LOSSES))) == pytest.approx(4.5 / 2)
        assert float(first.summary(LOSSES)) == pytest.approx(4.5 / 2)
        assert float(TwoStage().summary(LOSSES)) == pytest.approx(5.3 / 4)

    @pytest.mark.parametrize("name", sorted(HEADS_OBJECTIVES))
    def test_summaries(self, name):
        expected = {"layer_weighted": 1.75, "last": 2.25, "two_stage": 5.3 / 4}.get(name, 9.8 / 6)
        assert float(make_heads_objective(name).summary(LOSSES)) == pytest.approx(expected)


class TestEntropy:
    @settings(deadline=None)
    @given(st.integers(0, 1000), st.sampled_from(KINDS[:2]))
    def test_definition(self, seed, kind):
        logits = random_step(seed, kind).logits.detach()
        found = normalised_entropy(logits, kind)
        for row in range(6):
            for index in range(4):
                decisions = plain_decisions(logits[row, index], kind)
                entropies = [-sum(p * math.log(p) for p in one) / math.log(len(one)) for one in decisions]
                assert float(found[row, index]) == pytest.approx(sum(entropies) / len(entropies), abs=1e-5)

    @pytest.mark.parametrize("kind", KINDS[:2])
    def test_finite_gradient_where_probabilities_vanish(self, kind):
        logits = torch.tensor([[500.0, -500.0, 0.0]], requires_grad=True)
        normalised_entropy(logits, kind).sum().backward()
        assert bool(logits.grad.isfinite().all())


@torch.no_grad()
def plain_cosee(step, thresholds, beta, separation, margin) -> float:
    rows, exits = step.losses.shape
    signal = [[0.0] * (exits - 1) for _ in range(rows)]
    for row in range(rows):
        for index in range(exits - 1):
            decisions = plain_decisions(step.logits[row, index], step.problem_type)
            entropies = [-sum(p * math.log(p) for p in one) / math.log(len(one)) for one in decisions]
            signal[row][index] = sum(entropies) / len(entropies)
    total = 0.0
    for threshold in thresholds:
        for row in range(rows):
            taken = next((m for m in range(exits - 1) if signal[row][m] < threshold), exits - 1)
            shares = plain_softmax([-beta * step.progress * abs(m - taken) for m in range(exits)])
            total += sum(share * float(step.losses[row, m]) for m, share in enumerate(shares))
    total /= len(thresholds) * rows
    overlaps = []
    for index in range(exits - 1):
        groups: dict[bool, list[float]] = {True: [], False: []}
        for row in range(rows):
            logits = step.logits[row, index]
            if step.problem_type == "multi_label_classification":
                right = all((float(z) > 0) == bool(y) for z, y in zip(logits, step.labels[row], strict=True))
            else:
                right = int(logits.argmax()) == int(step.labels[row])
            groups[right].append(signal[row][index])
        if not all(groups.values()):
            overlaps.append(0.0)
            continue
        means = {right: sum(values) / len(values) for right, values in groups.items()}
        overlaps.append(max(0.0, means[True] - means[False] + margin))
    return total + separation * sum(overlaps) / len(overlaps)


class TestCoSEE:
    @settings(deadline=None, max_examples=40)
    @given(st.integers(0, 1000), st.sampled_from(KINDS[:2]), st.floats(0, 1))
    def test_definition(self, seed, kind, progress):
        step = random_step(seed, kind, progress=progress)
        objective = CoSEE(samples=3, beta=4.0, separation=0.7, margin=0.2)
        torch.manual_seed(seed)
        thresholds = torch.rand(3).tolist()
        torch.manual_seed(seed)
        found = objective(step)
        assert float(found.detach()) == pytest.approx(plain_cosee(step, thresholds, 4.0, 0.7, 0.2), rel=1e-4)

    def test_groups_of_one_kind_count_nothing(self):
        logits = torch.tensor([[[9.0, 0.0], [0.0, 0.1], [0.0, 0.0]], [[8.0, 0.0], [0.2, 0.0], [0.0, 0.0]]])
        step = HeadsStep(torch.zeros(2, 3), logits, torch.tensor([0, 0]))
        signal = normalised_entropy(logits[:, 1], KINDS[0])
        # At the first exit all rows are right; at the second, the second row only.
        expected = max(0.0, float(signal[1] - signal[0]) + 0.3) / 2
        assert float(CoSEE(separation=1.0)(step)) == pytest.approx(expected) and expected > 0

    def test_weights_at_the_ends(self):
        signal = torch.tensor([[0.9, 0.2], [0.1, 0.0], [0.8, 0.7]])
        thresholds = torch.tensor([0.3])
        assert torch.equal(CoSEE.weights(signal, thresholds, 0.0), torch.full((3, 3), 1 / 3))
        sharp = CoSEE.weights(signal, thresholds, 1e4)
        assert sharp.tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1]]
        two = CoSEE.weights(signal, torch.tensor([0.3, 1.0]), 1e4)
        assert two.tolist() == [[0.5, 0.5, 0], [1, 0, 0], [0.5, 0, 0.5]]

    def test_all_weight_on_the_exit_taken(self):
        step = random_step(3, progress=1.0)
        objective = CoSEE(samples=1, beta=1e6, separation=0.0)
        torch.manual_seed(0)
        threshold = float(torch.rand(1))
        torch.manual_seed(0)
        below = normalised_entropy(step.logits, KINDS[0]) < threshold
        taken = [next((m for m in range(3) if below[row, m]), 3) for row in range(6)]
        assert len(set(taken)) > 1
        expected = sum(float(step.losses[row, m].detach()) for row, m in enumerate(taken)) / 6
        assert float(objective(step).detach()) == pytest.approx(expected, rel=1e-5)

    def test_range_of_the_epoch_before(self):
        objective = CoSEE(samples=200, separation=0.0)
        drawn, signals = [], []
        for number in range(6):
            step = random_step(number, number=number, epoch=number / 2)
            signals.append(normalised_entropy(step.logits[:, :-1].detach(), KINDS[0]))
            objective(step)
            drawn.append(objective._drawn[1])
        for number in (0, 1):
            assert float(drawn[number].min()) < 0.05 and float(drawn[number].max()) > 0.95
        for number in range(2, 6):
            seen = torch.cat(signals[number // 2 * 2 - 2 : number // 2 * 2])
            low, high = float(seen.min()), float(seen.max())
            assert low <= float(drawn[number].min()) < low + 0.05 * (high - low)
            assert high - 0.05 * (high - low) < float(drawn[number].max()) <= high
            assert not torch.equal(drawn[number], drawn[number - 1])

    def test_one_draw_per_optimizer_step(self):
        """So that the step of a batch is the mean of those of its micro-batches."""
        objective = CoSEE(separation=0.0)
        whole = random_step(5, rows=8, progress=0.5)
        expected = float(objective(whole).detach())
        halves = [
            HeadsStep(whole.losses[part], whole.logits[part], whole.labels[part], progress=0.5)
            for part in (slice(0, 4), slice(4, 8))
        ]
        assert sum(float(objective(half).detach()) for half in halves) / 2 == pytest.approx(expected, rel=1e-5)

    def test_no_internal_exit(self):
        step = random_step(0, exits=1)
        torch.testing.assert_close(CoSEE()(step), step.losses.mean())


class TestVariational:
    @settings(deadline=None, max_examples=40)
    @given(st.integers(0, 1000), st.integers(0, 3), st.floats(0.05, 0.9))
    def test_definition(self, seed, first, rate):
        generator = torch.Generator().manual_seed(seed)
        exits = 4 - first
        open_exits = torch.randn(5, exits, generator=generator).softmax(1)
        distribution = F.pad(open_exits, (first, 0))
        may_exit = torch.rand(5, generator=generator) < 0.6
        distribution[~may_exit] = torch.tensor([0.0, 0.0, 0.0, 1.0])
        losses = torch.rand(5, 4, generator=generator)
        step = HeadsStep(losses, log_distribution=distribution.log(), may_exit=may_exit, first_exit=first)
        prior = [rate * (1 - rate) ** index for index in range(exits)]
        prior = [one / sum(prior) for one in prior]
        total = 0.0
        for row in range(5):
            total += sum(float(distribution[row, index] * losses[row, index]) for index in range(4))
            if may_exit[row]:
                for index in range(exits):
                    total += 0.3 * prior[index] * math.log(prior[index] / float(distribution[row, first + index]))
        assert float(Variational(0.3, rate)(step)) == pytest.approx(total / 5, rel=1e-4, abs=1e-5)

    def test_certain_policy_without_prior(self):
        distribution = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
        step = HeadsStep(LOSSES, log_distribution=distribution.log().clamp_min(-1e4))
        assert float(Variational(beta=0.0)(step)) == pytest.approx((2.0 + 0.1) / 2)

    def test_at_the_prior_nothing_is_paid(self):
        prior = torch.tensor([1.0, 0.9, 0.81])
        step = HeadsStep(LOSSES, log_distribution=(prior / prior.sum()).log().expand(2, 3))
        expected = float((LOSSES * prior / prior.sum()).sum(1).mean())
        assert float(Variational(beta=7.0)(step)) == pytest.approx(expected, rel=1e-5)


class TestSelfDistillation:
    @settings(deadline=None, max_examples=40)
    @given(st.integers(0, 1000), st.sampled_from(KINDS), st.floats(0, 1), st.floats(0.5, 4))
    def test_definition(self, seed, kind, weight, temperature):
        step = random_step(seed, kind)
        total = 0.0
        for row in range(6):
            total += float(step.losses[row, -1])
            for index in range(3):
                if kind == "regression":
                    distance = float(step.logits[row, index, 0] - step.logits[row, -1, 0]) ** 2
                else:
                    ours, wanted = (plain_decisions(step.logits[row, i], kind, temperature) for i in (index, -1))
                    distances = [
                        sum(p * math.log(p / q) for p, q in zip(*pair, strict=True))
                        for pair in zip(wanted, ours, strict=True)
                    ]
                    distance = temperature**2 * sum(distances) / len(distances)
                total += ((1 - weight) * float(step.losses[row, index]) + weight * distance) / 3
        found = SelfDistillation(weight, temperature)(step)
        assert float(found.detach()) == pytest.approx(total / 6, rel=1e-4, abs=1e-5)

    def test_without_distillation(self):
        step = random_step(1)
        expected = (step.losses[:, -1] + step.losses[:, :-1].mean(1)).mean()
        torch.testing.assert_close(SelfDistillation(weight=0.0)(step), expected)

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_last_exit_is_no_pupil(self, kind):
        step = random_step(2, kind)
        step.losses = torch.zeros_like(step.losses)
        SelfDistillation()(step).backward()
        assert not step.logits.grad[:, -1].any() and step.logits.grad[:, :-1].any()

    def test_no_internal_exit(self):
        step = random_step(0, exits=1)
        torch.testing.assert_close(SelfDistillation()(step), step.losses.mean())


class ToyExits:
    """Exits whose state is the hidden state's first position."""

    def __init__(self, layer_numbers) -> None:
        self.layer_numbers = layer_numbers

    def state(self, hidden_states, padding_mask, index):
        return hidden_states[:, 0]

    def logits(self, state, index):
        raise AssertionError("Hidden states need no logits.")


class TestGradientEquilibrium:
    @pytest.mark.parametrize("layer_numbers", [[1, 2, 3, 4], [2, 4], [1, 4], [4]])
    def test_by_hand(self, layer_numbers):
        """Every layer's gradient from the recursion `G_i = g_i / (n − i) + G_{i+1}·(n − i − 1) / (n − i)`."""
        generator = torch.Generator().manual_seed(0)
        matrices = [torch.randn(5, 5, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(4)]
        heads = [torch.randn(5, generator=generator, dtype=torch.float64).requires_grad_() for _ in layer_numbers]
        start = torch.randn(3, 2, 5, generator=generator, dtype=torch.float64)
        layers = [lambda batch, matrix=matrix: torch.tanh(batch.hidden_states @ matrix) for matrix in matrices]

        def loss(states):
            return sum((state @ head).square().sum() for state, head in zip(states, heads, strict=True))

        plain = collect_states(RowBatch(start), layers, ToyExits(layer_numbers))
        states = collect_states(RowBatch(start), layers, ToyExits(layer_numbers), gradient_equilibrium=True)
        assert all(torch.equal(*pair) for pair in zip(plain, states, strict=True))
        loss(states).backward()

        inputs, hidden = [], start
        for matrix in matrices:
            inputs.append(hidden.detach().requires_grad_())
            hidden = torch.tanh(inputs[-1] @ matrix)
        n, above = len(layer_numbers), torch.zeros_like(start)
        for number in range(4, 0, -1):
            output = torch.tanh(inputs[number - 1] @ matrices[number - 1])
            if number in layer_numbers:
                index = layer_numbers.index(number)
                value = output.detach().requires_grad_()
                objective = (value[:, 0] @ heads[index].detach()).square().sum()
                (own,) = torch.autograd.grad(objective, value)
                above = own / (n - index) + above * (n - index - 1) / (n - index)
            ours, above = torch.autograd.grad(output, (matrices[number - 1], inputs[number - 1]), above)
            torch.testing.assert_close(matrices[number - 1].grad, ours)
        for head, state in zip(heads, plain, strict=True):
            (whole,) = torch.autograd.grad((state.detach() @ head).square().sum(), head)
            torch.testing.assert_close(head.grad, whole)

    @pytest.mark.parametrize("make", [lambda: tiny_model(num_hidden_layers=4), tiny_llama])
    def test_models(self, make):
        """The same outputs bit for bit, the same gradients of heads, others below."""
        batch = collate(list(task(6, seed=1)))
        model = make()
        if model.item == "token":
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        gradients, outputs = [], []
        for balanced in (False, True):
            model.zero_grad()
            outputs.append(
                model(**batch, output_all_exits=True, exit_training=ExitTraining(gradient_equilibrium=balanced))
            )
            GradientEquilibrium()(HeadsStep(outputs[-1].all_exit_losses)).backward()
            gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        assert torch.equal(outputs[0].all_exit_losses, outputs[1].all_exit_losses)
        assert torch.equal(outputs[0].all_exit_states, outputs[1].all_exit_states)
        differ = {name for name in gradients[0] if not torch.allclose(*(one[name] for one in gradients), rtol=1e-4)}
        assert not any("exit_heads" in name or "exit_norms" in name or "classifier" in name for name in differ)
        assert any("layers.0." in name or "layer.0." in name for name in differ)


# Through the trainer


class Watch(TrainerCallback):
    """Weights at the beginning and after every step, by the folder of the step of the run."""

    def __init__(self) -> None:
        self.seen: dict[str, list] = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.seen[os.path.basename(args.output_dir)] = [weights(model)]

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen[os.path.basename(args.output_dir)].append(weights(model))


@pytest.mark.parametrize("name", sorted(HEADS_OBJECTIVES))
def test_encoders_learn(tmp_path, name):
    trainer = tiny_trainer(tmp_path, rows=16, phases=["heads"], heads_objective=name)
    before = weights(trainer.model)
    results = trainer.train()
    assert list(results.phases) == (["heads-backbone", "heads"] if name == "two_stage" else ["heads"])
    names = changed(before, trainer.model.state_dict())
    assert "bert.encoder.layer.0.output.dense.weight" in names and "classifier.weight" in names
    assert any("exit_policies" in one for one in names) == (name == "variational")
    assert any("exit_heads" in one for one in names) == (name != "last")
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())


@pytest.mark.parametrize("name", ["two_stage", "alternate", "gradient_equilibrium", "variational"])
def test_decoders_learn(tmp_path, name):
    model = tiny_llama(policy_inputs="both", exit_head="low_rank", min_exit_layer=2)
    trainer = tiny_text_trainer(
        tmp_path, model, rows=16, phases=["heads"], heads_objective=name, eval_strategy="epoch"
    )
    before = weights(model)
    trainer.train()
    names = changed(before, model.state_dict())
    assert "model.layers.0.mlp.up_proj.weight" in names and any("exit_heads" in one for one in names)
    assert any("exit_policies" in one for one in names) == (name == "variational")
    assert all(value.isfinite().all() for value in model.state_dict().values())
    entries = [entry["eval_exit_loss"] for entry in trainer.state.log_history if "eval_exit_loss" in entry]
    assert entries and all(map(math.isfinite, entries))


@pytest.mark.parametrize(
    "kind,name", [(KINDS[1], "cosee"), (KINDS[1], "self_distillation"), (KINDS[2], "variational")]
)
def test_other_problems(tmp_path, kind, name):
    def turn(row):
        return {"labels": float(row["labels"]) if kind == KINDS[2] else [float(row["labels"] > i) for i in (0, 1)]}

    model = tiny_model(num_hidden_layers=4, num_labels=1 if kind == KINDS[2] else 2)
    data = {"train_dataset": task(16, seed=1).map(turn), "compute_metrics": None}
    before = weights(model)
    tiny_trainer(tmp_path, model, heads_objective=name, trainer=data).train_heads()
    assert len(changed(before, model.state_dict())) > 40


def test_alternate_through_the_trainer(tmp_path):
    """In steps 0, 2, … the internal heads get no gradient, however many micro-batches a step has."""
    watch = Watch()
    trainer = tiny_trainer(
        tmp_path,
        rows=16,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        heads_objective="alternate",
        trainer={"callbacks": [watch]},
        **SGD,
    )
    trainer.train_heads()
    seen = watch.seen["heads"]
    moved = [any("exit_heads" in name for name in changed(*pair)) for pair in pairwise(seen)]
    assert moved == [False, True, False, True]


def test_cosee_knows_where_it_is(tmp_path, monkeypatch):
    steps = []
    call = CoSEE.__call__
    monkeypatch.setattr(CoSEE, "__call__", lambda self, step: steps.append(step) or call(self, step))
    options = {"samples": 2, "beta": 3.0}
    tiny_trainer(
        tmp_path,
        rows=16,
        num_train_epochs=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        heads_objective="cosee",
        heads_objective_options=options,
    ).train_heads()
    assert [step.number for step in steps] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [step.progress for step in steps] == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]
    assert [int(step.epoch) for step in steps] == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", ["variational", "self_distillation", "gradient_equilibrium"])
def test_one_step(tmp_path, name, accumulation):
    """One step of SGD in micro-batches is the step of the whole batch, computed outside of the trainer."""
    trainer = tiny_trainer(
        tmp_path,
        tiny_model(num_hidden_layers=4, policy_inputs="both"),
        rows=8,
        max_steps=1,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        heads_objective=name,
        **SGD,
    )
    trainer.train_heads()
    model = tiny_model(num_hidden_layers=4, policy_inputs="both").train()
    batch = collate(list(task(8, seed=1)))
    output = model(
        **batch, output_all_exits=True, exit_training=ExitTraining(gradient_equilibrium=name == "gradient_equilibrium")
    )
    step = HeadsStep(output.all_exit_losses, output.all_exit_logits, batch["labels"])
    if name == "variational":
        logits = model.exit_policies(output.all_exit_states, all_features(output.all_exit_logits.detach()))
        step.log_distribution = exit_log_distribution(logits)
    make_heads_objective(name)(step).backward()
    for own, (parameter_name, parameter) in zip(trainer.model.parameters(), model.named_parameters(), strict=True):
        gradient = 0.0 if parameter.grad is None else parameter.grad
        assert ("exit_policies" in parameter_name and name != "variational") == (parameter.grad is None)
        torch.testing.assert_close(own.detach(), parameter.detach() - 0.1 * gradient, rtol=0, atol=3e-6)


@pytest.mark.parametrize("trainable", ["all", "exits"])
def test_variational_policies_of_a_shared_head(tmp_path, trainable):
    """With nothing of the exits' own but policies, these alone are trained."""
    model = tiny_llama(exit_head="shared")
    before = weights(model)
    trainer = tiny_text_trainer(
        tmp_path, model, rows=8, phases=["heads"], trainable=trainable, heads_objective="variational"
    )
    trainer.train()
    names = changed(before, model.state_dict())
    assert all("exit_policies" in name for name in names) == (trainable == "exits") and names


class Kill(Exception):
    """Stands for a process that is stopped."""


class KillAt(TrainerCallback):
    """Stops at a step of a stage; at 0, before its first."""

    def __init__(self, stage: str, step: int) -> None:
        self.stage, self.step = stage, step

    def on_train_begin(self, args, state, control, **kwargs):
        if self.step == 0 and os.path.basename(args.output_dir) == self.stage:
            raise Kill

    def on_step_end(self, args, state, control, **kwargs):
        if os.path.basename(args.output_dir) == self.stage and state.global_step == self.step:
            raise Kill


class TestTwoStage:
    @staticmethod
    def run(folder, *callbacks, seed=0, **fields):
        dropout = {"hidden_dropout_prob": 0.1, "exit_norm": "layer_norm"}
        return tiny_trainer(
            folder,
            tiny_model(seed, num_hidden_layers=4, **dropout),
            rows=32,
            trainer={"callbacks": list(callbacks)},
            phases=["heads"],
            heads_objective="two_stage",
            save_strategy="steps",
            save_steps=3,
            weight_decay=0.1,
            **fields,
        )

    @pytest.fixture(scope="class")
    @classmethod
    def whole(cls, tmp_path_factory):
        watch = Watch()
        trainer = cls.run(tmp_path_factory.mktemp("whole"), watch)
        assert list(trainer.train().phases) == ["heads-backbone", "heads"]
        return watch.seen

    def test_what_learns(self, whole):
        first, second = whole["heads-backbone"], whole["heads"]
        assert len(first) == len(second) == 5 and not changed(first[-1], second[0])
        names = changed(first[0], first[-1])
        # The last exit has a norm of its own.
        internal = [name for name in first[0] if "exit_heads" in name or "exit_norms" in name]
        internal = [name for name in internal if "exit_norms.norms.layer_4" not in name]
        assert not names & set(internal) and not any("exit_policies" in name for name in names)
        assert {"classifier.weight", "exit_norms.norms.layer_4.weight", "bert.pooler.dense.weight"} <= names
        assert changed(second[0], second[-1]) == set(internal), "all else is bit-identical"

    @pytest.mark.parametrize("stage,step", [("heads-backbone", 4), ("heads", 0), ("heads", 4)])
    def test_killed(self, tmp_path, whole, stage, step):
        with pytest.raises(Kill):
            self.run(tmp_path, KillAt(stage, step)).train()
        watch = Watch()
        resumed = self.run(tmp_path, watch, seed=7)
        resumed.train(resume_from_checkpoint=True)
        assert not changed(whole["heads"][-1], weights(resumed.model))
        assert set(watch.seen) == ({"heads"} if stage == "heads" else {"heads-backbone", "heads"})
        assert len(watch.seen[stage]) == (2 if step else 5), "goes on from the checkpoint"

    def test_alone(self, tmp_path):
        watch = Watch()
        trainer = self.run(tmp_path, watch)
        trainer.train_heads()
        assert list(watch.seen) == ["heads-backbone", "heads"]
        for stage, left in (("heads-backbone", {"heads-backbone", "heads"}), ("heads", {"heads"})):
            again = Watch()
            folder = os.path.join(tmp_path, "phases", stage, "checkpoint-3")
            self.run(tmp_path, again, seed=7).train_heads(folder)
            assert set(again.seen) == left and len(again.seen[stage]) == 2

    def test_nothing_to_train(self, tmp_path):
        started = []
        model = tiny_llama(exit_head="shared")
        model.model.register_forward_hook(lambda *_: started.append(1))
        trainer = tiny_text_trainer(tmp_path, model, phases=["heads"], heads_objective="two_stage")
        with pytest.raises(ValueError, match=r"two_stage.*second stage.*shared"):
            trainer.train()
        assert not started and not os.path.exists(tmp_path / "phases")


# Errors


@pytest.mark.parametrize(
    "name,options,message",
    [
        ("first", None, r"heads_objective.*first.*layer_weighted"),
        ("cosee", {"gamma": 1.0}, r"heads_objective_options.*gamma.*samples, beta, separation, margin"),
        ("cosee", {"_range": 1.0}, r"heads_objective_options.*_range"),
        ("cosee", {"samples": 0}, r"cosee.*samples.*0.*at least 1"),
        ("cosee", {"samples": 1.5}, r"cosee.*samples.*1\.5"),
        ("cosee", {"beta": -1.0}, r"cosee.*beta.*-1\.0"),
        ("uniform", {"beta": 1.0}, r"beta.*uniform.*none"),
        ("two_stage", {"stage": 1.0}, r"stage.*two_stage"),
        ("variational", {"prior_rate": 1.0}, r"prior_rate.*1\.0.*\(0, 1\)"),
        ("variational", {"beta": "much"}, r"beta.*number.*much"),
        ("self_distillation", {"weight": 1.5}, r"weight.*1\.5"),
        ("self_distillation", {"temperature": 0.0}, r"temperature.*0\.0"),
    ],
)
def test_wrong_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_heads_objective(name, options)


def test_wrong_stage():
    with pytest.raises(ValueError, match=r"stage.*middle.*heads-backbone, heads"):
        make_heads_objective("two_stage", stage="middle")


@pytest.mark.parametrize("name", ["cosee", "self_distillation"])
def test_not_for_decoders(tmp_path, name):
    with pytest.raises(ValueError, match=rf"heads_objective.*{name}.*decoder.*variational"):
        tiny_text_trainer(tmp_path, heads_objective=name)


@pytest.mark.parametrize("fields", [{"num_labels": 1}, {"problem_type": "regression"}])
def test_no_classes(tmp_path, fields):
    with pytest.raises(ValueError, match=r"heads_objective.*cosee.*regression.*self_distillation"):
        tiny_trainer(tmp_path, tiny_model(num_hidden_layers=4, **fields), heads_objective="cosee")


def test_options_reach_the_objective(tmp_path):
    options = {"weight": 0.25, "temperature": 3}
    trainer = tiny_trainer(tmp_path, heads_objective="self_distillation", heads_objective_options=options)
    assert trainer.args.make_heads_objective() == SelfDistillation(0.25, 3)
    assert trainer.args.make_heads_objective() is not trainer.args.make_heads_objective(), "one object per run"


def test_every_objective_is_documented():
    for cls in HEADS_OBJECTIVES.values():
        assert cls.__doc__ and cls.__doc__ != heads_objectives.HeadsObjective.__doc__


@pytest.mark.parametrize("make", [tiny_trainer, tiny_text_trainer])
def test_the_second_stage_is_judged_by_what_it_can_change(tmp_path, make):
    """Full depth is frozen: by it, the first epoch would stay the best one and early stopping would stop."""
    trainer = make(
        tmp_path,
        rows=16,
        phases=["heads"],
        heads_objective="two_stage",
        num_train_epochs=4,
        exit_learning_rate=1e-2,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        trainer={"callbacks": [EarlyStoppingCallback(1)]},
    )
    trainer.train()
    found = [one for one in trainer.state.log_history if one["phase"] == "heads" and "eval_loss" in one]
    assert len(found) == 4 and len({one["eval_loss"] for one in found}) == 1
    losses = [one["eval_exit_loss"] for one in found]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    assert trainer.state.best_metric == losses[-1]
    store = trainer.collect_exits(trainer.eval_dataset)
    assert losses[-1] == pytest.approx(float(make_heads_objective("two_stage").summary(store.losses)), rel=1e-4)
