# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""`BertForConsistentEE` against a row-by-row reference, and what it computes and what it does not."""

from __future__ import annotations

import functools
import itertools

import pytest
import reference
import torch
from counters import HostSynchronisations, layer_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import scripted
from tiny import VOCABULARY, pad, random_rows, tiny_model
from torch.nn import functional as F

from transformers_cee import BertForConsistentEE, ExitClassifierOutput
from transformers_cee.exits.criteria import build_criterion
from transformers_cee.exits.runner import run_exits


TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}
CRITERIA = ("policy", "max_probability", "entropy", "patience")
NEVER = {"policy": 1.0, "max_probability": 1.0, "entropy": 0.0, "patience": 99}


def walks_of(model, rows, criterion, threshold, **options):
    return [
        reference.walk(model, row["input_ids"], criterion, threshold, row["token_type_ids"], **options) for row in rows
    ]


def check_against(walks, output, layers, criterion="policy", rows=None):
    """Every row of the output against its own walk; `rows` restricts to some."""
    assert isinstance(output, ExitClassifierOutput)
    assert output.exit_layers.dtype == torch.int64
    for row in range(len(walks)) if rows is None else rows:
        walk = walks[row]
        assert int(output.exit_layers[row]) == walk.exit_layer, f"row {row}"
        torch.testing.assert_close(output.logits[row], walk.logits, **TOLERANCE)
        probabilities = output.exit_probabilities[row]
        assert probabilities.shape == (len(layers),)
        asked = len(walk.scores)
        torch.testing.assert_close(probabilities[:asked], torch.tensor(walk.scores), **TOLERANCE)
        assert probabilities[asked:].isnan().all(), f"row {row} was asked behind its exit"


def ids(batch):
    """What is embedded of a batch, without token types."""
    return {"input_ids": batch["input_ids"], **dict.fromkeys(("token_type_ids", "position_ids", "inputs_embeds"))}


@torch.no_grad()
def check(model, rows, criterion, threshold, side="right", extra=0, spread=3, **options):
    walks = walks_of(model, rows, criterion, threshold, **options)
    taken = {walk.exit_layer for walk in walks}
    assert len(taken) >= spread, f"rows leave at {taken} only: the test would not see compaction"
    assert min(walk.slack for walk in walks) > 1e-4, "a decision is too close for float32"
    output = model(**pad(rows, side, extra), exit_criterion=criterion, exit_threshold=threshold)
    check_against(walks, output, reference.exit_layers(model.config), criterion)


class TestAgainstReference:
    @pytest.mark.parametrize("pooling", ["cls", "mean"])
    @pytest.mark.parametrize("norm", ["none", "layer_norm"])
    @pytest.mark.parametrize("inputs", ["state", "confidence", "both"])
    def test_policy(self, inputs, norm, pooling):
        model = tiny_model(policy_inputs=inputs, exit_norm=norm, exit_pooling=pooling)
        rows = random_rows(14, seed=3, pairs=True)
        check(model, rows, "policy", reference.spreading_thresholds(model, rows, "policy"))

    @pytest.mark.parametrize("pooling", ["cls", "mean"])
    @pytest.mark.parametrize("criterion", ["max_probability", "entropy"])
    def test_confidence_baselines(self, criterion, pooling):
        model = tiny_model(exit_pooling=pooling)
        rows = random_rows(14, seed=4)
        check(model, rows, criterion, reference.spreading_thresholds(model, rows, criterion))

    @pytest.mark.parametrize("pooling", ["cls", "mean"])
    @pytest.mark.parametrize("threshold", [1, [9, 2, 1, 1, 2, 1]])
    def test_patience(self, threshold, pooling):
        model = tiny_model(seed=3, exit_pooling=pooling, exit_norm="layer_norm", num_labels=2)
        check(model, random_rows(20, seed=7), "patience", threshold)

    @pytest.mark.parametrize("side,extra", [("right", 0), ("right", 3), ("left", 0), ("left", 3)])
    @pytest.mark.parametrize("pooling", ["cls", "mean"])
    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    def test_padding_and_attention(self, implementation, pooling, side, extra):
        model = tiny_model(exit_pooling=pooling, policy_inputs="both", attn_implementation=implementation)
        assert model.config._attn_implementation == implementation
        rows = random_rows(10, seed=6, pairs=True)
        check(model, rows, "policy", reference.spreading_thresholds(model, rows, "policy"), side, extra)

    @pytest.mark.parametrize(
        "exit_layers,expected", [([2, 4, 5], [2, 4, 5, 6]), (2, [2, 4, 6]), (4, [2, 6]), (1, [1, 2, 3, 4, 5, 6])]
    )
    def test_exit_layers(self, exit_layers, expected):
        model = tiny_model(exit_layers=exit_layers, policy_inputs="both")
        assert model.config.exit_layer_numbers == expected == reference.exit_layers(model.config)
        rows = random_rows(12, seed=7)
        thresholds = reference.spreading_thresholds(model, rows, "policy")
        check(model, rows, "policy", thresholds, spread=min(3, len(expected)))

    @torch.no_grad()
    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    @pytest.mark.parametrize("pooling", ["cls", "mean"])
    def test_without_a_mask(self, pooling, implementation):
        model = tiny_model(exit_pooling=pooling, attn_implementation=implementation)
        rows = random_rows(12, seed=8, shortest=9, longest=9)
        thresholds = reference.spreading_thresholds(model, rows, "policy")
        walks = walks_of(model, rows, "policy", thresholds)
        assert len({walk.exit_layer for walk in walks}) >= 3
        ids = pad(rows)["input_ids"]
        check_against(walks, model(ids, exit_threshold=thresholds), range(6))
        embedded = model.bert.embeddings.word_embeddings(ids)
        check_against(walks, model(inputs_embeds=embedded, exit_threshold=thresholds), range(6))
        full_mask = model(ids, attention_mask=torch.ones_like(ids), exit_threshold=thresholds)
        check_against(walks, full_mask, range(6))

    @pytest.mark.parametrize("criterion", CRITERIA)
    def test_multi_label(self, criterion):
        model = tiny_model(problem_type="multi_label_classification", policy_inputs="both", num_labels=2)
        rows = random_rows(20, seed=9)
        options = {"problem_type": "multi_label_classification"}
        thresholds = (
            1 if criterion == "patience" else reference.spreading_thresholds(model, rows, criterion, **options)
        )
        check(model, rows, criterion, thresholds, **options)

    def test_regression_leaves_by_policy(self):
        model = tiny_model(num_labels=1)
        rows = random_rows(12, seed=10)
        thresholds = reference.spreading_thresholds(model, rows, "policy", problem_type="regression")
        check(model, rows, "policy", thresholds, problem_type="regression")

    @pytest.mark.parametrize(
        "inputs,criterion",
        [("state", "max_probability"), ("state", "entropy"), ("state", "energy"), ("both", "policy")],
    )
    def test_regression_has_no_confidence(self, inputs, criterion):
        model = tiny_model(num_labels=1, policy_inputs=inputs)
        with layer_inputs(model) as seen, pytest.raises(ValueError, match=r"regression.*state"):
            model(**pad(random_rows(2, 0)), exit_criterion=criterion, exit_threshold=1.0)
        assert not seen

    @torch.no_grad()
    def test_all_exits(self):
        model = tiny_model(exit_layers=[2, 3, 5], exit_norm="layer_norm", exit_pooling="mean")
        rows = random_rows(6, seed=11)
        walks = walks_of(model, rows, "policy", 1.0)
        output = model(**pad(rows), exit_threshold=0.0, output_all_exits=True)
        expected = torch.stack([torch.stack(walk.all_logits) for walk in walks])
        torch.testing.assert_close(output.all_exit_logits, expected, **TOLERANCE)
        expected = torch.stack([torch.stack(walk.all_states) for walk in walks])
        torch.testing.assert_close(output.all_exit_states, expected, **TOLERANCE)
        assert torch.equal(output.logits, output.all_exit_logits[:, -1])
        assert output.exit_layers.tolist() == [6] * 6
        assert output.exit_probabilities.isnan().all()

    @torch.no_grad()
    def test_config_gives_the_defaults(self):
        model = tiny_model(exit_criterion="entropy")
        rows = random_rows(12, seed=12)
        model.config.exit_threshold = reference.spreading_thresholds(model, rows, "entropy")
        check_against(walks_of(model, rows, "entropy", model.config.exit_threshold), model(**pad(rows)), range(6))

    @torch.no_grad()
    def test_return_dict_false(self):
        model = tiny_model()
        batch = pad(random_rows(3, seed=1))
        output = model(**batch)
        plain = model(**batch, return_dict=False)
        assert isinstance(plain, tuple)
        for left, right in zip(plain, output.to_tuple(), strict=True):
            torch.testing.assert_close(left, right, equal_nan=True)


class TestProperties:
    """Random rows, holes in masks, thresholds per exit."""

    @staticmethod
    @functools.cache
    def model(pooling, inputs):
        return tiny_model(exit_pooling=pooling, policy_inputs=inputs, num_hidden_layers=4)

    @settings(max_examples=80)
    @given(
        data=st.data(),
        masks=st.integers(1, 8).flatmap(
            lambda time: st.lists(
                st.lists(st.booleans(), min_size=time, max_size=time).filter(any), min_size=1, max_size=6
            )
        ),
        pooling=st.sampled_from(["cls", "mean"]),
        criterion=st.sampled_from(CRITERIA),
        inputs=st.sampled_from(["state", "both"]),
        seed=st.integers(0, 1000),
    )
    @torch.no_grad()
    def test_any_mask_and_threshold(self, data, masks, pooling, criterion, inputs, seed):
        model = self.model(pooling, inputs)
        number = st.integers(1, 5) if criterion == "patience" else st.floats(0, 1) | st.sampled_from([0.0, 1.0])
        threshold = data.draw(number | st.lists(number, min_size=4, max_size=4))
        mask = torch.tensor(masks)
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, VOCABULARY, mask.shape, generator=generator)
        kind = data.draw(st.sampled_from([torch.long, torch.bool, torch.float32]))
        output = model(ids, attention_mask=mask.to(kind), exit_criterion=criterion, exit_threshold=threshold)
        thresholds = threshold if isinstance(threshold, list) else [threshold] * 4
        off = {
            "policy": min(thresholds[:3]) >= 1,
            "max_probability": min(thresholds[:3]) >= 1,
            "entropy": max(thresholds[:3]) <= 0,
            "patience": all(t > i for i, t in enumerate(thresholds[:3])),
        }[criterion]
        clear = 0
        for row in range(len(mask)):
            columns = mask[row].nonzero().squeeze(1)
            positions = columns - columns[0]
            walk = reference.walk(model, ids[row, columns], criterion, threshold, positions=positions)
            if walk.slack < 1e-5 and thresholds != [0.0] * 4:
                continue
            clear += 1
            assert int(output.exit_layers[row]) == walk.exit_layer
            torch.testing.assert_close(output.logits[row], walk.logits, rtol=1e-3, atol=5e-5)
            asked = 0 if off else len(walk.scores)
            torch.testing.assert_close(
                output.exit_probabilities[row, :asked], torch.tensor(walk.scores[:asked]), rtol=1e-3, atol=5e-5
            )
            assert output.exit_probabilities[row, asked:].isnan().all()

    @settings(max_examples=20)
    @given(bias=st.floats(-1e6, 1e6), rows=st.integers(1, 5), seed=st.integers(0, 99))
    @torch.no_grad()
    def test_zero_leaves_at_the_first_exit_and_one_never(self, bias, rows, seed):
        """Also where the policy is so sure that float32 has no number for it."""
        model = self.model("cls", "state")
        before = [network[-1].bias.clone() for network in model.exit_policies.networks]
        try:
            for network in model.exit_policies.networks:
                network[-1].bias.fill_(bias)
            batch = pad(random_rows(rows, seed))
            assert model(**batch, exit_threshold=0.0).exit_layers.tolist() == [1] * rows
            assert model(**batch, exit_threshold=1.0).exit_layers.tolist() == [4] * rows
            mixed = model(**batch, exit_threshold=[1.0, 0.0, 1.0, 1.0])
            assert mixed.exit_layers.tolist() == [2] * rows
            assert not mixed.exit_probabilities[:, :2].isnan().any()
        finally:
            for network, value in zip(model.exit_policies.networks, before, strict=True):
                network[-1].bias.copy_(value)

    @torch.no_grad()
    @pytest.mark.parametrize("criterion,first,never", [("max_probability", 0.0, 1.0), ("entropy", 1.0, 0.0)])
    def test_extremes_of_the_baselines(self, criterion, first, never):
        model = tiny_model()
        batch = pad(random_rows(5, seed=1))
        assert model(**batch, exit_criterion=criterion, exit_threshold=first).exit_layers.tolist() == [1] * 5
        assert model(**batch, exit_criterion=criterion, exit_threshold=never).exit_layers.tolist() == [6] * 5

    @torch.no_grad()
    def test_the_comparison_is_strict(self):
        model = tiny_model()
        batch = pad(random_rows(4, seed=1))
        score = float(model(**batch, exit_threshold=0.999999).exit_probabilities[0, 0])
        assert 0 < score < 1
        assert int(model(**batch, exit_threshold=[score, 1.0, 1.0, 1.0, 1.0, 1.0]).exit_layers[0]) == 6
        below = float(torch.nextafter(torch.tensor(score), torch.tensor(0.0)))
        assert int(model(**batch, exit_threshold=[below, 1.0, 1.0, 1.0, 1.0, 1.0]).exit_layers[0]) == 1

    @torch.no_grad()
    def test_one_exit_only(self):
        model = tiny_model(exit_layers=[6])
        rows = random_rows(3, seed=2)
        check_against(walks_of(model, rows, "policy", 0.0), model(**pad(rows), exit_threshold=0.0), range(1))


class TestWhatIsComputed:
    @torch.no_grad()
    @pytest.mark.parametrize("criterion", CRITERIA)
    def test_rows_that_left_are_gone(self, criterion):
        model = tiny_model(num_labels=2)
        rows = random_rows(16, seed=5)
        threshold = 1 if criterion == "patience" else reference.spreading_thresholds(model, rows, criterion)
        layers = [walk.exit_layer for walk in walks_of(model, rows, criterion, threshold)]
        assert len(set(layers)) >= 3
        with layer_inputs(model) as seen:
            model(**pad(rows), exit_criterion=criterion, exit_threshold=threshold)
        expected = [(number, sum(layer >= number for layer in layers)) for number in range(1, max(layers) + 1)]
        assert [(number, count) for number, count, _ in seen] == expected

    @torch.no_grad()
    def test_saved_layers_do_not_run(self):
        model = tiny_model()
        with layer_inputs(model) as seen:
            model(**pad(random_rows(4, seed=1)), exit_threshold=[1.0, 0.0, 0.5, 0.5, 0.5, 0.5])
        assert [number for number, _, _ in seen] == [1, 2]

    @torch.no_grad()
    @pytest.mark.parametrize("side", ["right", "left"])
    @pytest.mark.parametrize("pooling", ["cls", "mean"])
    def test_padding_is_trimmed(self, pooling, side):
        """Once a row has left, a layer's input is as wide as the longest row that remains."""
        model = tiny_model(exit_pooling=pooling)
        lengths, exits = [12, 12, 9, 9, 5, 3], [0, 2, 1, 2, 4, 5]
        rows = [random_rows(1, seed, length, length)[0] for seed, length in enumerate(lengths)]
        with scripted(exits) as criterion, layer_inputs(model) as seen:
            output = model(**pad(rows, side, extra=2), exit_criterion=criterion, exit_threshold=0.5)
        assert output.exit_layers.tolist() == [exit + 1 for exit in exits]
        assert seen == [(1, 6, 14), (2, 5, 12), (3, 4, 12), (4, 2, 5), (5, 2, 5), (6, 1, 3)]
        for row, walk in enumerate(walks_of(model, rows, "policy", 1.0)):
            torch.testing.assert_close(output.logits[row], walk.all_logits[exits[row]], **TOLERANCE)

    @torch.no_grad()
    @pytest.mark.parametrize("side", ["right", "left"])
    @pytest.mark.parametrize("pooling", ["cls", "mean"])
    def test_masks_vanish_with_the_last_padding(self, pooling, side):
        model = tiny_model(exit_pooling=pooling)
        masks = []
        for layer in model.bert.encoder.layer:
            layer.register_forward_pre_hook(lambda _, inputs: masks.append(inputs[1]))
        rows = [random_rows(1, seed, length, length)[0] for seed, length in enumerate([9, 4, 4, 7])]
        with scripted([1, 5, 3, 0]) as criterion:
            output = model(**pad(rows, side), exit_criterion=criterion, exit_threshold=0.5)
        assert [mask is None for mask in masks] == [False, False, True, True, True, True]
        for row, walk in enumerate(walks_of(model, rows, "policy", 1.0)):
            torch.testing.assert_close(output.logits[row], walk.all_logits[[1, 5, 3, 0][row]], **TOLERANCE)

    @torch.no_grad()
    @pytest.mark.parametrize("side,masked", [("right", True), ("left", True), ("right", False)])
    @pytest.mark.parametrize("criterion", CRITERIA)
    def test_one_synchronisation_per_exit(self, criterion, side, masked):
        model = tiny_model(seed=1, num_labels=2, policy_inputs="both")
        rows = random_rows(16, seed=5, shortest=2 if masked else 8, longest=12 if masked else 8)
        threshold = 1 if criterion == "patience" else reference.spreading_thresholds(model, rows, criterion)
        walks = walks_of(model, rows, criterion, threshold)
        assert len({walk.exit_layer for walk in walks}) >= 3
        batch = pad(rows, side)
        embedded = model.embed(batch["attention_mask"] if masked else None, **ids(batch))
        layers = [
            lambda batch, layer=layer: layer(batch.hidden_states, batch.attention_mask)
            for layer in model.bert.encoder.layer
        ]
        walk = build_criterion(criterion, threshold, 6, "single_label_classification", model.exit_policies)
        with HostSynchronisations() as waits:
            run = run_exits(embedded, layers, model, walk)
        assert run.exit_layers.tolist() == [walk.exit_layer for walk in walks]
        # Patience cannot let a row out at the first exit and does not look.
        visited = min(5, max(walk.exit_layer for walk in walks))
        assert len(waits) == visited - (criterion == "patience"), waits.calls

    @torch.no_grad()
    @pytest.mark.parametrize("criterion", CRITERIA)
    def test_exits_off_look_at_nothing(self, criterion):
        """No synchronisation, no internal head, no policy."""
        model = tiny_model()
        called = []
        for part in (model.exit_heads, model.exit_policies):
            for module in part.modules():
                if isinstance(module, torch.nn.Linear):
                    module.register_forward_hook(lambda *_: called.append(1))
        batch = pad(random_rows(6, seed=5))
        embedded = model.embed(batch["attention_mask"], **ids(batch))
        layers = [
            lambda batch, layer=layer: layer(batch.hidden_states, batch.attention_mask)
            for layer in model.bert.encoder.layer
        ]
        off = 6 if criterion == "patience" else NEVER[criterion]
        walk = build_criterion(criterion, off, 6, "single_label_classification", model.exit_policies)
        assert walk.is_off
        with HostSynchronisations() as waits:
            run = run_exits(embedded, layers, model, walk)
        assert not waits.calls and not called
        model(**batch, exit_threshold=0.999)
        assert called, "the hooks would have seen it"
        assert run.exit_layers.tolist() == [6] * 6 and run.scores.isnan().all()

    def test_the_counter_counts(self):
        """The counter of synchronisations sees each kind of wait, and what happens on the host is free."""
        values, flags = torch.arange(4), torch.tensor([True, False, True, False])
        for wait in (
            lambda: bool(flags[0]),
            lambda: flags.any().item(),
            lambda: flags.nonzero(),
            lambda: values[flags],
            lambda: values.tolist(),
            lambda: int(values[1]),
            lambda: values.max().cpu(),
            lambda: torch.where(flags),
        ):
            with HostSynchronisations() as waits:
                wait()
            assert len(waits.calls) == 1
        with HostSynchronisations() as waits:
            host = flags.cpu()
            assert bool(host.any()) and host.nonzero().squeeze(1).tolist() == [0, 2]
            values.index_select(0, host.nonzero().squeeze(1).to("cpu"))
        assert waits.calls == ["cpu"]


class TestLosses:
    def labels(self, kind, rows, num_labels):
        generator = torch.Generator().manual_seed(0)
        if kind == "single_label_classification":
            return torch.randint(0, num_labels, (rows,), generator=generator)
        if kind == "multi_label_classification":
            return torch.randint(0, 2, (rows, num_labels), generator=generator).float()
        values = torch.randn(rows, num_labels, generator=generator)
        return values.squeeze(1) if num_labels == 1 else values

    def expected(self, logits, labels, kind):
        if kind == "single_label_classification":
            return F.cross_entropy(logits, labels)
        if kind == "multi_label_classification":
            return F.binary_cross_entropy_with_logits(logits, labels)
        return F.mse_loss(logits, labels.reshape(logits.shape))

    CASES = (
        ("single_label_classification", 3),
        ("single_label_classification", 2),
        ("multi_label_classification", 4),
        ("regression", 1),
        ("regression", 2),
    )

    @pytest.mark.parametrize("kind,num_labels", CASES)
    @pytest.mark.parametrize("named", [True, False])
    def test_evaluation_takes_the_exits_taken(self, kind, num_labels, named):
        # Several values need a name: without one they are taken for indicators of labels.
        named = named or (kind, num_labels) == ("regression", 2)
        model = tiny_model(num_labels=num_labels, problem_type=kind if named else None)
        rows = random_rows(8, seed=1)
        thresholds = reference.spreading_thresholds(model, rows, "policy", problem_type=kind)
        labels = self.labels(kind, 8, num_labels)
        output = model(**pad(rows), labels=labels, exit_threshold=thresholds)
        walks = walks_of(model, rows, "policy", thresholds, problem_type=kind)
        assert len({walk.exit_layer for walk in walks}) >= 3
        expected = self.expected(torch.stack([walk.logits for walk in walks]), labels, kind)
        torch.testing.assert_close(output.loss, expected, **TOLERANCE)

    @pytest.mark.parametrize("kind,num_labels", CASES)
    def test_training_weighs_all_exits(self, kind, num_labels):
        model = tiny_model(num_labels=num_labels, problem_type=kind, exit_layers=[1, 3, 4]).train()
        rows = random_rows(8, seed=1)
        labels = self.labels(kind, 8, num_labels)
        output = model(**pad(rows), labels=labels)
        walks = walks_of(model, rows, "policy", 1.0, problem_type=kind)
        losses = [self.expected(torch.stack([w.all_logits[i] for w in walks]), labels, kind) for i in range(4)]
        torch.testing.assert_close(
            output.loss, (losses[0] + 2 * losses[1] + 3 * losses[2] + 4 * losses[3]) / 10, **TOLERANCE
        )
        assert output.exit_layers.tolist() == [6] * 8
        assert output.all_exit_logits is None


class TestGradients:
    def test_backward_through_early_exits(self):
        """Gradients are those of the row-by-row loss, and reach only what was used."""
        rows = random_rows(10, seed=3)
        labels = torch.arange(10) % 3
        model, twin = tiny_model(), tiny_model()
        thresholds = reference.spreading_thresholds(model, rows, "policy")
        thresholds[3] = 0.0  # everybody has left at layer 4
        walks = walks_of(twin, rows, "policy", thresholds)
        assert {1, 2, 4} <= {walk.exit_layer for walk in walks} and max(walk.exit_layer for walk in walks) == 4
        model(**pad(rows), labels=labels, exit_threshold=thresholds).loss.backward()
        F.cross_entropy(torch.stack([walk.logits for walk in walks]), labels).backward()
        used = 0
        for (name, parameter), (_, expected) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
            if any(f"layer.{dead}." in name or f"heads.{dead}." in name for dead in (4, 5)) or "policies" in name:
                assert parameter.grad is None, name
            if expected.grad is not None:
                used += 1
                torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-3, atol=1e-5, msg=name)
        assert used > 50

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("reentrant", [True, False])
    def test_gradient_checkpointing(self, training, reentrant):
        rows = random_rows(8, seed=3)
        plain, saving = tiny_model(), tiny_model()
        # `gradient_checkpointing_enable` is its name in older versions of transformers.
        enable = getattr(saving, "activation_checkpointing_enable", None) or saving.gradient_checkpointing_enable
        enable({"use_reentrant": reentrant})
        if reentrant:
            saving.enable_input_require_grads()
        thresholds = reference.spreading_thresholds(plain, rows, "policy")
        calls = {}
        for name, model in (("plain", plain), ("saving", saving)):
            # Checkpointing acts in training mode only; rows leave early there, too, where they are asked to.
            model.train()
            calls[name] = []
            query = model.bert.encoder.layer[0].attention.self.query
            query.register_forward_hook(lambda *_, name=name: calls[name].append(1))
            if training:
                model(**pad(rows), labels=torch.arange(8) % 3).loss.backward()
            else:
                output = model(**pad(rows), exit_threshold=thresholds)
                assert len(set(output.exit_layers.tolist())) >= 3
                F.cross_entropy(output.logits, torch.arange(8) % 3).backward()
        assert (len(calls["plain"]), len(calls["saving"])) == (1, 2), "the layer must be computed again"
        for (name, left), (_, right) in zip(plain.named_parameters(), saving.named_parameters(), strict=True):
            assert (left.grad is None) == (right.grad is None), name
            if left.grad is not None:
                torch.testing.assert_close(left.grad, right.grad, rtol=1e-5, atol=1e-7, msg=name)


class TestPrecision:
    @torch.no_grad()
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("pooling", ["cls", "mean"])
    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    def test_half_precision(self, dtype, pooling, implementation):
        model = tiny_model(exit_pooling=pooling, policy_inputs="both", attn_implementation=implementation)
        batch = pad(random_rows(8, seed=1))
        full = model(**batch, exit_threshold=1.0, output_all_exits=True)
        model = model.to(dtype)
        for criterion, threshold in (("policy", 0.5), ("entropy", 0.6), ("max_probability", 0.7), ("patience", 1)):
            output = model(**batch, exit_criterion=criterion, exit_threshold=threshold)
            assert output.logits.dtype == dtype and output.logits.isfinite().all()
            assert output.exit_probabilities.dtype == torch.float32
        close = model(**batch, output_all_exits=True).all_exit_logits.float()
        # bfloat16 keeps 8 bits: the states of 6 layers agree to a few per cent of the logits' size.
        assert float((close - full.all_exit_logits).abs().mean() / full.all_exit_logits.abs().mean()) < 0.1

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast(self, dtype):
        model = tiny_model(policy_inputs="both", exit_norm="layer_norm").train()
        with torch.autocast("cpu", dtype=dtype):
            output = model(**pad(random_rows(8, seed=1)), labels=torch.arange(8) % 3)
            early = model(**pad(random_rows(8, seed=1)), exit_threshold=0.5)
        assert output.loss.dtype == torch.float32 and output.loss.isfinite()
        assert early.logits.isfinite().all()
        output.loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


IDS = torch.randint(3, VOCABULARY, (4, 5), generator=torch.Generator().manual_seed(0))
BAD_INPUT = {
    "nothing": ({}, "input_ids"),
    "both": ({"input_ids": IDS, "inputs_embeds": torch.zeros(4, 5, 32)}, "input_ids"),
    "no rows": ({"input_ids": IDS[:0]}, "empty"),
    "no tokens": ({"input_ids": IDS[:, :0]}, "empty"),
    "no batch dimension": ({"input_ids": IDS[0]}, "batch"),
    "mask of another width": ({"input_ids": IDS, "attention_mask": torch.ones(4, 6)}, "attention_mask"),
    "mask of another height": ({"input_ids": IDS, "attention_mask": torch.ones(3, 5)}, "attention_mask"),
    "threshold list too short": ({"input_ids": IDS, "exit_threshold": [0.5] * 5}, "exit_threshold"),
    "threshold list too long": ({"input_ids": IDS, "exit_threshold": [0.5] * 7}, "exit_threshold"),
    "threshold list empty": ({"input_ids": IDS, "exit_threshold": []}, "exit_threshold"),
    "threshold below 0": ({"input_ids": IDS, "exit_threshold": -0.1}, "exit_threshold"),
    "threshold above 1": ({"input_ids": IDS, "exit_threshold": 1.1}, "exit_threshold"),
    "threshold not a number": ({"input_ids": IDS, "exit_threshold": float("nan")}, "exit_threshold"),
    "threshold a word": ({"input_ids": IDS, "exit_threshold": "0.5"}, "exit_threshold"),
    "threshold a bool": ({"input_ids": IDS, "exit_threshold": True}, "exit_threshold"),
    "one of the list": ({"input_ids": IDS, "exit_threshold": [0.5, 0.5, 2.0, 0.5, 0.5, 0.5]}, "exit_threshold"),
    "last of the list": ({"input_ids": IDS, "exit_threshold": [0.5] * 5 + [1.5]}, "exit_threshold"),
    "patience below 1": ({"input_ids": IDS, "exit_criterion": "patience", "exit_threshold": 0.5}, "exit_threshold"),
    "unknown criterion": ({"input_ids": IDS, "exit_criterion": "hope"}, "exit_criterion.*hope.*max_probability"),
    "label too large": ({"input_ids": IDS, "labels": torch.tensor([0, 1, 2, 3])}, "labels.*num_labels"),
    "label negative": ({"input_ids": IDS, "labels": torch.tensor([0, 1, 2, -1])}, "labels.*num_labels"),
    "label -100": ({"input_ids": IDS, "labels": torch.tensor([0, 1, 2, -100])}, "labels"),
    "labels too few": ({"input_ids": IDS, "labels": torch.tensor([0, 1, 2])}, "labels"),
    "labels of many": ({"input_ids": IDS, "labels": torch.zeros(4, 3, dtype=torch.long)}, "labels"),
    "indicators of other width": ({"input_ids": IDS, "labels": torch.zeros(4, 2)}, "labels"),
}


class TestCriteriaToBeFitted:
    @pytest.mark.parametrize("criterion,threshold", [("learning_to_exit", 0.1), ("state_classifier", 0.5)])
    def test_all_exits_need_no_criterion(self, criterion, threshold):
        """What such a criterion is fitted on has to be made before it is fitted."""
        model = tiny_model(exit_criterion=criterion, exit_threshold=threshold)
        batch = pad(random_rows(3, seed=1))
        expected = tiny_model()(**batch, output_all_exits=True).all_exit_logits
        assert torch.equal(model(**batch, output_all_exits=True).all_exit_logits, expected)
        assert model.train()(**batch, labels=torch.tensor([0, 1, 2])).loss.isfinite()
        with pytest.raises(ValueError, match=f"'{criterion}' needs its fitted estimator"):
            model.eval()(**batch)


class TestBadInput:
    @pytest.mark.parametrize("case", BAD_INPUT)
    @pytest.mark.parametrize("training", [True, False])
    def test_raises_before_any_layer(self, case, training):
        inputs, message = BAD_INPUT[case]
        model = tiny_model().train(training)
        embedded = []
        model.bert.embeddings.register_forward_pre_hook(lambda *_: embedded.append(1))
        with layer_inputs(model) as seen, pytest.raises(ValueError, match=message):
            model(**inputs)
        assert not seen and not embedded

    @pytest.mark.parametrize(
        "fields,message",
        [
            ({"exit_pooling": "max"}, "exit_pooling.*max.*cls.*mean"),
            ({"exit_norm": "batch"}, "exit_norm.*batch.*layer_norm"),
            ({"policy_inputs": "all"}, "policy_inputs.*all.*both"),
            ({"policy_hidden_size": 0}, "policy_hidden_size.*0"),
            ({"policy_activation": "jump"}, "policy_activation.*jump.*gelu"),
            ({"reward_alpha": -0.1}, "reward_alpha.*-0.1"),
            ({"exit_layers": 0}, "exit_layers.*0.*1..6"),
            ({"exit_layers": 7}, "exit_layers.*7.*1..6"),
            ({"exit_layers": [0, 2]}, "exit_layers.*0.*1..6"),
            ({"exit_layers": [2, 7]}, "exit_layers.*7.*1..6"),
            ({"exit_threshold": 1.5}, "exit_threshold.*1.5"),
            ({"exit_threshold": [0.5, 0.5]}, "exit_threshold.*2.*6"),
            ({"exit_layers": 2, "exit_threshold": [0.5] * 6}, "exit_threshold.*6.*3"),
            ({"exit_criterion": "hope"}, "exit_criterion.*hope"),
            ({"exit_criterion": "patience"}, "exit_threshold.*0.5.*patience.*at least 1"),
        ],
    )
    def test_config(self, fields, message):
        with pytest.raises(ValueError, match=message):
            tiny_model(**fields)

    def test_unknown_problem_type(self):
        model = tiny_model()
        # Past the config's own check, which newer releases of transformers no longer make on assignment.
        model.config.__dict__["problem_type"] = "guessing"
        with layer_inputs(model) as seen, pytest.raises(ValueError, match=r"problem_type.*guessing.*regression"):
            model(IDS)
        assert not seen


def test_class_declares_what_trainer_and_compile_ask():
    assert BertForConsistentEE.accepts_loss_kwargs is True
    assert BertForConsistentEE._can_compile_fullgraph is False
    ignored = set(tiny_model().config.keys_to_ignore_at_inference)
    fields = set(ExitClassifierOutput.__dataclass_fields__)
    assert ignored < fields and fields - ignored == {"loss", "logits"}


def test_every_row_is_back_at_its_place():
    """The same rows in any order give the same output, row for row."""
    model = tiny_model()
    rows = random_rows(8, seed=3)
    thresholds = reference.spreading_thresholds(model, rows, "policy")
    with torch.no_grad():
        first = model(**pad(rows), exit_threshold=thresholds)
        for order in itertools.islice(itertools.permutations(range(8)), 1, 5000, 1249):
            other = model(**pad([rows[row] for row in order]), exit_threshold=thresholds)
            assert other.exit_layers.tolist() == [int(first.exit_layers[row]) for row in order]
            torch.testing.assert_close(other.logits, first.logits[list(order)], **TOLERANCE)
