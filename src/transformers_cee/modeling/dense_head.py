# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Encoders whose stock head is a module `classifier` of two linear layers, as RoBERTa's, and their positions."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from transformers_cee.modeling.sequence_classification import EarlyExitSequenceClassifier, columns_from_first


class DenseHeadClassifier(EarlyExitSequenceClassifier):
    """A classifier whose head is `classifier`: dropout, `dense`, an activation, dropout, `out_proj`. Exits share
    `dense`; under mean pooling there is none."""

    task_modules: ClassVar[tuple[str, ...]] = ("classifier.dense", "classifier.out_proj")
    logits_module: ClassVar[str] = "classifier.out_proj"
    classifier: Any

    @staticmethod
    def activation(state: Tensor) -> Tensor:
        """Of the head, behind `dense`."""
        return state.tanh()

    def add_heads(self, config: Any) -> None:
        super().add_heads(config)
        if not config.keeps_stock_pooling:
            self.classifier.dense = None

    def pool(self, state: Tensor) -> Tensor:
        return self.activation(self.classifier.dense(self.classifier.dropout(state)))

    def classify(self, state: Tensor) -> Tensor:
        return self.classifier.out_proj(self.classifier.dropout(state))


class TokensCountedClassifier(DenseHeadClassifier):
    """Positions are counted by tokens that are no padding, from the number behind the padding's own."""

    @property
    def most_tokens(self) -> int:
        most: int = self.config.max_position_embeddings - self.body.embeddings.padding_idx - 1
        return most

    def positions(self, input_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor | None:
        if attention_mask is None:
            return None
        padding: int = self.body.embeddings.padding_idx
        columns = columns_from_first(attention_mask)
        if input_ids is None:
            return columns.clamp_min(0) + padding + 1
        # What is masked in front of a row is padding, whatever its ids: the row counts as it does alone.
        counted = ((input_ids != padding) & (columns >= 0)).long()
        return counted.cumsum(1) * counted + padding


__all__ = ["DenseHeadClassifier", "TokensCountedClassifier"]
