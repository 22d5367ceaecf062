# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Heads in closed form, against numpy's least squares and against what they are for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, tiny_llama

from transformers_cee.training.least_squares import fit_exit_heads


def make_batches(seed=0, prompt=2):
    """Padded batches; prompts and padding are −100 in the labels."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(12):
        ids = torch.randint(3, VOCABULARY, (4, 14), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, 9:] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :prompt] = -100
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def collect(model, batches):
    """Exit states (tokens, exits, hidden) by the model's own way."""
    with torch.no_grad():
        return torch.cat([model(**batch, output_all_exits=True).all_exit_states for batch in batches])


def mapped(model, states, index):
    """What the last head sees of an exit's states."""
    return model.exit_heads.heads[index](states)


def test_full_rank_is_least_squares():
    model, batches = tiny_llama(exit_layers=[1, 2, 3], exit_head="low_rank", exit_head_rank=32), make_batches()
    explained = fit_exit_heads(model, batches, ridge=1e-9)
    states = collect(model, batches)
    last = states[:, -1].double().numpy()
    for index, layer in enumerate((1, 2, 3)):
        found = states[:, index].double().numpy()
        solution, *_ = np.linalg.lstsq(found, last, rcond=None)
        with torch.no_grad():
            ours = mapped(model, states[:, index], index)
        np.testing.assert_allclose(ours.numpy(), found @ solution, atol=2e-3)
        share = 1 - ((last - found @ solution) ** 2).sum() / ((last - last.mean(0)) ** 2).sum()
        assert explained[layer] == pytest.approx(share, abs=1e-3)
    assert explained[1] < explained[2] < explained[3] < 1


def test_a_small_rank_is_the_best_of_its_rank():
    batches = make_batches()
    explained = {}
    model = None
    for rank in (1, 4, 16, 32, 40):
        norms = None if model is None else model.exit_norms.state_dict()
        model = tiny_llama(exit_layers=[2], exit_head="low_rank", exit_head_rank=rank)
        # Other ranks draw other random numbers.
        model.exit_norms.load_state_dict(norms or model.exit_norms.state_dict())
        explained[rank] = fit_exit_heads(model, batches, ridge=1e-9)[2]
        assert torch.isfinite(model.exit_heads.heads[0].up.weight).all()
    assert explained[1] < explained[4] < explained[16] < explained[32]
    assert explained[40] == pytest.approx(explained[32], abs=1e-5)
    # By hand: the fitted values of the change, cut to their largest directions.
    states = collect(model, batches).double().numpy()
    found, last = states[:, 0], states[:, 1]
    change, *_ = np.linalg.lstsq(found, last - found, rcond=None)
    _, _, directions = np.linalg.svd(found @ change, full_matrices=False)
    cut = found + found @ change @ directions[:4].T @ directions[:4]
    share = 1 - ((last - cut) ** 2).sum() / ((last - last.mean(0)) ** 2).sum()
    assert explained[4] == pytest.approx(share, abs=1e-3)


@pytest.mark.parametrize("kind", ["untied", "layernorm_linear"])
def test_heads_of_their_own(kind):
    batches = make_batches()
    model = tiny_llama(exit_layers=[3], exit_head=kind)
    fit_exit_heads(model, batches, ridge=1e-9)
    states = collect(model, batches)
    solution, *_ = np.linalg.lstsq(states[:, 0].double().numpy(), states[:, 1].double().numpy(), rcond=None)
    with torch.no_grad():
        wanted = model.lm_head(torch.tensor(states[:, 0].double().numpy() @ solution).float())
        torch.testing.assert_close(model.exit_logits(states[:, 0], 0), wanted, atol=5e-3, rtol=1e-3)


def test_exits_come_closer_to_the_last_one():
    """On text that was not fitted."""
    batches, others = make_batches(), make_batches(seed=1)
    model = tiny_llama(exit_layers=[1, 2, 3], exit_head="low_rank", exit_head_rank=32)

    def agreement():
        with torch.no_grad():
            chosen = torch.cat([model(**batch, output_all_exits=True).all_exit_predictions for batch in others])
        return (chosen[:, :-1] == chosen[:, -1:]).float().mean(0)

    before = agreement()
    fit_exit_heads(model, batches)
    assert (agreement() > before).all()


def test_only_counted_tokens_and_only_so_many():
    model = tiny_llama(exit_layers=[2], exit_head="low_rank", exit_head_rank=32)
    batches = make_batches()
    seen = []
    decoder = model.get_decoder()
    hook = decoder.register_forward_hook(lambda *arguments: seen.append(1))
    # 4 rows of 12 counted labels, one of them 5 shorter: 43 tokens a batch.
    fit_exit_heads(model, batches, max_tokens=100)
    assert len(seen) == 3
    hook.remove()
    first = {name: value.clone() for name, value in model.exit_heads.state_dict().items()}
    changed = [dict(batch) for batch in batches]
    for batch in changed:
        # Padding must not matter.
        batch["input_ids"] = torch.where(batch["attention_mask"] == 0, 5, batch["input_ids"])
    fit_exit_heads(model, changed, max_tokens=100)
    for name, value in model.exit_heads.state_dict().items():
        torch.testing.assert_close(value, first[name], atol=1e-5, rtol=1e-4)


def test_nothing_else_changes():
    model = tiny_llama(exit_layers=[2], exit_head="low_rank").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fit_exit_heads(model, make_batches())
    assert model.training
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"exit_heads.heads.layer_2.down.weight", "exit_heads.heads.layer_2.up.weight"}


def test_bad_arguments():
    batches = make_batches()
    with pytest.raises(ValueError, match="`exit_head`='norm' has no head to fit; accepted are low_rank, untied"):
        fit_exit_heads(tiny_llama(exit_layers=[2], exit_head="norm"), batches)
    model = tiny_llama(exit_layers=[2], exit_head="low_rank")
    with pytest.raises(ValueError, match="`ridge`=0 must be positive"):
        fit_exit_heads(model, batches, ridge=0)
    with pytest.raises(ValueError, match="no token to fit"):
        fit_exit_heads(model, [])
