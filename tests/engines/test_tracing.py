# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What stands around a trace: loggers are as before, masks take lengths that are tensors, functions are no scripts."""

from __future__ import annotations

import logging
import sys
import types

import pytest
import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from transformers_cee.engines.tracing import tracing


def test_level_of_the_root_logger_is_given_back_after_an_error():
    root = logging.getLogger()
    before = root.level
    with pytest.raises(RuntimeError, match="no graph"), tracing():
        root.setLevel(logging.CRITICAL)
        raise RuntimeError("no graph")
    assert root.level == before


@pytest.mark.parametrize(("release", "changes"), [("5.8.0", True), ("5.9.0", False), ("5.24.0", False)])
def test_masks_of_lengths_that_are_tensors(monkeypatch, release, changes):
    monkeypatch.setattr("transformers_cee.engines.tracing.version", lambda name: release)
    seen = []
    for name in ("sdpa", "eager"):
        shared = ALL_MASK_ATTENTION_FUNCTIONS._global_mapping
        monkeypatch.setitem(shared, name, lambda q_length, **asked: seen.append((q_length, asked)))
    with pytest.raises(RuntimeError), tracing():
        for length in (torch.tensor(3), 3):
            ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](q_length=length, kv_length=3)
        raise RuntimeError
    (positions, asked), (number, _) = seen
    assert asked == {"kv_length": 3} and number == 3
    assert positions.tolist() == ([0, 1, 2] if changes else 3)
    ALL_MASK_ATTENTION_FUNCTIONS["eager"](q_length=torch.tensor(2))
    assert seen[-1][0].tolist() == 2, "outside of a trace nothing changes"
    # What is registered afterwards is not hidden by anything that was left.
    assert "sdpa" not in ALL_MASK_ATTENTION_FUNCTIONS._local_mapping


def test_scripted_functions_are_plain_ones(monkeypatch):
    """Of a script both ways of an `if` would stand in the graph."""

    def bucket(states: torch.Tensor, size: int) -> torch.Tensor:
        return states.float() * 2 if size > 3 else states

    module = types.ModuleType("transformers.models.scripted.modeling_scripted")
    script = module.bucket = torch.jit.script(bucket)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with tracing():
        assert module.bucket is bucket
        traced = torch.jit.trace(lambda states: module.bucket(states, 3), torch.arange(4))
    assert module.bucket is script and "prim::If" not in str(traced.graph)
    with pytest.raises(ZeroDivisionError), tracing():
        _ = 1 / 0
    assert module.bucket is script
