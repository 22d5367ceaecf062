# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What drafters propose, and how they learn whether it holds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_llama
from transformers import StoppingCriteriaList

from transformers_cee.fitting.drafter import fit_drafter
from transformers_cee.generation import drafters
from transformers_cee.generation.draft_costs import DraftCosts
from transformers_cee.generation.drafting import Drafter, Drafting, Guess, JumpDrafts, PromptLookup
from transformers_cee.generation.drafts_pay import DraftsPay
from transformers_cee.generation.growing import GrowingTexts
from transformers_cee.generation.verifying import Verification


def looked_up(text, ngram):
    """What followed the longest and latest match of the last tokens, row by row; and how many were the same."""
    for length in range(min(ngram, len(text) - 1), 0, -1):
        for end in range(len(text) - 1, length - 1, -1):
            if text[end - length : end] == text[-length:]:
                return text[end:], length
    return [], 0


@given(
    st.lists(st.lists(st.integers(3, 6), min_size=1, max_size=12), min_size=1, max_size=4),
    st.integers(1, 4),
    st.integers(1, 6),
)
def test_lookup_beside_a_slow_search(rows, ngram, most):
    short = min(map(len, rows))
    texts = GrowingTexts(torch.tensor([row[:short] for row in rows]), 20, most + 1, StoppingCriteriaList())
    for place, row in enumerate(rows):
        texts.tokens[place, : len(row)] = torch.tensor(row)
    texts.lengths = torch.tensor([len(row) for row in rows])
    drafter = PromptLookup(most, ngram)
    # Drafts that cost nothing are proposed wherever one has a chance.
    drafts = drafter.draft(Drafting(None, texts, None, None), texts.room, DraftsPay(0.0, 0.0))
    found = [looked_up(row, ngram) for row in rows]
    assert drafter.guess.said.tolist() == [bool(tokens) for tokens, _ in found]
    # Rows that are ahead do not say how many columns there are.
    behind = [tokens for (tokens, _), row in zip(found, rows, strict=True) if len(row) == short]
    longest = max(len(tokens[:most]) for tokens in behind)
    assert longest == (0 if drafts is None else drafts.tokens.shape[1])
    for place, (tokens, same) in enumerate(found):
        if tokens:
            assert int(drafter.guess.tokens[place]) == tokens[0]
            assert int(drafter.guess.kinds[place]) == min(same, len(drafter.kinds)) - 1
        if drafts is not None:
            count = min(len(tokens), longest)
            assert int(drafts.counts[place]) == count and drafts.tokens[place, :count].tolist() == tokens[:count]


def test_rows_that_are_furthest_behind_count():
    texts = GrowingTexts(torch.full((4, 3), 7), 9, 2, StoppingCriteriaList())
    texts.lengths = torch.tensor([5, 4, 4, 3])
    texts.grows = torch.tensor([True, True, True, False])
    assert texts.behind.tolist() == [False, True, True, False]
    assert float(texts.mean(torch.tensor([1.0, 0.5, 0.0, 1.0]))) == 0.25
    assert texts.reach(torch.tensor([3, 1, 2, 3]), 3) == [1.0, 0.5]
    chances = torch.tensor([[0.9, 0.8, 0.7]] * 2 + [[0.5, 0.25, 0.1]] * 2)
    assert texts.reach(torch.tensor([3, 1, 2, 3]), 3, chances) == pytest.approx([0.7, 0.125])


class Lessons:
    """What a drafter was told: of each pass, the guess and what was said of it."""

    def __init__(self, drafter) -> None:
        self.drafter, self.guesses, self.told = drafter, [], []
        note = drafter.chances.note

        def noted(kinds, held):
            self.guesses.append(drafter.guess)
            self.told.append((kinds.tolist(), [float(one) for one in held]))
            note(kinds, held)

        drafter.chances.note = noted


def written(model, drafter, prompt, costs, new=12, **asked):
    """A text of `generate` whose drafts are verified, and the passes' counts of proposed drafts."""
    found = Verification(model, [drafter], lambda rows: costs)
    asked = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | asked
    return model.generate(prompt, custom_generate=found, **asked), found.proposed


def with_drafter():
    model = tiny_llama(drafter_layer=3)
    fit_drafter(model, [{"input_ids": torch.tensor([[3, 4, 5, 3, 4, 5, 3, 4]])}])
    return model


PROMPT = torch.tensor([[3, 4, 5, 3, 4, 5, 3, 4], [7, 8, 7, 8, 7, 8, 7, 8]])
# Drafts are free, and verifying them takes so long that none is proposed; or everything is free.
DEAR, FREE = DraftCosts(0.99, 0.0, 0.0), DraftCosts(0.0, 0.0, 0.0)


def test_looked_up_tokens_that_are_not_proposed_are_judged():
    model, drafter = tiny_llama(), PromptLookup(4, 3)
    drafter.chances.held[:] = 0.0
    lessons = Lessons(drafter)
    text, proposed = written(model, drafter, PROMPT, DEAR)
    assert text.tolist() == model.generate(PROMPT, max_new_tokens=12, do_sample=False, eos_token_id=None).tolist()
    assert not any(int(one.clamp_min(0).sum()) for one in proposed)
    wanted = []
    for place in range(9, text.shape[1]):
        found = [(looked_up(row[:place], 3), row[place]) for row in text.tolist()]
        found = [(tokens[0] == got, same - 1) for (tokens, same), got in found if tokens]
        wanted.append(([kind for _, kind in found], [float(hit) for hit, _ in found]))
    assert lessons.told == wanted


def test_jumps_that_are_not_proposed_are_judged():
    model = with_drafter()
    drafter = JumpDrafts(model, 4)
    drafter.chances.held[:] = 0.0
    lessons = Lessons(drafter)
    text, proposed = written(model, drafter, PROMPT, DEAR)
    assert text.tolist() == model.generate(PROMPT, max_new_tokens=12, do_sample=False, eos_token_id=None).tolist()
    assert lessons.told and not any(int(one.clamp_min(0).sum()) for one in proposed)
    # The first pass has no state to start from; then each has one token, until the drafter rests.
    for place, (guess, (kinds, held)) in enumerate(zip(lessons.guesses, lessons.told, strict=True), start=10):
        assert kinds == guess.kinds.tolist()
        if place < 12:
            assert held == (guess.tokens == text[:, place]).float().tolist()


@pytest.mark.parametrize(("judged", "trusted"), [([[0], [0]], True), ([[90], [90]], True), ([[90], [9]], False)])
def test_a_drafter_that_brought_little_in_training_is_not_trusted(judged, trusted):
    model = with_drafter()
    model.exit_drafter.judged[:] = 0
    model.exit_drafter.judged[:, 4:5] = torch.tensor(judged)
    found = Verification(
        model, [PromptLookup(4, 3), JumpDrafts(model, 4)], lambda rows: DraftCosts(0.2, 0.05, 0.1, 0.1)
    )
    model.generate(PROMPT, custom_generate=found, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert {name: pays.trusted for name, pays in found.pays.items()} == {"lookup": True, "jump": trusted}


def proposals(drafter):
    """What the drafter will have proposed, pass by pass."""
    found, draft = [], drafter.draft
    drafter.draft = lambda *given: found.append(draft(*given)) or found[-1]
    return found


@pytest.mark.parametrize(("scale", "kind"), [(0.0, 0), (1e6, 9)])
def test_what_is_proposed_is_what_is_judged(scale, kind):
    """The first draft, of the kind that its probability makes it."""
    model = with_drafter()
    drafter = JumpDrafts(model, 1)
    drafter.head = drafter.head * scale
    lessons, first = Lessons(drafter), proposals(drafter)
    drafter.chances.held[:] = drafter.chances.tried
    written(model, drafter, PROMPT, FREE)
    proposed = [one for one in first if one is not None]
    assert len(proposed) == len(lessons.guesses) > 2
    for drafts, guess, (kinds, _) in zip(proposed, lessons.guesses, lessons.told, strict=True):
        here = drafts.counts > 0
        assert drafts.tokens[here, 0].tolist() == guess.tokens[here].tolist()
        assert set(kinds) <= {kind} and set(guess.kinds.tolist()) == {kind}


def test_other_choices_are_the_next_most_probable_and_are_judged():
    model = with_drafter()
    drafter = JumpDrafts(model, 2)
    found, lessons = proposals(drafter), []
    note = drafter.other_chances.note
    drafter.other_chances.note = lambda *told: lessons.append(told) or note(*told)
    guesses = Lessons(drafter).guesses
    text = written(model, drafter, PROMPT, FREE)[0]
    assert text.tolist() == model.generate(PROMPT, max_new_tokens=12, do_sample=False, eos_token_id=None).tolist()
    drafted = [one for one in found if one is not None]
    assert len(drafted) == len(lessons) == len(guesses) > 3
    for drafts, (kinds, held), guess in zip(drafted, lessons, guesses, strict=True):
        # One lesson for each choice of the rows that still grow.
        assert drafts.others.shape[1] == 3 and len(kinds) == len(held) and len(kinds) in (3, 6)
        assert set(kinds.tolist()) <= set(guess.other_kinds.flatten().tolist())
        chosen = torch.cat((guess.tokens.unsqueeze(1), guess.others), 1)
        assert all(len(set(row)) == 4 for row in chosen.tolist())
        assert held.sum() <= len(PROMPT)
    assert any(held.any() for _, held in lessons)


@pytest.mark.parametrize("asked", [{"do_sample": True}, {"repetition_penalty": 1.2}])
def test_there_are_no_other_choices_where_tokens_are_drawn_or_depend_on_the_text(asked):
    model = with_drafter()
    drafter = JumpDrafts(model, 2)
    found = proposals(drafter)
    written(model, drafter, PROMPT, FREE, **asked)
    drafted = [one for one in found if one is not None]
    assert len(drafted) > 1 and all(one.others is None for one in drafted)


def test_other_choices_that_do_not_pay_are_not_proposed():
    model = with_drafter()
    drafter = JumpDrafts(model, 1)
    found = proposals(drafter)
    drafter.other_chances.note = lambda *told: None
    drafter.other_chances.held[:] = 0.02 * drafter.other_chances.tried
    drafter.chances.held[:] = drafter.chances.tried
    _, proposed = written(model, drafter, PROMPT, DraftCosts(0.2, 0.0, 0.0))
    drafted = [one for one in found if one is not None and one.tokens.shape[1]]
    assert drafted and all(one.others is None for one in drafted)
    assert max(int(one.max()) for one in proposed) == 1


@torch.no_grad()
@pytest.mark.parametrize("drawn", [False, True])
def test_lessons_where_tokens_are_drawn(drawn):
    """How probable it is that a draft is accepted, whether it is proposed or not."""
    model = tiny_llama()
    vocabulary, told = model.config.vocab_size, []

    class Fixed(Drafter):
        name = "fixed"
        kinds = (0.0,)

        def draft(self, drafting, room, pays):
            rows = len(room)
            given = torch.linspace(0, 1, vocabulary).softmax(0).expand(rows, -1) if drawn else None
            nothing = torch.zeros(rows, dtype=torch.long)
            self.guess = Guess(torch.full((rows,), 5), nothing, nothing == 0, given)
            told.append([row.tolist() for row in drafting.texts.tokens[:, : int(drafting.texts.lengths.max())]])

    drafter = Fixed(1)
    lessons = Lessons(drafter)
    written(model, drafter, PROMPT, FREE, new=5, do_sample=True, temperature=0.7, top_k=0)
    assert len(told) == len(lessons.told) == 4
    for texts, (_, held) in zip(told, lessons.told, strict=True):
        for row, chance in zip(texts, held, strict=True):
            model_says = (model(torch.tensor([row])).logits[0, -1] / 0.7).softmax(-1)
            given = torch.linspace(0, 1, vocabulary).softmax(0)
            wanted = sum(min(p, q) for p, q in zip(model_says.tolist(), given.tolist(), strict=True))
            assert chance == pytest.approx(wanted if drawn else float(model_says[5]), rel=1e-4)


@pytest.mark.parametrize("verify", [0.02, 0.1])
def test_an_exit_that_is_always_right_drafts(verify, monkeypatch):
    """Whatever was expected of it before."""
    model = tiny_llama(num_hidden_layers=8, max_position_embeddings=128).double()
    with torch.no_grad():
        for layer in model.model.layers[2:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        for name, weight in model.named_parameters():
            if "exit_norms" in name or name == "model.norm.weight":
                weight.fill_(1.0)
    monkeypatch.setattr(drafters, "draft_costs", lambda model, rows: DraftCosts(verify, 0.1125, 0.1, verify))
    asked = {"max_new_tokens": 100, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    output = model.generate(
        PROMPT[:1], assistant_early_exit=3, exit_threshold=0.0, exit_criterion="max_probability", exit_verify=True,
        return_dict_in_generate=True, **asked,
    )  # fmt: skip
    assert output.sequences.tolist() == model.generate(PROMPT[:1], **asked).tolist()
    assert output.tokens_per_pass > 3


def test_a_drafter_of_no_numbers_and_another_default_device():
    """Texts are written all the same."""
    model = with_drafter()
    expected = model.generate(PROMPT, max_new_tokens=8, do_sample=False, eos_token_id=None)
    torch.nn.init.constant_(model.exit_drafter.predictor.weight, torch.nan)
    torch.set_default_device("meta")
    try:
        drafter = JumpDrafts(model, 4)
    finally:
        torch.set_default_device(None)
    assert written(model, drafter, PROMPT, FREE, new=8)[0].tolist() == expected.tolist()
    assert drafter.chances.tried.device.type == "cpu"
