# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
from __future__ import annotations

import copy
import inspect
import json
import pickle
import warnings
from functools import partial
from typing import ClassVar

import pytest
import torch
from peft import get_peft_model
from tiny import tiny_llama, with_adapters
from tiny_models import tiny_model, tiny_tokenizer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GenerationConfig,
    PreTrainedTokenizerFast,
    TextClassificationPipeline,
    TextGenerationPipeline,
    pipeline,
)

from transformers_cee import EarlyExitTextClassificationPipeline, exit_lora_config


TASK = "early-exit-text-classification"
SENTENCES = ["a film with heart", "not a single joke lands and the plot is worse", "the plot is the plot"]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def make(model, tokenizer, **arguments):
    return pipeline(TASK, model=model, tokenizer=tokenizer, device="cpu", **arguments)


@pytest.mark.parametrize(("threshold", "layer"), [(0.0, 1), (1.0, 4)])
def test_threshold_per_call_and_at_construction(model, tokenizer, threshold, layer):
    per_call = make(model, tokenizer)(SENTENCES, exit_threshold=threshold)
    at_construction = make(model, tokenizer, exit_threshold=threshold)(SENTENCES)
    assert per_call == at_construction
    assert [result["exit_layer"] for result in per_call] == [layer] * 3
    assert make(model, tokenizer, exit_threshold=1.0 - threshold)(SENTENCES, exit_threshold=threshold) == per_call


def test_no_threshold_takes_the_models_own(tokenizer):
    results = make(tiny_model(exit_threshold=0.0), tokenizer)(SENTENCES)
    assert [result["exit_layer"] for result in results] == [1, 1, 1]


def test_criterion(model, tokenizer):
    classifier = make(model, tokenizer, exit_criterion="max_probability", exit_threshold=1.0)
    assert [result["exit_layer"] for result in classifier(SENTENCES)] == [4, 4, 4]
    assert [result["exit_layer"] for result in classifier(SENTENCES, exit_threshold=0.0)] == [1, 1, 1]


def test_budgets_and_named_operating_points(tokenizer):
    point = {"criterion": "max_probability", "thresholds": [1.0, 0.0, 0.0, 0.0]}
    budgets = [[0.25, 0.5, 0.0], [0.9, 0.01, 1.0]]
    fields = {"policy_condition": "film", "exit_budgets": budgets, "exit_operating_points": {"second": point}}
    classifier = make(tiny_model(**fields), tokenizer)
    assert [result["exit_layer"] for result in classifier(SENTENCES, exit_threshold="second")] == [2, 2, 2]
    assert [result["exit_layer"] for result in classifier(SENTENCES, exit_budget=0.25)] == [1, 1, 1]
    with pytest.raises(ValueError, match=r"`exit_budget`=1\.5"):
        classifier(SENTENCES, exit_budget=1.5)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_same_as_the_model_at_any_batch_size(model, tokenizer, batch_size):
    scores = [
        float(model(**tokenizer(text, return_tensors="pt"), exit_threshold=1.0).exit_layers) for text in SENTENCES
    ]
    assert scores == [4.0] * 3
    thresholds = [0.49, 0.5, 0.51, 0.5]
    results = make(model, tokenizer)(SENTENCES, exit_threshold=thresholds, batch_size=batch_size)
    for text, result in zip(SENTENCES, results, strict=True):
        with torch.no_grad():
            output = model(**tokenizer(text, return_tensors="pt"), exit_threshold=thresholds)
        probabilities = output.logits[0].softmax(-1)
        assert result["label"] == model.config.id2label[int(probabilities.argmax())]
        assert result["score"] == pytest.approx(float(probabilities.max()), abs=1e-5)
        assert result["exit_layer"] == int(output.exit_layers)


def test_all_labels_and_pairs(model, tokenizer):
    classifier = make(model, tokenizer, exit_threshold=0.0)
    both = classifier(SENTENCES[0], top_k=None)
    assert {result["label"] for result in both} == {"negative", "positive"}
    assert [result["exit_layer"] for result in both] == [1, 1]
    pair = classifier({"text": SENTENCES[0], "text_pair": SENTENCES[1]})
    assert pair["exit_layer"] == 1


def test_bad_arguments_are_named(model, tokenizer):
    classifier = make(model, tokenizer)
    with pytest.raises(ValueError, match="exit_threshold"):
        classifier(SENTENCES, exit_threshold=1.5)
    with pytest.raises(ValueError, match="exit_criterion"):
        classifier(SENTENCES, exit_criterion="mood")


def test_model_without_exits_is_refused(tokenizer):
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=30)
    with pytest.raises(ValueError, match="BertForSequenceClassification, which has no exits"):
        make(BertForSequenceClassification(config), tokenizer)


def test_language_models_are_sent_elsewhere(tokenizer):
    with pytest.raises(ValueError, match=r"LlamaForConsistentEECausalLM, which generates text.*'text-generation'"):
        make(tiny_llama(), tokenizer)


def test_the_stock_task_works_too(model, tokenizer):
    classifier = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    results = classifier(SENTENCES, batch_size=2)
    assert [set(result) for result in results] == [{"label", "score"}] * 3
    for threshold in (0.0, 1.0):
        early = make(model, tokenizer)(SENTENCES, exit_threshold=threshold)
        results = classifier(SENTENCES, exit_threshold=threshold)
        assert results == [{name: one[name] for name in ("label", "score")} for one in early]
    made = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu", exit_threshold=0.0)
    assert made(SENTENCES) == classifier(SENTENCES, exit_threshold=0.0) != classifier(SENTENCES, exit_threshold=1.0)


@pytest.mark.parametrize("task", [TASK, "text-classification"])
def test_misspelt_arguments_are_refused(model, tokenizer, task):
    classifier = pipeline(task, model=model, tokenizer=tokenizer, device="cpu")
    with pytest.raises(TypeError, match=r"`exit_thresold`=0\.5 is no argument: did you mean `exit_threshold`\?"):
        classifier(SENTENCES, exit_thresold=0.5)
    with pytest.raises(TypeError, match=r"did you mean `truncation`\?"):
        pipeline(task, model=model, tokenizer=tokenizer, device="cpu", truncaton=True)
    long = [" ".join(SENTENCES * 20)]
    options = {"truncation": True, "max_length": 8, "padding": True, "add_special_tokens": False, "top_k": 1}
    assert len(classifier(long, **options)) == 1


class TestZeroShot:
    LABELS: ClassVar = ["plot", "joke"]

    @pytest.fixture
    def make(self, tokenizer):
        labels = {"entailment": 0, "contradiction": 1}
        model = tiny_model(label2id=labels, id2label={number: name for name, number in labels.items()})
        return partial(pipeline, "zero-shot-classification", model=model, tokenizer=tokenizer, device="cpu")

    @pytest.mark.parametrize("multi_label", [False, True])
    @pytest.mark.parametrize("threshold", [0.0, 1.0])
    def test_threshold(self, make, tokenizer, threshold, multi_label):
        model = make().model
        results = make()(SENTENCES, self.LABELS, exit_threshold=threshold, multi_label=multi_label)
        assert results == make(exit_threshold=threshold)(SENTENCES, self.LABELS, multi_label=multi_label)
        for text, result in zip(SENTENCES, results, strict=True):
            pairs = [tokenizer(text, f"This example is {label}.", return_tensors="pt") for label in self.LABELS]
            with torch.no_grad():
                outputs = [model(**pair, exit_threshold=threshold) for pair in pairs]
            assert {int(one.exit_layers) for one in outputs} == {4 if threshold else 1}
            logits = torch.cat([one.logits for one in outputs])
            scores = logits.softmax(-1)[:, 0] if multi_label else logits[:, 0].softmax(0)
            found = dict(zip(result["labels"], result["scores"], strict=True))
            assert [found[label] for label in self.LABELS] == pytest.approx(scores.tolist(), abs=1e-5)

    def test_misspelt_arguments_are_refused(self, make):
        with pytest.raises(TypeError, match=r"did you mean `exit_threshold`\?"):
            make()(SENTENCES, self.LABELS, exit_thresold=0.5)
        with pytest.raises(ValueError, match="exit_criterion"):
            make()(SENTENCES, self.LABELS, exit_criterion="mood")


def test_features_have_no_exit_arguments(model, tokenizer):
    extractor = pipeline("feature-extraction", model=model, tokenizer=tokenizer, device="cpu")
    with pytest.raises(TypeError, match=r"`exit_threshold`=0\.0 is no argument of feature extraction"):
        extractor(SENTENCES, exit_threshold=0.0)
    with pytest.raises(TypeError, match=r"`truncaton`=True is no argument: did you mean `truncation`\?"):
        extractor(SENTENCES, truncaton=True)
    assert len(extractor(SENTENCES, truncation=True, tokenize_kwargs={"max_length": 8}, batch_size=1)) == 3
    assert extractor(SENTENCES[0], return_tensors=True).shape[-1] == model.config.hidden_size


def test_signatures_of_tokenizers_are_read_once(model, tokenizer, monkeypatch):
    classifier = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    classifier(SENTENCES, exit_threshold=0.0)
    read = []
    signature = inspect.signature
    monkeypatch.setattr(inspect, "signature", lambda method, **more: read.append(method) or signature(method, **more))
    classifier._sanitize_parameters(exit_threshold=0.0, truncation=True)
    assert not read


def test_models_without_exits_keep_the_stock_pipeline(tokenizer):
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=30)
    stock = BertForSequenceClassification(config).eval()
    classifier = pipeline("text-classification", model=stock, tokenizer=tokenizer, device="cpu", top_k=1)
    assert type(classifier) is TextClassificationPipeline
    assert len(classifier(SENTENCES, any_word="is handed to the tokenizer")) == 3


@pytest.mark.parametrize("task", ["text-classification", "feature-extraction", TASK])
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_do_the_same(model, tokenizer, task, copied):
    made = pipeline(task, model=model, tokenizer=tokenizer, device="cpu")
    other = copied(made)
    assert type(other) is type(made) and other is not made
    assert other(SENTENCES) == made(SENTENCES)


class TestAdapters:
    """Pipelines around a PeftModel do what they do around the merged model."""

    @pytest.fixture
    def adapted(self):
        with warnings.catch_warnings():
            # PEFT asks for what newer versions of transformers call something else.
            warnings.simplefilter("ignore", FutureWarning)
            model = get_peft_model(tiny_model(), exit_lora_config("SEQ_CLS", r=4)).eval()
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0.0, 0.3)
        return model

    @pytest.mark.parametrize("task", [TASK, "text-classification"])
    def test_classification(self, adapted, tokenizer, task):
        classifier = pipeline(task, model=adapted, tokenizer=tokenizer, device="cpu")
        merged = pipeline(task, model=copy.deepcopy(adapted).merge_and_unload(), tokenizer=tokenizer, device="cpu")
        for threshold in (0.0, [0.49, 0.5, 0.51, 0.5], 1.0):
            found, expected = (one(SENTENCES, exit_threshold=threshold) for one in (classifier, merged))
            for ours, theirs in zip(found, expected, strict=True):
                assert ours.pop("score") == pytest.approx(theirs.pop("score"), abs=1e-5)
                assert ours == theirs
        with pytest.raises(TypeError, match="exit_thresold"):
            classifier(SENTENCES, exit_thresold=0.5)

    def test_generation(self):
        words = PreTrainedTokenizerFast(
            tokenizer_object=tiny_tokenizer().backend_tokenizer, pad_token="[PAD]", unk_token="[UNK]"
        )
        model = with_adapters(tiny_llama(eos_token_id=None))
        merged = copy.deepcopy(model).merge_and_unload()
        options = {"max_new_tokens": 5, "do_sample": False, "return_tensors": True}
        generate, expected = (
            pipeline("text-generation", model=one, tokenizer=words, device="cpu") for one in (model, merged)
        )
        for threshold in (0.0, 0.5, 1.0):
            made = generate(SENTENCES[0], exit_threshold=threshold, **options)
            assert made == expected(SENTENCES[0], exit_threshold=threshold, **options)
        assert generate(SENTENCES[0], exit_threshold=0.0, **options) != generate(SENTENCES[0], **options)


def test_saved_pipeline_needs_no_remote_code(model, tokenizer, tmp_path):
    make(model, tokenizer).save_pretrained(tmp_path)
    assert "custom_pipelines" not in json.loads((tmp_path / "config.json").read_text())
    loaded = pipeline(TASK, model=str(tmp_path), device="cpu", exit_threshold=0.0)
    assert type(loaded) is EarlyExitTextClassificationPipeline
    assert loaded(SENTENCES[0])[0]["exit_layer"] == 1


class TestTextGeneration:
    """The stock pipeline hands exit arguments on to `generate`: the layers that run tell."""

    NEW = 5

    @pytest.fixture
    def generator(self):
        words = PreTrainedTokenizerFast(
            tokenizer_object=tiny_tokenizer().backend_tokenizer, pad_token="[PAD]", unk_token="[UNK]"
        )
        model = tiny_llama(eos_token_id=None)
        return pipeline("text-generation", model=model, tokenizer=words, device="cpu", eos_token_id=-1)

    def layers(self, generator, texts=SENTENCES[0], **options):
        """Calls of layers behind the prompt's pass."""
        calls = []
        hooks = [layer.register_forward_hook(lambda *_: calls.append(1)) for layer in generator.model.model.layers]
        made = generator(texts, max_new_tokens=self.NEW, do_sample=False, **options)
        for hook in hooks:
            hook.remove()
        first = made[0][0] if isinstance(texts, list) else made[0]
        assert first["generated_text"].startswith(texts[0] if isinstance(texts, list) else texts)
        return len(calls) - 4

    def test_depth_changes_with_the_threshold(self, generator):
        assert type(generator) is TextGenerationPipeline
        steps = self.NEW - 1
        assert self.layers(generator) == 4 * steps
        assert self.layers(generator, exit_threshold=1.0) == 4 * steps
        assert self.layers(generator, exit_threshold=0.0) == steps
        assert self.layers(generator, exit_threshold=[1.0, 0.0, 1.0, 1.0]) == 2 * steps
        assert self.layers(generator, exit_threshold=0.0, min_exit_layer=3) == 3 * steps
        assert self.layers(generator, exit_threshold=0.0, exit_criterion="margin", skipped_kv="deferred") == steps
        assert self.layers(generator, SENTENCES, exit_threshold=0.0, batch_size=3) == steps

    def test_defaults(self, generator):
        steps = self.NEW - 1
        config = GenerationConfig(exit_threshold=0.0, eos_token_id=-1)
        assert self.layers(generator, generation_config=config) == steps
        made = pipeline(
            "text-generation",
            model=generator.model,
            tokenizer=generator.tokenizer,
            device="cpu",
            eos_token_id=-1,
            exit_threshold=0.0,
        )
        assert self.layers(made) == steps
        assert self.layers(made, exit_threshold=1.0) == 4 * steps
        generator.model.generation_config.exit_threshold = 0.0
        made = pipeline("text-generation", model=generator.model, tokenizer=generator.tokenizer, device="cpu")
        assert self.layers(made, eos_token_id=-1) == steps

    def test_same_texts_as_generate(self, generator):
        model, words = generator.model, generator.tokenizer
        thresholds = [0.6, 0.5, 0.5, 1.0]
        inputs = words(SENTENCES[1], return_tensors="pt", return_token_type_ids=False)
        options = {"max_new_tokens": self.NEW, "do_sample": False, "exit_threshold": thresholds, "eos_token_id": -1}
        tokens = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
        made = generator(SENTENCES[1], return_tensors=True, **options)[0]["generated_token_ids"]
        assert list(made)[-self.NEW :] == tokens.tolist()

    def test_bad_arguments_are_named(self, generator):
        with pytest.raises(ValueError, match=r"`exit_threshold`=1.5"):
            generator(SENTENCES[0], max_new_tokens=2, exit_threshold=1.5)
        with pytest.raises(ValueError, match=r"`exit_criterion`='mood'"):
            generator(SENTENCES[0], max_new_tokens=2, exit_criterion="mood")
