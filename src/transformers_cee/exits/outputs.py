# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What an early-exit model returns."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutput


# Both begin with the fields of the stock class, in its order, so that tuples (`return_dict=False`) begin as the stock
# model's do.


@dataclass
class ExitClassifierOutput(SequenceClassifierOutput):
    """Output of an early-exit classifier: a [`~transformers.modeling_outputs.SequenceClassifierOutput`] and more.

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
            Pooled states of every exit, with `output_all_exits=True`; narrower ones are filled up with zeros.
        all_exit_losses (`torch.Tensor` of shape `(batch, exits)`, *optional*):
            Loss of each row at every exit, with `output_all_exits=True` and labels.
        all_policy_logits (`torch.Tensor` of shape `(batch, exits − 1)`, *optional*):
            The policies' logits of leaving at the internal exits, with `output_policies=True`.
        hidden_states (`tuple` of `torch.Tensor` of shape `(batch, time, hidden)`, *optional*):
            With `output_hidden_states=True`, embeddings and the output of every layer: layers + 1 entries, rows in
            their order. NaN where a row had left before the layer; 0 at padding that no remaining row needed. Of
            convolutional networks maps (batch, channels, height, width); None for layers that no row reached.
        attentions (`tuple` of `torch.Tensor` of shape `(batch, heads, time, time)`, *optional*):
            With `output_attentions=True` and eager attention, one entry per layer, with NaN and 0 likewise.
    """

    exit_layers: torch.Tensor | None = None
    exit_probabilities: torch.Tensor | None = None
    all_exit_logits: torch.Tensor | None = None
    all_exit_states: torch.Tensor | None = None
    all_exit_losses: torch.Tensor | None = None
    all_policy_logits: torch.Tensor | None = None


@dataclass
class ExitCausalLMOutput(CausalLMOutputWithPast):
    """Output of an early-exit language model: a [`~transformers.modeling_outputs.CausalLMOutputWithPast`] and more.

    A position is *counted* when the next position's label is not −100; `tokens` is the number of counted positions,
    listed row by row, from left to right.

    Args:
        loss (`torch.Tensor` of shape `(1,)`, *optional*, returned with `labels`):
            Mean over counted positions: of the exits taken, or with `output_all_exits=True` layer-weighted over all.
        logits (`torch.Tensor` of shape `(batch, kept, vocabulary)`, *optional*):
            Logits of each position's own exit, in training mode with labels of the last one; None with
            `output_all_exits=True` and `sample_exits=True`, where they are never held at once.
        cache (`Cache`, *optional*): keys and values of all layers; `past_key_values` before transformers 5.24.
        exit_layers (`torch.LongTensor` of shape `(batch, time)`): layer (1-based) at which each position left.
        exit_probabilities (`torch.FloatTensor` of shape `(batch, time, exits)`, *optional*):
            The exit criterion's score wherever it was asked, NaN elsewhere.
        all_exit_states (`torch.Tensor` of shape `(tokens, exits, hidden)`, *optional*):
            Normed exit states, which the policies see; this and what follows with `output_all_exits=True`.
        all_exit_losses (`torch.Tensor` of shape `(tokens, exits)`, *optional*): loss at every exit.
        all_exit_predictions (`torch.LongTensor` of shape `(tokens, exits)`, *optional*): each exit's token.
        all_exit_features (`torch.Tensor` of shape `(tokens, exits − 1, 5)`, *optional*):
            Confidence features, when the policies look at them.
        all_policy_logits (`torch.Tensor` of shape `(tokens, exits − 1)`, *optional*):
            The policies' logits of leaving at the internal exits, with `output_policies=True`.
        token_labels (`torch.LongTensor` of shape `(tokens,)`, *optional*): tokens to predict.
        token_rows (`torch.LongTensor` of shape `(tokens,)`, *optional*): row of the batch of each counted position.
        may_exit (`torch.BoolTensor` of shape `(tokens,)`, *optional*):
            Can the position leave in generation? The last prompt token cannot: prompts run at full depth. These three
            also with `exit_threshold` on known text with labels.
        token_losses (`torch.Tensor` of shape `(tokens,)`, *optional*):
            Cross-entropy of each counted position at its own exit, with `exit_threshold` on known text with labels.
        token_predictions (`torch.LongTensor` of shape `(tokens,)`, *optional*): its own exit's token, likewise.
        judged_drafts (`torch.Tensor` of shape `(batch, roll-outs, 4)`, *optional*):
            What the drafter's roll-outs came to, see `modeling.roll_outs.judge_drafts`.
        hidden_states (`tuple` of `torch.Tensor` of shape `(batch, time, hidden)`, *optional*):
            With `output_hidden_states=True`, embeddings and the output of every layer, the last one normed: layers + 1
            entries. NaN where a token had left before the layer.
        attentions (`tuple` of `torch.Tensor` of shape `(batch, heads, time, keys)`, *optional*):
            With `output_attentions=True` and eager attention, one entry per layer, with NaN likewise.
    """

    exit_layers: torch.Tensor | None = None
    exit_probabilities: torch.Tensor | None = None
    all_exit_states: torch.Tensor | None = None
    all_exit_losses: torch.Tensor | None = None
    all_exit_predictions: torch.Tensor | None = None
    all_exit_features: torch.Tensor | None = None
    all_policy_logits: torch.Tensor | None = None
    token_labels: torch.Tensor | None = None
    token_rows: torch.Tensor | None = None
    may_exit: torch.Tensor | None = None
    token_losses: torch.Tensor | None = None
    token_predictions: torch.Tensor | None = None
    judged_drafts: torch.Tensor | None = None
