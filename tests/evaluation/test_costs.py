# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Costs of exits against torch's own counter of what a forced exit really executes."""

from __future__ import annotations

import math
from itertools import accumulate, count

import pytest
import torch
from clocks import layer_clock
from tiny import pad, random_rows, tiny_llama, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from transformers_cee import BertCeeConfig, BertForConsistentEE
from transformers_cee.evaluation.costs import exit_cost_figures, exit_costs, measured_exit_costs
from transformers_cee.evaluation.timing import Timer
from transformers_cee.generation.cache import EarlyExitCache


LENGTH = 7
ALMOST = math.nextafter(1.0, 0.0)
CLOSED = {"policy": ALMOST, "max_probability": ALMOST, "entropy": 1e-30}
OPEN = {"policy": 0.0, "max_probability": 0.0, "entropy": 1.0}


def forced(criterion: str, index: int, count: int) -> list[float]:
    return [CLOSED[criterion]] * index + [OPEN[criterion]] * (count - index)


def executed(model, inputs: dict, criterion: str) -> list[int]:
    """FLOPs that torch counts when one row is sent to each exit."""
    counted = []
    numbers = model.layer_numbers
    for index, layer in enumerate(numbers):
        counter = FlopCounterMode(display=False)
        call = {name: value() if callable(value) else value for name, value in inputs.items()}
        with torch.no_grad(), counter:
            threshold = forced(criterion, index, len(numbers))
            output = model(**call, exit_criterion=criterion, exit_threshold=threshold)
        assert output.exit_layers.flatten().tolist() == [layer]
        counted.append(counter.get_total_flops())
    return counted


@pytest.mark.parametrize(
    ("fields", "criterion"),
    [
        ({}, "policy"),
        ({"exit_layers": [2, 5]}, "policy"),
        ({"exit_pooling": "mean", "exit_norm": "layer_norm"}, "policy"),
        ({"policy_inputs": "both", "policy_condition": "input"}, "policy"),
        ({"policy_inputs": "confidence", "policy_condition": "film"}, "policy"),
        ({"exit_layers": 2}, "max_probability"),
        ({"exit_pooling": "mean"}, "entropy"),
    ],
)
def test_bert_flops_are_those_that_torch_counts(fields, criterion):
    model = tiny_model(attn_implementation="eager", **fields)
    inputs = {"input_ids": torch.arange(3, 3 + LENGTH).unsqueeze(0)}
    assert exit_costs(model, LENGTH, criterion=criterion) == executed(model, inputs, criterion)


@pytest.mark.parametrize("kind", ["shared", "norm", "low_rank", "untied", "layernorm_linear"])
@pytest.mark.parametrize("skipped_kv", ["copy", "deferred"])
@pytest.mark.parametrize("criterion", ["policy", "max_probability"])
def test_llama_flops_are_those_that_torch_counts(kind, skipped_kv, criterion):
    model = tiny_llama(attn_implementation="eager", exit_head=kind, exit_head_rank=3, skipped_kv=skipped_kv)
    prompt = torch.arange(3, 3 + LENGTH - 1).unsqueeze(0)

    def cache():
        return EarlyExitCache.from_cache(model(prompt, use_cache=True).past_key_values, 4)

    with torch.no_grad():
        caches = [cache() for _ in model.layer_numbers]
    inputs = {"input_ids": torch.tensor([[9]]), "past_key_values": lambda: caches.pop()}
    with FlopCounterMode(display=False) as rotary:
        model.model.rotary_emb(torch.zeros(1, 1, 32), position_ids=torch.tensor([[LENGTH - 1]]))
    counted = [flops - rotary.get_total_flops() for flops in executed(model, inputs, criterion)]
    assert exit_costs(model, LENGTH, criterion=criterion) == counted


def test_exits_before_the_first_open_one_are_not_asked():
    every, later = tiny_llama(), tiny_llama(min_exit_layer=3)
    policy = 2 * 32 * 32 + 2 * 32
    assert exit_costs(every, 5)[3] - exit_costs(later, 5)[3] == 2 * policy
    head = 2 * 32 * 60
    difference = exit_costs(every, 5, criterion="margin")[3] - exit_costs(later, 5, criterion="margin")[3]
    assert difference == 2 * head
    # What remembers all exits asks them all.
    assert exit_costs(every, 5, criterion="exit_cdf") == exit_costs(later, 5, criterion="exit_cdf")


def test_layers():
    assert exit_costs(tiny_model(exit_layers=2), 128, unit="layers") == [2.0, 4.0, 6.0]


def test_bert_base_by_hand():
    with torch.device("meta"):
        model = BertForConsistentEE(BertCeeConfig(num_labels=2))
    found = exit_costs(model, 128)
    layer = 2 * 128 * (4 * 768 * 768 + 2 * 768 * 3072) + 4 * 128 * 128 * 768
    assert found[0] == layer + 2 * 768 * 768 + 2 * 768 * 32 + 2 * 32 + 2 * 768 * 2
    # BERT-base at 128 tokens is known as 22.4 GFLOPs.
    assert found[-1] == pytest.approx(22.4e9, rel=0.01)


def test_measured_costs_are_those_of_forced_exits():
    """A clock that ticks once per layer that ran: the cost of an exit is its layer, per row."""
    model = tiny_model(exit_layers=[2, 3]).train()
    timer = Timer(rounds=3, clock=layer_clock(model.bert.encoder.layer))
    batches = [pad(random_rows(2, seed)) for seed in range(3)]
    assert measured_exit_costs(model, batches, timer, disable_tqdm=True) == [1000.0, 1500.0, 3000.0]
    assert model.training


@pytest.mark.parametrize("first_layer", [None, 2, 4])
def test_measured_costs_of_a_decoder_are_those_of_one_token(first_layer):
    model = tiny_llama(exit_layers=[1, 3], min_exit_layer=first_layer)
    timer = Timer(rounds=3, clock=layer_clock(model.model.layers))
    rows = [{"input_ids": row["input_ids"]} for row in random_rows(2, 0)]
    batches = [pad(rows, side="left"), {"input_ids": torch.tensor([[3, 4], [5, 6]])}]
    assert measured_exit_costs(model, batches, timer, disable_tqdm=True) == [500.0, 1500.0, 2000.0]


def test_measured_costs_ask_the_policies_on_the_way():
    model, asked = tiny_model(exit_layers=[2, 3]), [0, 0]
    for index, network in enumerate(model.exit_policies.networks):
        network[0].register_forward_hook(lambda *_, index=index: asked.__setitem__(index, asked[index] + 1))
    timer = Timer(rounds=4, clock=layer_clock(model.bert.encoder.layer))
    measured_exit_costs(model, [pad(random_rows(2, 0))], timer, disable_tqdm=True)
    # Warm-up and four rounds: the first policy in every run, the second unless rows left at the first.
    assert asked == [5 * 3, 5 * 2]


def test_costs_that_are_noise_are_no_numbers():
    """Everything takes twice as long as what came before."""
    times = accumulate(2.0**number for number in count())
    model, batches = tiny_model(exit_layers=[2, 3]), [pad(random_rows(2, 0))]
    timer = Timer(rounds=3, attempts=2, clock=lambda: next(times))
    with pytest.raises(RuntimeError, match=r"Costs of exits at layers \[2, 3, 6\] are noise"):
        measured_exit_costs(model, batches, timer, disable_tqdm=True)
    assert all(figure.value is None for figure in exit_cost_figures(model, batches, timer, disable_tqdm=True).values())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: exit_costs(tiny_model(), 0), "`sequence_length`=0"),
        (lambda: exit_costs(tiny_model(), 8, unit="joules"), "`unit`='joules'.*'layers', 'flops'"),
        (lambda: exit_costs(tiny_model(), 8, criterion="luck"), "`criterion`='luck'.*policy"),
        (lambda: measured_exit_costs(tiny_model(), []), r"`batches` \(0\)"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_rows_that_leave_elsewhere_are_noticed():
    model = tiny_model()
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **{**kwargs, "exit_threshold": 1.0})
    with pytest.raises(RuntimeError, match="sent to layer 1 left at layers"):
        measured_exit_costs(model, [pad(random_rows(2, 0))], disable_tqdm=True)
