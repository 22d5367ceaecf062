# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Images that are classified, each leaving at its own layer."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import can_return_tuple

from transformers_cee.exits.arguments import check_arguments
from transformers_cee.exits.evaluating import evaluating
from transformers_cee.exits.outputs import ExitClassifierOutput
from transformers_cee.exits.row_batch import RowBatch
from transformers_cee.exits.runner import Layer, collect_states
from transformers_cee.exits.training_options import ExitTraining
from transformers_cee.modeling.classification import Asked, EarlyExitClassifier
from transformers_cee.modeling.flops import ItemFlops, counted_flops, policy_flops


class EarlyExitImageClassifier(EarlyExitClassifier):
    """Image classification in which every image leaves at its own layer (ConsistentEE, Zeng et al., AAAI 2024; exits
    of images as in EERO, Valade 2024).

    Internal exits are linear heads on what the stock model's own head sees. Exit heads and policies start at random
    and are trained with [`ConsistentEETrainer`].

    A family gives, beside what every classifier does:

    - `embed`: the embedded batch; `embed_arguments` are further arguments of `forward` that it takes.
    """

    embed_arguments: ClassVar[tuple[str, ...]] = ()

    def embed(self, pixel_values: Tensor, **given: Any) -> RowBatch:
        """The embedded batch."""
        raise NotImplementedError

    @torch.no_grad()
    def item_flops(self, length: int) -> ItemFlops:
        """FLOPs of one image of `length` pixels a side, part by part; policies differ in width, and the first counts
        for each."""
        image = torch.zeros(1, self.config.num_channels, length, length, device=self.device, dtype=self.dtype)
        flops: list[int] = []
        with evaluating(self):
            layers = [self.bind(index, layer, {}) for index, layer in enumerate(self.layers)]
            states = collect_states(self.embed(image), [_counting(layer, flops) for layer in layers], self)
            heads = [counted_flops(partial(self.logits, state, index)) for index, state in enumerate(states)]
            policy = policy_flops(self.exit_policies, states[0])
        return ItemFlops(flops, [0] * len(flops), [0] * len(states), heads, policy)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        exit_threshold: float | list[float] | str | None = None,
        exit_criterion: str | None = None,
        exit_budget: float | None = None,
        min_exit_layer: int | None = None,
        output_all_exits: bool = False,
        exit_training: ExitTraining | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> ExitClassifierOutput:
        """Classifies each image at the first exit where the criterion lets it go.

        Args:
            pixel_values (`Tensor` of shape `(batch, channels, height, width)`): the images.
            labels (`Tensor` of shape `(batch,)` or `(batch, num_labels)`, *optional*):
                As in [`EarlyExitSequenceClassifier`], like all arguments that are not listed here.
            kwargs: `output_hidden_states` and `output_attentions`, see `ExitClassifierOutput`, and what the family's
                stock model takes beside the pixels (`embed_arguments`).

        Raises:
            ValueError: no images, or such of another shape; and as `EarlyExitSequenceClassifier.forward`.
        """
        given = {name: kwargs.pop(name) for name in self.embed_arguments if name in kwargs}
        check_arguments(EarlyExitImageClassifier.forward, self.config, kwargs)
        if pixel_values is None or pixel_values.dim() != 4 or 0 in pixel_values.shape:
            shape = None if pixel_values is None else tuple(pixel_values.shape)
            raise ValueError(
                f"`pixel_values` of shape {shape} must be (batch, channels, height, width), with at least one image."
            )
        asked = Asked(
            pixel_values.shape[0], labels, exit_threshold, exit_criterion, exit_budget, min_exit_layer,
            output_all_exits, exit_training, num_items_in_batch,
        )  # fmt: skip
        return self.classified(asked, lambda: self.embed(pixel_values, **given), kwargs)


class StagedImageClassifier(EarlyExitImageClassifier):
    """A convolutional network whose layers are the residual blocks of all stages, counted through. Exit states are
    means over the maps behind a block.

    Stages differ in width: heads, norms and policies are as wide as their own stage, and exit states, which are
    stacked, are filled up with zeros to the width of the widest.
    """

    task_modules: ClassVar[tuple[str, ...]] = ("classifier",)

    @staticmethod
    def head_dropout(config: Any) -> float:
        return 0.0

    def add_heads(self, config: Any) -> None:
        super().add_heads(config)
        self.state_sizes: list[int] = config.state_sizes(self.layer_numbers)

    @property
    def layers(self) -> list[nn.Module]:
        return [block for stage in self.body.encoder.stages for block in stage.layers]

    def bind(self, index: int, layer: nn.Module, arguments: dict[str, Any]) -> Layer:
        return lambda batch: layer(batch.hidden_states)

    def pool(self, hidden_states: Tensor, index: int) -> Tensor:
        """Exit state (rows, channels) of exit `index` (0-based) from maps (rows, channels, height, width): up to the
        last linear layer of the stock head."""
        raise NotImplementedError

    def state(self, hidden_states: Tensor, padding_mask: Tensor | None, index: int) -> Tensor:
        state = self.exit_norms(self.pool(hidden_states, index), index)
        return F.pad(state, (0, self.config.hidden_size - state.shape[-1]))

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        own = {name for name, _ in self.named_parameters()} - set(loading_info.missing_keys)  # type: ignore[attr-defined]
        has_exits = any(name.startswith("exit_policies.") for name in own | set(loading_info.unexpected_keys))
        blocks = sorted(name for name in loading_info.unexpected_keys if ".stages." in name)
        if has_exits and blocks:
            # Exits are named by their blocks, which would be others.
            loading_info.missing_keys, loading_info.unexpected_keys = set(), set()
            raise ValueError(
                f"`depths`={self.config.depths} has no place for {blocks[0]}, and the checkpoint's exits are trained "
                "for its own blocks; accepted are its `depths`. Exits of a model are chosen by `exit_layers`."
            )
        super()._adjust_missing_and_unexpected_keys(loading_info)

    def logits(self, state: Tensor, index: int) -> Tensor:
        return super().logits(state[..., : self.state_sizes[index]], index)


def _counting(layer: Layer, flops: list[int]) -> Layer:
    """The layer, which notes its FLOPs when it runs."""

    def run(batch: RowBatch) -> Tensor:
        found: list[Tensor] = []
        flops.append(counted_flops(lambda: found.append(layer(batch))))
        return found[0]

    return run


__all__ = ["EarlyExitImageClassifier", "StagedImageClassifier"]
