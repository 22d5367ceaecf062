# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A drafter learns the model's own words, and drafts in use as it drafted when it learned."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_llama
from transformers.cache_utils import DynamicCache

from transformers_cee import LlamaForConsistentEECausalLM
from transformers_cee.exits.cache_name import CACHE_NAME
from transformers_cee.fitting import drafter as fitting
from transformers_cee.fitting.drafter import DrafterSettings, fit_drafter
from transformers_cee.generation.cache import EarlyExitCache
from transformers_cee.generation.slots import SlotPass


LAYER, TIME = 3, 12


def model_with_drafter(seed=0, **fields):
    model = tiny_llama(seed, drafter_layer=LAYER, drafter_vocab_size=40, **fields)
    torch.manual_seed(seed)
    for weight in model.exit_drafter.parameters():
        torch.nn.init.normal_(weight, 0.0, 0.2)
    return model


def texts(model, rows=4, time=TIME, seed=0):
    """What the model itself goes on to say."""
    torch.manual_seed(seed)
    ids = model.generate(
        torch.randint(3, 60, (rows, 3)), max_new_tokens=time - 3, do_sample=True, eos_token_id=None, pad_token_id=0
    )
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_roll_outs_are_drafts_in_use(attention):
    model = model_with_drafter().eval()
    model.set_attn_implementation(attention)
    batch, drafter = texts(model), model.exit_drafter
    read = fitting._read(model, batch)
    learned, ids, seen = [], batch["input_ids"], []
    handle = drafter.readout.register_forward_hook(lambda _, given, out: learned.append(given[0]))
    list(fitting._roll_out(model, read, 3))
    for start in (1, 4, 7):
        cache = DynamicCache()
        hidden = model.model(
            input_ids=ids[:, :start], output_hidden_states=True, use_cache=True, **{CACHE_NAME: cache}
        ).hidden_states
        held = EarlyExitCache.from_cache(cache, 4)
        state = hidden[LAYER][:, -1:]
        for step in range(3):
            column = start + step
            first = torch.full((4,), column)
            run = SlotPass(
                model.as_decoder, held, first, 1, column, column, None, torch.zeros(4, dtype=torch.long), state[:0, 0]
            )
            embedded = model.get_input_embeddings()(ids[:, column : column + 1])
            state = run.run_layer(drafter.layer, LAYER - 1, drafter.jump(state, embedded))
            of_roll_out = learned[step].view(4, TIME - 3, -1)[:, start - 1]
            seen.append((state[:, 0] - of_roll_out).abs().max())
    handle.remove()
    assert max(seen) < 1e-5 and len(learned) == 3


def test_it_learns_and_nothing_else_does():
    model = tiny_llama(1, drafter_layer=LAYER, drafter_vocab_size=40)
    before = {name: value.clone() for name, value in model.state_dict().items() if "drafter" not in name}
    batches = [texts(model, 8, 16, seed) for seed in range(40)]
    steps = list(fit_drafter(model, batches, DrafterSettings(1e-2, 2, 100, 40)))
    assert len(steps) == 39 and [step.tokens for step in steps[:2]] == [128, 256]
    first, last = (sum(sum(one.losses) for one in part) for part in (steps[:5], steps[-5:]))
    assert last < 0.8 * first
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    ids = model.exit_drafter.token_ids
    assert len(ids.unique()) == 40 and not model.exit_drafter.training


def test_words_are_those_said_most():
    model = tiny_llama(1, drafter_layer=2, drafter_vocab_size=5)
    batch = texts(model, 8, 16)
    list(fit_drafter(model, [batch], DrafterSettings(closed_form_tokens=10)))
    with torch.no_grad():
        said = model(**batch).logits.argmax(-1)
    counts = torch.bincount(torch.cat((said, batch["input_ids"])).flatten(), minlength=60)
    assert counts[model.exit_drafter.token_ids].sum() == counts.topk(5).values.sum()


def test_the_solved_readout_is_the_last_state_where_it_can_be():
    """A layer behind which nothing happens is read without error."""
    model = tiny_llama(2, drafter_layer=LAYER)
    with torch.no_grad():
        for part in (model.model.layers[3].self_attn.o_proj, model.model.layers[3].mlp.down_proj):
            part.weight.zero_()
    batch = texts(model, 8, 16)
    list(fit_drafter(model, [batch], DrafterSettings(closed_form_tokens=10)))
    read = fitting._read(model, batch)
    found = model.model.norm(model.exit_drafter.read(read.behind))
    torch.testing.assert_close(found, read.last, rtol=1e-2, atol=1e-2)


def test_saved_and_loaded(tmp_path):
    model = model_with_drafter()
    model.save_pretrained(tmp_path / "whole")
    loaded, info = LlamaForConsistentEECausalLM.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, value in model.exit_drafter.state_dict().items():
        assert torch.equal(value, loaded.exit_drafter.state_dict()[name]), name
    without = LlamaForConsistentEECausalLM.from_pretrained(tmp_path / "whole", drafter_layer=None)
    assert without.exit_drafter is None
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    model = LlamaForConsistentEECausalLM.from_pretrained(tmp_path / "base", drafter_layer=LAYER)
    own = dict(model.model.layers[LAYER - 1].named_parameters())
    assert all(torch.equal(value, own[name]) for name, value in model.exit_drafter.layer.named_parameters())
    assert not any(value.any() for value in model.exit_drafter.predictor.parameters())
    assert torch.equal(model.exit_drafter.token_ids, torch.arange(60))
    torch.nn.init.normal_(model.exit_drafter.readout.weight)
    model.save_exits(tmp_path / "exits", base=str(tmp_path / "base"))
    again = LlamaForConsistentEECausalLM.from_pretrained(tmp_path / "exits")
    assert torch.equal(again.exit_drafter.readout.weight, model.exit_drafter.readout.weight)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"`drafter_layer`=None of the config: the model has no drafter"),
        ({"drafter_layer": 4}, r"`drafter_layer`=4 must be less than 4"),
    ],
)
def test_nothing_to_fit(fields, message):
    model = tiny_llama(**fields)
    with pytest.raises(ValueError, match=message):
        list(fit_drafter(model, [texts(tiny_llama())]))


@pytest.mark.parametrize("layer", [1, 5, 1.5, "last"])
def test_layers_that_there_are(layer):
    with pytest.raises(ValueError, match="`drafter_layer`"):
        tiny_llama(drafter_layer=layer)
