# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What each of two processes does: a decoder whose weights are spread over both, against the whole model."""

from __future__ import annotations

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tiny import tiny_llama
from torch import distributed
from torch.distributed.tensor import DTensor

from transformers_cee import LlamaForConsistentEECausalLM


CASES = [
    {"exit_head": head, "tie_word_embeddings": tied, "exit_head_rank": 3, "policy_condition": "film"}
    for head in ("shared", "norm", "low_rank", "untied", "layernorm_linear")
    for tied in (True, False)
]
IDS = torch.randint(3, 60, (3, 6), generator=torch.Generator().manual_seed(1))


def results(model: LlamaForConsistentEECausalLM) -> dict[str, torch.Tensor]:
    options = {"max_new_tokens": 6, "eos_token_id": None, "do_sample": False, "return_dict_in_generate": True}
    found = {"logits": model(IDS).logits.detach()}
    for name, more in (
        ("off", {}),
        ("copy", {"exit_threshold": 0.5}),
        ("deferred", {"exit_threshold": 0.5, "skipped_kv": "deferred"}),
    ):
        made = model.generate(IDS, **options, **more)
        found[f"{name} tokens"], found[f"{name} layers"] = made.sequences, made.exit_layers
    found["loss"] = model.train()(IDS, labels=IDS).loss
    found["loss"].backward()
    return {name: one.detach() for name, one in found.items()}


def main(folder: str) -> None:
    distributed.init_process_group("gloo")
    for number, fields in enumerate(CASES):
        path = f"{folder}/{number}"
        if distributed.get_rank() == 0:
            tiny_llama(**fields).save_pretrained(path)
        distributed.barrier()
        model = LlamaForConsistentEECausalLM.from_pretrained(path, tp_plan="auto").eval()
        assert isinstance(model.model.layers[0].self_attn.q_proj.weight, DTensor)
        assert isinstance(model.lm_head.weight, DTensor)
        expected, found = results(tiny_llama(**fields)), results(model)
        assert len(expected["copy layers"].unique()) >= 2
        for name, one in expected.items():
            torch.testing.assert_close(found[name], one, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
