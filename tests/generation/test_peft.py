# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Prompts and prefixes that are learnt, with exits; adapters under which rows cannot leave."""

import peft
import pytest
import torch
from slow_llama import prompts, spreading
from tiny import pad, random_rows, tiny_llama, tiny_model

from transformers_cee import exit_lora_config
from transformers_cee.exits.cache_name import CACHE_NAME
from transformers_cee.generation.cache import EarlyExitCache


pytestmark = [
    pytest.mark.filterwarnings("ignore:Position ids are not supported"),
]
LEARNT = {
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "encoder": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}
OPTIONS = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None}


def adapted(config):
    torch.manual_seed(1)
    model = peft.get_peft_model(tiny_llama(), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


@pytest.mark.parametrize("kind", sorted(LEARNT))
class TestLearntPrompts:
    @torch.no_grad()
    def test_exits_off_is_the_model_asked_for_the_whole_text(self, kind):
        """Virtual tokens are put in once, whatever name the release has for a cache."""
        model, tokens = adapted(LEARNT[kind]()), torch.tensor([[5, 6, 7], [8, 9, 10]])
        output = model.generate(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), exit_threshold=1.0, **OPTIONS
        )
        for _ in range(OPTIONS["max_new_tokens"]):
            logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
            tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), dim=1)
        assert torch.equal(output, tokens)

    def test_verified_texts_are_refused(self, kind):
        model, batch = adapted(LEARNT[kind]()), prompts([4, 2, 5])
        with pytest.raises(ValueError, match=r"does not know where the virtual tokens of \w+ stand"):
            model.generate(**batch, **OPTIONS, exit_verify=True)

    @pytest.mark.parametrize("skipped_kv", ["copy", "deferred"])
    def test_rows_of_a_batch_are_rows_alone(self, kind, skipped_kv):
        model, batch, thresholds = adapted(LEARNT[kind]()), prompts([4, 2, 5]), spreading(tiny_llama())
        options = {**OPTIONS, "exit_threshold": thresholds, "skipped_kv": skipped_kv, "return_dict_in_generate": True}
        output = model.generate(**batch, **options)
        assert len(output.exit_layers[:, 1:].unique()) >= 2
        for row in range(3):
            alone = model.generate(**{name: value[row : row + 1] for name, value in batch.items()}, **options)
            assert torch.equal(alone.exit_layers[0], output.exit_layers[row])
            assert torch.equal(alone.sequences[0], output.sequences[row])

    @torch.no_grad()
    def test_deferred_values_are_those_of_the_whole_model(self, kind):
        """With padding: the mask that waiting tokens are completed with holds the virtual tokens, too."""
        model, batch = adapted(LEARNT[kind]()), prompts([4, 2, 5])
        options = {
            "exit_threshold": spreading(tiny_llama()),
            "skipped_kv": "deferred",
            "return_dict_in_generate": True,
        }
        output = model.generate(**batch, **OPTIONS, **options)
        known = output.sequences[:, :-1]
        mask = torch.nn.functional.pad(batch["attention_mask"], (0, known.shape[1] - 5), value=1)
        whole = model(input_ids=known, attention_mask=mask, use_cache=True)[CACHE_NAME]
        real = torch.nn.functional.pad(mask, (3, 0), value=1).bool()[:, None, :, None]
        for ours, theirs in zip(output[CACHE_NAME].layers, whole.layers, strict=True):
            if kind != "prefix":
                torch.testing.assert_close(ours.keys * real, theirs.keys * real, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(ours.values * real, theirs.values * real, rtol=1e-4, atol=1e-4)
            if kind == "prefix":
                # PEFT counts the positions of a whole text and of a step in different ways.
                break


def mixed(base, *args, **fields):
    config = exit_lora_config(*args, **fields)
    model = peft.get_peft_model(base, config, adapter_name="a")
    model.add_adapter("b", config)
    return model.eval()


TARGETS = ["q_proj", "k_proj", "v_proj"]
WAY_OUT = r"chooses for each row.*merge_and_unload.*`exit_threshold`=1.0"
REFUSED = {
    "mixed": (lambda: mixed(tiny_llama(), target_modules=TARGETS), {"adapter_names": ["a", "b", "__base__"]}),
    "invoked": (
        lambda: adapted(peft.LoraConfig(task_type="CAUSAL_LM", target_modules=TARGETS, alora_invocation_tokens=[9])),
        {},
    ),
    "poly": (
        lambda: adapted(
            peft.PolyConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], n_tasks=2, n_skills=2, n_splits=2, r=2)
        ),
        {"task_ids": torch.tensor([0, 1, 0])},
    ),
}


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_adapters_that_choose_for_each_row(kind):
    make, more = REFUSED[kind]
    model, batch = make(), prompts([4, 4, 4])
    batch["input_ids"][:, -2] = 9
    assert len(model.generate(**batch, **more, exit_threshold=1.0, **OPTIONS)) == 3
    with pytest.raises(ValueError, match=WAY_OUT):
        model.generate(**batch, **more, exit_threshold=0.5, **OPTIONS)
    if kind == "mixed":
        with torch.no_grad(), pytest.raises(ValueError, match=WAY_OUT):
            model(**batch, **more, exit_threshold=0.5)
        # One adapter for all rows is no mixture. (PEFT's hooks outlive an error, whatever its cause: a new model.)
        assert len(make().generate(**batch, exit_threshold=0.5, **OPTIONS)) == 3


def test_classifiers_with_mixed_adapters():
    model, batch = mixed(tiny_model(), "SEQ_CLS"), pad(random_rows(4, seed=1))
    with torch.no_grad(), pytest.raises(ValueError, match=WAY_OUT):
        model(**batch, adapter_names=["a", "b"] * 2, exit_threshold=0.5)
    with torch.no_grad():
        assert len(mixed(tiny_model(), "SEQ_CLS")(**batch, exit_threshold=0.5).logits) == 4


@pytest.mark.skipif(not hasattr(peft, "ShadowConfig"), reason="newer than the oldest PEFT")
def test_adapters_around_whole_layers():
    model, batch = adapted(peft.ShadowConfig(task_type="CAUSAL_LM")), prompts([4, 4])
    assert len(model.generate(**batch, exit_threshold=1.0, **OPTIONS)) == 2
    with pytest.raises(ValueError, match=r"SHADOW adapter of PEFT wraps whole layers.*disable_adapter"):
        model.generate(**batch, exit_threshold=0.5, **OPTIONS)
    with torch.no_grad(), pytest.raises(ValueError, match="wraps whole layers"):
        model(**batch, labels=batch["input_ids"], output_all_exits=True)


def test_modules_are_searched_for_adapters_once_per_generation(monkeypatch):
    """Where adapters sit outside of the layers, the search comes by every module."""
    model = adapted(exit_lora_config(target_modules=["lm_head"])).get_base_model()
    searched = []
    layer = model.model.layers[0]
    original = layer.modules
    monkeypatch.setattr(layer, "modules", lambda: searched.append(1) or original())
    model.generate(**prompts([4, 3]), exit_threshold=0.5, **OPTIONS)
    assert len(searched) == 1
    # Steps of the caller's own are looked at each.
    cache = EarlyExitCache(4)
    with torch.no_grad():
        model(torch.tensor([[5, 6]]), **{CACHE_NAME: cache})
        for _ in range(2):
            model(torch.tensor([[7]]), exit_threshold=0.0, **{CACHE_NAME: cache})
    assert len(searched) == 3


@torch.no_grad()
def test_verified_texts_of_adapters_are_their_own():
    model, batch = (
        adapted(peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])),
        prompts([4, 2, 5]),
    )
    expected = model.generate(**batch, **OPTIONS, exit_threshold=1.0)
    found = model.generate(**batch, **OPTIONS, exit_verify=True, prompt_lookup_num_tokens=4)
    assert torch.equal(found, expected) and not torch.equal(found, tiny_llama().generate(**batch, **OPTIONS))
