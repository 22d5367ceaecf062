# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Weights are used through their modules, so that whoever replaces or moves these is heard: quantization, offload."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from tiny import pad, random_rows, tiny_llama, tiny_model
from torch import nn

from transformers_cee.exits.criteria import CRITERIA
from transformers_cee.exits.estimators import ESTIMATORS


accelerate = pytest.importorskip("accelerate")

# A middle of the road for each criterion, by what scores of random models are like.
THRESHOLDS = {"entropy": 0.6, "energy": 0.2, "patience": 1, "entropy_patience": 0.8, "divergence_patience": 0.5}
NAMES = sorted(set(CRITERIA) - {"oracle"})
POLICIES = [
    {"policy_condition": "film"},
    {"policy_condition": "input", "policy_inputs": "confidence"},
    {"policy_inputs": "both", "policy_condition": "film"},
]
IDS = torch.randint(3, 60, (5, 7), generator=torch.Generator().manual_seed(3))


def with_estimators(make, **fields):
    model = make(exit_estimators=sorted(ESTIMATORS), **fields)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.exit_estimators.parameters():
            parameter.normal_(0.0, 0.3)
    model.exit_estimators["token_hash"].exits.random_(0, len(model.layer_numbers))
    return model


def encoder(**fields):
    return with_estimators(tiny_model, exit_norm="layer_norm", **fields)


def offloaded(model, folder):
    """All weights on the meta device until their module is called."""
    return accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))


def on_disk(model, folder):
    """Exits and half of the layers on disk."""
    model = copy.deepcopy(model)
    names = [name for name, child in model.named_children() if any(True for _ in child.parameters())]
    places = {name: "cpu" if name in ("bert", "model", "lm_head") else "disk" for name in names}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)


MOVED = {"offload": offloaded, "disk": on_disk}


def quantized(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)


def run_encoder(model, criterion):
    batch = pad(random_rows(9, 3))
    return model(**batch, exit_criterion=criterion, exit_threshold=THRESHOLDS.get(criterion, 0.5))


def run_decoder(model, criterion):
    return model(IDS, exit_criterion=criterion, exit_threshold=THRESHOLDS.get(criterion, 0.5))


RUNS = {
    "encoder": (encoder, run_encoder),
    "decoder": (lambda **fields: with_estimators(tiny_llama, **fields), run_decoder),
}


@pytest.mark.parametrize("way", MOVED)
@pytest.mark.parametrize("kind", RUNS)
class TestMoved:
    def same(self, model, run, way, folder, criterion):
        expected, output = run(model, criterion), run(MOVED[way](model, folder), criterion)
        assert output.exit_layers.tolist() == expected.exit_layers.tolist()
        torch.testing.assert_close(output.logits, expected.logits)
        torch.testing.assert_close(output.exit_probabilities, expected.exit_probabilities, equal_nan=True)

    @pytest.mark.parametrize("criterion", NAMES)
    @torch.no_grad()
    def test_criteria(self, criterion, kind, way, tmp_path):
        make, run = RUNS[kind]
        self.same(make(), run, way, tmp_path, criterion)

    @pytest.mark.parametrize("fields", POLICIES)
    @torch.no_grad()
    def test_policies(self, fields, kind, way, tmp_path):
        make, run = RUNS[kind]
        self.same(make(**fields), run, way, tmp_path, "policy")


@pytest.mark.parametrize("way", MOVED)
@pytest.mark.parametrize("head", ["shared", "norm", "low_rank", "untied", "layernorm_linear"])
@pytest.mark.parametrize("skipped_kv", ["copy", "deferred"])
def test_generation_with_moved_weights(skipped_kv, head, way, tmp_path):
    model = tiny_llama(exit_head=head, exit_head_rank=3)
    options = {"exit_threshold": 0.5, "skipped_kv": skipped_kv, "max_new_tokens": 5, "eos_token_id": None}
    options |= {"return_dict_in_generate": True, "do_sample": False}
    expected = model.generate(IDS, **options)
    output = MOVED[way](model, tmp_path).generate(IDS, **options)
    assert output.sequences.tolist() == expected.sequences.tolist()
    assert output.exit_layers.tolist() == expected.exit_layers.tolist()


@pytest.mark.parametrize("threshold", [0.0, [1.0, 0.0, 0.5, 0.5], [1.0, 1.0, 0.0, 1.0]])
@pytest.mark.parametrize("head", ["norm", "untied"])
@torch.no_grad()
def test_no_module_is_called_for_nothing(head, threshold):
    """Some kinds of quantized layers cannot take inputs without rows."""
    model, seen = tiny_llama(exit_head=head), []
    for module in (model.lm_head, *model.exit_heads.heads, *(network[0] for network in model.exit_policies.networks)):
        module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numel()))
    assert len(model(IDS, exit_threshold=threshold).exit_layers.unique()) == 1
    assert seen and all(seen)


@pytest.mark.skipif(not torch.backends.quantized.supported_engines[1:], reason="no engine for int8 on this machine")
class TestQuantized:
    """Eight bits are near enough: scores at the first exit, which all come to, are close to those of 32."""

    @pytest.mark.parametrize("kind", RUNS)
    @pytest.mark.parametrize("criterion", NAMES)
    @torch.no_grad()
    def test_criteria(self, criterion, kind):
        make, run = RUNS[kind]
        self.close(make(), run, criterion)

    @pytest.mark.parametrize("kind", RUNS)
    @pytest.mark.parametrize("fields", POLICIES)
    @torch.no_grad()
    def test_policies(self, fields, kind):
        make, run = RUNS[kind]
        self.close(make(**fields), run, "policy")

    def close(self, model, run, criterion):
        small = quantized(model)
        assert "dynamic" in type(next(iter(small.exit_policies.networks))[0]).__module__
        expected, output = run(model, criterion), run(small, criterion)
        assert output.logits.isfinite().all()
        torch.testing.assert_close(
            output.exit_probabilities[..., 0], expected.exit_probabilities[..., 0], rtol=0, atol=0.12, equal_nan=True
        )

    @pytest.mark.parametrize("skipped_kv", ["copy", "deferred"])
    def test_generation(self, skipped_kv):
        model = quantized(with_estimators(tiny_llama, exit_head="low_rank", policy_condition="film"))
        options = {"max_new_tokens": 5, "eos_token_id": None, "return_dict_in_generate": True}
        output = model.generate(IDS, exit_threshold=0.5, skipped_kv=skipped_kv, **options)
        assert output.exit_layers.shape == (5, 5) and len(output.exit_layers.unique()) >= 2
