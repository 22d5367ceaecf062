# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Answers, known text and scores of criteria, against slow references."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import VOCABULARY, tiny_llama
from torch.nn import functional as F

from transformers_cee.evaluation.answers import (
    FULL_DEPTH,
    Answers,
    TeacherForced,
    answer,
    pad_left,
    teacher_forced,
)


SETTINGS = [
    {"exit_criterion": "policy", "exit_threshold": 0.5},
    {"exit_criterion": "max_probability", "exit_threshold": 0.2},
    {"exit_criterion": "margin", "exit_threshold": 0.1},
]


@pytest.fixture(scope="module")
def model():
    return tiny_llama(exit_layers=[1, 2, 3])


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in (2, 7, 4, 5, 3)]


def greedy(model, prompt, settings, count):
    """Answer of one prompt by `generate` on it alone."""
    output = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        **settings,
    )
    return output.sequences[0, len(prompt) :].tolist(), output.exit_layers[0].tolist()


def test_padding_goes_to_the_left():
    batch = pad_left([[5], [6, 7, 8]], pad=0)
    assert batch["input_ids"].tolist() == [[0, 0, 5], [6, 7, 8]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]


def test_rows_of_answers():
    # One row of 3 tokens that ended, one of 4: 7 tokens, 5 of them after the first.
    tokens = torch.tensor([[7, 8, 2, 0], [7, 9, 9, 9]])
    layers = torch.tensor([[4, 1, 2, 0], [4, 4, 1, 1]])
    made = Answers(tokens, layers)
    assert made.count == 7
    assert made.rows() == [([7, 8, 2], [4, 1, 2]), ([7, 9, 9, 9], [4, 4, 1, 1])]
    assert made.after_first().count == 5
    assert made.after_first().rows() == [([8, 2], [1, 2]), ([9, 9, 9], [4, 1, 1])]
    assert Answers(tokens[:, :1], layers[:, :1]).after_first().count == 0


@pytest.mark.parametrize("settings", [FULL_DEPTH, *SETTINGS])
def test_answers_of_a_batch_are_those_of_single_prompts(model, prompts, settings):
    made = answer(model, prompts, 6, pad=0, **settings)
    for (tokens, layers), prompt in zip(made.rows(), prompts, strict=True):
        wanted, wanted_layers = greedy(model, prompt, settings, 6)
        assert tokens == wanted
        assert layers == wanted_layers
    if settings is not FULL_DEPTH:
        assert len({layer for _, layers in made.rows() for layer in layers}) > 1


def test_perplexity_by_hand(model, prompts):
    answers = [[9, 11], [4], [30, 31, 32], [], [8, 2]]
    result = teacher_forced(model, prompts, answers, 2, pad=0, **FULL_DEPTH)
    losses = []
    for prompt, tokens in zip(prompts, answers, strict=True):
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[0]
        for index, token in enumerate(tokens):
            losses.append(F.cross_entropy(logits[len(prompt) + index - 1], torch.tensor(token)).item())
    assert result.tokens == len(losses) == 8
    assert result.decided == 4
    assert result.perplexity == pytest.approx(math.exp(sum(losses) / 8), rel=1e-4)
    assert math.isnan(TeacherForced().perplexity)
    assert math.isnan(TeacherForced().agreement)


@pytest.mark.parametrize("settings", SETTINGS)
def test_known_text_leaves_where_generation_leaves(model, prompts, settings):
    """An answer that was generated with exits is what the exits choose when they are fed it."""
    made = answer(model, prompts, 8, pad=0, skipped_kv="copy", **settings)
    answers = [tokens for tokens, _ in made.rows()]
    assert teacher_forced(model, prompts, answers, 3, pad=0, **settings).agreement == 1.0


@pytest.mark.parametrize("settings", SETTINGS)
def test_agreement_by_hand(model, prompts, settings):
    full = [greedy(model, prompt, FULL_DEPTH, 8)[0] for prompt in prompts]
    matches = decided = 0
    for prompt, tokens in zip(prompts, full, strict=True):
        ids = torch.tensor([[*prompt, *tokens]])
        labels = torch.tensor([[-100] * len(prompt) + tokens])
        chosen = model(ids, labels=labels, **settings).logits[0].argmax(-1).tolist()
        for index in range(1, len(tokens)):
            decided += 1
            matches += chosen[len(prompt) + index - 1] == tokens[index]
    result = teacher_forced(model, prompts, full, 2, pad=0, **settings)
    assert (result.matches, result.decided) == (matches, decided)
    assert result.agreement < 1 or settings["exit_criterion"] != "policy"
