# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The registry, thresholds and the special cases of each criterion."""

from __future__ import annotations

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from scripted import scripted
from tiny import pad, random_rows, tiny_model

from transformers_cee.exits.criteria import CRITERIA, ExitStep, build_criterion, check_thresholds


def step(index: int, logits: list) -> ExitStep:
    tensor = torch.tensor(logits, dtype=torch.float32)
    return ExitStep(index, torch.zeros(len(tensor), 2), lambda _: tensor)


class TestRegistry:
    def test_names(self):
        assert sorted(CRITERIA) == [
            "calibrated_probability",
            "consistency",
            "divergence_patience",
            "energy",
            "entropy",
            "entropy_patience",
            "exit_cdf",
            "learning_to_exit",
            "margin",
            "max_probability",
            "oracle",
            "patience",
            "policy",
            "state_classifier",
            "state_similarity",
            "token_hash",
        ]
        assert all(cls.name == name for name, cls in CRITERIA.items())

    @pytest.mark.parametrize("call", [check_thresholds, lambda *args: build_criterion(*args, "regression")])
    def test_unknown_name(self, call):
        with pytest.raises(ValueError, match=r"`exit_criterion`='hope'.*energy, entropy,.*patience, policy"):
            call("hope", 0.5, 3)

    @torch.no_grad()
    def test_ones_own(self):
        model = tiny_model()
        with scripted([2, 0, 4]) as name:
            output = model(**pad(random_rows(3, seed=1)), exit_criterion=name, exit_threshold=0.5)
        assert output.exit_layers.tolist() == [3, 1, 5]
        with pytest.raises(ValueError, match=r"scripted"):
            model(**pad(random_rows(3, seed=1)), exit_criterion=name)

    def test_who_needs_logits(self):
        """Only a policy that looks at states does without, so a rule of one's own may ask."""
        for inputs in ("state", "confidence", "both"):
            policies = tiny_model(policy_inputs=inputs).exit_policies
            criterion = build_criterion("policy", 0.5, 6, "single_label_classification", policies)
            assert criterion.needs_logits is (inputs != "state")
        for name, threshold in (("max_probability", 0.5), ("margin", 0.5), ("entropy", 0.5), ("patience", 1)):
            assert build_criterion(name, threshold, 6, "single_label_classification").needs_logits

    def test_policy_needs_policies(self):
        for name in ("policy", "exit_cdf"):
            with pytest.raises(ValueError, match=f"'{name}' needs `policies`"):
                build_criterion(name, 0.5, 3, "single_label_classification")


class TestThresholds:
    @given(st.integers(1, 12), st.floats(0, 1), st.sampled_from(["policy", "max_probability", "margin", "entropy"]))
    def test_one_number(self, exits, threshold, criterion):
        assert check_thresholds(criterion, threshold, exits) == [threshold] * exits

    @given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
    def test_a_list(self, thresholds):
        assert check_thresholds("policy", thresholds, len(thresholds)) == thresholds
        assert check_thresholds("policy", tuple(thresholds), len(thresholds)) == thresholds
        tensor = torch.tensor(thresholds, dtype=torch.float64)
        assert check_thresholds("policy", tensor, len(thresholds)) == thresholds
        with pytest.raises(ValueError, match=f"{len(thresholds)} values.*{len(thresholds) + 1}"):
            check_thresholds("policy", thresholds, len(thresholds) + 1)

    def test_integers_are_numbers(self):
        assert check_thresholds("policy", 1, 2) == [1.0, 1.0]
        assert check_thresholds("patience", 3, 2) == [3.0, 3.0]

    @pytest.mark.parametrize("criterion", ["policy", "max_probability", "margin", "entropy"])
    @pytest.mark.parametrize("threshold", [-0.01, 1.01, float("nan"), float("inf"), [0.5, -1.0]])
    def test_outside(self, criterion, threshold):
        with pytest.raises(ValueError, match=rf"`exit_threshold`=.*'{criterion}'.*\[0, 1\]"):
            check_thresholds(criterion, threshold, 2)

    @pytest.mark.parametrize("threshold", [0, 0.5, -1, float("nan")])
    def test_patience_below_one(self, threshold):
        with pytest.raises(ValueError, match=r"patience.*at least 1"):
            check_thresholds("patience", threshold, 2)

    @pytest.mark.parametrize("threshold", ["0.5", None, True, {}])
    def test_not_a_number(self, threshold):
        with pytest.raises(ValueError, match=r"exit_threshold.*number"):
            check_thresholds("policy", threshold, 2)


class TestOff:
    """When may the loop skip looking at scores?"""

    @pytest.mark.parametrize(
        "criterion,off,on",
        [("policy", 1.0, 0.999), ("max_probability", 1.0, 0.0), ("margin", 1.0, 0.5), ("entropy", 0.0, 1e-9)],
    )
    def test_by_threshold(self, criterion, off, on):
        policies = tiny_model().exit_policies
        build = lambda thresholds: build_criterion(criterion, thresholds, 3, "single_label_classification", policies)  # noqa: E731
        assert build(off).is_off
        assert not build(on).is_off
        assert build([off, off, on]).is_off, "the last exit takes everything anyway"
        mixed = build([off, on, off])
        assert not mixed.is_off and not mixed.can_exit(0) and mixed.can_exit(1)

    @pytest.mark.parametrize("patience,off", [(1, False), (2, False), (3, True), (4, True), (99, True)])
    def test_patience(self, patience, off):
        """With 4 exits, 3 of them internal, the third internal exit is the first that can have 2 repetitions."""
        assert build_criterion("patience", patience, 4, "single_label_classification").is_off is off

    @torch.no_grad()
    @pytest.mark.parametrize("patience", [6, 7, 100])
    def test_patience_of_all_exits_is_full_depth(self, patience):
        model = tiny_model()
        with torch.no_grad():
            for head in (*model.exit_heads.heads, model.classifier):
                head.weight.zero_()
                head.bias.copy_(torch.tensor([0.0, 1.0, 0.0]))  # all heads agree everywhere
        batch = pad(random_rows(4, seed=1))
        output = model(**batch, exit_criterion="patience", exit_threshold=patience)
        assert output.exit_layers.tolist() == [6] * 4
        for wanted in (1, 2, 4):
            output = model(**batch, exit_criterion="patience", exit_threshold=wanted)
            assert output.exit_layers.tolist() == [wanted + 1] * 4


class TestRules:
    def test_patience_counts_in_a_row(self):
        criterion = build_criterion("patience", 2, 9, "single_label_classification")
        a, b = [5.0, 0.0], [0.0, 5.0]
        seen = [criterion.score(step(index, [one])).item() for index, one in enumerate([a, a, b, b, b, a, b, b])]
        assert seen == [0, 1, 0, 1, 2, 0, 0, 1]

    def test_patience_of_labels_needs_all_labels(self):
        criterion = build_criterion("patience", 1, 4, "multi_label_classification")
        rows = [[[5.0, 5.0], [5.0, -5.0]], [[5.0, -5.0], [5.0, -5.0]], [[5.0, -5.0], [5.0, -5.0]]]
        assert [criterion.score(step(index, one)).tolist() for index, one in enumerate(rows)] == [
            [0, 0],
            [0, 1],
            [1, 2],
        ]

    def test_patience_follows_the_rows(self):
        criterion = build_criterion("patience", 2, 4, "single_label_classification")
        criterion.select(torch.tensor([0, 1, 2]))  # before the first exit there is nothing to remember
        criterion.score(step(0, [[5, 0], [0, 5], [5, 0]]))
        criterion.select(torch.tensor([2, 1]))
        assert criterion.score(step(1, [[5, 0], [5, 0]])).tolist() == [1, 0]

    def test_directions(self):
        scores = torch.tensor([0.2, 0.5, 0.8])
        above, below = [0, 0, 1], [1, 0, 0]
        for name, leaves in (("policy", above), ("max_probability", above), ("margin", above), ("entropy", below)):
            assert CRITERIA[name].passes(scores, 0.5).tolist() == [bool(value) for value in leaves]
        assert CRITERIA["patience"].passes(torch.tensor([1.0, 2.0, 3.0]), 2).tolist() == [False, True, True]
        lower_leaves = {name for name, cls in CRITERIA.items() if not cls.higher_is_deeper}
        assert lower_leaves == {"entropy", "energy", "entropy_patience", "divergence_patience", "learning_to_exit"}
        for name, cls in CRITERIA.items():
            leaves = {"patience": [0, 0, 0]}.get(name, below if name in lower_leaves else above)
            assert cls.passes(scores, 0.5 if name != "patience" else 1).tolist() == [bool(value) for value in leaves]

    @pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification"])
    def test_margin_between_the_two_best(self, problem_type):
        logits = [[2.0, 1.0, -3.0], [0.5, 0.5, 0.5], [-9.0, 9.0, 0.0]]
        scores = build_criterion("margin", 0.5, 3, problem_type).score(step(0, logits))
        expected = [reference.confidence(torch.tensor(row), problem_type)[1] for row in logits]
        assert scores.tolist() == pytest.approx(expected, abs=1e-6)
        message = (
            r"`exit_criterion`='margin': .*'regression' has no class probabilities; accepted are .*patience, policy"
        )
        with pytest.raises(ValueError, match=message):
            build_criterion("margin", 0.5, 3, "regression")

    def test_thresholds_in_tensors(self):
        for threshold in (torch.tensor(0.25), 0.25, torch.full((3,), 0.25)):
            assert build_criterion("margin", threshold, 3, "single_label_classification").thresholds == [0.25] * 3

    def test_heads_run_only_when_asked(self):
        calls = []
        one = ExitStep(0, torch.randn(4, 2), lambda states: calls.append(len(states)) or states * 2)
        torch.testing.assert_close(one.logits_of(torch.tensor([1, 3])), one.state[[1, 3]] * 2)
        assert calls == [2]
        torch.testing.assert_close(one.logits, one.state * 2)
        torch.testing.assert_close(one.logits_of(torch.tensor([0])), one.state[[0]] * 2)
        assert one.logits is one.logits and calls == [2, 4]
