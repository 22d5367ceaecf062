# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The harness of decoding: what is forced comes out, and the script runs from end to end."""

from __future__ import annotations

import json
import math
import re

import generation_speed
import pytest
import torch
from tiny import tiny_llama
from transformers import LlamaForCausalLM

from transformers_cee.fitting.drafter import fit_drafter


NEW = 17


def forced(model, prompt, chance, drafts=3):
    verification = generation_speed.ForcedVerification(model, drafts, chance)
    text = model.generate(
        prompt, custom_generate=verification, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return text, torch.stack(verification.accepted, 1)


@torch.no_grad()
def test_acceptance_is_what_was_asked_for():
    model = tiny_llama(drafter_layer=3, drafter_vocab_size=60).eval()
    # A drafter that knows something would have other choices of its drafts.
    fit_drafter(model, [{"input_ids": torch.randint(3, 60, (8, 12))}])
    prompt = torch.randint(3, 60, (2, 5))
    text, accepted = forced(model, prompt, 1.0)
    # The prompt gives one token, and so does the first pass, which has no state to draft from; each other one gives
    # four, and the last one as many as there is room for.
    assert accepted[:, 1:-1].unique().tolist() == [3]
    assert accepted.shape[1] == 1 + math.ceil((NEW - 2) / 4) and text.shape[1] == 5 + NEW
    plain = model.generate(prompt, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    text, accepted = forced(model, prompt, 0.0)
    assert torch.equal(text, plain) and not accepted.any() and accepted.shape[1] == NEW - 1
    torch.manual_seed(0)
    _, accepted = forced(model, torch.randint(3, 60, (200, 5)), 0.5)
    # With room for all three: 1/2 + 1/4 + 1/8.
    assert float(accepted[:, 1:4].float().mean()) == pytest.approx(0.875, abs=0.1)


def test_shapes_without_weights(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [
        "generation_speed.py", "--random", "tiny", "--batch_sizes", "2", "--accepted", "0.2", "0.5", "1",
        "--new_tokens", "9", "--prompt_tokens", "4", "--repeats", "3", "--output", str(tmp_path),
        "--settings", "exits off", "exit 4, deferred", "3 drafts, 0.5 accepted", "3 drafts, 1 accepted",
    ])  # fmt: skip
    generation_speed.main()
    rows = {row["setting"]: row for row in json.loads((tmp_path / "results.json").read_text())["rows"]}
    assert list(rows) == ["stock", "exits off", "exit 4, deferred", "3 drafts, 0.5 accepted", "3 drafts, 1 accepted"]
    assert rows["3 drafts, 1 accepted"]["passes"] == 3
    assert rows["3 drafts, 1 accepted"]["tokens_per_pass"] == pytest.approx((1 + 4 + 3) / 3)
    # Both cost the same, and the formula knows what is accepted.
    ratio = rows["3 drafts, 1 accepted"]["formula"] / rows["3 drafts, 0.5 accepted"]["formula"]
    assert ratio == pytest.approx(4 / (1 + 0.5 + 0.25 + 0.125))
    assert rows["exit 4, deferred"]["depth"] == 4 and 1 <= rows["3 drafts, 0.5 accepted"]["tokens_per_pass"] <= 4
    assert (tmp_path / "table.md").read_text().strip() in capsys.readouterr().out


def test_the_stock_model_generates_as_the_checkpoint_does(tmp_path, monkeypatch):
    """A config that a trainer left says nothing of the cache."""
    model = tiny_llama()
    model.config.use_cache = False
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("sys.argv", ["generation_speed.py", "--model", str(tmp_path)])
    stock, own = generation_speed.load_models(generation_speed.parse_arguments())
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert stock.generation_config.use_cache == own.generation_config.use_cache == loaded.generation_config.use_cache
    assert own.layer_numbers == [1, 2, 3, 4]
    prompt = torch.tensor([[5, 6, 7]])
    asked = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(stock.generate(prompt, **asked), loaded.generate(prompt, **asked))


@pytest.mark.parametrize(
    ("more", "what"),
    [(["--accepted", "1.5"], "--accepted must be"), (["--settings", "exit 3"], "'exit 3'.* unknown; accepted are")],
)
def test_refusals(more, what, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["generation_speed.py", "--random", "tiny", "--batch_sizes", "1", *more])
    with pytest.raises((SystemExit, ValueError)) as error:
        generation_speed.main()
    assert re.search(what, str(error.value) + capsys.readouterr().err)
