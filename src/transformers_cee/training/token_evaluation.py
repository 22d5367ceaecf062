# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Evaluation of decoders on known text, token by token; nothing as wide as the vocabulary is collected.

Everything is aligned with the labels: column *t* of a row tells of the prediction of that row's token *t*.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction

from transformers_cee.evaluation.operating_points import token_figures


IGNORED = -100


class PlainTextLabels:
    """Collator that gives batches without `labels` their own text as labels; padding does not count.

    Args:
        collator (`Callable`): makes a batch of tensors from a list of rows.
    """

    def __init__(self, collator: Callable[[list], Mapping[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, rows: list) -> Mapping[str, Any]:
        batch = self.collator(rows)
        if "labels" in batch:
            return batch
        labels = batch["input_ids"]
        if batch.get("attention_mask") is not None:
            labels = labels.masked_fill(batch["attention_mask"] == 0, IGNORED)
        return {**batch, "labels": labels}


def counted_tokens(labels: Tensor) -> Tensor:
    """Which labels (rows, time) are predicted: all but −100, and but a row's first, which has nothing before it."""
    counted = labels != IGNORED
    counted[:, 0] = False
    return counted


@dataclass
class KnownText:
    """What a decoder made of known text at the exits that its tokens took, one number per counted token.

    Args:
        losses (`Tensor` of shape `(tokens, exits)`):
            Cross-entropy in nats at all exits, or `(tokens, 1)` at the exit taken; the last column counts.
        predictions, labels (`LongTensor`): most probable token, and the true one.
        exit_layers (`LongTensor`): layer (1-based) at which the token before left.
        may_exit (`BoolTensor`): could it leave early?
    """

    losses: Tensor
    predictions: Tensor
    labels: Tensor
    exit_layers: Tensor
    may_exit: Tensor

    @classmethod
    def from_arrays(cls, batches: Sequence[tuple], labels: Sequence[Any]) -> "KnownText":
        """From batches of what `token_prediction_step` gave, gathered and padded with −100."""
        parts = []
        for arrays, their_labels in zip(batches, labels, strict=True):
            losses, predictions, exit_layers, may_exit = (torch.as_tensor(array) for array in arrays)
            counted = predictions != IGNORED
            values = (losses, predictions, torch.as_tensor(their_labels), exit_layers, may_exit == 1)
            parts.append([value[counted] for value in values])
        return cls(*(torch.cat(column) for column in zip(*parts, strict=True)))

    @property
    def decided_layers(self) -> Tensor:
        """Exit layers of the tokens that could leave early; of all, where none could."""
        return self.exit_layers[self.may_exit] if bool(self.may_exit.any()) else self.exit_layers

    def figures(self, full_depth: "KnownText | None" = None) -> dict[str, float]:
        """Figures of `token_figures`, with the agreement where the same text at full depth is given."""
        predictions = None if full_depth is None else full_depth.predictions
        return token_figures(self.losses[:, -1], self.predictions, self.labels, self.may_exit, predictions)


@torch.no_grad()
def token_prediction_step(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """Loss, then losses (rows, time, exits or 1), most probable tokens, exit layers and whether the token before could
    leave (each (rows, time)), then labels of a batch of known text. Labels that are not predicted hold −100.

    Args:
        model (`nn.Module`): a decoder.
        inputs (`dict`): its inputs, with labels, and either an exit threshold or `output_all_exits=True`: then tokens
            go to full depth and the losses are those of all exits.
    """
    outputs = model(**inputs, logits_to_keep=torch.empty(0, dtype=torch.long))
    labels = inputs["labels"]
    counted = counted_tokens(labels)

    def table(values: Tensor) -> Tensor:
        filled = values.new_full((*labels.shape, *values.shape[1:]), IGNORED)
        filled[counted] = values
        return filled

    if outputs.all_exit_losses is None:
        losses, predictions = outputs.token_losses.unsqueeze(1), outputs.token_predictions
    else:
        losses, predictions = outputs.all_exit_losses, outputs.all_exit_predictions[:, -1]
    layers = outputs.exit_layers[:, :-1][counted[:, 1:]]
    fields = (losses.float(), predictions, layers, outputs.may_exit.long())
    return outputs.loss.detach().float(), tuple(map(table, fields)), labels


def aligned_prediction(prediction: EvalPrediction) -> EvalPrediction:
    """What `compute_metrics` of a decoder gets: most probable tokens (rows, time) beside the labels they are for."""
    arrays = prediction.predictions
    # Batches are not joined with `eval_do_concat_batches=False`.
    tokens = [batch[1] for batch in arrays] if isinstance(arrays, list) else arrays[1]
    return EvalPrediction(tokens, prediction.label_ids, inputs=prediction.inputs, losses=prediction.losses)
