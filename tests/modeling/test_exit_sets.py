# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Several sets of exits on one base: each is what it is alone."""

from __future__ import annotations

import copy

import pytest
import torch
from exits_alone import AUTO, FIELDS, LABELS, OTHER_FIELDS, OURS, SIZES, outputs, same, stock, trained
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertModel

from transformers_cee import load_exits


@pytest.fixture(params=list(OURS))
def kind(request):
    return request.param


@pytest.fixture
def folders(kind, tmp_path):
    """Two sets on one base: other layers, heads, policies, thresholds, points, estimators."""
    stock(kind).save_pretrained(tmp_path / "base")
    first = trained(kind, tmp_path / "base", exit_threshold=0.5, **FIELDS[kind])
    first.config.exit_operating_points = {"quick": {"criterion": "policy", "thresholds": [0.6, 0.4, 1.0]}}
    second = trained(kind, tmp_path / "base", seed=2, exit_threshold=0.3, **OTHER_FIELDS[kind])
    if kind == "decoder":
        first.generation_config.exit_threshold = 0.4
        second.generation_config.skipped_kv = "deferred"
    first.save_exits(tmp_path / "first")
    second.save_exits(tmp_path / "second")
    return tmp_path / "first", tmp_path / "second"


def alone(kind, folder, **options):
    return AUTO[kind].from_pretrained(folder, **options).eval()


def both(kind, folders):
    model = alone(kind, folders[0])
    model.load_exits(folders[1], name="fast")
    return model


def test_each_is_what_it_is_alone(kind, folders):
    model = both(kind, folders)
    assert (model.exits_names, model.active_exits) == (["default", "fast"], "fast")
    for name, folder in (("fast", folders[1]), ("default", folders[0]), ("fast", folders[1]), ("default", folders[0])):
        model.set_exits(name)
        expected = alone(kind, folder)
        assert model.active_exits == name
        same(expected, model)
        assert model.layer_numbers == expected.layer_numbers == model.config.exit_layer_numbers
        if kind == "decoder":
            for field in ("exit_threshold", "skipped_kv"):
                assert getattr(model.generation_config, field, None) == getattr(
                    expected.generation_config, field, None
                )
    assert model.get_submodule(model.base_model_prefix) is model.base_model


def test_order_does_not_matter(kind, folders, tmp_path):
    """A model with untrained exits, or a stock one, takes sets in any order."""
    model = OURS[kind].from_pretrained(tmp_path / "base").eval()
    model.load_exits(folders[1], name="b")
    model.load_exits(folders[0], name="a")
    same(alone(kind, folders[0]), model)
    model.set_exits("b")
    same(alone(kind, folders[1]), model)
    model = load_exits(stock(kind), folders[1], name="b")
    assert model.exits_names == ["b"]
    load_exits(model, folders[0], name="a")
    same(alone(kind, folders[0]), model)
    load_exits(model, folders[1], name="a")
    assert model.exits_names == ["b", "a"]
    same(alone(kind, folders[1]), model)


def test_changes_stay_with_their_set(kind, folders):
    model = both(kind, folders)
    model.config.exit_threshold = 0.45
    with torch.no_grad():
        model.exit_policies.networks[0][0].bias.add_(1)
    changed = outputs(model, exit_threshold=0.5)
    model.set_exits("default")
    same(alone(kind, folders[0]), model)
    model.set_exits("fast")
    assert model.config.exit_threshold == 0.45
    assert all(map(torch.equal, outputs(model, exit_threshold=0.5), changed))


def test_the_active_one_is_saved(kind, folders, tmp_path):
    model = both(kind, folders)
    model.save_pretrained(tmp_path / "whole")
    same(alone(kind, folders[1]), alone(kind, tmp_path / "whole"))
    model.set_exits("default")
    model.save_exits(tmp_path / "exits")
    same(alone(kind, folders[0]), alone(kind, tmp_path / "exits"))


def test_dtype_and_training_mode_follow(kind, folders):
    model = both(kind, folders).to(torch.bfloat16).train()
    model.set_exits("default")
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    assert all(module.training for module in model.modules())
    model.eval()
    model.set_exits("fast")
    same(alone(kind, folders[1]).to(torch.bfloat16), model)
    model.set_exits("default")
    same(alone(kind, folders[0]).to(torch.bfloat16), model)


def test_more_tokens(kind, folders):
    """Sets that were not active when the embeddings were resized are resized when they are."""
    model, size = both(kind, folders), SIZES["vocab_size"]
    model.resize_token_embeddings(size + 3, mean_resizing=False)
    more = torch.full((2, 7), size + 1)
    for name, folder in (("default", folders[0]), ("fast", folders[1])):
        model.set_exits(name)
        expected = alone(kind, folder)
        expected.resize_token_embeddings(size + 3, mean_resizing=False)
        for key, value in expected.state_dict().items():
            own = model.state_dict()[key]
            assert own.shape == value.shape, key
            new = value.shape[:1] == (size + 3,)
            assert torch.equal(own[:size] if new else own, value[:size] if new else value), key
        assert torch.isfinite(model(more, exit_threshold=0.5).logits).all()
    model.resize_token_embeddings(size)
    for name, folder in (("default", folders[0]), ("fast", folders[1])):
        model.set_exits(name)
        same(alone(kind, folder), model)
    model.resize_token_embeddings(size + 3)
    with pytest.raises(ValueError, match=r"`vocab_size`=63.*with 60"):
        model.load_exits(folders[0], name="again")


def test_copies_have_their_own(kind, folders):
    model = both(kind, folders)
    other = copy.deepcopy(model)
    other.set_exits("default")
    assert model.active_exits == "fast"
    same(alone(kind, folders[1]), model)
    same(alone(kind, folders[0]), other)


def test_refusals(kind, folders):
    model = both(kind, folders)
    with pytest.raises(ValueError, match="`name`='slow' is no set of exits; accepted are 'default', 'fast'"):
        model.set_exits("slow")
    model.hf_device_map = {"a": "cpu", "b": 0}
    with pytest.raises(ValueError, match="spread over several devices"):
        model.set_exits("default")
    del model.hf_device_map
    targets = ["query"] if kind == "encoder" else ["q_proj"]
    adapted = get_peft_model(model, LoraConfig(target_modules=targets))
    for call in (lambda: model.set_exits("default"), lambda: adapted.save_exits("nowhere")):
        with pytest.raises(ValueError, match=r"has adapters.*merge them first"):
            call()
    assert model.active_exits == "fast"


def test_a_name_is_a_text(kind, folders):
    model = alone(kind, folders[0])
    with pytest.raises(ValueError, match="`name`=3 must be a text"):
        model.load_exits(folders[1], name=3)
    assert model.exits_names == ["default"]


def test_heads_of_other_labels(tmp_path):
    """Sets bring their own classifiers where the base has none; a pooler that one set does not use comes back."""
    torch.manual_seed(0)
    BertModel(BertConfig(**SIZES)).save_pretrained(tmp_path / "base")
    fields = {"first": {**LABELS, "exit_pooling": "mean"}, "second": {"num_labels": 5, "exit_layers": 2}}
    for seed, (name, one) in enumerate(fields.items()):
        trained("encoder", tmp_path / "base", seed=seed, **one).save_exits(tmp_path / name)
    model = alone("encoder", tmp_path / "second")
    model.load_exits(tmp_path / "first", name="first")
    for _ in range(2):
        same(alone("encoder", tmp_path / "first"), model)
        assert model.num_labels == 3
        model.set_exits("default")
        same(alone("encoder", tmp_path / "second"), model)
        assert model.num_labels == 5
        model.set_exits("first")
    without = alone("encoder", tmp_path / "first")
    with pytest.raises(ValueError, match=r"lacks 'bert\.pooler.*with these exits first"):
        without.load_exits(tmp_path / "second", name="second")
    same(alone("encoder", tmp_path / "first"), without)
