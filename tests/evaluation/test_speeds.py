# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Speeds of answers on a clock that counts the rows that run through layers, and limits of them against loops."""

from __future__ import annotations

import json

import pytest
import torch
from clocks import layer_clock
from hypothesis import given
from hypothesis import strategies as st
from tiny import VOCABULARY, tiny_llama

from transformers_cee.evaluation.answers import Answers, answer
from transformers_cee.evaluation.operating_points import FULL_DEPTH
from transformers_cee.evaluation.report import write_results
from transformers_cee.evaluation.speeds import FIGURES, Speed, allowed_speedup, measure_speed
from transformers_cee.evaluation.timing import Figure, Timer


POLICY = {"exit_criterion": "policy", "exit_threshold": 0.5}
ALL_AT_ONCE = {"exit_criterion": "policy", "exit_threshold": 0.0}


@pytest.fixture
def model():
    model = tiny_llama(exit_layers=[1, 2, 3]).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in (2, 7, 4, 5)]


def measure(model, batches, settings, count=6):
    timer = Timer(rounds=3, clock=layer_clock(model.model.layers))
    return measure_speed(model, batches, settings, count, 0, timer)


def test_speeds_are_those_of_what_ran(model, prompts):
    """One second per call of a layer: a prompt takes 4, and a token as many as its exit says."""
    found = measure(model, [[prompt] for prompt in prompts], POLICY)
    layers = [answer(model, [prompt], 6, 0, **POLICY).exit_layers for prompt in prompts]
    whole, first = sum(int(one.sum()) for one in layers), 4 * len(prompts)
    assert first < whole - first < 20 * len(prompts), "exits that differ"
    tokens, later = 6 * len(prompts), 5 * len(prompts)
    assert found.tokens_per_second == pytest.approx(tokens / whole)
    assert found.full_tokens_per_second == pytest.approx(1 / 4)
    assert found.speedup == pytest.approx(24 * len(prompts) / whole)
    assert found.decode_tokens_per_second == pytest.approx(later / (whole - first))
    assert found.full_decode_tokens_per_second == pytest.approx(1 / 4)
    assert found.decode_speedup == pytest.approx(20 * len(prompts) / (whole - first))
    assert found.prompts == len(prompts)
    assert found.spreads == dict.fromkeys(FIGURES, 0.0) and found.noisy == {}


def test_answers_of_one_token_have_no_speed_without_prompt(model, prompts):
    found = measure(model, [prompts[:1]], ALL_AT_ONCE, count=1)
    assert (found.speedup, found.decode_speedup, found.decode_tokens_per_second) == (1.0, None, None)
    assert found.figure("decode_speedup").text() == "-"


def test_more_speed_than_was_saved_is_noise(model, prompts, tmp_path):
    """The last layer takes as long as eleven others."""
    timer = Timer(rounds=3, attempts=1, clock=layer_clock([*model.model.layers, *[model.model.layers[-1]] * 10]))
    found = measure_speed(model, [prompts[:1]], ALL_AT_ONCE, 6, 0, timer)
    assert found.speedup is None and found.decode_speedup is None
    assert found.noisy["speedup"] == pytest.approx(6 * 14 / (14 + 5))
    assert found.figure("speedup").text() == "noise"
    read = json.loads(write_results({"speed": vars(found)}, tmp_path / "results.json").read_text())["speed"]
    assert read["speedup"] is None and read["noisy"]["speedup"] == found.noisy["speedup"]
    assert Speed(**read) == found


def test_results_without_spreads_still_load():
    old = {"tokens_per_second": 20.0, "decode_tokens_per_second": None, "full_tokens_per_second": 10.0}
    old |= {"full_decode_tokens_per_second": None, "speedup": 2.0, "decode_speedup": None, "prompts": 4}
    assert Speed(**old).figure("speedup").text() == "2.00x"


def test_figures_by_name():
    found = Speed.of({"speedup": Figure(6.1, 0.01, 1.13), "tokens_per_second": Figure(5.0, 0.1)}, 2)
    assert (found.speedup, found.tokens_per_second, found.decode_speedup) == (None, 5.0, None)
    assert found.noisy == {"speedup": 6.1} and found.spreads == {"speedup": 0.01, "tokens_per_second": 0.1}


ROWS = st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=5), min_size=1, max_size=3)


def answers_of(rows):
    longest = max(map(len, rows))
    layers = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    return Answers(torch.zeros_like(layers), layers)


def slow_seconds(rows, call, row_price, fixed):
    """Of a batch: steps call as many layers as their deepest row, and every row runs through its own."""
    seconds = fixed
    for step in range(max(map(len, rows))):
        there = [row[step] for row in rows if step < len(row)]
        seconds += call * max(there) + row_price * sum(there)
    return seconds


@given(ROWS, ROWS, st.floats(0, 10), st.floats(0.01, 10), st.floats(0, 100), st.booleans())
def test_no_machine_is_faster_than_allowed(early, full, call, row_price, prompt, has_prompt):
    full = [[4] * len(row) for row in full]
    fixed = prompt if has_prompt else 0.0
    allowed = allowed_speedup([answers_of(full)], [answers_of(early)], has_prompt)
    seconds = [slow_seconds(rows, call, row_price, fixed) for rows in (full, early)]
    tokens = [sum(map(len, rows)) for rows in (full, early)]
    assert tokens[1] / tokens[0] * seconds[0] / seconds[1] <= allowed * (1 + 1e-9)


def test_answers_of_one_length_are_allowed_the_layers_that_they_save():
    full, early = answers_of([[4, 4, 4, 4]]), answers_of([[4, 1, 2, 1]])
    assert allowed_speedup([full], [early], has_prompt=True) == pytest.approx(16 / 8)
    # One answer of a single token, the other of four: its prompt is spread over four.
    assert allowed_speedup([answers_of([[4]])], [early], has_prompt=True) == pytest.approx(4.0)


def test_full_depth_is_no_faster_than_itself(model, prompts):
    assert measure(model, [prompts[:2]], FULL_DEPTH).speedup == 1.0
