# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Scores of every criterion on stored exits, of rows and of tokens, and thresholds for wanted depths."""

from __future__ import annotations

from dataclasses import replace

import criteria_reference as slow
import pytest
import torch
from accelerate import Accelerator
from fitted import MULTI, REGRESSION, SINGLE, fitted_model, journeys, labels_of
from text_reference import text_tokens
from tiny import collate_text, instructions, pad, random_rows, tiny_llama, tiny_model

from transformers_cee.exits.criteria import CRITERIA, CriterionSettings
from transformers_cee.exits.deciding import criterion_settings
from transformers_cee.exits.estimators import ESTIMATORS
from transformers_cee.stores import scoring
from transformers_cee.stores.filling import collect_exits
from transformers_cee.stores.scoring import exits_taken, score_exits, thresholds_for_depths
from transformers_cee.stores.store import ExitStore


OF_TOKENS = {
    "policy",
    "exit_cdf",
    "max_probability",
    "margin",
    "entropy",
    "entropy_patience",
    "patience",
    "state_similarity",
    "state_classifier",
    "learning_to_exit",
    "consistency",
}


@torch.no_grad()
def stored(model, rows, labels, problem_type):
    output = model(**pad(rows), output_all_exits=True)
    layers = torch.tensor(model.layer_numbers)
    return ExitStore(output.all_exit_states, output.all_exit_logits, labels, layers, problem_type)


def settings_of(model, rows):
    batch = pad(rows)
    return criterion_settings(model, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
@pytest.mark.parametrize("problem_type", [SINGLE, MULTI, REGRESSION])
def test_rows(criterion, problem_type, monkeypatch):
    """In chunks, whose borders must not show: labels, tokens and masks are cut as the rows are."""
    if problem_type == REGRESSION and CRITERIA[criterion].needs_classes:
        pytest.skip("has no classes")
    monkeypatch.setattr(scoring, "SCORED_ENTRIES", 5)
    model, rows, labels = fitted_model(problem_type), random_rows(12, seed=2), labels_of(12, problem_type)
    store = stored(model, rows, labels, problem_type)
    scores = score_exits(criterion, store, model.exit_policies, settings_of(model, rows))
    expected = [slow.scores_of(criterion, row) for row in journeys(model, rows, labels, problem_type)]
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float32), rtol=1e-3, atol=2e-4)


@torch.no_grad()
@pytest.mark.parametrize("criterion", sorted({*CRITERIA} - {"oracle"}))
def test_hindsight_is_what_happens(criterion):
    model, rows = fitted_model(), random_rows(24, seed=2)
    store = stored(model, rows, labels_of(24, SINGLE), SINGLE)
    scores = score_exits(criterion, store, model.exit_policies, settings_of(model, rows))
    threshold = slow.spreading_threshold(criterion, scores.tolist())
    exits = exits_taken(criterion, threshold, scores)
    assert len(exits.unique()) >= 2
    output = model(**pad(rows), exit_criterion=criterion, exit_threshold=threshold)
    assert store.layers[exits].tolist() == output.exit_layers.tolist()


def test_conditioned_policies_in_training_mode():
    """Nothing is drawn: scores are those of the default price, with which the model walks."""
    model, rows = fitted_model(policy_condition="film"), random_rows(12, seed=2)
    store = stored(model, rows, labels_of(12, SINGLE), SINGLE)
    expected = score_exits("policy", store, model.exit_policies)
    assert torch.equal(score_exits("policy", store, model.train().exit_policies), expected)


@torch.no_grad()
def test_exit_cdf_gives_closed_exits_nothing():
    model = tiny_llama(policy_inputs="both")
    store = collect(model, instructions(12, seed=1))
    probabilities = score_exits("policy", store, model.exit_policies)
    scores = score_exits("exit_cdf", store, model.exit_policies, min_exit_layer=2)
    assert scores[:, 0].eq(0).all()
    torch.testing.assert_close(scores[:, 1], probabilities[:, 1])
    torch.testing.assert_close(scores[:, 2], 1 - (1 - probabilities[:, 1]) * (1 - probabilities[:, 2]))


@torch.no_grad()
@pytest.mark.parametrize("criterion", ["policy", "entropy", "patience", "entropy_patience", "exit_cdf"])
def test_closed_exits(criterion):
    model, rows = tiny_llama(policy_inputs="both", min_exit_layer=3), instructions(12, seed=1)
    store = collect(model, rows)
    open_scores = score_exits(criterion, store, model.exit_policies)
    scores = score_exits(criterion, store, model.exit_policies, min_exit_layer=3)
    if criterion == "exit_cdf":
        assert scores[:, 2].lt(open_scores[:, 2]).all()
    else:
        torch.testing.assert_close(scores[:, 2], open_scores[:, 2])
    boldest = 1.0 if criterion in ("entropy", "entropy_patience", "patience") else 0.0
    if criterion == "exit_cdf":
        # Would let more out, if closed exits had been given something.
        boldest = float(scores[:, 2].median())
        assert bool((open_scores[scores[:, 2] <= boldest, 2] > boldest).any())
    exits = exits_taken(criterion, boldest, scores)
    assert set(exits.tolist()) <= {2, 3} and bool((exits == 2).any())
    batch = collate_text(list(rows))
    output = model(**batch, exit_criterion=criterion, exit_threshold=boldest)
    counted = torch.nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1))
    taken = torch.where(store.may_exit, exits, 3)
    assert store.layers[taken].tolist() == output.exit_layers[counted].tolist()


class TestOracle:
    def test_labels_are_the_stores_own(self):
        model, rows, labels = fitted_model(), random_rows(12, seed=2), labels_of(12, SINGLE)
        store = stored(model, rows, labels, SINGLE)
        assert torch.equal(score_exits("oracle", store), store.correct[:, :-1].float())
        given = score_exits("oracle", store, settings=CriterionSettings(labels=(labels + 1) % 3))
        expected = store.logits[:, :-1].argmax(-1) == ((labels + 1) % 3).unsqueeze(1)
        assert torch.equal(given, expected.float())

    def test_tolerance_is_the_stores_own(self):
        model, rows, labels = fitted_model(REGRESSION), random_rows(12, seed=2), labels_of(12, REGRESSION)
        store = stored(model, rows, labels, REGRESSION)
        for tolerance in (0.01, 0.4, 2.0):
            store.tolerance = tolerance
            assert torch.equal(score_exits("oracle", store), store.correct[:, :-1].float())


class TestThresholdsForDepths:
    @pytest.mark.parametrize("criterion", sorted(CRITERIA))
    def test_as_close_as_any(self, criterion):
        """Against thresholds between any two scores, and both ends."""
        model, rows = fitted_model(), random_rows(40, seed=3)
        store = stored(model, rows, labels_of(40, SINGLE), SINGLE)
        scores = score_exits(criterion, store, model.exit_policies, settings_of(model, rows))
        layers, wanted = store.layers.tolist(), [1.0, 2.0, 3.5, 5.0, 6.0]
        values = sorted(set(scores.flatten().tolist()))
        tries = [1, 2, 3, 4, 5, 6] if criterion == "patience" else [0.0, *values, 1.0]

        def depth(threshold: float) -> float:
            exits = [slow.exit_of(criterion, row, threshold) for row in scores.tolist()]
            return sum(layers[exit] for exit in exits) / len(exits)

        reachable = [depth(threshold) for threshold in tries]
        for target, threshold in zip(
            wanted, thresholds_for_depths(criterion, scores, layers, wanted, candidates=400), strict=True
        ):
            assert CRITERIA[criterion].check(threshold) and threshold < 100
            best = min(abs(one - target) for one in reachable)
            found = float(store.layers[exits_taken(criterion, threshold, scores)].float().mean())
            assert abs(found - target) == pytest.approx(best, abs=1e-6)

    @pytest.mark.parametrize("criterion", sorted(CRITERIA))
    def test_full_depth_of_the_most_willing_scores(self, criterion):
        """Nobody leaves at the depth L, even where only a threshold that switches exits off does that."""
        willing = [1.0] * 3 if CRITERIA[criterion].higher_is_deeper else [0.0] * 3
        scores = torch.tensor([[0.0, 1.0, 2.0] if criterion == "patience" else willing] * 10)
        (threshold,) = thresholds_for_depths(criterion, scores, [1, 2, 3, 4], [4.0])
        assert exits_taken(criterion, threshold, scores).tolist() == [3] * 10

    @pytest.mark.parametrize("criterion", ["policy", "entropy", "patience"])
    def test_one_exit(self, criterion):
        (threshold,) = thresholds_for_depths(criterion, torch.empty(4, 0), [4], [4.0])
        assert exits_taken(criterion, threshold, torch.empty(4, 0)).tolist() == [0] * 4


@pytest.fixture(scope="module")
def known():
    """A language model with estimators, its tokens one by one, and the same tokens stored."""
    names = sorted({*ESTIMATORS} - {"token_hash"})
    model = tiny_llama(policy_inputs="both", exit_head="untied", exit_estimators=names)
    rows = instructions(12, seed=1)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in [*model.exit_estimators.parameters(), *model.exit_heads.parameters()]:
            parameter.normal_(0.0, 0.3)
        tokens = text_tokens(model, rows)
    return model, tokens, collect(model, rows)


def scores_of_tokens(model, tokens, criterion):
    """Scores (tokens, 3) by the reference, one token at a time."""
    expected = []
    for token in tokens:
        policy = [
            slow.reference.policy_score(model, token.states[i], token.logits[: i + 1], SINGLE, i) for i in range(3)
        ]
        row = slow.Journey(
            token.states[:3], token.logits[:3], SINGLE, policy, dict(model.exit_estimators.items()), [1, 2, 3, 4]
        )
        expected.append(slow.scores_of(criterion, row))
    return torch.tensor(expected, dtype=torch.float32)


class TestFirstExit:
    @pytest.mark.parametrize("criterion", ["policy", "exit_cdf", "entropy", "patience"])
    def test_of_the_model(self, criterion):
        """Stored scores leave where walks of the model do; who names a layer is asked for that."""
        rows, model = random_rows(24, seed=2), tiny_model(num_hidden_layers=4, min_exit_layer=3).eval()
        store = stored(model, rows, labels_of(24, SINGLE), SINGLE)
        settings = settings_of(model, rows)
        scores = score_exits(criterion, store, model.exit_policies, settings)
        limit = 1.0 if criterion == "patience" else float(scores[:, 2].median())
        with torch.no_grad():
            walked = model(**pad(rows), exit_criterion=criterion, exit_threshold=limit).exit_layers
            opened = model(**pad(rows), exit_criterion=criterion, exit_threshold=limit, min_exit_layer=2).exit_layers
        assert torch.equal(store.layers[exits_taken(criterion, limit, scores)], walked) and 3 in walked
        scores = score_exits(criterion, store, model.exit_policies, settings, min_exit_layer=2)
        assert torch.equal(store.layers[exits_taken(criterion, limit, scores)], opened)

    @pytest.mark.parametrize("layer", [0, 5, 1.5, "3"])
    def test_no_layer(self, known, layer):
        model, _, store = known
        with pytest.raises(ValueError, match=r"`min_exit_layer`=.* must lie in 1..4"):
            score_exits("policy", store, model.exit_policies, min_exit_layer=layer)


class TestTokens:
    @pytest.mark.parametrize("criterion", sorted(OF_TOKENS))
    def test_against_reference(self, known, criterion):
        model, tokens, store = known
        scores = score_exits(criterion, store, model.exit_policies, criterion_settings(model))
        torch.testing.assert_close(scores, scores_of_tokens(model, tokens, criterion), rtol=1e-3, atol=2e-4)

    @pytest.mark.parametrize("criterion", sorted({*CRITERIA} - {"oracle", "token_hash"}))
    @pytest.mark.parametrize("features", [True, False])
    def test_with_the_heads_of_the_model(self, known, criterion, features, monkeypatch):
        """Logits that the store does not keep are made anew, of a part of the tokens at a time."""
        monkeypatch.setattr(scoring, "SCORED_TOKENS", 5)
        model, tokens, store = known
        store = store if features else replace(store, features=None)
        settings = criterion_settings(model)
        scores = score_exits(criterion, store, model.exit_policies, settings, heads=model.exit_logits)
        torch.testing.assert_close(scores, scores_of_tokens(model, tokens, criterion), rtol=1e-3, atol=2e-4)

    @pytest.mark.parametrize("criterion", sorted({*CRITERIA} - OF_TOKENS))
    def test_refused(self, known, criterion):
        model, _, store = known
        with pytest.raises(
            ValueError, match=rf"'{criterion}' cannot be asked of stored tokens; accepted are .*policy"
        ):
            score_exits(criterion, store, model.exit_policies, criterion_settings(model))

    def test_tokens_that_are_given(self):
        model = tiny_llama(exit_estimators=["token_hash"])
        table = model.exit_estimators["token_hash"].exits
        table.copy_(torch.arange(len(table)) % 4)
        store = collect(model, instructions(3, seed=1))
        ids = torch.arange(len(store)) + 3
        scores = score_exits("token_hash", store, model.exit_policies, criterion_settings(model, input_ids=ids))
        assert exits_taken("token_hash", 0.99, scores).tolist() == (ids % 4).tolist()

    def test_without_features(self):
        model = tiny_llama()
        store = collect(model, instructions(3, seed=1))
        for criterion in ("state_similarity", "patience", "exit_cdf"):
            assert score_exits(criterion, store, model.exit_policies).shape == (len(store), 3)
        confident = tiny_llama(policy_inputs="both").exit_policies
        for criterion, policies in (("entropy_patience", None), ("consistency", None), ("exit_cdf", confident)):
            with pytest.raises(ValueError, match=f"'{criterion}' cannot be asked of stored tokens"):
                score_exits(criterion, store, policies)


def collect(model, rows):
    return collect_exits(
        model, rows, collate_text, Accelerator(cpu=True), problem_type=SINGLE, batch_size=8, disable_tqdm=True
    )
