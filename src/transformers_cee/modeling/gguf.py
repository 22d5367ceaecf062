# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Loading of GGUF files, which name stock architectures only."""

import os
from dataclasses import fields
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from transformers_cee.exits.configuration import DecoderExitConfigMixin
from transformers_cee.modeling.loading import announce_untrained


_EXIT_FIELDS = {one.name for one in fields(DecoderExitConfigMixin)}


class GGUFLoadingMixin:
    """Mixin before a `PreTrainedModel` with exits that also loads the GGUF files of its stock model."""

    stock_class: ClassVar[type[PreTrainedModel]]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, gguf_file: str | None = None, **kwargs: Any
    ) -> Any:
        """As `PreTrainedModel.from_pretrained`. With `gguf_file`, the weights are read into a stock model first; the
        model is then saved as any other."""
        own: Any = super()
        if gguf_file is None:
            return own.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        config_class: Any = cls.config_class  # type: ignore[attr-defined]
        names = {one.name for one in fields(config_class)}
        exits = {name: kwargs.pop(name) for name in list(kwargs) if name in names - {"dtype"}}
        given = kwargs.pop("config", None)
        stock = cls.stock_class.from_pretrained(
            pretrained_model_name_or_path, *args, gguf_file=gguf_file, **{"dtype": torch.float32, **kwargs}
        )
        values = {} if given is None else given.to_diff_dict()
        values = {**stock.config.to_dict(), **{name: values[name] for name in values if name in _EXIT_FIELDS}, **exits}
        for name in ("model_type", "quantization_config", "architectures", "transformers_version"):
            values.pop(name, None)
        config = config_class(**values)
        # By `to`, rotary embeddings would be rounded, too.
        model = own._from_config(config, attn_implementation=stock.config._attn_implementation, dtype=stock.dtype).to(
            stock.device
        )
        model.load_state_dict(stock.state_dict(), strict=False)
        own = (model.exit_norms, model.exit_heads, model.exit_drafter)
        for module in (part for one in own if one is not None for part in one.modules()):
            model._init_weights(module)
        untrained = [name for name, _ in model.named_parameters() if name.startswith("exit_")]
        announce_untrained(model, untrained, os.path.join(pretrained_model_name_or_path, gguf_file))
        model.generation_config = stock.generation_config
        return model.eval()
