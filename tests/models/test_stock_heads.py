# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Stock heads of other tasks on our configs and checkpoints: the stock model, or an error that says what there is."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_config, tiny_llama, tiny_llama_config, tiny_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
)


IDS = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(0))
OF_BERT = (BertModel, BertForMaskedLM, BertForSequenceClassification, BertForTokenClassification)
OF_LLAMA = (
    LlamaModel, LlamaForCausalLM, LlamaForSequenceClassification, LlamaForTokenClassification,
)  # fmt: skip
CASES = [(one, tiny_model) for one in OF_BERT] + [(one, tiny_llama) for one in OF_LLAMA]


@pytest.mark.parametrize("stock,make", CASES)
@torch.no_grad()
def test_from_our_checkpoints(stock, make, tmp_path):
    """The layers are ours, so the states are those of full depth."""
    model = make()
    model.save_pretrained(tmp_path)
    other = stock.from_pretrained(tmp_path).eval()
    states = other(IDS, output_hidden_states=True).hidden_states[-1]
    expected = model(IDS, exit_threshold=1.0, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "stock,config", [(one, tiny_config) for one in OF_BERT] + [(one, tiny_llama_config) for one in OF_LLAMA]
)
@torch.no_grad()
def test_from_our_configs(stock, config):
    output = stock(config()).eval()(IDS)
    assert output[0].shape[0] == 3


@pytest.mark.parametrize(
    "auto,make", [(AutoModelForSequenceClassification, tiny_llama), (AutoModelForTokenClassification, tiny_model)]
)
def test_auto_classes_of_other_tasks(auto, make, tmp_path):
    make().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"Unrecognized configuration class.*CeeConfig"):
        auto.from_pretrained(tmp_path)
