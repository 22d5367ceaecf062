# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What an early-exit model returns."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class ExitClassifierOutput(ModelOutput):
    """Output of an early-exit classifier.

    Args:
        loss (`torch.Tensor` of shape `(1,)`, *optional*, returned with `labels`):
            In training mode the layer-weighted loss over all exits, otherwise the loss at the exits taken.
        logits (`torch.Tensor` of shape `(batch, num_labels)`):
            Logits of each row's own exit head.
        exit_layers (`torch.LongTensor` of shape `(batch,)`):
            Layer (1-based) at which each row left.
        exit_probabilities (`torch.FloatTensor` of shape `(batch, exits)`):
            The exit criterion's score at every exit where it was asked, for the policy `p_l = P(exit at l | reached
            l)`; NaN where a row never came or where no criterion was asked (exits off; the last exit takes the rest).
        all_exit_logits (`torch.Tensor` of shape `(batch, exits, num_labels)`, *optional*):
            Logits of every exit head, with `output_all_exits=True`; no row leaves early then.
        all_exit_states (`torch.Tensor` of shape `(batch, exits, hidden)`, *optional*):
            Pooled states of every exit, with `output_all_exits=True`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    exit_layers: torch.Tensor | None = None
    exit_probabilities: torch.Tensor | None = None
    all_exit_logits: torch.Tensor | None = None
    all_exit_states: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
