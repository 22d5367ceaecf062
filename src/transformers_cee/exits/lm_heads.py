# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Norms and LM heads of a language model's internal exits, kind by kind in one registry. The last exit keeps the
model's own norm and head."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import initialization as init

from transformers_cee.exits.by_layer import LayerModules
from transformers_cee.exits.registry import Registry


class LMExitHead:
    """One kind of exit: what each internal exit has of its own. Nobody makes an object of it: subclasses give a `name`
    and whichever of the methods differ."""

    name: ClassVar[str]
    # Does it end in the model's own LM head? Otherwise `head` gives logits.
    shares_lm_head: ClassVar[bool] = True

    @staticmethod
    def norm(config: Any, like_model: Callable[[], nn.Module]) -> nn.Module | None:
        """Norm of one exit, or None where exits share the model's.

        Args:
            config (`DecoderExitConfigMixin`): of the model.
            like_model (`Callable`): makes a norm of the model's own kind.
        """
        return like_model()

    @staticmethod
    def head(config: Any) -> nn.Module | None:
        """What maps normed states (…, hidden) of one exit to what the LM head takes (…, hidden), or to logits
        (…, vocabulary); None where there is nothing between."""
        return None

    @staticmethod
    def start(layer: nn.Module, head: nn.Module, weight: Tensor) -> None:
        """How a head that no checkpoint has begins: called for each of its layers, once that has been drawn as any
        layer of the model.

        Args:
            layer (`nn.Module`): the layer; the head itself, or one inside of it.
            head (`nn.Module`): the head of one exit.
            weight (`Tensor` of shape `(vocabulary, hidden)`): of the model's LM head.
        """


LM_EXIT_HEADS: Registry[type[LMExitHead]] = Registry("exit_head", "register_exit_head", LMExitHead)
register_exit_head = LM_EXIT_HEADS.register


@register_exit_head
class Shared(LMExitHead):
    """The model's own final norm and LM head; no new weights."""

    name = "shared"

    @staticmethod
    def norm(config: Any, like_model: Callable[[], nn.Module]) -> nn.Module | None:
        return None


@register_exit_head
class Norm(LMExitHead):
    """A norm per exit, shared LM head."""

    name = "norm"


@register_exit_head
class LowRank(LMExitHead):
    """A norm and a residual adapter of rank `exit_head_rank` per exit, shared LM head."""

    name = "low_rank"

    @staticmethod
    def head(config: Any) -> nn.Module:
        return LowRankAdapter(config.hidden_size, config.exit_head_rank)

    @staticmethod
    def start(layer: nn.Module, head: nn.Module, weight: Tensor) -> None:
        if layer is head.up:
            init.zeros_(head.up.weight)


@register_exit_head
class Untied(LMExitHead):
    """A norm and an LM head per exit, started from the model's (ConsistentEE, Zeng et al. 2024)."""

    name = "untied"
    shares_lm_head = False

    @staticmethod
    def head(config: Any) -> nn.Module:
        return nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @staticmethod
    def start(layer: nn.Module, head: nn.Module, weight: Tensor) -> None:
        init.copy_(head.weight, weight)


@register_exit_head
class LayerNormLinear(LMExitHead):
    """A LayerNorm and a linear layer with bias per exit (Valade 2024)."""

    name = "layernorm_linear"
    shares_lm_head = False

    @staticmethod
    def norm(config: Any, like_model: Callable[[], nn.Module]) -> nn.Module:
        return nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps)

    @staticmethod
    def head(config: Any) -> nn.Module:
        return nn.Linear(config.hidden_size, config.vocab_size, bias=True)


class LMExitNorms(nn.Module):
    """One norm per internal exit, or nothing where exits share the model's.

    Args:
        layers (sequence of `int`): layers (1-based) of the internal exits.
        config (`DecoderExitConfigMixin`): its `exit_head` names the kind.
        like_model (`Callable`): makes a norm of the model's own kind.
    """

    def __init__(self, layers: Sequence[int], config: Any, like_model: Callable[[], nn.Module]) -> None:
        super().__init__()
        kind = LM_EXIT_HEADS.find(config.exit_head)
        self.norms = _per_layer(layers, lambda: kind.norm(config, like_model))

    @property
    def is_shared(self) -> bool:
        return len(self.norms) == 0

    def forward(self, hidden_states: Tensor, index: int) -> Tensor:
        """Normed states (…, hidden) of internal exit `index` (0-based)."""
        return self.norms[index](hidden_states)


class LMExitHeads(nn.Module):
    """What each internal exit has of its own between its normed state and its logits.

    Args:
        layers (sequence of `int`): layers (1-based) of the internal exits.
        config (`DecoderExitConfigMixin`): its `exit_head` names the kind.

    Raises:
        ValueError: a kind that neither ends in the model's LM head nor makes one for each exit.
    """

    def __init__(self, layers: Sequence[int], config: Any) -> None:
        super().__init__()
        self.kind = LM_EXIT_HEADS.find(config.exit_head)
        self.heads = _per_layer(layers, lambda: self.kind.head(config))
        if len(self.heads) not in (0 if self.kind.shares_lm_head else len(layers), len(layers)):
            raise ValueError(
                f"`exit_head`={self.kind.name!r} makes {len(self.heads)} heads for {len(layers)} exits; accepted are "
                "one for each, or with `shares_lm_head` none."
            )

    @property
    def share_head(self) -> bool:
        """Do all exits end in the model's own LM head?"""
        return self.kind.shares_lm_head

    def head_state(self, state: Tensor, index: int) -> Tensor:
        """What the shared LM head takes (…, hidden) at internal exit `index` (0-based)."""
        return self.heads[index](state) if self.share_head and len(self.heads) else state

    def forward(self, state: Tensor, index: int, lm_head: nn.Module) -> Tensor:
        """Logits (…, vocabulary) of internal exit `index` (0-based) from its normed state (…, hidden)."""
        return lm_head(self.head_state(state, index)) if self.share_head else self.heads[index](state)

    def check_resizes(self) -> None:
        """Raises `ValueError` for heads with logits of their own that another vocabulary cannot be given to."""
        fixed = [type(head).__name__ for head in self.heads if not (self.share_head or isinstance(head, nn.Linear))]
        if fixed:
            raise ValueError(
                f"`exit_head`={self.kind.name!r}: heads that are {fixed[0]} cannot be resized; accepted are linear "
                "layers, and kinds that share the LM head."
            )

    def start(self, layer: nn.Module, weight: Tensor) -> None:
        """What `_init_weights` of a model does for a layer that a checkpoint lacks, see `LMExitHead.start`."""
        for head in self.heads:
            if any(layer is one for one in head.modules()):
                self.kind.start(layer, head, weight)


class LowRankAdapter(nn.Module):
    """Residual adapter `h + U·D·h` of low rank, which starts as the identity."""

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, rank, bias=False)
        self.up = nn.Linear(rank, hidden_size, bias=False)

    def forward(self, state: Tensor) -> Tensor:
        return state + self.up(self.down(state))


def _per_layer(layers: Sequence[int], make: Callable[[], nn.Module | None]) -> LayerModules:
    """A module per exit, or none where there is nothing to make."""
    found = {layer: make() for layer in layers}
    kept = {layer: module for layer, module in found.items() if module is not None}
    modules = iter(kept.values())
    return LayerModules(list(kept), lambda: next(modules))


__all__ = [
    "LM_EXIT_HEADS",
    "LMExitHead",
    "LMExitHeads",
    "LMExitNorms",
    "LowRankAdapter",
    "register_exit_head",
]
