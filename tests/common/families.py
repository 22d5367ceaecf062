# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tiny models of every family of the table, and inputs for them.

A family has one entry in `FAMILIES`: the fields of a tiny config, and what cannot be read from the table of
`transformers_cee.families` or from transformers.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForSequenceClassification
from transformers.models.auto import configuration_auto

from transformers_cee.families import MODELS


VOCABULARY = 60
KINDS = {
    "AutoModelForSequenceClassification": ("encoder", AutoModelForSequenceClassification),
    "AutoModelForCausalLM": ("decoder", AutoModelForCausalLM),
    "AutoModelForImageClassification": ("image", AutoModelForImageClassification),
}
# Weights are drawn wide, so that rows and tokens differ.
SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "initializer_range": 0.15}
TEXT = {**SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0}
ENCODER = {**TEXT, "intermediate_size": 48, "num_labels": 3}
BERT = {**ENCODER, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# Padding is found by its id, and positions are counted by it.
PADS_WITH_1 = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
DECODER = {**TEXT, "intermediate_size": 48, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
# Prompts and rows are longer than this.
WINDOW = 6
SLIDING = {**DECODER, "sliding_window": WINDOW}
MIXED = {**SLIDING, "use_sliding_window": True, "max_window_layers": 2}
CONVOLUTIONS = {"hidden_sizes": [8, 16, 24], "depths": [1, 2, 1], "num_labels": 3}
DEBERTA = {
    "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8, "norm_rel_ebd": "layer_norm",
    "share_att_key": True, "position_biased_input": False, "type_vocab_size": 0, "conv_kernel_size": 3,
    "conv_act": "gelu",
}  # fmt: skip
DISTILBERT = {
    "vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0, "initializer_range": 0.15, "dim": 32,
    "n_layers": 4, "n_heads": 4, "hidden_dim": 48, "dropout": 0.0, "attention_dropout": 0.0,
    "seq_classif_dropout": 0.0, "num_labels": 3,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """What the tests must be told of a family.

    Args:
        fields: of a tiny config, of 4 layers where the family counts layers, without dropout.
        padding: token id of padding; one that must not count, unless the architecture finds padding by its id.
        window: tokens that some layer's attention sees, where it does not see all.
        lora_targets: where PEFT has no default for the stock architecture.
        checkpoints: can layers be computed again for gradients, as in the stock model?
        layers: finds the layers in a model, where they are no single list of as many as the config counts.
        pooled: state (hidden,) by hand of one row at a layer, under `POOLED`, from the stock model and what its layers
            give for it (1, …).
    """

    fields: dict[str, Any]
    padding: int = 7
    window: int | None = None
    lora_targets: tuple[str, ...] | None = None
    checkpoints: bool = True
    layers: Callable[[nn.Module], list[nn.Module]] | None = None
    pooled: Callable[[Any, Tensor], Tensor] = field(default=lambda stock, hidden: hidden[0].mean(0))


def _blocks(made: nn.Module) -> list[nn.Module]:
    return [block for stage in made.base_model.encoder.stages for block in stage.layers]


def _mean_of_normed(stock: Any, hidden: Tensor) -> Tensor:
    return stock.model.final_norm(hidden)[0].mean(0)


def _normed_first(stock: Any, hidden: Tensor) -> Tensor:
    return stock.vit.layernorm(hidden)[0, 0]


def _mean_of_pixels(stock: Any, hidden: Tensor) -> Tensor:
    return hidden[0].mean((-2, -1))


# Under these fields the state of a row needs no weights, and can be written down for any family.
POOLED = {"encoder": {"exit_pooling": "mean"}, "image": {}}

FAMILIES: dict[str, Family] = {
    "bert_cee": Family(BERT),
    "roberta_cee": Family({**BERT, **PADS_WITH_1}, padding=1),
    "xlm_roberta_cee": Family({**BERT, **PADS_WITH_1}, padding=1),
    "distilbert_cee": Family(DISTILBERT, lora_targets=("q_lin", "v_lin")),
    "electra_cee": Family({**BERT, "embedding_size": 16}),
    "mpnet_cee": Family({**BERT, **PADS_WITH_1}, padding=1, lora_targets=("q", "v"), checkpoints=False),
    "deberta_v2_cee": Family({**BERT, **DEBERTA}),
    "modernbert_cee": Family(
        {**ENCODER, "local_attention": 4, **dict.fromkeys(("bos_token_id", "cls_token_id"), 1),
         **dict.fromkeys(("eos_token_id", "sep_token_id"), 2)},
        lora_targets=("Wqkv",), pooled=_mean_of_normed,
    ),
    "llama_cee": Family({**DECODER, "attention_bias": True}),
    "mistral_cee": Family(SLIDING, window=WINDOW),
    "qwen2_cee": Family(MIXED, window=WINDOW),
    "qwen3_cee": Family({**MIXED, "head_dim": 16, "attention_bias": True}, window=WINDOW),
    "smollm3_cee": Family(
        {**SLIDING, "use_sliding_window": True, "no_rope_layer_interval": 2, "attention_bias": True},
        window=WINDOW, lora_targets=("q_proj", "v_proj"),
    ),
    # What layers add is normed: drawn as narrow as the others, embeddings would hardly tell tokens apart.
    "olmo2_cee": Family(
        {**DECODER, "attention_bias": True, "initializer_range": 0.6}, lora_targets=("q_proj", "v_proj")
    ),
    "phi3_cee": Family(
        {**SLIDING, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        window=WINDOW, lora_targets=("qkv_proj",),
    ),
    "resnet_cee": Family(
        {**CONVOLUTIONS, "embedding_size": 8, "layer_type": "basic"},
        lora_targets=("convolution",), checkpoints=False, layers=_blocks, pooled=_mean_of_pixels,
    ),
    "convnext_cee": Family(
        {**CONVOLUTIONS, "num_stages": 3, "patch_size": 4, "layer_scale_init_value": 1.0, "initializer_range": 0.15},
        lora_targets=("pwconv1", "pwconv2"), checkpoints=False, layers=_blocks, pooled=_mean_of_pixels,
    ),
    "vit_cee": Family(
        {**SIZES, "intermediate_size": 48, "image_size": 32, "patch_size": 8, "num_labels": 3},
        # The latter before transformers 5.24.
        lora_targets=("q_proj", "v_proj", "query", "value"), pooled=_normed_first,
    ),
}  # fmt: skip


def kind_of(model_type: str) -> str:
    """`"encoder"`, `"decoder"` or `"image"`."""
    return KINDS[MODELS[model_type].auto_classes[0]][0]


def of_kind(*kinds: str) -> list[str]:
    """Model types of the table that are of these kinds."""
    return [model_type for model_type in MODELS if kind_of(model_type) in kinds]


def classes(model_type: str) -> tuple[Any, Any]:
    """Config and model class of a family."""
    entry = MODELS[model_type]
    found = []
    for full_name in (entry.config, entry.model):
        module, _, name = full_name.rpartition(".")
        found.append(getattr(importlib.import_module(module), name))
    return found[0], found[1]


def config(model_type: str, **fields: Any) -> Any:
    """A tiny config."""
    return classes(model_type)[0](**{**FAMILIES[model_type].fields, **fields})


def model(model_type: str, seed: int = 0, **fields: Any) -> Any:
    """A random model in evaluation mode with opinionated exits, so that rows and tokens leave everywhere."""
    torch.manual_seed(seed)
    return opinionated(classes(model_type)[1](config(model_type, **fields)).eval())


def stock_config(model_type: str, **fields: Any) -> Any:
    """The tiny config of transformers' own model."""
    made = configuration_auto.CONFIG_MAPPING[MODELS[model_type].stock]
    return made(**{**FAMILIES[model_type].fields, **fields})


def stock_model(model_type: str, seed: int = 0, **fields: Any) -> Any:
    """A random model of transformers' own class, in evaluation mode."""
    torch.manual_seed(seed)
    auto_class = KINDS[MODELS[model_type].auto_classes[0]][1]
    return opinionated(auto_class.from_config(stock_config(model_type, **fields)).eval())


def twin(ours: Any) -> Any:
    """Transformers' own model with our model's weights."""
    model_type = ours.config.model_type
    theirs = stock_model(model_type, **stock_fields(ours.config))
    shared = {name: value for name, value in ours.state_dict().items() if not name.startswith("exit_")}
    missing, unexpected = theirs.load_state_dict(shared, strict=False)
    assert not unexpected
    # Under mean pooling ours has no layer in front of the last one.
    unused = ("classifier.dense.", "pre_classifier.")
    assert all("pooler" in name or name.startswith(unused) for name in missing), missing
    return theirs


def layers(made: nn.Module) -> list[nn.Module]:
    """The layers of a model, ours or the stock one, first to last."""
    model_type = next(one for one, entry in MODELS.items() if made.config.model_type in (one, entry.stock))
    finds = FAMILIES[model_type].layers
    if finds is not None:
        return finds(made)
    depth = made.config.num_hidden_layers
    return next(
        list(one)
        for name, one in made.named_modules()
        if isinstance(one, nn.ModuleList) and len(one) == depth and not name.startswith("exit_")
    )


def stock_fields(ours: Any) -> dict[str, Any]:
    """Of a config of ours, the fields of the stock config that tests set."""
    names = ("tie_word_embeddings", "problem_type")
    return {name: getattr(ours, name) for name in names if hasattr(ours, name)}


@torch.no_grad()
def opinionated(made: nn.Module) -> Any:
    """Draws norms and biases, too: one that is left out, or taken twice, shows."""
    for name, parameter in made.named_parameters():
        if name.startswith(("exit_heads", "exit_policies", "classifier")) and parameter.ndim > 1:
            parameter.normal_(0.0, 0.3)
        elif parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    # Policies that are sure of nothing.
    for name, parameter in made.named_parameters():
        if name.startswith("exit_policies") and name.endswith(".2.bias"):
            parameter.zero_()
    return made


def rows(
    model_type: str, count: int, seed: int = 1, lengths: tuple[int, ...] | None = None
) -> list[dict[str, Tensor]]:
    """Inputs of single rows, (1, …), without padding; texts of `lengths` tokens, by default of 2 to 12."""
    generator = torch.Generator().manual_seed(seed)
    if kind_of(model_type) == "image":
        return [{"pixel_values": torch.randn(1, 3, 32, 32, generator=generator)} for _ in range(count)]
    drawn = lengths or torch.randint(2, 13, (count,), generator=generator).tolist()
    return [{"input_ids": torch.randint(3, VOCABULARY, (1, length), generator=generator)} for length in drawn]


def batch(model_type: str, rows: list[dict[str, Tensor]], side: str = "right") -> dict[str, Tensor]:
    """Rows as one batch, padded on `side`."""
    if kind_of(model_type) == "image":
        return {"pixel_values": torch.cat([row["pixel_values"] for row in rows])}
    time = max(row["input_ids"].shape[1] for row in rows)
    ids = torch.full((len(rows), time), FAMILIES[model_type].padding)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        length = row["input_ids"].shape[1]
        columns = slice(0, length) if side == "right" else slice(time - length, time)
        ids[number, columns], mask[number, columns] = row["input_ids"][0], 1
    return {"input_ids": ids, "attention_mask": mask}
