# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Models with adapters of PEFT around them: LoRA in the layers, exits as `modules_to_save`."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import PeftModel
from tiny import changed, collate_text, instructions, tiny_llama, tiny_text_trainer, weights, with_adapters

from transformers_cee.training.hardness import fingerprint
from transformers_cee.training.parameters import bare_model


PARTS = {"heads": ("lora_", "exit_norms.modules_to_save"), "policy": ("exit_policies.modules_to_save",)}


def names(model, phase: str) -> set[str]:
    return {name for name, _ in model.named_parameters() if any(part in name for part in PARTS[phase])}


@pytest.mark.parametrize("phase", ["heads", "policy", "consistent"])
def test_changes_only_what_it_should(tmp_path, phase):
    model = with_adapters(tiny_llama(policy_inputs="both"))
    before, flags = weights(model), {name: p.requires_grad for name, p in model.named_parameters()}
    trainer = tiny_text_trainer(tmp_path, model, weight_decay=0.1)
    if phase == "consistent":
        trainer._consistent_model(str(tmp_path / "one"), None)
    else:
        {"heads": trainer.train_heads, "policy": trainer.train_policy}[phase]()
    assert changed(before, model.state_dict()) == names(model, "policy" if phase == "policy" else "heads")
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_exits_only(tmp_path):
    model = with_adapters(tiny_llama())
    before = weights(model)
    tiny_text_trainer(tmp_path, model, trainable="exits").train()
    expected = {name for name in names(model, "heads") if "lora_" not in name} | names(model, "policy")
    assert changed(before, model.state_dict()) == expected


@pytest.mark.parametrize("objective", ["expected", "sampled"])
def test_whole_run(tmp_path, objective):
    """All phases and the evaluation; what is saved is loaded by PEFT around the same base model."""
    model = with_adapters(tiny_llama(exit_threshold=0.5))
    before = weights(model)
    options = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    options |= {"metric_for_best_model": "loss", "consistent_objective": objective, "consistent_samples": 2}
    trainer = tiny_text_trainer(tmp_path / "run", model, num_train_epochs=2, **options)
    assert len(trainer.train().phases) == 5
    assert changed(before, model.state_dict()) == names(model, "heads") | names(model, "policy")
    trainer.evaluate()
    assert sum(trainer.operating_points["eval"][0].exit_histogram.values()) > 0
    trainer.save_model(str(tmp_path / "saved"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        again = PeftModel.from_pretrained(tiny_llama(exit_threshold=0.5), str(tmp_path / "saved")).eval()
    batch = collate_text(list(instructions(4, seed=9)))
    with torch.no_grad():
        one, other = (some.eval()(**batch, exit_threshold=0.5) for some in (model, again))
    torch.testing.assert_close(one.loss, other.loss)
    assert torch.equal(one.exit_layers, other.exit_layers)


def test_merged_model_is_what_was_trained(tmp_path):
    model = with_adapters(tiny_llama())
    tiny_text_trainer(tmp_path, model).train()
    batch = collate_text(list(instructions(4, seed=9)))
    with torch.no_grad():
        adapted = model.eval()(**batch, exit_threshold=0.5)
        merged = model.merge_and_unload().eval()(**batch, exit_threshold=0.5)
    torch.testing.assert_close(adapted.loss, merged.loss, rtol=1e-4, atol=1e-5)
    assert torch.equal(adapted.exit_layers, merged.exit_layers)


def test_same_gradients_as_the_bare_model(tmp_path):
    """Exits as `modules_to_save` learn what they learn without PEFT while the rest is frozen."""
    sgd = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_steps": 1}
    bare, wrapped = tiny_llama(), with_adapters(tiny_llama())
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    for name, model in (("bare", bare), ("wrapped", wrapped)):
        options = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3}
        trainer = tiny_text_trainer(tmp_path / name, model, rows=8, trainable="exits", **options, **sgd)
        trainer.train_heads()
        trainer.train_policy()
    inner = bare_model(wrapped)
    for part in ("exit_norms", "exit_policies"):
        copied = getattr(inner, part).modules_to_save["default"].state_dict()
        for name, value in getattr(bare, part).state_dict().items():
            torch.testing.assert_close(copied[name], value, rtol=0, atol=3e-6)


def test_fingerprint_sees_adapters():
    model, rows = with_adapters(tiny_llama()), instructions(3, seed=1)
    before = fingerprint(bare_model(model), rows)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "exit_policies.modules_to_save" in name).add_(1.0)
    assert fingerprint(bare_model(model), rows) == before
    for part in ("lora_B", "exit_norms.modules_to_save"):
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if part in name).view(-1)[0].add_(1e-3)
        after = fingerprint(bare_model(model), rows)
        assert after != before
        before = after


def test_policies_that_are_not_saved(tmp_path):
    model = with_adapters(tiny_llama(), modules_to_save=["exit_norms"])
    with pytest.raises(ValueError, match=r"policies are frozen.*exit_policies.*modules_to_save"):
        tiny_text_trainer(tmp_path, model).train_policy()
