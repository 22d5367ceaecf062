# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Estimators: their losses by hand, what they find in stores with a known answer, and models that carry them."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from tiny import VOCABULARY, changed, collate_text, instructions, pad, random_rows, tiny_llama, tiny_model, weights
from transformers import AutoModelForSequenceClassification

from transformers_cee import BertForConsistentEE
from transformers_cee.exits.deciding import criterion_settings
from transformers_cee.exits.estimators import ESTIMATORS
from transformers_cee.stores.filling import collect_exits
from transformers_cee.stores.scoring import score_exits
from transformers_cee.stores.store import ExitStore
from transformers_cee.training.estimators import fit_estimators, fit_token_hash
from transformers_cee.training.parameters import freeze_for_model_step


SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
OF_STORES = sorted({*ESTIMATORS} - {"token_hash"})
FAST = {"steps": 20, "batch_size": 16}


def random_store(rows: int = 40, problem_type: str = SINGLE, seed: int = 0, **fields) -> ExitStore:
    """A store for `tiny_model(num_hidden_layers=4)` in which each exit is right for reasons that its state tells."""
    generator = torch.Generator().manual_seed(seed)
    labels = 1 if problem_type == REGRESSION else 3
    states = torch.randn(rows, 4, 32, generator=generator)
    logits = torch.randn(rows, 4, labels, generator=generator)
    true = {
        SINGLE: torch.randint(0, 3, (rows,), generator=generator),
        MULTI: torch.randint(0, 2, (rows, labels), generator=generator).float(),
        REGRESSION: torch.randn(rows, generator=generator),
    }[problem_type]
    return ExitStore(states, logits, true, torch.tensor([1, 2, 3, 4]), problem_type, **fields)


def small_model(problem_type: str = SINGLE, **fields):
    labels = 1 if problem_type == REGRESSION else 3
    return tiny_model(num_hidden_layers=4, num_labels=labels, problem_type=problem_type, **fields)


def told_store(rows: int = 400) -> ExitStore:
    """At even rows every internal exit is right and sees it in its first number; at odd rows it is wrong."""
    store = random_store(rows)
    last = torch.arange(rows) % 3
    store.labels = last
    right = (torch.arange(rows) % 2 == 0).unsqueeze(1)
    predicted = torch.where(right, last.unsqueeze(1), (last.unsqueeze(1) + 1) % 3).expand(rows, 3)
    predicted = torch.cat((predicted, last.unsqueeze(1)), dim=1)
    store.logits = 3.0 * torch.nn.functional.one_hot(predicted, 3).float()
    store.states[:, :3, 0] = torch.where(right, 2.0, -2.0)
    return store


@pytest.fixture(scope="module")
def tokens():
    """A language model and a store of its tokens with confidence features."""
    model = tiny_llama(policy_inputs="both")
    store = collect_exits(
        model, instructions(20, seed=1), collate_text, Accelerator(cpu=True), problem_type=SINGLE, batch_size=8,
        disable_tqdm=True,
    )  # fmt: skip
    return model, store


class TestLosses:
    """The number that is returned, from the fitted estimator's scores, one entry and one exit at a time."""

    @pytest.mark.parametrize("problem_type", [SINGLE, MULTI, REGRESSION])
    def test_learning_to_exit(self, problem_type):
        model, store = small_model(problem_type), random_store(problem_type=problem_type)
        loss = fit_estimators(model, store, ["learning_to_exit"], **FAST)["learning_to_exit"]
        layer = model.exit_estimators["learning_to_exit"].linear
        terms = []
        for row in range(40):
            for exit in range(3):
                z, y = store.logits[row, exit], store.labels[row]
                if problem_type == REGRESSION:
                    target = abs(math.tanh(float(z[0]) - float(y)))
                elif problem_type == SINGLE:
                    target = float(int(z.argmax()) != int(y))
                else:
                    target = float(any((float(a) > 0) != (float(b) > 0.5) for a, b in zip(z, y, strict=True)))
                score = 1 / (1 + math.exp(-float(layer.weight[0] @ store.states[row, exit] + layer.bias)))
                terms.append((score - target) ** 2)
        assert loss == pytest.approx(sum(terms) / len(terms), rel=1e-4)

    @pytest.mark.parametrize(
        "name,problem_type",
        [
            *((name, kind) for name in ("consistency", "state_classifier") for kind in (SINGLE, MULTI)),
            ("state_classifier", REGRESSION),
        ],
    )
    def test_balanced_cross_entropy(self, name, problem_type):
        model, store = small_model(problem_type), random_store(problem_type=problem_type)
        store.logits[:, 2] = store.logits[:, 3]  # one exit is always consistent
        loss = fit_estimators(model, store, [name], **FAST)[name]
        scores = score_exits(name, store, None, criterion_settings(model))
        exits = []
        for exit in range(3):
            same = []
            for row in range(40):
                now, last = store.logits[row, exit], store.logits[row, 3]
                same.append(
                    {
                        SINGLE: lambda now=now, last=last: int(now.argmax()) == int(last.argmax()),
                        MULTI: lambda now=now, last=last: (
                            [v > 0 for v in now.tolist()] == [v > 0 for v in last.tolist()]
                        ),
                        REGRESSION: lambda now=now, last=last: abs(float(now) - float(last)) <= store.tolerance,
                    }[problem_type]()
                )
            total = 0.0
            for row in range(40):
                share = same.count(same[row]) / 40
                score = float(scores[row, exit])
                total -= 0.5 / share * math.log(score if same[row] else 1 - score)
            exits.append(total / 40)
        assert loss == pytest.approx(sum(exits) / 3, rel=1e-3)

    @pytest.mark.parametrize("problem_type", [SINGLE, MULTI])
    def test_temperatures_are_the_best(self, problem_type):
        model, store = small_model(problem_type), random_store(300, problem_type)
        if problem_type == SINGLE:
            hits = torch.rand(300, generator=torch.Generator().manual_seed(1)) < 0.8
            store.labels = torch.where(hits, store.logits[:, 1].argmax(-1), store.labels)
        else:
            store.labels = (
                store.logits[:, 1] + torch.randn(300, 3, generator=torch.Generator().manual_seed(1)) > 0
            ).float()
        loss = fit_estimators(model, store, ["calibrated_probability"])["calibrated_probability"]
        found = model.exit_estimators["calibrated_probability"].log_temperatures.tolist()

        def likelihood(log_temperature: float, exit: int) -> float:
            scaled = store.logits[:, exit].double() / math.exp(log_temperature)
            if problem_type == SINGLE:
                return -float(scaled.log_softmax(-1)[torch.arange(300), store.labels].mean())
            signs = 2 * store.labels.double() - 1
            return float((1 + (-signs * scaled).exp()).log().mean())

        best = [minimize_scalar(likelihood, bounds=(-5, 5), args=(exit,), method="bounded") for exit in range(3)]
        assert found[1] == pytest.approx(best[1].x, abs=0.02) and abs(found[1]) > 0.05
        assert loss == pytest.approx(sum(one.fun for one in best) / 3, abs=1e-4)


class TestFits:
    @pytest.mark.parametrize("name", ["consistency", "state_classifier", "learning_to_exit"])
    def test_what_states_tell(self, name):
        model, store = small_model(), told_store()
        losses = fit_estimators(model, store, [name], steps=200)
        assert losses[name] < 0.25
        fresh = told_store(100)
        scores = score_exits(name, fresh, None, criterion_settings(model))
        right = (scores < 0.5) if name == "learning_to_exit" else (scores > 0.5)
        assert bool(right[::2].all()) and not bool(right[1::2].any())

    def test_a_known_temperature(self):
        """Labels drawn from softmax(z/T) give T back."""
        model, store, wanted = small_model(), random_store(6000), 2.5
        store.logits = 4 * store.logits
        store.labels = (store.logits[:, 1] / wanted).softmax(-1).multinomial(
            1, generator=torch.Generator().manual_seed(0)
        ).squeeze(1)  # fmt: skip
        fit_estimators(model, store, ["calibrated_probability"])
        assert float(model.exit_estimators["calibrated_probability"].temperatures[1]) == pytest.approx(wanted, rel=0.1)

    def test_separable_logits_keep_a_temperature(self):
        model, store = small_model(), random_store()
        store.labels = store.logits[:, 0].argmax(-1)
        losses = fit_estimators(model, store, ["calibrated_probability"])
        temperatures = model.exit_estimators["calibrated_probability"].temperatures
        assert math.isfinite(losses["calibrated_probability"])
        assert bool(torch.isfinite(temperatures).all()) and bool((temperatures > 0).all())

    def test_only_entries_that_may_leave(self):
        """What others hold must not matter."""
        fitted = []
        for value in (0.0, 100.0):
            store = told_store(80)
            store.may_exit = torch.arange(80) < 60
            store.states[60:] = value
            model = small_model()
            losses = fit_estimators(model, store, OF_STORES, **FAST)
            fitted.append((losses, weights(model.exit_estimators)))
        assert fitted[0][0] == fitted[1][0] and not changed(fitted[0][1], fitted[1][1])

    @pytest.mark.parametrize("kind", ["rows", "tokens"])
    def test_nothing_else_changes(self, kind, tokens):
        if kind == "rows":
            model, store, names = small_model(), random_store(), OF_STORES
        else:
            model, store = tiny_llama(policy_inputs="both"), tokens[1]
            names = ["consistency", "learning_to_exit", "state_classifier"]
        before = weights(model)
        torch.manual_seed(11)
        expected = torch.rand(3)
        torch.manual_seed(11)
        losses = fit_estimators(model, store, names, **FAST)
        assert torch.equal(torch.rand(3), expected), "the caller's random numbers"
        assert not changed(before, weights(model))
        assert sorted(losses) == sorted(names) == model.config.exit_estimators == sorted(model.exit_estimators)
        assert all(math.isfinite(loss) for loss in losses.values())
        assert not any(parameter.requires_grad for parameter in model.exit_estimators.parameters())

    def test_the_model_trains_without_them(self):
        """Distributed training waits for every parameter that has a gradient to come."""
        model = small_model()
        fit_estimators(model, random_store(), ["consistency"], **FAST)
        model.requires_grad_(True)
        freeze_for_model_step(model, "all")
        assert not any(parameter.requires_grad for parameter in model.exit_estimators.parameters())
        assert model.classifier.weight.requires_grad

    def test_by_seed(self):
        fitted = []
        for seed in (0, 0, 1):
            model = small_model()
            losses = fit_estimators(model, random_store(), ["consistency"], seed=seed, **FAST)
            fitted.append((losses, weights(model.exit_estimators)))
        assert fitted[0][0] == fitted[1][0] and not changed(fitted[0][1], fitted[1][1])
        assert changed(fitted[0][1], fitted[2][1])

    def test_again(self):
        """A second fit replaces the first and leaves the others."""
        model = small_model()
        fit_estimators(model, random_store(), ["consistency", "state_classifier"], **FAST)
        before = weights(model.exit_estimators)
        fit_estimators(model, random_store(seed=1), ["state_classifier"], **FAST)
        after = weights(model.exit_estimators)
        assert changed(before, after) and all("state_classifier" in name for name in changed(before, after))
        assert model.config.exit_estimators == ["consistency", "state_classifier"]


class TestTokens:
    def test_scores_of_stored_tokens(self, tokens):
        """A store of tokens, without logits, gives the scores that logits give."""
        model, store = tokens
        names = ["consistency", "learning_to_exit", "state_classifier"]
        fit_estimators(model, store, names, **FAST)
        rows = instructions(20, seed=1)
        for name in names:
            scores = score_exits(name, store, model.exit_policies, criterion_settings(model))
            number = 0
            with torch.no_grad():
                for row in rows:
                    batch = collate_text([row])
                    output = model(**batch, output_all_exits=True)
                    history = score_row(model, name, output)
                    torch.testing.assert_close(scores[number : number + len(history)], history, rtol=0, atol=1e-4)
                    number += len(history)
            assert number == len(store)

    def test_refused(self, tokens):
        model, store = tokens
        with pytest.raises(ValueError, match=r"'calibrated_probability'.*logits of all heads"):
            fit_estimators(model, store, ["state_classifier", "calibrated_probability"], **FAST)
        plain = store.select(torch.arange(len(store)))
        plain.features = None
        with pytest.raises(ValueError, match=r"'consistency'.*no `features`.*policy_inputs"):
            fit_estimators(model, plain, ["consistency"], **FAST)


def score_row(model, name: str, output) -> torch.Tensor:
    """Scores (tokens, exits − 1) from full logits, with a criterion object of its own."""
    from transformers_cee.exits.criteria import CRITERIA, ExitStep, build_criterion

    walk = build_criterion(name, CRITERIA[name].off, 4, SINGLE, model.exit_policies, criterion_settings(model))
    states = output.all_exit_states
    steps = [ExitStep(i, states[:, i], lambda one, i=i: model.exit_logits(one, i)) for i in range(3)]
    return torch.stack([walk.score(step) for step in steps], dim=1)


class TestTokenHash:
    @given(
        st.lists(st.lists(st.integers(0, VOCABULARY - 1), max_size=30), min_size=1, max_size=5),
        st.sets(st.integers(0, VOCABULARY - 1), max_size=4),
    )
    def test_against_a_loop(self, corpus, special):
        model = _LLAMA
        counts = Counter(token for row in corpus for token in row if token not in special)
        if not counts:
            with pytest.raises(ValueError, match=r"`tokens` has no token beside"):
                fit_token_hash(model, corpus, special)
            return
        fit_token_hash(model, corpus, special)
        found = model.exit_estimators["token_hash"].exits.tolist()
        ranked = sorted(counts, key=lambda token: (-counts[token], token))
        for token in range(VOCABULARY):
            expected = ranked.index(token) * 4 // len(ranked) if token in counts else 3
            assert found[token] == expected
        sizes = Counter(found[token] for token in ranked)
        assert max(sizes.values()) - min(sizes.get(exit, 0) for exit in range(4)) <= 1

    def test_takes_tensors_and_generators(self):
        model = tiny_model()
        fit_token_hash(model, (torch.tensor([[5, 6], [5, 7]]) for _ in range(2)), [7])
        table = model.exit_estimators["token_hash"].exits
        assert [table[token].item() for token in (5, 6, 7, 8)] == [0, 3, 5, 5]
        assert model.config.exit_estimators == ["token_hash"]

    @pytest.mark.parametrize("arguments,message", [
        (([[5, VOCABULARY]],), rf"`tokens` holds {VOCABULARY}; accepted are ids in 0\.\.{VOCABULARY - 1}"),
        (([[5, -1]],), r"`tokens` holds -1"),
        (([[5]], [99]), r"`special_tokens` holds 99"),
        (([],), r"`tokens` has no token"),
    ])  # fmt: skip
    def test_refused(self, arguments, message):
        model = tiny_model()
        with pytest.raises(ValueError, match=message):
            fit_token_hash(model, *arguments)
        assert model.config.exit_estimators == [] and not len(model.exit_estimators)


_LLAMA = tiny_llama()


class TestSaved:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("load", [BertForConsistentEE, AutoModelForSequenceClassification])
    def test_round_trip(self, load, dtype, tmp_path):
        model = small_model().to(dtype)
        fit_estimators(model, random_store(), OF_STORES, **FAST)
        rows = pad(random_rows(12, seed=1))
        fit_token_hash(model, [rows["input_ids"]], [7])
        model.save_pretrained(tmp_path)
        again = load.from_pretrained(tmp_path, dtype=dtype).eval()
        assert again.config.exit_estimators == sorted(ESTIMATORS)
        before, after = model.exit_estimators.state_dict(), again.exit_estimators.state_dict()
        assert before.keys() == after.keys()
        assert all(
            torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before
        )
        with torch.no_grad():
            for name in ESTIMATORS:
                first = model(**rows, exit_criterion=name, exit_threshold=0.5)
                second = again(**rows, exit_criterion=name, exit_threshold=0.5)
                assert first.exit_layers.tolist() == second.exit_layers.tolist()
                torch.testing.assert_close(first.logits, second.logits)

    @pytest.mark.parametrize("make", [tiny_model, tiny_llama])
    def test_checkpoints_without_them(self, make, tmp_path):
        """Estimators that a checkpoint lacks are as if never fitted, not what was in the memory."""
        make().save_pretrained(tmp_path)
        model = type(make()).from_pretrained(tmp_path, exit_estimators=sorted(ESTIMATORS))
        temperatures, table = (model.exit_estimators[name] for name in ("calibrated_probability", "token_hash"))
        assert temperatures.temperatures.tolist() == [1.0] * (len(model.layer_numbers) - 1)
        assert table.exits.tolist() == [len(model.layer_numbers) - 1] * VOCABULARY
        assert all(bool(torch.isfinite(value).all()) for value in model.exit_estimators.state_dict().values())

    def test_decoder(self, tokens, tmp_path):
        model = tiny_llama(policy_inputs="both")
        fit_estimators(model, tokens[1], ["state_classifier"], **FAST)
        fit_token_hash(model, [[5, 6, 7]])
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
        assert not changed(weights(model), weights(again)) and weights(model).keys() == weights(again).keys()


class TestRefused:
    @pytest.mark.parametrize(
        "names,message",
        [
            (["luck"], r"`names`=\['luck'\] must be a list of names among calibrated_probability"),
            ("consistency", r"`names`='consistency' must be a list"),
            (["token_hash"], r"'token_hash' is fitted on token ids, by `fit_token_hash`"),
        ],
    )
    def test_names(self, names, message):
        with pytest.raises(ValueError, match=message):
            fit_estimators(small_model(), random_store(), names)

    @pytest.mark.parametrize("name", ["learning_to_exit", "calibrated_probability"])
    def test_no_labels(self, name):
        """Before anything is fitted; what looks at predictions alone needs none."""
        model, store = small_model(), random_store()
        known = {
            one: fit_estimators(small_model(), store, [one], **FAST) for one in ("consistency", "state_classifier")
        }
        store.labels = torch.full((40,), math.nan)
        with pytest.raises(ValueError, match=f"`names` has '{name}', which is fitted on labels"):
            fit_estimators(model, store, ["consistency", name])
        assert not model.config.exit_estimators
        for one, losses in known.items():
            assert fit_estimators(model, store, [one], **FAST) == losses

    @pytest.mark.parametrize("name", ["consistency", "calibrated_probability"])
    def test_regression(self, name):
        message = (
            f"`names` has '{name}': .*'regression' has no class probabilities; accepted are 'learning_to_exit' and"
        )
        with pytest.raises(ValueError, match=message):
            fit_estimators(small_model(REGRESSION), random_store(problem_type=REGRESSION), [name])

    @pytest.mark.parametrize("options,message", [
        ({"steps": 0}, r"`steps`=0"),
        ({"batch_size": 0}, r"`batch_size`=0"),
        ({"learning_rate": 0.0}, r"`learning_rate`=0\.0"),
    ])  # fmt: skip
    def test_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            fit_estimators(small_model(), random_store(), ["consistency"], **options)

    def test_stores(self):
        with pytest.raises(ValueError, match=r"`store` has exits at layers \[1, 2, 3, 4\].*this model has \[2, 4\]"):
            fit_estimators(small_model(exit_layers=[2]), random_store(), ["consistency"])
        with pytest.raises(ValueError, match=r"`store` has no entry that can leave"):
            store = random_store(may_exit=torch.zeros(40, dtype=torch.bool))
            fit_estimators(small_model(), store, ["consistency"])
        store = ExitStore(
            torch.zeros(3, 1, 32), torch.zeros(3, 1, 3), torch.zeros(3).long(), torch.tensor([4]), SINGLE
        )
        with pytest.raises(ValueError, match=r"`model` has no exit before its last layer"):
            fit_estimators(small_model(exit_layers=[4]), store, ["consistency"])

    def test_nothing_is_fitted_then(self):
        model = small_model()
        with pytest.raises(ValueError, match=r"luck"):
            fit_estimators(model, random_store(), ["consistency", "luck"])
        assert model.config.exit_estimators == [] and not len(model.exit_estimators)
