# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Phases that train a decoder itself, against loops over single tokens of unpadded rows."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from text_reference import text_tokens
from text_steps import ROWS, certain, compare, layer_weighted, manual, one_step
from tiny import changed, collate_text, instructions, tiny_llama, tiny_text_trainer, tiny_trainer, weights
from torch.nn import functional as F
from transformers import Trainer

from transformers_cee.training.model_step import log_distribution


KINDS = ("shared", "norm", "low_rank", "untied", "layernorm_linear")
ACCUMULATION = [(8, 1), (4, 2), (2, 4), (3, 3)]


def test_micro_batches_differ():
    """The tests of accumulation would say nothing otherwise."""
    counts = [sum(label != -100 for label in labels) for labels in instructions(ROWS, seed=1)["labels"]]
    assert sum(counts[:4]) != sum(counts[4:]) and len({sum(counts[start : start + 2]) for start in (0, 2, 4, 6)}) > 2


class TestHeads:
    @pytest.mark.parametrize("batch_size,accumulation", ACCUMULATION)
    def test_counts_tokens(self, tmp_path, batch_size, accumulation):
        """The mean over all counted tokens of the step, however rows are spread over micro-batches; neither prompts
        nor padding are in it."""
        model = tiny_llama()
        before, expected = weights(model), manual(model, layer_weighted)
        fields = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        one_step(tmp_path, model, **fields).train_heads()
        compare(model, expected, before)

    @pytest.mark.parametrize("fields", [*({"exit_head": kind} for kind in KINDS), {"exit_layers": [3]}])
    @pytest.mark.parametrize("tied", [False, True])
    def test_kinds_of_exits(self, tmp_path, fields, tied):
        model = tiny_llama(tie_word_embeddings=tied, **fields)
        before, expected = weights(model), manual(model, layer_weighted)
        one_step(tmp_path, model).train_heads()
        compare(model, expected, before)

    @pytest.mark.parametrize("objective", ["uniform", "last"])
    def test_objectives(self, tmp_path, objective):
        model = tiny_llama()
        before = weights(model)
        pick = (lambda losses: losses[-1]) if objective == "last" else (lambda losses: sum(losses) / len(losses))
        expected = manual(model, lambda _, tokens: sum(pick(token.losses) for token in tokens) / len(tokens))
        one_step(tmp_path, model, heads_objective=objective).train_heads()
        compare(model, expected, before)

    @pytest.mark.parametrize("temperature,top_k", [(1.0, 0), (2.0, 0), (1.0, 3)])
    def test_kl(self, tmp_path, temperature, top_k):
        model = tiny_llama()
        before = weights(model)

        def loss(_, tokens):
            total = 0.0
            for token in tokens:
                chosen = token.logits[-1].topk(top_k or 60).indices
                wanted = (token.logits[-1].detach()[chosen] / temperature).softmax(0)
                for index in range(4):
                    ours = (token.logits[index][chosen] / temperature).log_softmax(0)
                    total = total + (index + 1) / 10 * temperature**2 * (wanted * (wanted.log() - ours)).sum()
            return total / len(tokens)

        expected = manual(model, loss)
        options = {"token_loss": "kl", "token_loss_options": {"temperature": temperature, "top_k": top_k}}
        one_step(tmp_path, model, **options).train_heads()
        compare(model, expected, before)

    def test_argmax(self, tmp_path):
        model = tiny_llama()
        before = weights(model)

        def loss(_, tokens):
            total = 0.0
            for token in tokens:
                for index in range(4):
                    logs = token.logits[index].log_softmax(0)
                    entropy = -(logs.exp() * logs).sum()
                    ce = -logs[token.predictions[-1]]
                    total = total + (index + 1) / 10 * (0.9 * ce - 0.1 * entropy)
            return total / len(tokens)

        expected = manual(model, loss)
        one_step(tmp_path, model, token_loss="argmax", token_loss_options={"entropy_weight": 0.1}).train_heads()
        compare(model, expected, before)

    def test_plain_text(self, tmp_path):
        """Rows without labels: all of the text is learnt, padding is not."""
        model = tiny_llama()
        before, rows = weights(model), instructions(ROWS, seed=1, plain=True)
        twin = copy.deepcopy(model)
        layer_weighted(twin, text_tokens(twin, rows)).backward()
        expected = {name: p.detach() - (0 if p.grad is None else 0.1 * p.grad) for name, p in twin.named_parameters()}
        fields = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
        trainer = one_step(tmp_path, model, trainer={"train_dataset": rows}, **fields)
        trainer.train_heads()
        compare(model, expected, before)
        assert len(trainer.compute_hardness()) == sum(len(ids) - 1 for ids in rows["input_ids"])

    def test_padding_does_not_matter(self, tmp_path):
        ends = []
        for extra, identifier in ((0, 7), (5, 30)):

            def collate(rows, extra=extra, identifier=identifier):
                batch = collate_text(rows)
                batch["input_ids"][batch["attention_mask"] == 0] = identifier
                fill = {"input_ids": identifier, "attention_mask": 0, "labels": -100}
                return {name: F.pad(value, (0, extra), value=fill[name]) for name, value in batch.items()}

            model = tiny_llama()
            trainer = one_step(tmp_path / str(extra), model, trainer={"data_collator": collate})
            trainer.train_heads()
            ends.append(weights(model))
        for name, value in ends[0].items():
            torch.testing.assert_close(ends[1][name], value, rtol=0, atol=3e-6)

    def test_a_micro_batch_without_tokens(self, tmp_path):
        """Counts for nothing, and does not spoil the others."""
        rows = list(instructions(ROWS, seed=1))
        empty = [{**row, "labels": [-100] * len(row["labels"])} for row in rows[4:]]
        model = tiny_llama()
        before = weights(model)
        twin = copy.deepcopy(model)
        layer_weighted(twin, text_tokens(twin, rows[:4])).backward()
        expected = {name: p.detach() - (0 if p.grad is None else 0.1 * p.grad) for name, p in twin.named_parameters()}
        data = Dataset.from_list(rows[:4] + empty)
        fields = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "logging_steps": 1}
        trainer = one_step(tmp_path, model, trainer={"train_dataset": data}, logging_strategy="steps", **fields)
        trainer.train_heads()
        compare(model, expected, before)
        logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
        assert logged == pytest.approx(float(layer_weighted(twin, text_tokens(twin, rows[:4])).detach()), rel=1e-4)


class TestConsistent:
    @pytest.mark.parametrize("inputs", ["state", "both"])
    @pytest.mark.parametrize("batch_size,accumulation", [(8, 1), (3, 3)])
    @pytest.mark.parametrize("first_layer", [None, 3])
    def test_expected(self, tmp_path, inputs, batch_size, accumulation, first_layer):
        model = tiny_llama(policy_inputs=inputs, min_exit_layer=first_layer)
        before = weights(model)

        def loss(model, tokens):
            total = 0.0
            for token in tokens:
                shares = token.exit_probabilities(model, first_layer or 1)
                total = total + sum(share * ce for share, ce in zip(shares, token.losses, strict=True))
            return total / len(tokens)

        expected = manual(model, loss)
        fields = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        one_step(tmp_path, model, **fields)._consistent_model(str(tmp_path / "one"), None)
        compare(model, expected, before)

    @pytest.mark.parametrize("first_layer", [None, 2])
    def test_sampled_is_expected_without_copying(self, tmp_path, first_layer):
        """Where tokens that left do not change what others see, many samples are the expectation."""
        ends, start = {}, weights(tiny_llama())
        for objective in ("expected", "sampled"):
            model = tiny_llama(min_exit_layer=first_layer)
            fields = {"consistent_samples": 1000, "consistent_copy_states": False}
            trainer = one_step(tmp_path, model, consistent_objective=objective, **fields)
            trainer._consistent_model(str(tmp_path / objective), None)
            ends[objective] = torch.cat([value.flatten() for value in weights(model).values()])
        moved = ends["expected"] - torch.cat([value.flatten() for value in start.values()])
        assert float((ends["sampled"] - ends["expected"]).norm() / moved.norm()) < 0.1
        assert not torch.equal(*ends.values())

    @pytest.mark.parametrize("copying", [False, True])
    def test_sampled_with_certain_policies(self, tmp_path, copying):
        """Policies that leave nothing to chance: without copying the step is that of the losses at the exits taken;
        with it, the loss is that of evaluation at threshold 0.5, where tokens that left keep their state, too."""
        model = certain(tiny_llama(3))
        before = weights(model)

        def loss(model, tokens):
            shares = [token.exit_probabilities(model) for token in tokens]
            assert min(max(one) for one in shares) > 1 - 1e-9
            taken = [one.index(max(one)) for one in shares]
            assert len(set(taken)) > 2
            return sum(token.losses[index] for token, index in zip(tokens, taken, strict=True)) / len(tokens)

        expected = manual(model, loss)
        fields = {"logging_strategy": "steps", "logging_steps": 1, "eval_exit_thresholds": [0.5]}
        options = {"consistent_objective": "sampled", "consistent_samples": 2, "consistent_copy_states": copying}
        trainer = one_step(tmp_path, model, **fields, **options)
        trainer.evaluate(trainer.train_dataset)
        point = trainer.operating_points["eval"][1]
        trainer._consistent_model(str(tmp_path / "one"), None)
        logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
        if copying:
            assert logged == pytest.approx(point.metrics["loss"], rel=1e-4)
            assert max(float((expected[name] - value).abs().max()) for name, value in weights(model).items()) > 1e-4
        else:
            compare(model, expected, before, atol=1e-5)

    def test_sampled_counts_tokens(self, tmp_path):
        """Where nothing is left to chance, micro-batches of different sizes must agree."""
        ends = []
        for batch_size, accumulation in ((8, 1), (3, 3)):
            model = certain(tiny_llama(3))
            fields = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
            trainer = one_step(tmp_path, model, consistent_objective="sampled", consistent_samples=2, **fields)
            trainer._consistent_model(str(tmp_path / str(batch_size)), None)
            ends.append(weights(model))
        assert changed(weights(certain(tiny_llama(3))), ends[0])
        for name, value in ends[0].items():
            torch.testing.assert_close(ends[1][name], value, rtol=0, atol=3e-6, msg=name)

    @torch.no_grad()
    def test_distribution_lines_up(self):
        """Token by token: exits, probabilities and shifted labels belong together."""
        model = tiny_llama(policy_inputs="both")
        rows = list(instructions(6, seed=4))
        outputs = model(**collate_text(rows), output_all_exits=True)
        distribution = log_distribution(model, outputs, "single_label_classification").exp()
        tokens = text_tokens(model, rows)
        assert len(distribution) == len(tokens)
        for number, token in enumerate(tokens):
            shares = token.exit_probabilities(model)
            assert distribution[number].tolist() == pytest.approx(shares, abs=1e-5)
            assert int(outputs.token_labels[number]) == token.label
            losses = [float(loss) for loss in token.losses]
            assert outputs.all_exit_losses[number].tolist() == pytest.approx(losses, rel=1e-4)

    def test_frozen_exits_that_are_drawn(self, tmp_path):
        """All tokens leave at the last exit, which `trainable="exits"` freezes: nothing to learn, and no error."""
        model = tiny_llama()
        with torch.no_grad():
            for network in model.exit_policies.networks:
                network[-1].weight.zero_()
                network[-1].bias.fill_(-30.0)
        before = weights(model)
        trainer = one_step(tmp_path, model, consistent_objective="sampled", trainable="exits")
        trainer._consistent_model(str(tmp_path / "one"), None)
        assert not changed(before, model.state_dict())


class TestArguments:
    def test_for_decoders_only(self, tmp_path):
        for fields in ({"token_loss": "kl"}, {"policy_max_tokens": 10}):
            with pytest.raises(ValueError, match=rf"{next(iter(fields))}.*decoders.*BertForConsistentEE"):
                tiny_trainer(tmp_path, **fields)

    def test_logits_are_not_collected(self, tmp_path):
        options = {"preprocess_logits_for_metrics": lambda logits, labels: logits}
        with pytest.raises(ValueError, match=r"preprocess_logits_for_metrics"):
            tiny_text_trainer(tmp_path, trainer=options)

    def test_stock_trainer(self, tmp_path):
        """The plain Trainer of transformers trains the model as well, all exits at once, counting the same tokens."""
        ends = []
        for trained_by in (Trainer, None):
            model = tiny_llama()
            trainer = one_step(tmp_path / str(trained_by), model, per_device_train_batch_size=4)
            trainer.args.gradient_accumulation_steps = 2
            if trained_by is not None:
                options = {"train_dataset": instructions(ROWS, seed=1), "data_collator": collate_text}
                trained_by(model, trainer.args, **options).train()
            else:
                trainer.train_heads()
            ends.append(weights(model))
        for name, value in ends[0].items():
            torch.testing.assert_close(ends[1][name], value, rtol=0, atol=3e-6, msg=name)
