# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Configuration of DeBERTa-v2 with exits."""

from transformers import DebertaV2Config

from transformers_cee.exits.configuration import EncoderExitConfigMixin
from transformers_cee.modeling.remote_code import RemoteCodeConfigMixin


class DebertaV2CeeConfig(RemoteCodeConfigMixin, EncoderExitConfigMixin, DebertaV2Config):
    """Configuration of [`DebertaV2ForConsistentEE`]: the fields of `DebertaV2Config` and those of
    `EncoderExitConfigMixin`.

    Raises:
        ValueError: a field of the exits is out of its range; the message names the field, the value and what is
            accepted.
    """

    model_type = "deberta_v2_cee"

    def check_exits(self) -> None:
        super().check_exits()
        if self.keeps_stock_pooling and self.pooler_hidden_size != self.hidden_size:
            raise ValueError(
                f"`pooler_hidden_size`={self.pooler_hidden_size} gives states of another size than the layers; "
                f"accepted is `hidden_size`={self.hidden_size}, or `exit_pooling`='mean', which has no pooler."
            )


__all__ = ["DebertaV2CeeConfig"]
