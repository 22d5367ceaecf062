# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Every family whose tokens leave one by one."""

from __future__ import annotations

import by_hand
import families
import pytest
import torch

from transformers_cee.exits.cache_name import CACHE_NAME
from transformers_cee.generation.draft_costs import DraftCosts
from transformers_cee.generation.drafting import Drafter, Drafts
from transformers_cee.generation.verifying import Verification


FAMILIES = families.of_kind("decoder")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
# Some prompts alone are longer than the windows of the tiny configs, others are shorter.
LENGTHS = (11, 2, 7)
NEW_TOKENS = 8


def prompts(model_type, seed=1, lengths=LENGTHS):
    """Rows of prompts, and the batch that they make."""
    rows = families.rows(model_type, len(lengths), seed, lengths)
    return rows, families.batch(model_type, rows, "left")


@torch.no_grad()
def thresholds_of(model, stock, criterion, seed=5):
    """One per exit, at which tokens leave everywhere."""
    ids = torch.randint(3, families.VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(seed))
    walks = [walk for row in ids for walk in by_hand.token_walks(model, stock, row, [], range(12))]
    return by_hand.spreading([by_hand.scores(model, walk, criterion) for walk in walks])


def check_window(model_type, length):
    """The test would not see a window that nothing is longer than."""
    window = families.FAMILIES[model_type].window
    assert window is None or length > window + 1


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("way", ["exit", "jump"])
def test_verified_text_is_the_stock_models(model_type, way, monkeypatch):
    monkeypatch.setattr(
        "transformers_cee.generation.drafters.draft_costs", lambda model, rows: DraftCosts(0.02, 0.02, 0.02)
    )
    fields = {"drafter_layer": 3, "drafter_vocab_size": 40} if way == "jump" else {}
    model = families.model(model_type, seed=2, **fields).double()
    stock = families.twin(model).double()
    _, batch = prompts(model_type)
    asked = {"max_new_tokens": 2 * NEW_TOKENS, "do_sample": False, "eos_token_id": [3, 4, 5], "pad_token_id": 0}
    expected = stock.generate(**batch, **asked)
    drafts = {"assistant_early_exit": model.layer_numbers[0]} if way == "exit" else {"prompt_lookup_num_tokens": 4}
    found = model.generate(**batch, **asked, **drafts, exit_verify=True, return_dict_in_generate=True)
    assert torch.equal(found.sequences, expected)
    check_window(model_type, found.sequences.shape[1])
    assert found.accepted_drafts.shape[1] > 1


class Offers(Drafter):
    """Knows what rows (rows, all tokens) will be; drafts that, or something else with the right token beside it."""

    name = "offers"
    kinds = (0.5,)
    looks_behind = 2

    def __init__(self, texts, right):
        super().__init__(3)
        self.texts, self.right, self.asked, self.shown = texts, right, 0, []

    def draft(self, drafting, room, pays):
        turn, self.asked = self.asked, self.asked + 1
        if self.seen is not None:
            self.shown.append((drafting.texts.lengths, drafting.texts.grows, self.seen))
        ahead = drafting.texts.lengths.unsqueeze(1) + torch.arange(2)
        tokens = self.texts.gather(1, ahead.clamp_max(self.texts.shape[1] - 1))
        wrong = (tokens[:, :1] + torch.arange(1, 4)) % families.VOCABULARY
        # Rows differ in where the right one is: before the others, among them, or nowhere.
        others, places = wrong.clone(), (torch.arange(len(room)) + turn) % 4
        hidden = places < 3
        others[hidden, places[hidden]] = tokens[hidden, 0]
        first = torch.where(torch.tensor(turn % 3 == 0 or self.right), tokens[:, 0], wrong[:, 2])
        tokens = torch.stack((first, tokens[:, 1]), 1)
        counts = room.clamp_max(2)
        if not counts.any():
            return None
        return Drafts(tokens, counts, others=others)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize(("ends", "embedded"), [(None, False), ([3, 4, 5], False), (None, True)])
@torch.no_grad()
def test_another_choice_takes_the_place_of_a_first_draft(model_type, right, ends, embedded):
    model = families.model(model_type, seed=2).double()
    _, batch = prompts(model_type)
    length = batch["input_ids"].shape[1]
    asked = {
        "max_new_tokens": 2 * NEW_TOKENS, "do_sample": False, "eos_token_id": ends, "pad_token_id": 0,
        "return_dict_in_generate": True, "output_logits": True,
    }  # fmt: skip
    expected = model.generate(**batch, **asked)
    whole = expected.sequences
    mask = torch.ones_like(whole)
    mask[:, :length] = batch["attention_mask"]
    states = families.twin(model).double()(whole, attention_mask=mask, output_hidden_states=True).hidden_states[2]
    if embedded:
        batch = {**batch, "input_ids": None, "inputs_embeds": model.get_input_embeddings()(batch["input_ids"])}
        expected.sequences = whole[:, length:]
    offers = Offers(expected.sequences, right)
    way = Verification(model, [offers], lambda rows: DraftCosts(0.0, 0.0, 0.0))
    found = model.generate(**batch, **asked, custom_generate=way)
    assert torch.equal(found.sequences, expected.sequences)
    check_window(model_type, whole.shape[1])
    for one, other in zip(found[CACHE_NAME].layers, expected[CACHE_NAME].layers, strict=True):
        # Plain generation keeps what a window still sees.
        known = other.keys.shape[2]
        last = one.keys[:, :, -known:], one.values[:, :, -known:]
        torch.testing.assert_close(last, (other.keys, other.values), rtol=1e-9, atol=1e-9)
    # Behind a row's end plain generation goes on, with padding.
    written = torch.stack([column.abs().amax(-1) > 0 for column in found.logits])
    for column, (one, other) in enumerate(zip(found.logits, expected.logits, strict=True)):
        torch.testing.assert_close(one[written[column]], other[written[column]], rtol=1e-6, atol=1e-6)
    # The last token has run through no layer yet.
    assert len(offers.shown) > 2
    for lengths, grows, shown in offers.shown:
        places = lengths[grows] - 2 + (length if embedded else 0)
        torch.testing.assert_close(shown[grows], states[grows, places], rtol=1e-6, atol=1e-6)
    accepted = torch.stack(way.accepted, 1)
    assert bool((torch.stack(way.proposed, 1) >= accepted).all())
    if right:
        assert accepted.max() == 2
    else:
        # Some rows got another choice in a pass in which others got none.
        assert bool(((accepted == 1).any(0) & (accepted == 0).any(0)).any())


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_full_depth_is_the_stock_model(model_type, tmp_path, record_property):
    stock = families.stock_model(model_type, seed=3)
    stock.save_pretrained(tmp_path)
    model, info = families.classes(model_type)[1].from_pretrained(tmp_path, output_loading_info=True)
    model.eval()
    assert all(name.startswith("exit_") for name in info["missing_keys"])
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    rows = families.rows(model_type, 3, lengths=(14, 3, 9))
    difference = 0.0
    for side in ("right", "left"):
        batch = families.batch(model_type, rows, side)
        labels = batch["input_ids"].where(batch["attention_mask"].bool(), torch.tensor(-100))
        expected = stock(**batch, labels=labels)
        for options in ({}, {"exit_threshold": 1.0}):
            output = model(**batch, labels=labels, **options)
            assert output.exit_layers.unique().tolist() == [model.config.num_hidden_layers]
            apart = (output.logits - expected.logits)[batch["attention_mask"].bool()]
            difference = max(difference, float(apart.abs().max()))
            torch.testing.assert_close(output.loss, expected.loss)
    check_window(model_type, 14)
    record_property("difference", difference)
    assert difference <= 1e-6


@pytest.mark.parametrize("model_type", FAMILIES)
def test_generation_without_exits_is_the_stock_models(model_type):
    model = families.model(model_type)
    stock, (_, batch) = families.twin(model), prompts(model_type)
    options = {"max_new_tokens": NEW_TOKENS, "eos_token_id": None, "return_dict_in_generate": True}
    expected = stock.generate(**batch, **options).sequences
    for exits in ({}, {"exit_threshold": 1.0}, {"exit_threshold": 1.0, "skipped_kv": "deferred"}):
        output = model.generate(**batch, **options, **exits)
        assert torch.equal(output.sequences, expected), exits
        assert output.exit_layers.unique().tolist() == [model.config.num_hidden_layers]
    embedded = {**batch, "input_ids": None, "inputs_embeds": model.get_input_embeddings()(batch["input_ids"])}
    assert torch.equal(model.generate(**embedded, **options).sequences, expected[:, -NEW_TOKENS:])
    ways = (
        {"do_sample": True, "top_k": 10}, {"num_beams": 2}, {"cache_implementation": "static"},
        {"prefill_chunk_size": 4}, {"use_cache": False},
    )  # fmt: skip
    for way in ways:
        torch.manual_seed(0)
        expected = stock.generate(**batch, **options, **way).sequences
        torch.manual_seed(0)
        assert torch.equal(model.generate(**batch, **options, **way).sequences, expected), way


def test_masks_by_type_of_layer_are_of_full_depth():
    """Generation with static caches makes them, where there is more than one type."""
    model, (_, batch) = families.model("qwen3_cee"), prompts("qwen3_cee")
    masks = dict.fromkeys(("full_attention", "sliding_attention"), torch.ones(3, 1, 11, 11, dtype=torch.bool).tril())
    given = {"input_ids": batch["input_ids"], "attention_mask": masks}
    assert model(**given).logits.isfinite().all()
    for asked in ({"exit_threshold": 0.5}, {"labels": batch["input_ids"], "output_all_exits": True}):
        with pytest.raises(ValueError, match="`attention_mask` of the layer types full_attention, sliding_attention"):
            model(**given, **asked)


@pytest.mark.parametrize(("skipped_kv", "criterion"), [("copy", "policy"), ("deferred", "max_probability")])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_generation_with_a_cache_is_that_without(model_type, skipped_kv, criterion):
    """Prompts of several lengths, padded on the left, against single rows that run anew in every step."""
    model = families.model(model_type)
    stock, (rows, batch) = families.twin(model), prompts(model_type)
    thresholds = thresholds_of(model, stock, criterion)
    output = model.generate(
        **batch,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=None,
        exit_criterion=criterion,
        exit_threshold=thresholds,
        skipped_kv=skipped_kv,
        return_dict_in_generate=True,
        output_logits=True,
    )
    seen = set()
    for number, row in enumerate(rows):
        ids = row["input_ids"][0]
        text = by_hand.generate(model, stock, ids, thresholds, skipped_kv, criterion, NEW_TOKENS)
        assert by_hand.slack(text.scores, thresholds) > 1e-5, "a decision is too close for float32"
        assert output.exit_layers[number].tolist() == text.layers, f"row {number}"
        assert output.sequences[number, -NEW_TOKENS:].tolist() == text.tokens[len(ids) :], f"row {number}"
        for step, logits in enumerate(text.logits):
            torch.testing.assert_close(output.logits[step][number], logits, **CLOSE)
        seen |= set(text.layers)
    assert len(seen) >= 3, f"tokens leave behind layers {seen} only"
    check_window(model_type, max(LENGTHS))


@pytest.mark.parametrize("skipped_kv", ["copy", "deferred"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_layers_behind_the_exit_do_not_run(model_type, skipped_kv):
    model, seen = families.model(model_type), []
    for number, layer in enumerate(families.layers(model), start=1):
        layer.register_forward_pre_hook(lambda _, inputs, n=number: seen.append((n, inputs[0].shape[1])))
    options = {"max_new_tokens": 4, "eos_token_id": None, "skipped_kv": skipped_kv}
    model.generate(**prompts(model_type)[1], exit_threshold=[1.0, 0.0, 0.0, 0.0], **options)
    assert seen == [(layer, max(LENGTHS)) for layer in (1, 2, 3, 4)] + [(1, 1), (2, 1)] * 3


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_deferred_caches_become_those_of_full_depth(model_type):
    """What follows a text that was generated with exits sees it as if there had been none."""
    model = families.model(model_type)
    stock, (rows, batch) = families.twin(model), prompts(model_type, lengths=(9, 9, 9))
    output = model.generate(
        **batch, max_new_tokens=NEW_TOKENS, eos_token_id=None, exit_threshold=thresholds_of(model, stock, "policy"),
        skipped_kv="deferred", return_dict_in_generate=True,
    )  # fmt: skip
    assert len(output.exit_layers.unique()) >= 3
    more = torch.randint(3, families.VOCABULARY, (3, 4), generator=torch.Generator().manual_seed(1))
    # The cache lacks the last token, which nothing has run yet.
    given = torch.cat((output.sequences[:, -1:], more), 1)
    ours = model(given, **{CACHE_NAME: output[CACHE_NAME]}).logits
    theirs = stock(torch.cat((output.sequences, more), 1)).logits[:, -5:]
    torch.testing.assert_close(ours, theirs, **CLOSE)
    assert len(rows) == 3


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_known_text_is_generated_text(model_type):
    """Prompts run at full depth; every other token leaves where it left in generation, with the same logits."""
    model = families.model(model_type)
    stock, (rows, _) = families.twin(model), prompts(model_type)
    thresholds, texts = thresholds_of(model, stock, "policy"), []
    for row in rows:
        ids = row["input_ids"][0]
        texts.append(by_hand.generate(model, stock, ids, thresholds, "copy", "policy", NEW_TOKENS))
    assert min(by_hand.slack(text.scores, thresholds) for text in texts) > 1e-5
    assert len({layer for text in texts for layer in text.layers}) >= 3
    for side in ("right", "left"):
        whole = families.batch(model_type, [{"input_ids": torch.tensor([text.tokens])} for text in texts], side)
        starts = (whole["attention_mask"].argmax(1) + torch.tensor(LENGTHS)).tolist()
        labels = torch.full_like(whole["input_ids"], -100)
        for number, start in enumerate(starts):
            labels[number, start : start + NEW_TOKENS] = whole["input_ids"][number, start : start + NEW_TOKENS]
        output = model(**whole, labels=labels, exit_threshold=thresholds)
        for number, (start, text) in enumerate(zip(starts, texts, strict=True)):
            # A position's logits are of the token behind it.
            columns = slice(start - 1, start - 1 + NEW_TOKENS)
            assert output.exit_layers[number, columns].tolist() == text.layers, (side, number)
            torch.testing.assert_close(output.logits[number, columns], torch.stack(text.logits), **CLOSE)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_all_exits_of_tokens(model_type, side):
    """States, losses and predictions of every exit, row by row."""
    model = families.model(model_type)
    stock, rows = families.twin(model), families.rows(model_type, 3, lengths=(13, 2, 8))
    batch = families.batch(model_type, rows, side)
    labels = batch["input_ids"].where(batch["attention_mask"].bool(), torch.tensor(-100))
    # Nothing predicts a row's first token; with padding before it, something would.
    labels[torch.arange(3), batch["attention_mask"].argmax(1)] = -100
    output = model(**batch, labels=labels, output_all_exits=True)
    walks, truth = [], []
    for row in rows:
        ids = row["input_ids"][0]
        walks += by_hand.token_walks(model, stock, ids, [], range(len(ids) - 1))
        truth += ids[1:].tolist()
    assert output.token_labels.tolist() == truth
    for index, (walk, label) in enumerate(zip(walks, truth, strict=True)):
        torch.testing.assert_close(output.all_exit_states[index], torch.stack(walk.states), **CLOSE)
        losses = [float(torch.logsumexp(logits, 0) - logits[label]) for logits in walk.logits]
        torch.testing.assert_close(output.all_exit_losses[index], torch.tensor(losses), **CLOSE)
        assert output.all_exit_predictions[index].tolist() == [int(logits.argmax()) for logits in walk.logits]
    check_window(model_type, 13)
