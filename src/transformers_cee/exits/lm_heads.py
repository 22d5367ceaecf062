# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Norms and LM heads of a language model's internal exits. The last exit keeps the model's own norm and head."""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from transformers_cee.exits.by_layer import LayerModules


class LMExitNorms(nn.Module):
    """One norm per internal exit, or nothing where exits share the model's.

    Args:
        kind (`str`): `exit_head` of the config.
        layers (sequence of `int`): layers (1-based) of the internal exits.
        hidden_size (`int`): size of a hidden state.
        eps (`float`): of the norms.
        make_norm (`Callable`): makes a norm of the model's own kind.
    """

    def __init__(
        self, kind: str, layers: Sequence[int], hidden_size: int, eps: float, make_norm: Callable[[], nn.Module]
    ) -> None:
        super().__init__()
        if kind == "layernorm_linear":
            make_norm = partial(nn.LayerNorm, hidden_size, eps=eps)
        self.norms = LayerModules(() if kind == "shared" else layers, make_norm)

    @property
    def is_shared(self) -> bool:
        return len(self.norms) == 0

    def forward(self, hidden_states: Tensor, index: int) -> Tensor:
        """Normed states (…, hidden) of internal exit `index` (0-based)."""
        return self.norms[index](hidden_states)


class LMExitHeads(nn.Module):
    """What each internal exit has of its own between its normed state and its logits.

    Args:
        kind (`str`): `exit_head` of the config.
        layers (sequence of `int`): layers (1-based) of the internal exits.
        hidden_size, vocab_size (`int`): sizes of states and of logits.
        rank (`int`): of the adapters of `"low_rank"`.
    """

    def __init__(self, kind: str, layers: Sequence[int], hidden_size: int, vocab_size: int, rank: int) -> None:
        super().__init__()
        self.kind = kind
        make: Callable[[], nn.Module] | None = {
            "low_rank": lambda: LowRankAdapter(hidden_size, rank),
            "untied": lambda: nn.Linear(hidden_size, vocab_size, bias=False),
            "layernorm_linear": lambda: nn.Linear(hidden_size, vocab_size, bias=True),
        }.get(kind)
        self.heads = LayerModules((), nn.Identity) if make is None else LayerModules(layers, make)

    @property
    def share_head(self) -> bool:
        """Do all exits end in the model's own LM head?"""
        return self.kind not in ("untied", "layernorm_linear")

    def head_state(self, state: Tensor, index: int) -> Tensor:
        """What the shared LM head takes (…, hidden) at internal exit `index` (0-based)."""
        return self.heads[index](state) if self.kind == "low_rank" else state

    def forward(self, state: Tensor, index: int, lm_head: nn.Module) -> Tensor:
        """Logits (…, vocabulary) of internal exit `index` (0-based) from its normed state (…, hidden)."""
        return lm_head(self.head_state(state, index)) if self.share_head else self.heads[index](state)


class LowRankAdapter(nn.Module):
    """Residual adapter `h + U·D·h` of low rank, which starts as the identity."""

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, rank, bias=False)
        self.up = nn.Linear(rank, hidden_size, bias=False)

    def forward(self, state: Tensor) -> Tensor:
        return state + self.up(self.down(state))
