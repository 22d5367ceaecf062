# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Cards of language models: what they say, and that their snippet runs."""

from __future__ import annotations

import re

import pytest

from transformers_cee.evaluation.generation import GenerationPoint
from transformers_cee.evaluation.speeds import Speed
from transformers_cee.hub.generation_card import GenerationCard


def make_point(criterion="policy", threshold=0.5, depth=2.0, timed=True):
    speeds = {"1": Speed(20.0, 25.0, 10.0, 12.5, 2.0, 2.0, 4)} if timed else {}
    return GenerationPoint(
        criterion,
        threshold,
        depth=depth,
        saved_layers=1 - depth / 4,
        layer_speedup=4 / depth,
        wall_clock_speedup=2.0 if timed else None,
        metrics={"agreement": 0.9, "rougeL": 0.2},
        speeds=speeds,
    )


def make_card(**options):
    return GenerationCard(
        **{
            "model_name": "llama-cee",
            "num_layers": 4,
            "dataset_name": "some text",
            "metric_name": "agreement",
            "curves": {"policy": [make_point()], "margin": [make_point("margin", 0.3)]},
            "full_depth": make_point("full depth", 1.0, 4.0, timed=False),
            "exit_layers": [1, 2, 4],
            "base_model": "someone/llama",
            "training_arguments": {"phases": ["heads", "policy"], "trainable": "exits", "token_loss": "kl"},
            "timing": "Timed on a toaster.",
            **options,
        }
    )


def test_what_the_card_says():
    text = make_card(dataset_id="someone/text", license="mit").render().content
    for part in (
        "pipeline_tag: text-generation",
        "base_model: someone/llama",
        "- someone/text",
        "an exit after layers 1, 2 and 4",
        "learned to predict the last exit's distribution, with all other weights frozen",
        "| full depth",
        "20.0 (10.0)",
        "Timed on a toaster.",
        "    **inputs,\n    exit_criterion='policy',\n    exit_threshold=0.5,\n    max_new_tokens=32,\n",
        "exit criteria: ConsistentEE (policy) and margin",
    ):
        assert part in text
    assert "memorized layer" not in text


def test_noise_is_called_so():
    noisy = make_point()
    noisy.speeds["1"] = Speed(None, 25.0, 10.0, 12.5, None, 2.0, 4, {}, {"speedup": 6.1, "tokens_per_second": 61.0})
    noisy.wall_clock = noisy.speeds["1"].figure("speedup")
    text = make_card(curves={"policy": [noisy]}).render().content
    assert "noise (10.0)" in text and "6.1" not in text and "61.0" not in text
    (row,) = [line for line in text.splitlines() if line.startswith("| ConsistentEE (policy) |       0.5")]
    assert row.split("|")[6].strip() == "noise" and "`noise` stands where" in text


def test_usage_of_a_budget():
    text = make_card(usage={"exit_budget": 0.5}).render().content
    assert "    **inputs,\n    exit_budget=0.5,\n    max_new_tokens=32,\n" in text
    assert "# Wanted mean depth as a share of all layers; 1.0 runs all layers.\n" in text
    assert "exit_threshold" not in text


def test_untimed_cards_have_no_speeds():
    text = make_card(curves={"policy": [make_point(timed=False)]}, figure=None).render().content
    assert "tokens/s" not in text
    assert "![" not in text


@pytest.mark.parametrize("chat", [False, True])
def test_the_snippet_runs(tmp_path, capsys, chat):
    pytest.importorskip("transformers_cee.models.llama_cee.modeling_llama_cee")
    from tiny import tiny_llama
    from tiny_models import tiny_tokenizer
    from transformers import PreTrainedTokenizerFast

    # Without BERT's token types.
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer, pad_token="[PAD]")
    if chat:
        tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tiny_llama(exit_layers=[1, 2]).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    path = make_card(repo_id=str(tmp_path), chat=chat, prompt="the film").save(tmp_path)
    snippet = re.search(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL).group(1)
    exec(compile(snippet, "card", "exec"), {})
    assert "tensor([[4" in capsys.readouterr().out
