# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A language model gets exits from text alone: it stays what it was, and its early tokens are its own as often as is
promised."""

from __future__ import annotations

import json
import logging

import families
import pytest
import torch
from bulk_reference import draw_texts, word_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from transformers_cee import add_exits
from transformers_cee.adding import language
from transformers_cee.cli import main


@pytest.fixture(autouse=True, scope="module")
def short_answers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language, "PROMPTS", 2)
        patch.setattr(language, "PROMPT_TOKENS", 2)
        patch.setattr(language, "ANSWER_TOKENS", 4)
        yield


TEXTS = 160
QUIET = {"disable_tqdm": True, "exit_layers": [2, 3]}


def saved(folder, model_type="llama_cee"):
    stock = families.stock_model(model_type).eval()
    # The text alone decides, and layers change little: early ones know something of the last.
    with torch.no_grad():
        for name, weight in stock.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_(0.3)
    stock.save_pretrained(folder)
    tokenizer = word_tokenizer(families.FAMILIES[model_type].padding)
    # As most do who generate.
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(folder)
    return stock


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    return folder, saved(folder)


@pytest.fixture(scope="module")
def added(base, tmp_path_factory):
    output = tmp_path_factory.mktemp("added") / "exits"
    return output, add_exits(base[0], draw_texts(TEXTS), output, agreement=[0.7, 0.4], **QUIET)


@torch.no_grad()
def test_full_depth_is_the_model(base, added):
    model = AutoModelForCausalLM.from_pretrained(added[0]).eval()
    ids = AutoTokenizer.from_pretrained(base[0])(draw_texts(1, seed=4), return_tensors="pt")["input_ids"]
    found = model(ids, exit_criterion="policy", exit_threshold=1.0)
    torch.testing.assert_close(found.logits, base[1](ids).logits)


@torch.no_grad()
def test_promise_is_what_the_certifying_texts_do(base, added):
    """Text by text and token by token, without stores: a token decides by its state behind a text at full depth."""
    (folder, stock), (output, found) = base, added
    model = AutoModelForCausalLM.from_pretrained(output).eval()
    assert model.layer_numbers == [2, 3, 4] and model.config.skipped_kv == "deferred"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = draw_texts(TEXTS)
    order = torch.randperm(TEXTS, generator=torch.Generator().manual_seed(42)).tolist()
    certifying = [texts[number] for number in order[TEXTS // 2 :]]
    certifying = [text for text in certifying if len(tokenizer(text)["input_ids"]) > 2]
    assert found.certifying == len(certifying)
    for speed in found.speeds:
        assert speed.reason is None and speed.criterion == "policy" and speed.accuracy is None
        point = model.config.exit_operating_points[speed.name]
        shares, layers = [], []
        for text in certifying:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            hidden = stock(ids, output_hidden_states=True).hidden_states
            last = stock(ids).logits.argmax(-1)
            same = []
            # Nothing stands before the first token, and nothing behind the last.
            for place in range(1, ids.shape[1] - 1):
                layer, said = 4, last[0, place]
                for index, number in enumerate((2, 3)):
                    state = model.exit_state(hidden[number][:, place], index)
                    logit = model.exit_policies.exit_logit(state, None, index, point["alpha"])
                    if bool(logit.sigmoid() > point["thresholds"][index]):
                        layer, said = number, model.exit_logits(state, index).argmax()
                        break
                layers.append(layer)
                same.append(float(said == last[0, place]))
            shares.append(sum(same) / len(same))
        assert sum(shares) / len(shares) == pytest.approx(speed.agreement)
        assert sum(layers) / len(layers) == pytest.approx(speed.depth)
        assert speed.agreement > speed.promised
    assert found.speeds[1].depth <= found.speeds[0].depth and found.speeds[1].depth < 4


@torch.no_grad()
def test_folder_and_default(base, added):
    output = added[0]
    results = json.loads((output / "results.json").read_text())
    assert [one["promised"] for one in results["speeds"]] == [0.7, 0.4] and results["promises"] == "tokens"
    assert all(0 <= one["identical"] <= 1 and set(one["speedups"]) <= {"1"} for one in results["speeds"])
    card = (output / "README.md").read_text()
    assert "most probable token of full depth" in card and "same answers" in card and "`agreement-0.7`" in card
    model = AutoModelForCausalLM.from_pretrained(output).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    asked = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    default, named = model.generate(ids, **asked), model.generate(ids, exit_threshold="agreement-0.7", **asked)
    assert torch.equal(default.exit_layers, named.exit_layers)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", families.of_kind("decoder"))
def test_every_family(model_type, tmp_path, monkeypatch):
    # Some families have tokenizers of their own, which these words are not for.
    tokenizer = word_tokenizer(families.FAMILIES[model_type].padding)
    monkeypatch.setattr(language.AutoTokenizer, "from_pretrained", lambda folder, padding_side: tokenizer)
    saved(tmp_path / "base", model_type)
    found = add_exits(tmp_path / "base", draw_texts(80), tmp_path / "exits", agreement=0.3, disable_tqdm=True)
    assert found.num_layers == 4 and found.speeds[0].depth <= 4
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "exits").layer_numbers == [2, 3, 4]


def test_too_few_texts_for_the_promise(base, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        found = add_exits(base[0], draw_texts(60), tmp_path / "exits", agreement=0.99, **QUIET)
    assert "Exits are off at 'agreement-0.99'" in caplog.text and found.speeds[0].reason
    # Said before the pass, with the number that the reason gives after it.
    early = caplog.records[0].getMessage()
    assert "`agreement`=0.99 takes 299 texts that certify" in early and "there are 27" in early
    assert "at least 299" in found.speeds[0].reason
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "exits").config.exit_threshold is None


def test_what_is_refused(base, added, tmp_path):
    texts = draw_texts(60)
    with pytest.raises(ValueError, match=r"`label_column`='label' is of a classifier"):
        add_exits(base[0], texts, tmp_path / "exits", label_column="label")
    with pytest.raises(ValueError, match="has exits already"):
        add_exits(added[0], texts, tmp_path / "exits")
    with pytest.raises(ValueError, match="no exit before the last layer"):
        add_exits(base[0], texts, tmp_path / "exits", exit_layers=[4])
    with pytest.raises(ValueError, match="no three tokens"):
        add_exits(base[0], ["w11 w12"] * 60, tmp_path / "exits")
    assert not (tmp_path / "exits").exists()


def test_long_texts_do_not_make_few_of_them(base, monkeypatch):
    """A promise counts texts: of many long ones the first tokens are read."""
    monkeypatch.setattr(language, "TOKENS_OF_A_HALF", 200)
    monkeypatch.setattr(language, "FEWEST_TOKENS", 4)
    tokenizer = word_tokenizer()
    model = families.model("llama_cee")
    rows, learning, certifying = language._prepare(["w11 " * 30] * 80, tokenizer, model, 0)
    assert (len(learning), len(certifying)) == (40, 40)
    assert {len(ids) for ids in rows["input_ids"]} == {5}
    assert torch.cat((learning, certifying)).tolist() == list(range(80))


def test_a_classifier_on_a_decoder_is_no_language_model(tmp_path):
    config = LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"no model with exits for `AutoModelForSequenceClassification`"):
        add_exits(tmp_path / "base", draw_texts(60), tmp_path / "exits")


def test_command(base, tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("\n".join(draw_texts(60)), encoding="utf-8")
    words = ["--texts", str(tmp_path / "texts.txt"), "--output", str(tmp_path / "exits"), "--agreement", "0.3"]
    assert main(["add-exits", str(base[0]), *words, "--exit_layers", "2", "3", "--disable_tqdm"]) == 0
    assert json.loads(capsys.readouterr().out)["promises"] == "tokens"
