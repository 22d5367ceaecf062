# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""`generate(exit_verify=True)` writes what the stock model writes without a cache, whoever drafts."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from slow_llama import prompts, stock
from tiny import tiny_llama
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import Cache

from transformers_cee.exits.cache_name import CACHE_NAME
from transformers_cee.fitting.drafter import fit_drafter
from transformers_cee.generation import drafters, verifying
from transformers_cee.generation.draft_costs import DraftCosts, draft_costs


# Those with "jump" in their name on a model that has a drafter.
DRAFTERS = {
    "jump": {},
    "lookup and jump": {"prompt_lookup_num_tokens": 3},
    "lookup": {"prompt_lookup_num_tokens": 5},
    "exit": {"assistant_early_exit": 2, "exit_threshold": 0.0, "exit_criterion": "max_probability"},
    "policy": {"exit_threshold": 0.5, "num_assistant_tokens": 4},
    "both": {"prompt_lookup_num_tokens": 2, "assistant_early_exit": 3, "exit_threshold": 0.3},
}
PROCESSORS = (
    {},
    {"repetition_penalty": 1.4},
    {"no_repeat_ngram_size": 2, "min_new_tokens": 4},
    {"bad_words_ids": [[3, 4], [9]], "suppress_tokens": [6]},
    {"forced_eos_token_id": 2, "exponential_decay_length_penalty": (2, 1.2)},
)
NEW = 12


@pytest.fixture(autouse=True, scope="module")
def costs():
    """What is drafted depends on costs, and no test on the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drafters, "draft_costs", lambda model, rows: DraftCosts(0.02, 0.01, 0.02))
        patch.setattr(verifying, "perf_counter", lambda: 0.0)
        yield


def wide(seed=0, drafter="", **options):
    """In double precision passes over one token and over several choose alike."""
    fields = {"drafter_layer": 3, "drafter_vocab_size": 50} if "jump" in drafter else {}
    model = tiny_llama(seed, **fields, **options)
    if fields:
        fit(model)
    return model.double()


def fit(model):
    """The solved start is enough for some drafts to be accepted."""
    prompt = torch.randint(3, 60, (8, 4), generator=torch.Generator().manual_seed(0)) % model.config.vocab_size
    ids = model.generate(prompt, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)
    fit_drafter(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])


def repeating(lengths, seed=0):
    """Prompts whose n-grams come again."""
    batch = prompts(lengths, seed)
    ids = batch["input_ids"]
    half = ids.shape[1] // 2
    if half:
        ids[:, -half:] = torch.where(batch["attention_mask"][:, :half] == 1, ids[:, :half], ids[:, -half:])
    return batch


def run(model, batch, **options):
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(**batch, return_dict_in_generate=True, **options)


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    ends=st.sampled_from([None, [2], list(range(2, 12))]),
    processors=st.sampled_from(PROCESSORS),
    drafter=st.sampled_from(list(DRAFTERS)),
    attention=st.sampled_from(["sdpa", "eager"]),
    new=st.integers(1, NEW),
    seed=st.integers(0, 5),
)
def test_the_text_is_the_stock_models(lengths, ends, processors, drafter, attention, new, seed):
    model = wide(seed, drafter, eos_token_id=ends)
    if attention == "eager":
        # Its masks overflow in double precision.
        model.float().set_attn_implementation(attention)
    batch = repeating(lengths, seed)
    asked = {**processors, "max_new_tokens": new, "output_scores": True}
    if ends is None:
        asked.pop("exponential_decay_length_penalty", None)
    found = run(model, batch, exit_verify=True, **DRAFTERS[drafter], **asked)
    expected = run(stock(model), batch, use_cache=False, **asked)
    assert torch.equal(found.sequences, expected.sequences)
    counted = found.exit_layers > 0
    assert len(found.scores) == len(expected.scores) == counted.shape[1]
    for column, (one, other) in enumerate(zip(found.scores, expected.scores, strict=True)):
        rows = counted[:, column]
        torch.testing.assert_close(one[rows], other[rows], rtol=1e-5, atol=1e-5)


def test_expected_speed_is_that_of_the_longest_row():
    """Without a draft it is one, also where rows end at different lengths."""
    model = wide()
    found = run(
        model, repeating((9, 7, 9)), exit_verify=True, prompt_lookup_num_tokens=1, eos_token_id=list(range(30))
    )
    lengths = (found.exit_layers > 0).sum(1)
    assert len(lengths.unique()) > 1
    steps = found.proposed_drafts.shape[1] + 0.02 * int(found.proposed_drafts.amax(0).sum())
    assert found.expected_speedup == pytest.approx((int(lengths.max()) - 1) / steps)


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_drafts_are_accepted_and_refused(drafter):
    model, accepted = wide(0, drafter), []
    for seed in range(4):
        found = run(model, repeating((9, 7, 9), seed), exit_verify=True, eos_token_id=None, **DRAFTERS[drafter])
        passes, rows = found.accepted_drafts.shape[1], len(found.sequences)
        per_row = (found.accepted_drafts.clamp_min(0) + (found.accepted_drafts >= 0)).sum(1)
        assert per_row.tolist() == [NEW - 1] * rows
        assert found.tokens_per_pass == pytest.approx(rows * (NEW - 1) / int((found.accepted_drafts >= 0).sum()))
        assert torch.equal(found.proposed_drafts < 0, found.accepted_drafts < 0)
        assert bool((found.proposed_drafts >= found.accepted_drafts).all())
        # Drafts take time.
        assert 0 < found.expected_speedup <= (NEW - 1) / passes
        accepted += [found.accepted_drafts.max(), NEW - 1 - passes]
        assert found.accepted_drafts.min() <= 0
    assert max(accepted) > 0


def held(cache):
    return [(layer.keys, layer.values) for layer in cache.layers]


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("lengths", [(9,), (9, 4, 6)])
def test_the_cache_goes_on(drafter, lengths):
    model = wide(3, drafter, eos_token_id=list(range(2, 9)))
    batch = repeating(lengths, 3)
    found = run(model, batch, exit_verify=True, **DRAFTERS[drafter])
    expected = run(model, batch)
    assert torch.equal(found.sequences, expected.sequences)
    for one, other in zip(held(found[CACHE_NAME]), held(expected[CACHE_NAME]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    more = torch.cat((found.sequences, torch.full((len(lengths), 2), 5)), 1)
    mask = torch.ones_like(more)
    mask[:, : batch["attention_mask"].shape[1]] = batch["attention_mask"]
    longer = {"input_ids": more, "attention_mask": mask}
    again = run(model, longer, exit_verify=True, **DRAFTERS[drafter], **{CACHE_NAME: found[CACHE_NAME]})
    assert torch.equal(again.sequences, run(stock(model), longer, use_cache=False).sequences)


def test_a_cache_that_is_given_is_filled():
    model, batch, cache = wide(1), repeating((8,), 1), DynamicCache()
    found = model.generate(**batch, max_new_tokens=NEW, exit_verify=True, eos_token_id=None, **{CACHE_NAME: cache})
    expected = run(model, batch, eos_token_id=None)
    assert torch.equal(found, expected.sequences) and isinstance(cache, Cache)
    assert cache.get_seq_length() == found.shape[1] - 1
    for one, other in zip(held(cache), held(expected[CACHE_NAME]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


class Logged(StoppingCriteria):
    """Ends rows whose last two tokens add up to something; keeps what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, input_ids, scores, **kwargs):
        self.asked.append(input_ids.tolist())
        return (input_ids[:, -2:].sum(1) % 5 == 0) & (input_ids.shape[1] > 11)


class Streamed:
    def __init__(self):
        self.put_, self.ended = [], 0

    def put(self, value):
        self.put_.append(value.tolist())

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("ends", [None, [2, 3, 4]])
@pytest.mark.parametrize("seed", range(3))
def test_criteria_and_streamers_see_a_plain_batch(ends, seed):
    model, batch = wide(seed, eos_token_id=ends), repeating((9, 5, 7), seed)
    seen = []
    for other, asked in ((model, {"exit_verify": True}), (stock(model), {})):
        criterion, streamer = Logged(), Streamed()
        found = run(
            other, batch, eos_token_id=ends, streamer=streamer,
            stopping_criteria=StoppingCriteriaList([criterion]), **asked,
        )  # fmt: skip
        seen.append((found.sequences.tolist(), criterion.asked, streamer.put_, streamer.ended))
    assert seen[0] == seen[1]


class CountsRows(LogitsProcessor):
    """Prefers a token by the number of the row and of the column."""

    def __call__(self, input_ids, scores):
        wanted = (torch.arange(len(scores)) * 7 + input_ids.shape[1] + input_ids.sum(1)) % scores.shape[1]
        return scores.scatter_add(1, wanted.unsqueeze(1), torch.full((len(scores), 1), 9.0))


def test_processors_see_whole_batches():
    model, batch = wide(2), repeating((9, 5, 7), 2)
    asked = {"logits_processor": LogitsProcessorList([CountsRows()]), "eos_token_id": None}
    found = run(model, batch, exit_verify=True, **asked)
    assert torch.equal(found.sequences, run(stock(model), batch, **asked).sequences)


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_sampling_follows_the_whole_models_distribution(drafter):
    """All texts of four tokens, against their probabilities under the model without a cache."""
    size, draws, temperature = 6, 10_000, 0.8
    fields = {"drafter_layer": 3, "drafter_vocab_size": 4} if "jump" in drafter else {}
    model = tiny_llama(4, vocab_size=size, eos_token_id=None, pad_token_id=0, bos_token_id=1, **fields)
    if fields:
        fit(model)
    prompt = torch.tensor([[3, 4, 5, 3, 4]])
    torch.manual_seed(0)
    found = model.generate(
        prompt, do_sample=True, temperature=temperature, top_k=5, max_new_tokens=4, num_return_sequences=draws,
        exit_verify=True, return_dict_in_generate=True, **DRAFTERS[drafter],
    )  # fmt: skip
    accepted = found.accepted_drafts
    assert accepted.max() > 0 and (accepted == 0).any()
    texts = torch.tensor(list(itertools.product(range(size), repeat=4)))
    with torch.no_grad():
        logits = model(torch.cat((prompt.expand(len(texts), -1), texts), 1)).logits[:, -5:-1] / temperature
    logits = logits.masked_fill(logits < logits.topk(5).values[..., -1:], -torch.inf)
    chances = logits.softmax(-1).gather(2, texts.unsqueeze(2)).squeeze(2).prod(1)
    counts = torch.bincount((found.sequences[:, -4:] * size ** torch.arange(3, -1, -1)).sum(1), minlength=size**4)
    usual = chances * draws > 5
    assert counts[chances == 0].sum() == 0 and usual.sum() > 50
    seen = torch.cat((counts[usual], counts[~usual].sum()[None]))
    wanted = torch.cat((chances[usual], chances[~usual].sum()[None])) * draws
    surprise, freedom = ((seen - wanted) ** 2 / wanted.clamp_min(1e-9)).sum(), int(usual.sum())
    assert surprise < freedom + 4 * (2 * freedom) ** 0.5


def test_layers_that_drafted_do_not_run_again():
    model, ran = wide(), [0] * 4
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(
            lambda _, given, index=index: ran.__setitem__(index, ran[index] + given[0].shape[1])
        )
    run(model, repeating((8,)), max_new_tokens=2)
    ran[:] = [0] * 4
    found = run(model, repeating((8,)), exit_verify=True, eos_token_id=None, **DRAFTERS["exit"])
    prompt, drafted = 8, ran[3] - 8
    assert ran == [prompt + drafted] * 4 and drafted > found.accepted_drafts.shape[1]


@pytest.mark.parametrize(
    "way", ["embeddings", "chunks", "several", "default", "sampled seed"], ids=lambda way: way.replace(" ", "_")
)
def test_ways_to_ask(way, tmp_path):
    model, batch = wide(5), repeating((8, 6), 5)
    if way == "embeddings":
        given = {"inputs_embeds": model.get_input_embeddings()(batch["input_ids"])}
        given["attention_mask"] = batch["attention_mask"]
        expected = run(stock(model), given, eos_token_id=None)
        assert torch.equal(run(model, given, exit_verify=True, eos_token_id=None).sequences, expected.sequences)
    elif way == "chunks":
        asked = {"prefill_chunk_size": 3, "eos_token_id": None}
        found = run(model, batch, exit_verify=True, **asked)
        assert torch.equal(found.sequences, run(stock(model), batch, eos_token_id=None).sequences)
    elif way == "several":
        torch.manual_seed(0)
        found = run(model, batch, exit_verify=True, do_sample=True, num_return_sequences=3)
        assert found.sequences.shape[0] == 6
    elif way == "default":
        model.generation_config.exit_verify, model.generation_config.prompt_lookup_num_tokens = True, 3
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path).double()
        found = run(loaded, batch, eos_token_id=None)
        assert found.tokens_per_pass >= 1
        assert loaded.generation_config.prompt_lookup_num_tokens == 3
        other = stock(loaded)
        other.generation_config.prompt_lookup_num_tokens = None
        assert torch.equal(found.sequences, run(other, batch, eos_token_id=None).sequences)
    else:
        texts = []
        for _ in range(2):
            torch.manual_seed(7)
            texts.append(run(model, batch, exit_verify=True, do_sample=True, **DRAFTERS["lookup"]).sequences)
        assert torch.equal(*texts)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"num_beams": 2}, r"`num_beams`=1, not 2"),
        ({"guidance_scale": 2.0}, r"`guidance_scale` and `exit_verify` exclude each other"),
        ({"output_hidden_states": True}, r"`output_hidden_states` and `exit_verify` exclude"),
        ({"output_attentions": True}, r"`output_attentions` and `exit_verify` exclude"),
        ({"exit_verify": "yes"}, r"`exit_verify`='yes' must be True or False"),
        ({"assistant_early_exit": 4}, r"`assistant_early_exit`=4 must be one of the layers.*1, 2, 3"),
        ({"prompt_lookup_num_tokens": 0}, r"`prompt_lookup_num_tokens`=0 must be a whole number"),
        ({"num_assistant_tokens": 1.5, "assistant_early_exit": 1}, r"`num_assistant_tokens`=1.5 must be a whole"),
        ({"use_cache": False}, r"`use_cache`=False"),
        ({"cache_implementation": "static"}, r"`cache_implementation`='static'"),
        ({"exit_threshold": 2.0}, r"`exit_threshold`=2.0"),
    ],
)  # fmt: skip
def test_refused_before_a_layer_runs(asked, message):
    model = tiny_llama()
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda *_: pytest.fail("a layer has run"))
    with pytest.raises(ValueError, match=message):
        model.generate(torch.tensor([[3, 4]]), max_new_tokens=2, **{"exit_verify": True, **asked})


def test_costs_are_measured_once_for_each_size_of_a_batch():
    model = tiny_llama()
    costs = draft_costs(model)
    assert draft_costs(model, 3) is draft_costs(model, 4) and draft_costs(model, 16) is draft_costs(model, 99)
    assert draft_costs(model, 4) is not costs and draft_costs(model, 16) is not draft_costs(model, 4)
    assert draft_costs(model, 1) is costs and 0 <= costs.verify and 0 < costs.layer < 1 and 0 < costs.head < 1
    assert costs.layer * model.config.num_hidden_layers + costs.head == pytest.approx(1)
