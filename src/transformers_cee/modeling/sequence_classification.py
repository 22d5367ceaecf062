# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Encoders that classify, each input leaving at its own layer."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.utils import can_return_tuple

from transformers_cee.exits.arguments import check_arguments
from transformers_cee.exits.heads import first_token, mean_token
from transformers_cee.exits.outputs import ExitClassifierOutput
from transformers_cee.exits.row_batch import RowBatch
from transformers_cee.exits.runner import Layer
from transformers_cee.exits.training_options import ExitTraining
from transformers_cee.lazy import named
from transformers_cee.modeling.base import check_inputs
from transformers_cee.modeling.classification import Asked, EarlyExitClassifier
from transformers_cee.modeling.flops import ItemFlops, counted_flops, layer_flops, policy_flops


# Engines stand on this file, and are imported when they are asked for.
_EXPORT = "transformers_cee.engines.exporting.export_model"


class EarlyExitSequenceClassifier(EarlyExitClassifier):
    """Sequence classification and regression in which every input leaves at its own layer (ConsistentEE, Zeng et al.,
    AAAI 2024).

    Internal exits are linear heads on the state that the stock model's own head makes before its last linear layer.
    Exit heads and policies start at random and are trained with [`ConsistentEETrainer`].

    A family of encoders gives, beside what every model with exits does, where it differs:

    - `embed`: the embedded batch with its masks and positions; or of its parts, `positions` and `embedded`.
    - `finished`: what is done to hidden states behind the last layer.
    - `pool` and `classify`: the stock head in two parts, up to its last linear layer and from there.
    """

    # Of the stock head; a family whose head is otherwise says how it classifies.
    classifier: Any
    dropout: Any

    # What a family may say otherwise

    @property
    def layers(self) -> nn.ModuleList:
        return self.body.encoder.layer

    @property
    def most_tokens(self) -> int | None:
        """Tokens of the longest text that the model was made for; None where its config names none."""
        most: int | None = getattr(self.config, "max_position_embeddings", None)
        return most

    @property
    def reads_longer(self) -> bool:
        """Does the model compute something of longer texts, too? One that looks positions up in a table does not."""
        modules = self.body.named_modules()
        return not any(isinstance(one, nn.Embedding) and name.endswith("position_embeddings") for name, one in modules)

    def bind(self, index: int, layer: nn.Module, arguments: dict[str, Any]) -> Layer:
        """The layer `index` (0-based) as a function of the batch; `arguments` are those that the caller hands on."""
        types = getattr(self.config, "layer_types", None)
        kind = "" if types is None else types[index]

        def run(batch: RowBatch) -> Tensor:
            rotary = {} if batch.rotary is None else {"position_embeddings": batch.rotary[kind]}
            return layer(batch.hidden_states, batch.mask_of(kind), **rotary, **arguments)

        return run

    def embed(self, attention_mask: Tensor | None, **given: Tensor | None) -> RowBatch:
        """The embedded batch, its masks and positions.

        Args:
            attention_mask (`BoolTensor` of shape `(rows, time)`, *optional*): true at tokens.
            given: `input_ids`, `token_type_ids`, `position_ids` (rows, time) and `inputs_embeds` (rows, time, hidden).
        """
        placed = self.placed(given, attention_mask)
        return self.masked(self.embedded(**placed), attention_mask, placed["position_ids"])

    def placed(self, given: dict[str, Tensor | None], attention_mask: Tensor | None) -> dict[str, Tensor | None]:
        """What is embedded, with position ids."""
        if given["position_ids"] is None:
            given["position_ids"] = self.positions(given["input_ids"], attention_mask)
        return given

    def positions(self, input_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor | None:
        """Position ids (rows, time) that are not given; None where the stock model counts well itself."""
        # A left-padded row counts from its own first token; right-padded rows keep 0, 1, 2, ….
        return None if attention_mask is None else columns_from_first(attention_mask).clamp_min(0)

    def embedded(self, **given: Tensor | None) -> Tensor:
        """Embeddings (rows, time, hidden) of tokens, token types and positions."""
        return self.body.embeddings(**given)

    def masked(self, hidden_states: Tensor, attention_mask: Tensor | None, placed: Tensor | None = None) -> RowBatch:
        """Rows (rows, time, hidden) whose tokens see each other, with what layers need to know of columns. Nothing of
        that depends on what the hidden states hold, but on their shape, type and device."""
        mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
        )
        # No mask for the layers means that nothing is padded: then pooling needs none either.
        return RowBatch(hidden_states, mask, None if mask is None else attention_mask)

    def classify(self, state: Tensor) -> Tensor:
        return self.classifier(self.dropout(state))

    def finished(self, hidden_states: Tensor) -> Tensor:
        """What the stock model makes of the last layer's hidden states before it pools them."""
        return hidden_states

    def pool(self, state: Tensor) -> Tensor:
        """Exit state (rows, hidden) of pooled hidden states (rows, hidden): the stock head up to its last layer."""
        return state

    def walked(self, walk: Any, layers: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        """As in the stock model, the last hidden states are those that are pooled."""
        found = super().walked(walk, layers, arguments)
        states = found.get("hidden_states", ())
        if len(states) > len(layers) and states[-1] is not None:
            found["hidden_states"] = (*states[:-1], self.finished(states[-1]))
        return found

    # What the walks over layers ask

    def state(self, hidden_states: Tensor, padding_mask: Tensor | None, index: int) -> Tensor:
        """Exit state (rows, hidden) of exit `index` (0-based) from hidden states (rows, time, hidden)."""
        if self.config.averages_tokens(index == self.last_exit):
            pooled = mean_token(self.finished(hidden_states), padding_mask)
        else:
            pooled = self.pool(self.finished(first_token(hidden_states, padding_mask)))
        return self.exit_norms(pooled, index)

    def export(self, output: str | os.PathLike[str], **options: Any) -> Any:
        """Exports the model to an engine: a folder that loads without the original weights, and with `from_pretrained`
        of this class or of an Auto class gives an object that pipelines, trainers' `evaluate`, calibration and
        benchmarks take like the model.

        The layers become blocks between exits, whose graphs also give logits and the criterion's score. Budgets and
        operating points are fitted anew on the engine, from the calibration texts; what cannot be is dropped, with a
        message.

        Args:
            output (`str` or `os.PathLike`): the folder; it is made, and must be empty where it exists.
            engine (`str`, *optional*, defaults to `"openvino"`): a name of `transformers_cee.engines.ENGINES`.
            precision (`str`, *optional*, defaults to `"int8"`): `"float32"`, `"bfloat16"` or `"int8"`.
            calibration_texts (sequence of `str`, *optional*):
                Texts that the model is for, without labels; some hundred give the scales of int8, some thousand
                certify an agreement of 0.99. On those that set scales, up to 256 and at most half, nothing is fitted
                or certified.
            calibration_labels (sequence, *optional*):
                Labels of these texts, as in a data set. Operating points that bound a risk take them; others do not.
            processing_class (*optional*): the tokenizer; by default that of the checkpoint the model came from.
            exit_criterion (`str`, *optional*, defaults to the config's):
                Criterion whose score becomes part of the graphs. Others are asked outside, which takes longer.
            exit_layers (`str`, *optional*):
                `"auto"` keeps those exits, at the threshold, with the least expected time of a batch for `agreement`,
                by costs measured here; see `choose_exits`. None keeps all.
            agreement (`float`, *optional*, defaults to 0.99): with full depth, certified, of `"auto"`.
            batch_size (`int`, *optional*, defaults to 32): rows of a batch of the calibration, and in service.
            measure (`bool`, *optional*, defaults to `True`):
                Measure what layers and checks cost on this machine, which should be idle. Exits that cannot pay for
                the size of a batch are then not asked. It takes `calibration_texts`.

        Returns:
            [`ExportedSequenceClassifier`]: the exported model, loaded.

        Raises:
            ImportError: the engine is not installed; the message says what installs it.
            ValueError: an unknown engine or criterion, a precision that the engine lacks or that takes texts, no
                tokenizer, adapters that are not merged, or a folder that is not empty. Nothing is written by then.
        """
        return named(_EXPORT)(self, output, **options)

    def item_flops(self, length: int) -> ItemFlops:
        config, exits = self.config, range(len(self.layer_numbers))
        hidden = torch.zeros(1, 1, config.hidden_size, device=self.device, dtype=self.dtype)
        return ItemFlops(
            [layer_flops(layer, config, length, length) for layer in self.layers],
            [0] * len(self.layers),
            [counted_flops(partial(self.state, hidden, None, index)) for index in exits],
            [counted_flops(partial(self.logits, hidden[0], index)) for index in exits],
            policy_flops(self.exit_policies, hidden[0]),
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
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
        """Classifies each row at the first exit where the criterion lets it go.

        Args:
            input_ids (`LongTensor` of shape `(batch, time)`): token ids; or give `inputs_embeds`.
            attention_mask (`Tensor` of shape `(batch, time)`, *optional*):
                0 at padding, on either side; anything else, of any dtype, at tokens.
            labels (`Tensor` of shape `(batch,)` or `(batch, num_labels)`, *optional*):
                Classes, indicators or values, by `config.problem_type`, which the first labels settle where it is
                None. The loss is that of the exits taken. In training mode, where no exit argument is given, no row
                leaves early and the loss is that of all exits (layer-weighted); without labels, `all_exit_logits` are
                returned there, and a loss on `logits` trains the last exit alone.
            exit_threshold (`float`, `list[float]` or `str`, *optional*, defaults to `config.exit_threshold`):
                A row leaves at the first exit whose policy probability is greater: 1.0 switches exits off, 0.0 lets
                all out at the first exit. Without one, of the call or the config, no row leaves early. A list holds
                one number per exit; a name stands for one of `config.exit_operating_points`.
            exit_criterion (`str`, *optional*, defaults to `config.exit_criterion`):
                `"policy"`, or a baseline such as `"max_probability"`, `"entropy"` or `"patience"`; see
                `transformers_cee.exits.criteria.CRITERIA`.
            exit_budget (`float`, *optional*):
                Wanted mean depth as a share of all layers, instead of a threshold; of policies conditioned on α.
            min_exit_layer (`int`, *optional*, defaults to `config.min_exit_layer`): first layer to leave at.
            output_all_exits (`bool`, *optional*, defaults to `False`):
                Run to full depth and return every exit's logits and state.
            exit_training ([`ExitTraining`], *optional*): what trainers ask for.

            kwargs: `output_hidden_states` and `output_attentions` as in the stock model, see `ExitClassifierOutput`.
            num_items_in_batch (`int`, *optional*):
                Divides summed losses instead of the number of rows: all labels, of all micro-batches and processes.

        Raises:
            ValueError: no or both of `input_ids` and `inputs_embeds`, an empty batch, a mask or labels that do not
                fit, labels that Trainer took out, or a threshold that is out of range or of the wrong length. No
                layer has run by then.
        """
        check_arguments(EarlyExitSequenceClassifier.forward, self.config, kwargs)
        shape = check_inputs(input_ids, inputs_embeds)
        if attention_mask is not None:
            attention_mask = _checked_mask(attention_mask, shape)
        asked = Asked(
            shape[0], labels, exit_threshold, exit_criterion, exit_budget, min_exit_layer, output_all_exits,
            exit_training, num_items_in_batch, input_ids, attention_mask,
        )  # fmt: skip
        given = {
            "input_ids": input_ids,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        return self.classified(asked, lambda: self.embed(attention_mask, **given), kwargs)


def columns_from_first(attention_mask: Tensor) -> Tensor:
    """Distance (rows, time) of each column from its row's first token, negative before it."""
    first = attention_mask.to(torch.int8).argmax(1, keepdim=True)
    return torch.arange(attention_mask.shape[1], device=attention_mask.device) - first


def _checked_mask(attention_mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Truth values (batch, time), true at tokens: what is not 0 is one, whatever its number.

    Raises:
        ValueError: a mask of another shape.
    """
    if tuple(attention_mask.shape) != shape:
        raise ValueError(f"`attention_mask` of shape {tuple(attention_mask.shape)} must be (batch, time) = {shape}.")
    return attention_mask != 0


__all__ = ["EarlyExitSequenceClassifier", "columns_from_first"]
