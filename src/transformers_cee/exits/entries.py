# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What leaves at the exits, in one shape for rows and tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from transformers_cee.exits.outputs import ExitCausalLMOutput, ExitClassifierOutput
from transformers_cee.exits.policy import all_features


@dataclass
class ExitEntries:
    """The entries of a batch that ran to all exits: its rows, or its counted tokens row by row, from left to right.

    Of rows the logits are there, and all else follows from them. Of tokens, whose logits are as wide as the
    vocabulary, losses and predictions are there instead.

    Args:
        rows (`LongTensor` of shape `(entries,)`): row of the batch that each belongs to.
        states (`Tensor` of shape `(entries, exits, hidden)`): exit states.
        labels (`Tensor` of shape `(entries,)` or `(rows, labels)`): true labels, or the tokens to predict; NaN where
            they are not known.
        may_exit (`BoolTensor` of shape `(entries,)`): can the entry leave before the last exit?
        logits (`Tensor` of shape `(rows, exits, labels)`, *optional*): logits of all exit heads.
        token_losses (`Tensor` of shape `(tokens, exits)`, *optional*): loss of each token at each exit.
        predictions (`LongTensor` of shape `(tokens, exits)`, *optional*): each exit's most probable token.
        features (`Tensor` of shape `(entries, exits − 1, 5)`, *optional*): confidence features, if policies use them.
    """

    rows: Tensor
    states: Tensor
    labels: Tensor
    may_exit: Tensor
    logits: Tensor | None = None
    token_losses: Tensor | None = None
    predictions: Tensor | None = None
    features: Tensor | None = None


def row_entries(
    output: ExitClassifierOutput, labels: Tensor | None, problem_type: str, needs_features: bool
) -> ExitEntries:
    """Each row of a batch is an entry.

    Args:
        output (`ExitClassifierOutput`): made with `output_all_exits=True`.
        labels (`Tensor` of shape `(rows,)` or `(rows, labels)`, *optional*): true labels, if they are known.
        problem_type (`str`): what the logits mean.
        needs_features (`bool`): do the policies look at confidence features?
    """
    states, logits = output.all_exit_states, output.all_exit_logits
    assert states is not None and logits is not None
    count, device = len(states), states.device
    return ExitEntries(
        torch.arange(count, device=device),
        states,
        torch.full((count,), torch.nan, device=device) if labels is None else labels,
        torch.ones(count, dtype=torch.bool, device=device),
        logits=logits,
        features=all_features(logits, problem_type) if needs_features else None,
    )


def token_entries(output: ExitCausalLMOutput) -> ExitEntries:
    """Each counted token of a batch is an entry.

    Args:
        output (`ExitCausalLMOutput`): made with labels and `output_all_exits=True`.
    """
    rows, states, labels = output.token_rows, output.all_exit_states, output.token_labels
    assert rows is not None and states is not None and labels is not None and output.may_exit is not None
    return ExitEntries(
        rows,
        states,
        labels,
        output.may_exit,
        token_losses=output.all_exit_losses,
        predictions=output.all_exit_predictions,
        features=output.all_exit_features,
    )


__all__ = ["ExitEntries", "row_entries", "token_entries"]
