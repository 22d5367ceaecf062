# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The encoder alone, for whoever wants its states."""

from functools import wraps
from typing import Any, ClassVar

from transformers.models.bert.modeling_bert import BertModel

from transformers_cee.exits.arguments import check_arguments
from transformers_cee.models.bert_cee.configuration_bert_cee import BertCeeConfig


class BertCeeModel(BertModel):
    """The encoder of a [`BertForConsistentEE`] at full depth, without exits and heads: what stock heads and
    `AutoModel.from_config` make of its config.

    Args:
        config ([`BertCeeConfig`]): there is a pooler where the exits use one (`exit_pooling="cls"`).
    """

    config_class = BertCeeConfig
    config: BertCeeConfig
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"^exit_", r"^classifier\."]

    def __init__(self, config: BertCeeConfig, **kwargs: Any) -> None:
        super().__init__(config, **{"add_pooling_layer": config.exit_pooling == "cls", **kwargs})

    @wraps(BertModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # There are no exits here, and arguments that ask for them would be dropped.
        check_arguments(BertModel.forward, self.config, kwargs)
        return super().forward(*args, **kwargs)


__all__ = ["BertCeeModel"]
