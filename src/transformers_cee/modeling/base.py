# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""`EarlyExitModel`: what a model with exits is, whatever its family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import capture_outputs

from transformers_cee.exits.adapters import check_adapters
from transformers_cee.exits.configuration import check_min_exit_layer, first_exit
from transformers_cee.exits.entries import ExitEntries
from transformers_cee.exits.estimators import init_estimator, make_estimators, resize_estimators
from transformers_cee.exits.losses import OwnLoss
from transformers_cee.exits.policy import make_policies
from transformers_cee.exits.recording import recorded, wants_states
from transformers_cee.exits.runner import Layer
from transformers_cee.exits.support import check_rows_can_leave
from transformers_cee.modeling.flops import ItemFlops
from transformers_cee.modeling.loading import EarlyExitLoadingMixin, check_config_class


# Arguments of `forward` that layers know nothing of.
OUTPUT_FLAGS = ("output_hidden_states", "output_attentions", "return_dict")


class EarlyExitModel(EarlyExitLoadingMixin, OwnLoss):
    """A model with exits; mix in before the `PreTrainedModel` of a family.

    It owns the exits' heads, norms, policies and estimators, and knows the layers that they belong to. A subclass for
    each task says how states become logits and losses; a family says what is peculiar to its layers.

    A family gives:

    - `config_class`, a config of the family's own with the fields of the exits, and `stock_class`, the model of
      transformers whose checkpoints it loads and which it equals at full depth.
    - `task_modules`: modules beside the exits that a checkpoint of another task may lack.
    - `add_stock`: makes the modules of the stock model, under its names.
    - `layers`, and how one is called (`bind`).

    Raises:
        TypeError: a config of another class.
        ValueError: a field of the exits is out of its range.
    """

    config: Any
    training: bool
    device: torch.device
    dtype: torch.dtype
    stock_class: ClassVar[type[PreTrainedModel]]
    # What leaves, is counted and is learnt: a "row" of the batch, or a "token" of it.
    item: ClassVar[str]

    def __init__(self, config: Any) -> None:
        check_config_class(config, type(self))
        # Fields may have been set on a config that was checked before.
        config.check_exits()
        if "layer_types" in vars(config) and config.layer_types is not None:
            # Of the first layers of a checkpoint: transformers saves no types of layers that there are not.
            config.layer_types = config.layer_types[: config.num_hidden_layers]
        super().__init__(config)  # type: ignore[call-arg]
        self.layer_numbers: list[int] = config.exit_layer_numbers
        self.add_stock(config)
        self.add_heads(config)
        self.exit_policies = make_policies(config, self.layer_numbers)
        self.exit_estimators = make_estimators(config)
        self.post_init()  # type: ignore[attr-defined]

    # What a family and a task say

    def add_stock(self, config: Any) -> None:
        """Makes the modules of the stock model, under its names."""
        raise NotImplementedError

    def add_heads(self, config: Any) -> None:
        """Makes `exit_norms` and `exit_heads`."""
        raise NotImplementedError

    @property
    def body(self) -> Any:
        """The stock model without its head."""
        return getattr(self, self.base_model_prefix)  # type: ignore[attr-defined]

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The layers in order."""
        raise NotImplementedError

    # What leaves

    def count_items(self, labels: Tensor) -> Tensor:
        """How many items (rows,) of each row of a batch count, from its labels."""
        raise NotImplementedError

    def entries(self, output: Any, labels: Tensor | None, problem_type: str) -> ExitEntries:
        """States and results of a batch's items at all exits, in the batch's order.

        Args:
            output (`ModelOutput`): of `forward` with `output_all_exits=True`.
            labels (`Tensor`, *optional*): the batch's labels, if they are known.
            problem_type (`str`): what logits and labels mean.
        """
        raise NotImplementedError

    def step_inputs(self, batch: dict[str, Tensor]) -> Callable[[], dict[str, Any]]:
        """What `forward` takes to decide once for each row of a batch where it leaves, anew at every call: one pass
        may be timed again and again.

        Args:
            batch (`dict`): the model's inputs without labels.
        """
        raise NotImplementedError

    def item_flops(self, length: int) -> ItemFlops:
        """FLOPs of one inference, part by part: of a row of `length` tokens, or of a new token that attends to
        `length` keys, itself included; or of an image of `length` pixels a side."""
        raise NotImplementedError

    # Exits

    @property
    def last_exit(self) -> int:
        """The last exit (0-based), which is the stock model's head."""
        return len(self.layer_numbers) - 1

    def first_exit(self, min_exit_layer: int | None = None) -> int:
        """Exit (0-based) before which nothing leaves.

        Args:
            min_exit_layer (`int`, *optional*): first layer (1-based) to leave at; that of the config by default.

        Raises:
            ValueError: it is no layer.
        """
        layer = self.config.min_exit_layer if min_exit_layer is None else min_exit_layer
        check_min_exit_layer(layer, self.config.num_hidden_layers)
        return first_exit(self.layer_numbers, layer)

    def check_walk(self, rows_leave: bool) -> None:
        """Raises `ValueError` where layers cannot be run one by one, or not for some rows alone.

        Args:
            rows_leave (`bool`): may the layers see a part of the batch?
        """
        if rows_leave:
            check_rows_can_leave(self.config, self.layers)
        check_adapters(self, self.layers, rows_leave)  # type: ignore[arg-type]

    def captured(self, walk: Callable[[], Any], arguments: dict[str, Any]) -> dict[str, Any]:
        """A walk's result as `run`, and what its layers gave that the arguments or the config ask for."""
        wanted = wants_states(self.config, arguments)
        if not any(wanted.values()):
            return {"run": walk()}
        return _captured_by(self.body, walk, **wanted, return_dict=True)

    def walked(
        self, walk: Callable[[Sequence[Layer]], Any], layers: Sequence[Callable[[Any], Any]], arguments: dict[str, Any]
    ) -> dict[str, Any]:
        """`captured`, of layers that transformers may have no hooks on, too; these may give tuples as in the stock
        model, see `recorded`."""
        if self.body._can_record_outputs:
            return self.captured(lambda: walk(layers), arguments)
        return recorded(walk, layers, wants_states(self.config, arguments))

    def estimator_changed(self, name: str) -> None:
        """Told that the estimator of a criterion was fitted anew."""

    # Weights

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        init_estimator(module)

    def resize_token_embeddings(self, *args: Any, mean_resizing: bool = True, **kwargs: Any) -> nn.Module:
        """As `PreTrainedModel.resize_token_embeddings`, what the exits have of the vocabulary included."""
        embeddings: nn.Module = super().resize_token_embeddings(  # type: ignore[misc]
            *args, mean_resizing=mean_resizing, **kwargs
        )
        self.resize_exits(mean_resizing)
        return embeddings

    def resize_exits(self, mean_resizing: bool = True) -> None:
        """Makes what the exits have of the vocabulary fit its size.

        Args:
            mean_resizing (`bool`, *optional*, defaults to `True`): as in `resize_token_embeddings`.
        """
        resize_estimators(self)  # type: ignore[arg-type]


@capture_outputs
def _captured_by(model: nn.Module, walk: Callable[[], Any], **kwargs: Any) -> dict[str, Any]:
    # Asked of the part of the model that captures at full depth: hooks of transformers on both would note everything
    # twice.
    return {"run": walk()}


def check_inputs(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> tuple[int, ...]:
    """(batch, time) of the input.

    Raises:
        ValueError: no or both inputs, or an empty one.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
    given = input_ids if inputs_embeds is None else inputs_embeds
    assert given is not None
    shape = tuple(given.shape[:2])
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"The input of shape {shape} is empty; (batch, time) with at least one row and token needed.")
    return shape


__all__ = ["OUTPUT_FLAGS", "EarlyExitModel", "check_inputs"]
