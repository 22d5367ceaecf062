# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A network of about one layer that drafts the next tokens from the deep state of the last one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init


class JumpDrafter(nn.Module):
    """Jumps over the layers before `layer`: predicts the next token's state there from the last token's state behind
    that layer and the next token's embedding, runs a copy of the layer, and reads what the last layer would say.

    Its layer attends to the keys and values that the model's own layer has of earlier tokens, so it has no cache of
    its own, and it drafts tokens of a small vocabulary alone: those that texts have most often (FR-Spec, Zhao et al.
    2025).

    It keeps how sure it was of drafts of known text, and which of them stood where the most probable token is taken:
    whether it can pay is known before the first draft.

    Args:
        layer (`nn.Module`): of the kind of the model's layers, with the index of the one that it stands for.
        hidden_size (`int`): of the model.
        vocab_size (`int`): tokens that it may draft.
    """

    # Kinds of drafts, by their own probability in equal steps from 0 to 1.
    KINDS = 10
    # Of more than so many judged drafts the earlier ones count half.
    _JUDGED = 20_000

    def __init__(self, layer: nn.Module, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.predictor = nn.Linear(2 * hidden_size, hidden_size)
        self.layer = layer
        self.readout = nn.Linear(hidden_size, hidden_size, bias=False)
        self.token_ids: Tensor
        self.register_buffer("token_ids", torch.arange(vocab_size))
        # First drafts of each kind, and how many of them the model said, too. Whole numbers keep their precision.
        self.judged: Tensor
        self.register_buffer("judged", torch.zeros(2, self.KINDS, dtype=torch.long))

    def jump(self, states: Tensor, embedded: Tensor) -> Tensor:
        """States before the layer (…, hidden) of tokens with these embeddings (…, hidden), from the states behind the
        layer (…, hidden) of the tokens before them."""
        return embedded + self.predictor(self.seen(states, embedded))

    @staticmethod
    def seen(states: Tensor, embedded: Tensor) -> Tensor:
        """What the predictor looks at (…, 2 · hidden): both, each normed."""
        size = (states.shape[-1],)
        return torch.cat((F.rms_norm(states, size), F.rms_norm(embedded, size)), -1)

    def read(self, states: Tensor) -> Tensor:
        """States behind the last layer (…, hidden), from those behind this one."""
        return states + self.readout(states)

    def kinds(self, sure: Tensor) -> Tensor:
        """Kinds (…) of drafts with these probabilities (…)."""
        return (sure.nan_to_num(0.0) * self.KINDS).long().clamp_max(self.KINDS - 1)

    @torch.no_grad()
    def judge(self, kinds: Tensor, stands: Tensor) -> None:
        """First drafts of such kinds (drafts,) are what the model says (drafts,), or not."""
        for row, counted in enumerate((kinds, kinds[stands])):
            self.judged[row] += torch.bincount(counted, minlength=self.KINDS)
        if self.judged[0].sum() > self._JUDGED:
            self.judged //= 2

    def start(self, module: nn.Module, model_layer: nn.Module) -> None:
        """How a part that no checkpoint has begins: the layer as the model's own, the rest so that it changes
        nothing.

        Args:
            module (`nn.Module`): the part, any module of this one.
            model_layer (`nn.Module`): the layer of the model that it stands for.
        """
        if module is self:
            init.copy_(self.token_ids, torch.arange(len(self.token_ids)))
            init.zeros_(self.judged)
        elif module is self.predictor or module is self.readout:
            for weight in module.parameters():
                init.zeros_(weight)
        else:
            for name, part in self.layer.named_modules():
                if part is module:
                    own = dict(model_layer.get_submodule(name).named_parameters(recurse=False))
                    for key, weight in module.named_parameters(recurse=False):
                        init.copy_(weight, own[key])


def make_drafter(config: Any, layer: Callable[[int], nn.Module]) -> JumpDrafter | None:
    """The drafter that a config asks for, None where it asks for none.

    Args:
        layer (`Callable`): makes a layer of the model's kind, of an index (0-based).
    """
    if config.drafter_layer is None:
        return None
    size = min(config.drafter_vocab_size, config.vocab_size)
    return JumpDrafter(layer(config.drafter_layer - 1), config.hidden_size, size)


__all__ = ["JumpDrafter", "make_drafter"]
