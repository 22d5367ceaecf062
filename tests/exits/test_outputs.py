# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Outputs as tuples: the stock model's entries first, ours behind them."""

import torch
from tiny import tiny_llama
from transformers import LlamaForCausalLM
from transformers.cache_utils import Cache
from transformers.modeling_outputs import SequenceClassifierOutput

from transformers_cee.exits.outputs import ExitClassifierOutput


OPTIONS = {"output_hidden_states": True, "return_dict": False}


def shapes(entry):
    return [tuple(tensor.shape) for tensor in entry] if isinstance(entry, tuple) else tuple(entry.shape)


def test_decoder():
    model = tiny_llama().eval()
    stock = LlamaForCausalLM(model.config).eval()
    stock.load_state_dict(model.state_dict(), strict=False)
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    with torch.no_grad():
        ours, theirs = (one(ids, labels=ids, use_cache=True, **OPTIONS) for one in (model, stock))
    assert len(theirs) == 4 < len(ours)
    for one, other in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(one, other)
    assert isinstance(ours[2], Cache) and shapes(ours[3]) == shapes(theirs[3])
    assert (ours[4] == 4).all()


def test_classifier():
    stock = SequenceClassifierOutput(*map(torch.tensor, (1.0, [2.0])), hidden_states=(torch.zeros(3),))
    ours = ExitClassifierOutput(exit_layers=torch.tensor([4]), **stock).to_tuple()
    assert all(one is other for one, other in zip(ours, stock.to_tuple(), strict=False))
    assert len(ours) == 4 and ours[3].tolist() == [4]
