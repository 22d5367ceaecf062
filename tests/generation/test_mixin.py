# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""`generate` around the decode steps: where options come from, what comes out, and exits switched off."""

from __future__ import annotations

import math

import pytest
import torch
from slow_llama import SlowModel, check_against_slow, prompts, spreading
from tiny import tiny_llama
from transformers import GenerationConfig, LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput

from transformers_cee import LlamaForConsistentEECausalLM
from transformers_cee.generation.decay import decayed


NEW = 7


def stock_twin(model) -> LlamaForCausalLM:
    """The stock model with the same weights."""
    twin = LlamaForCausalLM._from_config(model.config, attn_implementation=model.config._attn_implementation).eval()
    twin.load_state_dict({name: one for name, one in model.state_dict().items() if not name.startswith("exit_")})
    return twin


def run(model, batch, **options):
    torch.manual_seed(1)
    return model.generate(**batch, **{"max_new_tokens": NEW, "return_dict_in_generate": True, **options})


class TestExitsOff:
    """With exits off, everything is as with the stock model, bit for bit."""

    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    @pytest.mark.parametrize("lengths", [(4, 4), (2, 5, 1)])
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"do_sample": True},
            {"num_beams": 3},
            {"use_cache": False},
            {"cache_implementation": "static"},
            {"prefill_chunk_size": 2},
        ],
    )
    def test_like_stock(self, implementation, lengths, options):
        model = tiny_llama(eos_token_id=list(range(2, 12)))
        model.set_attn_implementation(implementation)
        batch = prompts(lengths)
        options = {**options, "output_logits": True, "output_scores": True}
        expected = run(stock_twin(model), batch, **options)
        for exits in ({}, {"exit_threshold": 1.0}, {"exit_criterion": "entropy", "exit_threshold": 0.0}):
            output = run(model, batch, **options, **exits)
            assert torch.equal(output.sequences, expected.sequences)
            for name in ("logits", "scores"):
                for ours, theirs in zip(output[name], expected[name], strict=True):
                    assert torch.equal(ours, theirs)
            assert type(output.past_key_values) is type(expected.past_key_values)
            new = output.sequences[:, batch["input_ids"].shape[1] :]
            assert output.exit_layers.shape == new.shape
            for tokens, layers in zip(new.tolist(), output.exit_layers.tolist(), strict=True):
                count = next((number for number, one in enumerate(tokens, 1) if 2 <= one < 12), len(tokens))
                assert layers == [4] * count + [0] * (len(tokens) - count)

    @pytest.mark.parametrize("drafts", [{"prompt_lookup_num_tokens": 2}, "stock", "ours"])
    def test_drafts(self, drafts):
        """Several tokens per step; assistants know nothing of the call that they assist."""
        # Not every version drafts without a token that ends rows.
        model, batch = tiny_llama(eos_token_id=59), prompts([6])
        if isinstance(drafts, str):
            drafts = {"assistant_model": tiny_llama(1) if drafts == "ours" else stock_twin(tiny_llama(1))}
        output = run(model, batch, **drafts)
        assert torch.equal(output.sequences, run(model, batch).sequences)
        assert output.exit_layers.tolist() == [[4] * NEW]

    def test_as_an_assistant_of_a_stock_model(self):
        model, batch = tiny_llama(eos_token_id=None), prompts([6])
        expected = run(stock_twin(model), batch)
        assert torch.equal(run(stock_twin(model), batch, assistant_model=tiny_llama(1)).sequences, expected.sequences)

    def test_tokens_alone(self):
        model, batch = tiny_llama(), prompts([3, 2])
        tokens = run(model, batch, return_dict_in_generate=False)
        assert torch.equal(tokens, run(model, batch).sequences)
        with_exits = run(model, batch, return_dict_in_generate=False, exit_threshold=0.5)
        assert torch.equal(with_exits, run(model, batch, exit_threshold=0.5).sequences)


def depths(model, **options) -> set[int]:
    """Layers of all new tokens but the first, which the prompt's pass gives."""
    return set(run(model, prompts([3, 5]), eos_token_id=None, **options).exit_layers[:, 1:].flatten().tolist())


class TestWhereOptionsComeFrom:
    """A threshold of 0 lets everything out at the first exit, one of 1 nothing."""

    def test_argument(self):
        model = tiny_llama()
        assert depths(model) == {4}
        assert depths(model, exit_threshold=0.0) == {1}
        assert depths(model, exit_threshold=[1.0, 0.0, 1.0, 1.0]) == {2}
        assert depths(model, exit_threshold=torch.tensor([1.0, 0.0, 1.0, 1.0]), num_beams=2) == {2}
        assert depths(model, exit_threshold=0.0, min_exit_layer=3) == {3}
        assert depths(model, exit_threshold=0.0, min_exit_layer=4) == {4}
        assert depths(model, exit_threshold=0.0, exit_criterion="margin") == {1}
        assert depths(model, exit_threshold=1.0, exit_criterion="entropy") == {1}
        assert depths(model, exit_threshold=4.0, exit_criterion="patience") == {4}

    def test_generation_config(self):
        model = tiny_llama()
        assert depths(model, generation_config=GenerationConfig(exit_threshold=0.0, max_new_tokens=NEW)) == {1}

    def test_the_models_generation_config(self):
        model = tiny_llama()
        model.generation_config.exit_threshold = 0.0
        model.generation_config.min_exit_layer = 2
        assert depths(model) == {2}
        assert depths(model, min_exit_layer=1) == {1}
        assert depths(model, exit_threshold=1.0) == {4}
        other = GenerationConfig(exit_threshold=1.0, max_new_tokens=NEW)
        assert depths(model, generation_config=other) == {4}
        # What it leaves out is filled in from the model's.
        assert depths(model, generation_config=GenerationConfig(max_new_tokens=NEW)) == {2}

    def test_config(self):
        model = tiny_llama(exit_threshold=0.0, min_exit_layer=2)
        assert depths(model) == {2}
        model.generation_config.exit_threshold = 1.0
        assert depths(model) == {4}
        assert depths(model, exit_threshold=0.0) == {2}

    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_argument_beats_all(self):
        model = tiny_llama(exit_threshold=1.0)
        model.generation_config.exit_threshold = 0.0
        given = GenerationConfig(exit_threshold=0.0, exit_criterion="max_probability", max_new_tokens=NEW)
        assert depths(model, generation_config=given) == {1}
        assert depths(model, generation_config=given, exit_threshold=1.0) == {4}
        assert depths(model, generation_config=given, exit_criterion="entropy") == {4}

    @pytest.mark.parametrize("name,value", [("exit_threshold", 0.0), ("exit_threshold", [1.0, 0.0, 1.0, 1.0])])
    def test_saved_and_reloaded(self, tmp_path, name, value):
        layer = 2 if isinstance(value, list) else 1
        model = tiny_llama()
        setattr(model.generation_config, name, value)
        model.save_pretrained(tmp_path / "generation")
        loaded = LlamaForConsistentEECausalLM.from_pretrained(tmp_path / "generation").eval()
        assert getattr(loaded.generation_config, name) == value
        assert loaded.config.exit_threshold is None
        assert depths(loaded) == {layer}
        tiny_llama(**{name: value}).save_pretrained(tmp_path / "config")
        assert depths(LlamaForConsistentEECausalLM.from_pretrained(tmp_path / "config").eval()) == {layer}
        given = {name: value}
        assert depths(LlamaForConsistentEECausalLM.from_pretrained(tmp_path / "config", **given).eval()) == {layer}

    def test_calls_leave_no_trace_on_the_model(self):
        model = tiny_llama()
        before = (model.config.to_dict(), model.generation_config.to_dict(), set(vars(model)))
        run(model, prompts([3]), exit_threshold=0.3, exit_criterion="margin", exit_threshold_decay=2.0)
        assert (model.config.to_dict(), model.generation_config.to_dict(), set(vars(model))) == before


@pytest.mark.parametrize("skipped_kv", ["copy", "deferred"])
class TestPrompts:
    @pytest.mark.parametrize("chunk", [1, 2, 3, 4, 8])
    @pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"exit_threshold_decay": 3.0}])
    def test_in_chunks(self, skipped_kv, chunk, options):
        """A last chunk of one token is no decode step."""
        model, batch = tiny_llama(eos_token_id=None), prompts([5, 3])
        options = {"exit_threshold": spreading(model), "skipped_kv": skipped_kv, **options}
        whole, chunked = run(model, batch, **options), run(model, batch, prefill_chunk_size=chunk, **options)
        assert torch.equal(whole.sequences, chunked.sequences)
        assert torch.equal(whole.exit_layers, chunked.exit_layers)
        assert whole.exit_layers.shape == (2, NEW) and len(whole.exit_layers.unique()) > 2
        for ours, theirs in zip(chunked.past_key_values.layers, whole.past_key_values.layers, strict=True):
            torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-4, atol=1e-4)

    def test_embedded(self, skipped_kv):
        model, batch = tiny_llama(eos_token_id=None), prompts([5, 3])
        options = {"exit_threshold": spreading(model), "skipped_kv": skipped_kv}
        expected = run(model, batch, **options)
        embedded = {
            "inputs_embeds": model.get_input_embeddings()(batch["input_ids"]),
            "attention_mask": batch["attention_mask"],
        }
        output = run(model, embedded, **options)
        assert torch.equal(output.sequences, expected.sequences[:, 5:])
        assert torch.equal(output.exit_layers, expected.exit_layers)

    def test_without_a_mask(self, skipped_kv):
        model, batch = tiny_llama(eos_token_id=None), prompts([4, 4])
        options = {"exit_threshold": spreading(model), "skipped_kv": skipped_kv}
        expected = run(model, batch, **options)
        output = run(model, {"input_ids": batch["input_ids"]}, **options)
        assert torch.equal(output.sequences, expected.sequences)
        assert torch.equal(output.exit_layers, expected.exit_layers)

    def test_given_as_inputs(self, skipped_kv):
        model, batch = tiny_llama(), prompts([4, 4])
        options = {"exit_threshold": 0.5, "skipped_kv": skipped_kv, "max_new_tokens": NEW}
        expected = run(model, batch, **options).sequences
        assert torch.equal(model.generate(batch["input_ids"], **options), expected)
        config = GenerationConfig(eos_token_id=2, pad_token_id=0, **options)
        assert torch.equal(model.generate(batch["input_ids"], config), expected)


class Streamer:
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens.append(value)

    def end(self):
        self.ended = True


class EndsRows(StoppingCriteria):
    """Ends row i when it has i + 2 new tokens."""

    def __init__(self, prompt_length):
        self.prompt_length = prompt_length

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] - self.prompt_length >= torch.arange(len(input_ids)) + 2


class TestOutput:
    def test_streaming(self):
        model, batch, streamer = tiny_llama(), prompts([4]), Streamer()
        output = run(model, batch, exit_threshold=spreading(model), streamer=streamer)
        assert torch.equal(streamer.tokens[0], batch["input_ids"])
        assert [int(token) for token in streamer.tokens[1:]] == output.sequences[0, 4:].tolist()
        assert streamer.ended and len(output.exit_layers.unique()) > 1

    @pytest.mark.parametrize("skipped_kv", ["copy", "deferred"])
    @pytest.mark.parametrize("options", [{"do_sample": True}, {"num_beams": 4}])
    def test_return_sequences(self, skipped_kv, options):
        model, batch = tiny_llama(eos_token_id=list(range(2, 12))), prompts([4, 2])
        thresholds = spreading(model)
        output = run(model, batch, exit_threshold=thresholds, num_return_sequences=3, skipped_kv=skipped_kv, **options)
        slow = SlowModel(model, 4, threshold=thresholds, skipped_kv=skipped_kv)
        expected = run(slow, batch, num_return_sequences=3, use_cache=False, **options)
        assert torch.equal(output.sequences, expected.sequences) and len(output.sequences) == 6
        repeated = {name: value.repeat_interleave(3, dim=0) for name, value in batch.items()}
        check_against_slow(model, repeated, slow, output, beams="num_beams" in options)

    def test_rows_that_end_by_other_rules(self):
        model, batch = tiny_llama(), prompts([4, 4, 4])
        stopping = StoppingCriteriaList([EndsRows(4)])
        with_end = run(model, batch, exit_threshold=0.0, stopping_criteria=stopping, eos_token_id=59)
        assert with_end.exit_layers.tolist() == [[4, 1, 0, 0], [4, 1, 1, 0], [4, 1, 1, 1]]
        # Without a token that ends rows nothing pads them either, and they go on with the others.
        without = run(model, batch, exit_threshold=0.0, stopping_criteria=stopping, eos_token_id=None)
        assert without.exit_layers.tolist() == [[4, 1, 1, 1]] * 3

    def test_padding_that_ends_rows(self):
        """Padding with the token that ends rows: the first one is the row's own."""
        model, batch = tiny_llama(eos_token_id=list(range(2, 20)), pad_token_id=2), prompts([4, 3, 2, 5])
        output = run(model, batch, exit_threshold=spreading(model))
        for tokens, layers in zip(output.sequences[:, 5:].tolist(), output.exit_layers.tolist(), strict=True):
            ends = next((number for number, token in enumerate(tokens) if 2 <= token < 20), len(tokens))
            assert [layer > 0 for layer in layers] == [number <= ends for number in range(len(tokens))]

    @pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prefill_chunk_size": 3}])
    def test_one_token(self, options):
        output = run(tiny_llama(), prompts([4, 2]), exit_threshold=0.0, max_new_tokens=1, **options)
        assert output.exit_layers.tolist() == [[4], [4]]

    def test_a_step_too_many(self, monkeypatch):
        """Where asking for the end would wait for the device, transformers runs one step more and takes it back."""
        from transformers.generation import utils

        if not hasattr(utils, "DeferredStopCheck"):
            pytest.skip("this version of transformers always waits")
        model, batch = tiny_llama(eos_token_id=list(range(2, 30))), prompts([4, 2])
        for skipped_kv in ("copy", "deferred"):
            options = {"exit_threshold": spreading(model), "skipped_kv": skipped_kv, "max_new_tokens": 12}
            expected = run(model, batch, **options)
            assert expected.sequences.shape[1] < 16
            with monkeypatch.context() as patch:
                patch.setattr(utils.DeferredStopCheck, "is_supported", staticmethod(lambda *args, **kwargs: True))
                patch.setattr(torch, "Event", lambda **kwargs: _NoEvent())
                output = run(model, batch, **options)
            assert torch.equal(output.sequences, expected.sequences)
            assert torch.equal(output.exit_layers, expected.exit_layers)
            for ours, theirs in zip(output.past_key_values.layers, expected.past_key_values.layers, strict=True):
                torch.testing.assert_close(ours.keys, theirs.keys)

    def test_loops_of_ones_own(self):
        """What does not tell which layers its tokens came from gets none."""
        made = GenerateDecoderOnlyOutput(sequences=torch.tensor([[3]]))
        output = run(tiny_llama(), prompts([3]), exit_threshold=0.5, custom_generate=lambda *args, **kwargs: made)
        assert output is made and "exit_layers" not in output


class TestBudgetsAndNames:
    """Where several places say something, the first counts: argument, generation config, saved defaults, config."""

    def model(self, **fields):
        budgets = [[0.25, 0.4, 0.3], [0.5, 0.1, 0.5], [1.0, 0.001, 0.7]]
        point = {"criterion": "max_probability", "thresholds": [0.03, 0.04, 0.05, 1.0]}
        points = {"exit_budgets": budgets, "exit_operating_points": {"point": point}}
        model = tiny_llama(policy_condition="film", **points, **fields)
        model.generation_config.eos_token_id = None
        return model

    def layers(self, model, **options):
        return run(model, prompts([4, 2, 5]), **options).exit_layers.tolist()

    @pytest.mark.parametrize("criterion", [None, "policy"])
    def test_the_configs_budget(self, criterion):
        model = self.model(exit_budget=0.4)
        assert self.layers(model, exit_criterion=criterion) == self.layers(self.model(), exit_budget=0.4)

    def test_another_criterion_than_the_configs_budget(self):
        model = self.model(exit_budget=0.4, exit_threshold=0.04)
        options = {"exit_criterion": "max_probability"}
        # Nobody has given a threshold for it.
        assert self.layers(model, **options) == [[4] * NEW] * 3
        expected = self.layers(self.model(), exit_threshold=0.04, **options)
        assert self.layers(model, exit_threshold=0.04, **options) == expected != [[4] * NEW] * 3

    @pytest.mark.parametrize("asked", [{"exit_budget": 0.4}, {"exit_threshold": "point"}])
    @pytest.mark.parametrize("in_config", [False, True])
    def test_before_saved_defaults(self, asked, in_config):
        model, expected = self.model(), self.layers(self.model(), **asked)
        model.generation_config.exit_threshold, model.generation_config.exit_criterion = 0.0, "patience"
        if in_config:
            asked = {"generation_config": GenerationConfig(**asked)}
        assert self.layers(model, **asked) == expected

    def test_a_number_before_a_saved_budget(self):
        model = self.model()
        model.generation_config.exit_budget = 0.25
        assert self.layers(model, exit_threshold=1.0) == [[4] * NEW] * 3

    @pytest.mark.parametrize(
        ("asked", "message"),
        [
            ({"exit_budget": 0.5, "exit_threshold": 0.3}, r"`exit_budget`=0\.5 excludes `exit_threshold`=0\.3"),
            ({"exit_budget": 0.5, "exit_criterion": "margin"}, r"`exit_budget`=0\.5 excludes.*'margin'"),
            ({"exit_threshold": "point", "exit_criterion": "margin"}, r"'point' is an operating point of.*'margin'"),
        ],
    )
    def test_contradictions(self, asked, message):
        for options in (asked, {"generation_config": GenerationConfig(**asked)}):
            with pytest.raises(ValueError, match=message):
                self.layers(self.model(), **options)


class _NoEvent:
    def record(self):
        pass

    def synchronize(self):
        pass


class TestDecay:
    def test_formula(self):
        assert decayed(0.8, 4.0, 0.25) == pytest.approx(0.72 + 0.1 * math.exp(-1))
        assert decayed(0.99, 0.0, 0.5) == pytest.approx(0.991)
        assert decayed([0.5, 0.0], 2.0, 1.0) == pytest.approx([0.45 + 0.1 * math.exp(-2), 0.1 * math.exp(-2)])
        # An exit that is closed stays closed.
        assert decayed(1.0, 5.0, 1.0) == 1.0 and decayed([1.0, 0.5], 0.0, 1.0)[0] == 1.0

    @pytest.mark.parametrize("criterion", ["policy", "margin"])
    @pytest.mark.parametrize("skipped_kv", ["copy", "deferred"])
    @pytest.mark.parametrize("length", [{"max_new_tokens": NEW}, {"max_length": NEW + 5, "max_new_tokens": None}])
    def test_thresholds_of_every_step(self, criterion, skipped_kv, length):
        model, batch = tiny_llama(7, eos_token_id=None), prompts([5, 2])
        base = [min(1.0, value / 0.95) for value in spreading(model, criterion)]
        calm = lambda new: [0.9 * value + 0.1 * math.exp(-6.0 * new / NEW) if value < 1 else 1.0 for value in base]  # noqa: E731
        options = {"exit_threshold": base, "exit_criterion": criterion, "skipped_kv": skipped_kv, **length}
        output = run(model, batch, exit_threshold_decay=6.0, **options)
        slow = SlowModel(model, 5, threshold=calm, skipped_kv=skipped_kv, criterion=criterion)
        assert torch.equal(output.sequences, run(slow, batch, use_cache=False, **length).sequences)
        check_against_slow(model, batch, slow, output)
        assert not torch.equal(output.exit_layers, run(model, batch, **options).exit_layers)

    def test_from_the_generation_config(self):
        model, batch = tiny_llama(7, eos_token_id=None), prompts([5, 2])
        options = {"exit_threshold": [min(1.0, value / 0.95) for value in spreading(model)]}
        expected = run(model, batch, exit_threshold_decay=6.0, **options)
        model.generation_config.exit_threshold_decay = 6.0
        assert torch.equal(run(model, batch, **options).exit_layers, expected.exit_layers)


def test_misspelt_fields_of_a_generation_config():
    """Such configs keep any field, and nobody would ever look at this one."""
    model, asked = tiny_llama(), {"max_new_tokens": 2, "do_sample": False}
    with pytest.raises(TypeError, match=r"`exit_treshold`=0\.5 is no argument: did you mean `exit_threshold`"):
        model.generate(torch.tensor([[3, 4]]), generation_config=GenerationConfig(exit_treshold=0.5, **asked))
    model.generate(torch.tensor([[3, 4]]), generation_config=GenerationConfig(exit_treshold=None, **asked))
    for name, meant in (("min_exit_layers", "min_exit_layer"), ("skiped_kv", "skipped_kv")):
        with pytest.raises(TypeError, match=f"did you mean `{meant}`"):
            model.generate(torch.tensor([[3, 4]]), generation_config=GenerationConfig(**{name: 2}, **asked))
    model.generation_config.exits_must_play = True
    with pytest.raises(TypeError, match="did you mean `exits_must_pay`"):
        model.generate(torch.tensor([[3, 4]]), **asked)
