# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What a trainer asks of a forward pass beside its loss."""

from dataclasses import dataclass

from transformers_cee.exits.token_losses import TokenLoss


@dataclass(frozen=True)
class ExitTraining:
    """Options of a forward pass in training. A model that has no use for one takes no notice of it.

    Args:
        sample_exits (`bool`): of decoders, with `labels`: every token leaves with the policy's probability, and the
            loss is that of the exits.
        copy_states (`bool`): with `sample_exits`, a token that left keeps its exit state as input of deeper layers, as
            generation with `skipped_kv="copy"` sees it; otherwise its own states there are what others see.
        gradient_equilibrium (`bool`): with all exits, every layer gets the mean of the gradients of the exits behind
            it; see `exits.runner.collect_states`.
        output_policies (`bool`): with `output_all_exits`, also what the policies make of every internal exit, with
            gradient.
        token_loss (`TokenLoss`, *optional*): of decoders with `output_all_exits`: loss per token; cross-entropy by
            default.
        roll_outs (`int`): of decoders with a drafter: so many tokens are drafted from every token on, and the loss is
            the drafter's; 0 for none.
    """

    sample_exits: bool = False
    copy_states: bool = True
    gradient_equilibrium: bool = False
    output_policies: bool = False
    token_loss: TokenLoss | None = None
    roll_outs: int = 0
