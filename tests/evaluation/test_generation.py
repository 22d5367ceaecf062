# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Operating points of language models, against answers of single prompts."""

from __future__ import annotations

import pytest
import torch
from clocks import steady_clock
from tiny import VOCABULARY, tiny_llama

from transformers_cee.evaluation.answers import FULL_DEPTH
from transformers_cee.evaluation.generation import GenerationBenchmark
from transformers_cee.evaluation.report import write_results


POLICY = {"exit_criterion": "policy", "exit_threshold": 0.5}


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    steady_clock(monkeypatch)


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


def make_benchmark(model, prompts, **options):
    answers = [[9, 11, 2], [4, 2], [30, 31, 2], [7, 2], [8, 2]]
    return GenerationBenchmark(
        model,
        prompts,
        answers,
        lambda rows: [" ".join(map(str, row)) for row in rows],
        pad=0,
        max_new_tokens=6,
        batch_size=2,
        timing_prompts=2,
        disable_tqdm=True,
        **options,
    )


def test_operating_points(model, prompts, tmp_path):
    def shared_words(answers, references):
        return {"shared": sum(answer == reference for answer, reference in zip(answers, references, strict=True))}

    benchmark = make_benchmark(model, prompts, text_metrics=shared_words, timing_batch_sizes=(1, 2))
    point = benchmark.measure("policy", 0.5)
    full = benchmark.full_depth()
    early = [greedy(model, prompt, POLICY, 6) for prompt in prompts]
    wanted = [greedy(model, prompt, FULL_DEPTH, 6) for prompt in prompts]
    layers = [layer for _, row in early for layer in row if layer]
    assert point.depth == pytest.approx(sum(layers) / len(layers))
    assert point.exit_histogram == {str(layer): layers.count(layer) for layer in (1, 2, 3, 4)}
    same = sum(one[0] == other[0] for one, other in zip(early, wanted, strict=True)) / 5
    assert point.metrics["identical"] == same
    assert point.metrics.keys() == {"agreement", "identical", "perplexity", "shared"}
    assert full.depth == 4
    assert full.metrics["agreement"] == full.metrics["identical"] == 1
    assert list(point.speeds) == ["1", "2"]
    assert point.wall_clock == point.speeds["1"].figure("speedup")
    assert point.speeds["1"].speedup == 1.0, "everything takes as long on this clock"
    assert point.speeds["2"].prompts == 2
    assert point.peak_memory_mb > 0
    assert benchmark.texts["policy", "0.5"] == [" ".join(map(str, tokens)) for tokens, _ in early]
    assert benchmark.references[1] == "4 2"
    assert "rouge" not in write_results({"point": point}, tmp_path / "results.json").read_text()


def test_a_point_without_exits_is_the_full_model(model, prompts):
    point = make_benchmark(model, prompts).measure("policy", 1.0)
    assert point.depth == 4
    assert point.metrics["agreement"] == point.metrics["identical"] == 1


def test_perplexity_of_as_much_as_was_asked_for(model, prompts):
    whole, some, none = (
        make_benchmark(model, prompts, perplexity_tokens=tokens).measure("policy", 0.5) for tokens in (None, 2, 0)
    )
    assert "perplexity" not in none.metrics
    assert whole.metrics["perplexity"] != some.metrics["perplexity"]
    for point in (some, none):
        for name in ("agreement", "identical"):
            assert point.metrics[name] == whole.metrics[name]


def test_a_named_point(prompts):
    thresholds = [0.03, 0.04, 1.0, 1.0]
    points = {"fast": {"criterion": "margin", "thresholds": thresholds}}
    model = tiny_llama(exit_operating_points=points)
    benchmark = make_benchmark(model, prompts)
    named, plain = (benchmark.measure("margin", threshold) for threshold in ("fast", thresholds))
    assert named.exit_threshold == "fast" and named.depth == plain.depth < 4
    assert named.metrics == plain.metrics


def test_a_budget(prompts):
    """Asked of generate in words, a price and a threshold between two fitted points."""
    torch.manual_seed(0)
    model = tiny_llama(
        exit_layers=[1, 2, 3], policy_condition="film", exit_budgets=[[0.3, 0.2, 0.5], [0.9, 0.02, 0.5]]
    )
    benchmark = make_benchmark(model, prompts)
    point = benchmark.measure_budget(0.5, min_exit_layer=2)
    early = [greedy(model, prompt, {"exit_budget": 0.5, "min_exit_layer": 2}, 6) for prompt in prompts]
    layers = [layer for _, row in early for layer in row if layer]
    assert point.depth == pytest.approx(sum(layers) / len(layers))
    assert (point.criterion, point.exit_threshold, point.exit_budget) == ("policy", 0.5, 0.5)
    assert point.exit_arguments == {"exit_budget": 0.5}
    assert benchmark.texts["policy", "budget 0.5"] == [" ".join(map(str, row)) for row, _ in early]
    assert point.wall_clock_speedup is not None
    with pytest.raises(ValueError, match=r"`exit_budget`=2\.0 must be a share"):
        benchmark.measure_budget(2.0)


def test_a_budget_of_a_model_without_any(model, prompts):
    with pytest.raises(ValueError, match="this model has no fitted budgets"):
        make_benchmark(model, prompts).measure_budget(0.5)


def test_bad_lists(model, prompts):
    with pytest.raises(ValueError, match=r"`prompts` \(0\) and `answers` \(0\) must be as many"):
        GenerationBenchmark(model, [], [], lambda rows: [], pad=0)
    with pytest.raises(ValueError, match=r"`prompts` \(5\) and `answers` \(1\)"):
        GenerationBenchmark(model, prompts, [[1]], lambda rows: [], pad=0)


@pytest.mark.parametrize("settings", [{"skipped_kv": "deferred"}, {"exit_threshold_decay": 4.0}])
def test_known_text_says_nothing_of_other_ways_to_generate(model, prompts, settings):
    """Agreement and perplexity are those of copied states and of thresholds that stay."""
    benchmark = make_benchmark(model, prompts)
    point = benchmark.measure("policy", 0.5, **settings)
    assert point.metrics.keys() == {"identical"}
    early = [greedy(model, prompt, {**POLICY, **settings}, 6) for prompt in prompts]
    assert benchmark.texts["policy", "0.5"] == [" ".join(map(str, tokens)) for tokens, _ in early]
    assert benchmark.full_depth().metrics.keys() == {"agreement", "identical", "perplexity"}


def test_bad_input_costs_no_work(model, prompts):
    with pytest.raises(ValueError, match=r"`references` \(1\) must be as many as `answers` \(5\)"):
        make_benchmark(model, prompts, references=["one"])
    with pytest.raises(ValueError, match=r"`timing_prompts`=0"):
        GenerationBenchmark(model, prompts, prompts, lambda rows: [""] * 5, pad=0, timing_prompts=0)
    benchmark = make_benchmark(model, prompts)
    with pytest.raises(ValueError, match="'polcy' is unknown"):
        benchmark.measure("polcy", 0.5)
    with pytest.raises(ValueError, match=r"`exit_threshold`=1.5 for the criterion 'policy'"):
        benchmark.measure("policy", 1.5)
    assert benchmark.full_answers is None
