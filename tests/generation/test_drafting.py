# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What drafters propose, and how they learn whether it holds."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_llama
from transformers import StoppingCriteriaList

from transformers_cee.fitting.drafter import fit_drafter
from transformers_cee.generation.draft_costs import DraftCosts
from transformers_cee.generation.drafting import Drafting, JumpDrafts, PromptLookup
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
    longest = max(len(tokens[:most]) for tokens, _ in found)
    assert longest == (0 if drafts is None else drafts.tokens.shape[1])
    for place, (tokens, same) in enumerate(found):
        if tokens:
            count = min(len(tokens), most)
            assert int(drafts.counts[place]) == count and drafts.tokens[place, :count].tolist() == tokens[:count]
            assert int(drafter.guess.tokens[place]) == tokens[0]
            assert int(drafter.guess.kinds[place]) == min(same, len(drafter.kinds)) - 1
        elif drafts is not None:
            assert int(drafts.counts[place]) == 0


@pytest.mark.parametrize("name", ["lookup", "jump"])
def test_drafts_that_are_not_proposed_are_judged(name):
    """Where verifying is too dear nothing is proposed, and what would have held is learned all the same."""
    model = tiny_llama(**({"drafter_layer": 3} if name == "jump" else {}))
    prompt = torch.tensor([[3, 4, 5, 3, 4, 5, 3, 4], [7, 8, 7, 8, 7, 8, 7, 8]])
    if name == "jump":
        fit_drafter(model, [{"input_ids": prompt[:1]}])
    drafter = PromptLookup(4, 3) if name == "lookup" else JumpDrafts(model, 4)
    # Free drafts that pay if they are certain to hold, which none is.
    costs = DraftCosts(0.99, 0.0, 0.0)
    drafter.chances.held[:] = 0.0
    ways = partial(Verification, model, [drafter], lambda rows: costs)
    told = []
    note = drafter.chances.note
    drafter.chances.note = lambda kinds, held: (told.append((kinds.tolist(), held.tolist())), note(kinds, held))
    found = ways()
    expected = model.generate(prompt, max_new_tokens=12, do_sample=False)
    output = model.generate(
        prompt, max_new_tokens=12, do_sample=False, custom_generate=found, return_dict_in_generate=True
    )
    assert output.sequences.tolist() == expected.tolist()
    assert not any(int(one.clamp_min(0).sum()) for one in found.proposed)
    if name == "lookup":
        wanted = []
        for place in range(9, expected.shape[1]):
            kinds, held = [], []
            for row in expected.tolist():
                tokens, same = looked_up(row[:place], 3)
                if tokens:
                    kinds.append(same - 1)
                    held.append(tokens[0] == row[place])
            wanted.append((kinds, held))
        assert told == wanted
    else:
        # The first pass has no state to start from, and a drafter that brings nothing rests.
        assert told and all(len(kinds) == 2 for kinds, _ in told)
