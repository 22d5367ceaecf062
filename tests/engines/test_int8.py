# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""int8 of every engine: what a row gets depends on no other row."""

import pytest
import torch
from torch import nn

from transformers_cee.engines import ENGINES


INT8 = [name for name, engine in ENGINES.items() if "int8" in engine.precisions]
# Of logits and scores, which have sizes near 1. Sums in another order may move a state by one step of int8; a scale
# that other rows have a say in moves all of them.
TOLERANCE = 0.01
# A token whose states are large in one unit.
EXTREME = 59


@pytest.fixture(scope="module")
def model(make_model):
    made = make_model(exit_criterion="policy")
    with torch.no_grad():
        made.bert.embeddings.word_embeddings.weight[EXTREME] = 100 * torch.eye(32)[0]
        # Scales follow the largest state: let one be much larger than all that other tokens have.
        made.bert.embeddings.LayerNorm.weight[0] = 8.0
    return made


def exported(model, engine, tokenizer, texts, folder):
    options = {"calibration_texts": texts, "processing_class": tokenizer, "measure": False}
    return model.export(folder, engine=engine, precision="int8", **options)


def batches(tokenizer, texts):
    """One row alone and as the first of others: of its kind, of extreme ones, and of a long one."""
    row = tokenizer(texts[0])["input_ids"]
    others = [tokenizer(text)["input_ids"] for text in texts[1:6]]
    for rows in ([], others, [[EXTREME] * len(row)] * 3, [(others[0] * 40)[:60]]):
        ids = nn.utils.rnn.pad_sequence([torch.tensor(one) for one in (row, *rows)], batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones(len(one)) for one in (row, *rows)], batch_first=True)
        yield {"input_ids": ids, "attention_mask": mask.long()}


@torch.no_grad()
def influence(model, tokenizer, texts):
    """The largest change of the first row's logits and scores by the rows beside it."""
    found = []
    for batch in batches(tokenizer, texts):
        logits = model(**batch, output_all_exits=True).all_exit_logits[0].flatten()
        scores = model(**batch, exit_criterion="policy", exit_threshold=0.9999).exit_probabilities[0]
        found.append(torch.cat([logits, scores.nan_to_num(0.0)]))
    return max(float((one - found[0]).abs().max()) for one in found[1:])


@pytest.mark.parametrize("engine", INT8)
def test_rows_have_no_influence(engine, model, tokenizer, texts, tmp_path):
    assert influence(exported(model, engine, tokenizer, texts, tmp_path / "out"), tokenizer, texts) < TOLERANCE


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_one_scale_for_a_batch_would_be_found(model, tokenizer, texts):
    """What the test above is there to find."""
    per_tensor = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert influence(per_tensor, tokenizer, texts) > 3 * TOLERANCE


@pytest.mark.parametrize("engine", INT8)
@torch.no_grad()
def test_labels_are_those_of_float32(engine, make_model, tokenizer, texts, tmp_path):
    model = make_model()
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    wanted = model(**batch, output_all_exits=True).all_exit_logits
    found = exported(model, engine, tokenizer, texts, tmp_path / "out")(**batch, output_all_exits=True).all_exit_logits
    sizes = wanted.std(0).mean()
    assert (found - wanted).abs().mean() < 0.2 * sizes
    # Where two labels are nearly alike, either may win.
    top = wanted.topk(2).values
    sure = top[..., 0] - top[..., 1] > sizes
    assert sure.float().mean() > 0.3
    assert torch.equal(found.argmax(-1)[sure], wanted.argmax(-1)[sure])
