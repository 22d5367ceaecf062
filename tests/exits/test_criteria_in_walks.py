# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Every criterion against a slow twin: its scores, and where rows leave in the real walks, which drop them."""

from __future__ import annotations

import criteria_reference as slow
import pytest
import reference
import torch
from fitted import MULTI, REGRESSION, SINGLE, fitted_model, journeys, labels_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VOCABULARY, pad, random_rows, tiny_llama, tiny_model

from transformers_cee.exits.criteria import CRITERIA, CriterionSettings, ExitStep, build_criterion
from transformers_cee.exits.deciding import criterion_settings
from transformers_cee.exits.estimators import ESTIMATORS
from transformers_cee.exits.runner import run_exits


WITHOUT_CLASSES = [
    "policy",
    "exit_cdf",
    "patience",
    "learning_to_exit",
    "state_classifier",
    "state_similarity",
    "token_hash",
    "oracle",
]
CASES = [(name, kind) for name in sorted(CRITERIA) for kind in (SINGLE, MULTI)]
CASES += [(name, REGRESSION) for name in WITHOUT_CLASSES]


def walk(model, batch: dict, criterion: str, threshold: float, labels: torch.Tensor, problem_type: str):
    """The model's own walk; the oracle's is built here, since no model is told the labels."""
    if criterion != "oracle":
        return model(**batch, exit_criterion=criterion, exit_threshold=threshold)
    settings = criterion_settings(model, labels=labels)
    one = build_criterion("oracle", threshold, len(model.layer_numbers), problem_type, None, settings)
    rows = model.embed(**batch, position_ids=None, inputs_embeds=None)
    layers = [
        lambda batch, layer=layer: layer(batch.hidden_states, batch.attention_mask)
        for layer in model.bert.encoder.layer
    ]
    return run_exits(rows, layers, model, one)


@torch.no_grad()
@pytest.mark.parametrize("exit_layers,inputs", [(None, "state"), ([1, 2, 4, 5], "both")])
@pytest.mark.parametrize("criterion,problem_type", CASES)
def test_rows_leave_where_the_slow_rule_says(criterion, problem_type, exit_layers, inputs):
    if problem_type == REGRESSION:
        inputs = "state"
    # Half of the tolerance leaves the first exits of a random regression behind.
    fields = {"exit_layers": exit_layers, "policy_inputs": inputs, "exit_tolerance": 0.4}
    model, rows = fitted_model(problem_type, **fields), random_rows(24, seed=2)
    labels = labels_of(24, problem_type)
    expected = [slow.scores_of(criterion, row) for row in journeys(model, rows, labels, problem_type)]
    threshold = slow.spreading_threshold(criterion, expected)
    exits = [slow.exit_of(criterion, row, threshold) for row in expected]
    assert len(set(exits)) >= (2 if criterion == "patience" else 3), "a threshold that tells the rows apart"
    for side in ("right", "left"):
        output = walk(model, pad(rows, side, extra=2), criterion, threshold, labels, problem_type)
        assert output.exit_layers.tolist() == [model.layer_numbers[exit] for exit in exits]
        scores = output.scores if criterion == "oracle" else output.exit_probabilities
        for row, exit in enumerate(exits):
            asked = [value for value in scores[row, : min(exit + 1, len(expected[0]))].tolist() if value == value]
            # Exits that nobody can leave at may be passed without a look.
            known = expected[row][: exit + 1][-len(asked) :] if asked else []
            assert asked == pytest.approx(known, abs=2e-4)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([name for name, kind in CASES if kind == SINGLE and name not in ("token_hash", "oracle")]),
    st.sampled_from([SINGLE, MULTI]),
    st.integers(1, 4),
    st.integers(0, 10_000),
    st.data(),
)
def test_scores(criterion, problem_type, patience, seed, data):
    """Scores at every exit with rows that leave at random: the memory follows the others."""
    model = _MODELS.setdefault(problem_type, fitted_model(problem_type))
    generator = torch.Generator().manual_seed(seed)
    states, logits = torch.randn(4, 5, 32, generator=generator), 2 * torch.randn(4, 5, 3, generator=generator)
    # Runs of exits that say the same.
    for index in range(1, 5):
        if data.draw(st.booleans()):
            logits[:2, index] = logits[:2, index - 1]
    walk = build_criterion(
        criterion,
        CRITERIA[criterion].off,
        6,
        problem_type,
        model.exit_policies,
        CriterionSettings(estimators=model.exit_estimators, patience=patience),
    )
    rows = []
    for row in range(4):
        policy = [
            reference.policy_score(model, states[row, i], list(logits[row, : i + 1]), problem_type, i)
            for i in range(5)
        ]
        rows.append(
            slow.Journey(
                list(states[row]), list(logits[row]), problem_type, policy, dict(model.exit_estimators.items()),
                [1, 2, 3, 4, 5, 6], patience=patience,
            )
        )  # fmt: skip
    left = torch.arange(4)
    for index in range(5):
        step = ExitStep(index, states[left, index], lambda _, index=index: logits[left, index], left)  # noqa: B023
        with torch.no_grad():
            found = walk.score(step)
        expected = [slow.scores_of(criterion, rows[row])[index] for row in left.tolist()]
        assert found.tolist() == pytest.approx(expected, abs=2e-5)
        if not walk.can_exit(index):
            assert not bool(walk.passes(found, walk.thresholds[index]).any())
        kept = [number for number in range(len(left)) if data.draw(st.booleans())] or [0]
        walk.select(torch.tensor(kept))
        left = left[kept]


_MODELS: dict = {}


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_tables_follow_the_vocabulary(kind, tmp_path):
    """New tokens have the last exit, as unknown ones; what is saved loads again."""
    make, last = (tiny_model, 5) if kind == "encoder" else (tiny_llama, 3)
    model = make(exit_estimators=["token_hash"])
    before = torch.randint(0, last, (VOCABULARY,), generator=torch.Generator().manual_seed(1))
    model.exit_estimators["token_hash"].exits.copy_(before)
    model.resize_token_embeddings(VOCABULARY + 5, mean_resizing=False)
    model.save_pretrained(tmp_path)
    for one in (model, type(model).from_pretrained(tmp_path)):
        assert one.exit_estimators["token_hash"].exits.tolist() == [*before.tolist(), *[last] * 5]
        ids = torch.tensor([[VOCABULARY + 2, VOCABULARY + 4]])
        output = one(ids, exit_criterion="token_hash", exit_threshold=0.99)
        assert set(output.exit_layers.flatten().tolist()) == {last + 1}
    model.resize_token_embeddings(40, mean_resizing=False)
    assert torch.equal(model.exit_estimators["token_hash"].exits, before[:40])


class TestDecoders:
    """One exit per token, in text that is known and in generation."""

    def model(self, **fields):
        model = tiny_llama(exit_estimators=sorted({*ESTIMATORS} - {"calibrated_probability"}), **fields)
        table = model.exit_estimators["token_hash"].exits
        table.copy_(torch.randint(0, 4, table.shape, generator=torch.Generator().manual_seed(1)))
        return model

    @torch.no_grad()
    def test_token_hash_of_known_text(self):
        model = self.model()
        ids = torch.randint(3, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(2))
        table = model.exit_estimators["token_hash"].exits
        output = model(ids, exit_criterion="token_hash", exit_threshold=0.99)
        assert output.exit_layers.tolist() == [[table[token].item() + 1 for token in row] for row in ids.tolist()]
        labels = ids.clone()
        labels[:, :3] = -100
        output = model(ids, labels=labels, exit_criterion="token_hash", exit_threshold=0.99)
        expected = [[4] * 3 + [table[token].item() + 1 for token in row[3:]] for row in ids.tolist()]
        assert output.exit_layers.tolist() == expected

    @torch.no_grad()
    @pytest.mark.parametrize("skipped_kv", ["copy", "deferred"])
    def test_token_hash_generates(self, skipped_kv):
        """A step's exit is that of the token that it starts from."""
        model = self.model(eos_token_id=None)
        prompt = torch.randint(3, VOCABULARY, (3, 4), generator=torch.Generator().manual_seed(2))
        output = model.generate(
            prompt, exit_criterion="token_hash", exit_threshold=0.99, skipped_kv=skipped_kv, max_new_tokens=6,
            do_sample=False, return_dict_in_generate=True,
        )  # fmt: skip
        table, new = model.exit_estimators["token_hash"].exits, output.sequences[:, 4:]
        assert output.exit_layers[:, 1:].tolist() == (table[new[:, :-1]] + 1).tolist()
        assert len(output.exit_layers[:, 1:].unique()) > 1

    @torch.no_grad()
    @pytest.mark.parametrize(
        "criterion", ["state_similarity", "state_classifier", "learning_to_exit", "exit_cdf", "divergence_patience"]
    )
    def test_steps_agree_with_known_text(self, criterion):
        """Generation and the same text at once: the memory of a step begins with the step's token."""
        model = self.model(eos_token_id=None, exit_patience=1)
        prompt = torch.randint(3, VOCABULARY, (3, 4), generator=torch.Generator().manual_seed(2))
        threshold = {"state_similarity": 0.6, "divergence_patience": 0.1, "exit_cdf": 0.7}.get(criterion, 0.5)
        settings = {"exit_criterion": criterion, "exit_threshold": threshold}
        output = model.generate(
            prompt, **settings, max_new_tokens=7, do_sample=False, return_dict_in_generate=True, skipped_kv="copy"
        )
        labels = output.sequences.clone()
        labels[:, :4] = -100
        known = model(output.sequences[:, :-1], labels=labels[:, :-1], **settings)
        assert known.exit_layers[:, 4:].tolist() == output.exit_layers[:, 1:].tolist()
        assert len(output.exit_layers[:, 1:].unique()) > 1


class TestSpecialCases:
    @torch.no_grad()
    @pytest.mark.parametrize("criterion", sorted(set(CRITERIA) - {"oracle"}))
    def test_off(self, criterion):
        model, rows = fitted_model(), random_rows(6, seed=2)
        threshold = CRITERIA[criterion].off
        output = model(**pad(rows), exit_criterion=criterion, exit_threshold=threshold)
        assert output.exit_layers.tolist() == [6] * 6
        settings = criterion_settings(model, input_ids=pad(rows)["input_ids"])
        assert build_criterion(criterion, threshold, 6, SINGLE, model.exit_policies, settings).is_off

    @torch.no_grad()
    @pytest.mark.parametrize("criterion", ["entropy_patience", "divergence_patience"])
    def test_as_patient_as_there_are_exits(self, criterion):
        batch = pad(random_rows(6, seed=2))
        for patience in (6, 9):
            model = fitted_model(exit_patience=patience)
            output = model(**batch, exit_criterion=criterion, exit_threshold=1.0)
            assert output.exit_layers.tolist() == [6] * 6

    @torch.no_grad()
    def test_patience_of_one_is_the_plain_rule(self):
        model, batch = fitted_model(exit_patience=1), pad(random_rows(12, seed=2))
        for threshold in (0.3, 0.6, 0.9):
            plain = model(**batch, exit_criterion="entropy", exit_threshold=threshold)
            patient = model(**batch, exit_criterion="entropy_patience", exit_threshold=threshold)
            assert plain.exit_layers.tolist() == patient.exit_layers.tolist()

    def test_temperatures_of_one_change_nothing(self):
        settings = CriterionSettings(estimators={"calibrated_probability": ESTIMATORS["calibrated_probability"](
            tiny_model().config
        )})  # fmt: skip
        step = ExitStep(1, torch.zeros(5, 2), lambda _: torch.randn(5, 3, generator=torch.Generator().manual_seed(0)))
        plain = build_criterion("max_probability", 0.5, 6, SINGLE).score(step)
        assert torch.equal(
            plain, build_criterion("calibrated_probability", 0.5, 6, SINGLE, None, settings).score(step)
        )

    @pytest.mark.parametrize("value", [1e4, -1e4])
    def test_energy_of_extreme_logits(self, value):
        step = ExitStep(0, torch.zeros(1, 2), lambda _: torch.full((1, 3), value))
        score = build_criterion("energy", 0.5, 3, SINGLE).score(step)
        assert score.tolist() == [0.0 if value > 0 else 1.0]

    def test_exit_cdf_is_the_exit_distribution(self):
        model = fitted_model()
        states = torch.randn(4, 6, 32)
        walk = build_criterion("exit_cdf", 1.0, 6, SINGLE, model.exit_policies)
        with torch.no_grad():
            scores = [walk.score(ExitStep(i, states[:, i], lambda _: None)) for i in range(5)]
            leave = model.exit_policies(states).sigmoid()
        reached, total = torch.ones(4), torch.zeros(4)
        for index in range(5):
            total += reached * leave[:, index]
            reached *= 1 - leave[:, index]
            torch.testing.assert_close(scores[index], total)

    def test_identical_states_are_similar_and_opposite_ones_are_not(self):
        walk = build_criterion("state_similarity", 0.5, 5, SINGLE)
        state = torch.randn(3, 8)
        steps = (state, 5 * state, -state, -state)
        scores = [walk.score(ExitStep(i, one, lambda _: None)) for i, one in enumerate(steps)]
        assert [one.tolist() for one in scores] == [[0] * 3, pytest.approx([1] * 3), [0] * 3, pytest.approx([1] * 3)]
        assert all(bool((one <= 1).all()) for one in scores), "a threshold of 1 must hold"
        assert not walk.needs_logits and not walk.can_exit(0) and walk.can_exit(1)

    @given(st.lists(st.integers(0, 4), min_size=1, max_size=8), st.floats(0, 1), st.floats(0, 1))
    def test_token_hash_rises_with_the_threshold(self, planned, low, high):
        low, high = sorted((low, high))
        estimators = {"token_hash": torch.nn.Module()}
        estimators["token_hash"].forward = lambda ids: ids
        settings = CriterionSettings(estimators=estimators, input_ids=torch.tensor(planned)[:, None])
        exits = []
        for threshold in (low, high, 0.0, 0.999, 1.0):
            walk = build_criterion("token_hash", threshold, 5, SINGLE, None, settings)
            leaves = [
                walk.passes(walk.score(ExitStep(i, torch.zeros(len(planned), 1), lambda _: None)), threshold).tolist()
                for i in range(4)
            ]
            exits.append([([one[row] for one in leaves] + [True]).index(True) for row in range(len(planned))])
        assert all(a <= b for a, b in zip(exits[0], exits[1], strict=True))
        assert exits[2] == [0] * len(planned) and exits[3] == planned and exits[4] == [4] * len(planned)


class TestRefused:
    @pytest.mark.parametrize("criterion", sorted(ESTIMATORS))
    def test_without_estimator(self, criterion):
        with pytest.raises(ValueError, match=f"'{criterion}' needs its fitted estimator; this model has none"):
            tiny_model()(**pad(random_rows(2, seed=1)), exit_criterion=criterion, exit_threshold=0.5)

    def test_token_hash_without_tokens(self):
        model = fitted_model()
        with pytest.raises(ValueError, match=r"'token_hash' looks at `input_ids`; got None"):
            model(inputs_embeds=torch.randn(2, 3, 32), exit_criterion="token_hash", exit_threshold=0.5)

    def test_oracle_in_forward(self):
        batch = pad(random_rows(2, seed=1))
        with pytest.raises(ValueError, match=r"'oracle' needs the true labels.*evaluation"):
            tiny_model()(**batch, labels=torch.tensor([0, 1]), exit_criterion="oracle", exit_threshold=0.5)

    @pytest.mark.parametrize("criterion", sorted({*CRITERIA} - {*WITHOUT_CLASSES}))
    def test_regression(self, criterion):
        model = fitted_model(REGRESSION)
        with pytest.raises(ValueError, match=r"'regression' has no class probabilities"):
            model(**pad(random_rows(2, seed=1)), exit_criterion=criterion, exit_threshold=0.5)

    @pytest.mark.parametrize("criterion", sorted({*CRITERIA} - {"patience"}))
    @pytest.mark.parametrize("threshold", [-0.1, 1.1])
    def test_thresholds(self, criterion, threshold):
        with pytest.raises(ValueError, match=rf"'{criterion}' must be numbers in \[0, 1\]"):
            build_criterion(criterion, threshold, 3, SINGLE)
