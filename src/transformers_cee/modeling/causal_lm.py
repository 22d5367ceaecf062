# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Language models in which every token leaves at its own layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.utils import can_return_tuple

from transformers_cee.exits.arguments import check_arguments
from transformers_cee.exits.cache_name import CACHE_NAME, takes_cache
from transformers_cee.exits.configuration import check_skipped_kv
from transformers_cee.exits.deciding import ExitDecision, model_criterion, resolve_decision
from transformers_cee.exits.entries import ExitEntries, token_entries
from transformers_cee.exits.jump_drafter import make_drafter
from transformers_cee.exits.lm_heads import LMExitHeads, LMExitNorms
from transformers_cee.exits.losses import check_training_without_labels, say_what_labels_train
from transformers_cee.exits.outputs import ExitCausalLMOutput
from transformers_cee.exits.row_batch import SLIDING, Rotary, RowBatch
from transformers_cee.exits.runner import Layer
from transformers_cee.exits.support import check_no_graph
from transformers_cee.exits.token_targets import count_tokens, token_targets
from transformers_cee.exits.training_options import ExitTraining
from transformers_cee.generation.cache import EarlyExitCache
from transformers_cee.generation.decoding import Decoder, complete_waiting
from transformers_cee.generation.masks import causal_masks, layer_types_of
from transformers_cee.generation.mixin import EarlyExitGenerationMixin
from transformers_cee.generation.steps import decode_step
from transformers_cee.modeling.base import check_inputs
from transformers_cee.modeling.decoder_runs import DecoderRuns, TextInputs, check_known_text, positions_of
from transformers_cee.modeling.flops import ItemFlops, counted_flops, layer_flops, policy_flops
from transformers_cee.modeling.gguf import GGUFLoadingMixin


# How heads are spread over devices, and which share weights, is the stock model's matter.
_OF_STOCK = ("_tied_weights_keys", "_tp_plan", "_pp_plan", "_fsdp_plan")


class EarlyExitCausalLM(GGUFLoadingMixin, DecoderRuns, EarlyExitGenerationMixin):
    """Text generation in which every token leaves at its own layer (ConsistentEE, Zeng et al., AAAI 2024).

    Norms and heads of the internal exits start as copies of the model's own, policies at random;
    [`ConsistentEETrainer`] trains them. Until then exits are off (`config.exit_threshold` is None) and the model does
    what the stock one does.

    A family of decoders gives, beside what every model with exits does, where it differs:

    - `keys_and_values` and `normed_keys`: how a layer projects its input.
    - `apply_rotary`, the rotary embedding of queries and keys, and `rotates`, which layers have it.
    """

    item = "token"
    task_modules: ClassVar[tuple[str, ...]] = ("lm_head",)
    logits_module: ClassVar[str] = "lm_head"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "stock_class" in vars(cls):
            for name in _OF_STOCK:
                setattr(cls, name, getattr(cls.stock_class, name, None))

    def __init__(self, config: Any) -> None:
        # Before anything is made: exits may not know how its layers look at the text.
        self.layer_types = layer_types_of(config)
        super().__init__(config)
        # Transformers guesses this from the class name, and Trainer counts labels by it.
        self.loss_type = "ForCausalLM"
        self.vocab_size = config.vocab_size

    def add_heads(self, config: Any) -> None:
        internal, norm = self.layer_numbers[:-1], type(self.model.norm)
        self.exit_norms = LMExitNorms(internal, config, lambda: norm(config.hidden_size, config.rms_norm_eps))
        self.exit_heads = LMExitHeads(internal, config)
        kind = type(self.model.layers[0])
        self.exit_drafter = make_drafter(config, lambda index: kind(config, index))

    def add_stock(self, config: Any) -> None:
        self.model = self.body_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # Asked for single layers only: containers of classes outside of transformers are passed over when it loads.
        if any(module is norm for norm in self.exit_norms.norms) and isinstance(module, type(self.model.norm)):
            init.copy_(module.weight, self.model.norm.weight)
        if self.exit_drafter is not None:
            self.exit_drafter.start(module, self.layers[self.config.drafter_layer - 1])
        tied = self.config.tie_word_embeddings
        self.exit_heads.start(module, (self.model.embed_tokens if tied else self.lm_head).weight)

    def get_decoder(self) -> nn.Module:
        return self.model

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As `PreTrainedModel.resize_token_embeddings`, heads of the internal exits and tables of tokens included.

        Raises:
            ValueError: heads of the internal exits that give logits and are no linear layers.
        """
        self.exit_heads.check_resizes()
        return super().resize_token_embeddings(*args, **kwargs)

    def resize_exits(self, mean_resizing: bool = True) -> None:
        self.exit_heads.check_resizes()
        super().resize_exits(mean_resizing)
        for index, head in enumerate(self.exit_heads.heads):
            if isinstance(head, nn.Linear):
                size = self.config.vocab_size
                self.exit_heads.heads[index] = self._get_resized_lm_head(head, size, mean_resizing=mean_resizing)

    # What a family may say otherwise

    body_class: ClassVar[type[nn.Module]]

    def keys_and_values(self, layer: nn.Module, states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (rows, time, heads · head size) that a layer makes of its input states (rows, time, hidden),
        before any rotary embedding."""
        attention, normed = layer.self_attn, layer.input_layernorm(states)
        return attention.k_proj(normed), attention.v_proj(normed)

    def normed_keys(self, layer: nn.Module, keys: Tensor) -> Tensor:
        """What a layer makes of its keys (rows, time, heads, head size) before their rotary embedding."""
        norm = getattr(layer.self_attn, "k_norm", None)
        return keys if norm is None else norm(keys)

    # From queries, keys (…, rows, heads, time, head size), cosines and sines (rows, time, head size) to both, rotated.
    apply_rotary = staticmethod(apply_rotary_pos_emb)

    def rotates(self, layer: nn.Module) -> bool:
        """Does the layer have a rotary embedding?"""
        return True

    def check_length(self, past: int, length: int) -> None:
        """Raises `ValueError` where no token may leave while a text grows from `past` tokens, of which keys and values
        are kept, to `length` tokens. Any may, by default."""

    # What the walks over layers ask

    @property
    def layers(self) -> list[nn.Module]:
        # Slicing a ModuleList would make a new module in every step.
        return list(self.model.layers)[: self.config.num_hidden_layers]

    def exit_state(self, hidden_states: Tensor, index: int) -> Tensor:
        """Normed state (…, hidden) of exit `index` (0-based) from its layer's hidden states (…, hidden)."""
        if index == self.last_exit or self.exit_norms.is_shared:
            return self.model.norm(hidden_states)
        return self.exit_norms(hidden_states, index)

    def exit_logits(self, state: Tensor, index: int) -> Tensor:
        """Logits (…, vocabulary) of exit `index` from its normed state (…, hidden)."""
        return self.lm_head(state) if index == self.last_exit else self.exit_heads(state, index, self.lm_head)

    def head_state(self, state: Tensor, index: int) -> Tensor:
        """What the LM head takes (…, hidden) at exit `index`, where all exits share it."""
        return state if index == self.last_exit else self.exit_heads.head_state(state, index)

    def project_skipped(self, start: int, stop: int, states: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Keys and values (layers, rows, heads, time, head size) of the layers `start..stop−1` (0-based) for input
        states (rows, time, hidden): each layer's own norms, projections and rotary embedding."""
        keys, values = [], []
        layers = self.layers[start:stop]
        for layer in layers:
            key, value = self.keys_and_values(layer, states)
            shape = (*states.shape[:-1], -1, layer.self_attn.head_dim)
            keys.append(self.normed_keys(layer, key.view(shape)))
            values.append(value.view(shape))
        stacked = torch.stack(keys).transpose(2, 3)
        if all(map(self.rotates, layers)):
            stacked = self.apply_rotary(stacked[:, :, :0], stacked, *rotary)[1]
        else:
            # Under autocast rotated keys are of another type than the others.
            stacked = torch.stack(
                [
                    self.apply_rotary(key[:, :0], key, *rotary)[1] if self.rotates(layer) else key
                    for key, layer in zip(stacked, layers, strict=True)
                ]
            )
        return stacked, torch.stack(values).transpose(2, 3)

    @property
    def as_decoder(self) -> Decoder:
        return Decoder(self.config, self.layers, self.layer_types, self.model.rotary_emb, self.project_skipped)

    # What leaves

    def count_items(self, labels: Tensor) -> Tensor:
        return count_tokens(labels)

    def entries(self, output: ExitCausalLMOutput, labels: Tensor | None, problem_type: str) -> ExitEntries:
        return token_entries(output)

    def step_inputs(self, batch: dict[str, Tensor]) -> Callable[[], dict[str, Any]]:
        return decode_step(self, batch)

    def item_flops(self, length: int) -> ItemFlops:
        config, exits = self.config, range(len(self.layer_numbers))
        state = torch.zeros(1, 1, config.hidden_size, device=self.device, dtype=self.dtype)
        copies = config.skipped_kv == "copy"
        return ItemFlops(
            [
                # Masks hide what is outside of the window.
                layer_flops(layer, config, 1, min(length, config.sliding_window) if kind == SLIDING else length)
                for layer, kind in zip(self.layers, self.layer_types, strict=True)
            ],
            [counted_flops(partial(self.keys_and_values, layer, state)) if copies else 0 for layer in self.layers],
            [counted_flops(partial(self.exit_state, state, index)) for index in exits],
            [counted_flops(partial(self.exit_logits, state, index)) for index in exits],
            policy_flops(self.exit_policies, state[0]),
        )

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | Mapping[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        exit_threshold: float | list[float] | str | ExitDecision | None = None,
        exit_criterion: str | None = None,
        exit_budget: float | None = None,
        min_exit_layer: int | None = None,
        skipped_kv: str | None = None,
        output_all_exits: bool = False,
        exit_training: ExitTraining | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> ExitCausalLMOutput:
        """Runs the model: at full depth, to all exits, or each token to its own exit.

        - Without `exit_threshold`: full depth, as the stock model. In training mode with `labels`, the loss is that of
          all exits, and `logits` are the last exit's; without labels, a loss on `logits` trains the last exit alone.
        - One token per row with a cache and `exit_threshold`: a decode step. Layers behind a token's exit
          are not executed for it.
        - Several tokens with `exit_threshold`, or `sample_exits` of `exit_training`: the text is known, so each token
          leaves at its own exit and others see it as generation with `skipped_kv="copy"` would. All layers are
          executed. With `labels`, positions whose own label is −100 (the prompt) stay at full depth, as in generation.

        Args:
            input_ids (`LongTensor` of shape `(batch, time)`): token ids; or give `inputs_embeds`.
            attention_mask (`Tensor` of shape `(batch, past + time)`, *optional*):
                0 at padding; anything else, of any dtype, at tokens. Or, but for decode steps with exits, what the
                attention itself takes, of shape `(batch, 1, time, past + time)`; at full depth also by type of layer.
            cache (`Cache`, *optional*): of the tokens before; an [`EarlyExitCache`] for decode steps with exits, see
                `EarlyExitCache.from_cache`. `past_key_values`, its name before transformers 5.24, is taken as well.
            labels (`LongTensor` of shape `(batch, time)`, *optional*):
                Tokens of the same positions, shifted inside; −100 where nothing is to be learnt. `shift_labels` (what
                each position is to predict) and `ignore_index` are taken as by the stock model.
            logits_to_keep (`int` or `LongTensor`, *optional*):
                Positions from the end whose logits are returned, or which positions; 0 stands for all. The loss is
                that of all positions.
            exit_threshold (`float`, `list[float]` or `str`, *optional*):
                A token leaves at the first exit whose score is beyond it; a list holds one number per exit, a name
                stands for one of `config.exit_operating_points`. `generate` fills in the default of the generation
                config or of the config, and decides once for all of its steps; here `None` means full depth.
            exit_criterion (`str`, *optional*, defaults to `config.exit_criterion`): name of the exit criterion.
            exit_budget (`float`, *optional*):
                Wanted mean depth as a share of all layers, instead of a threshold; of policies conditioned on α.
            min_exit_layer (`int`, *optional*, defaults to `config.min_exit_layer`): first layer to leave at.
            skipped_kv (`str`, *optional*, defaults to `config.skipped_kv`): `"copy"` or `"deferred"`.
            output_all_exits (`bool`): with `labels`, states, losses and predictions of all exits at counted positions.
            exit_training ([`ExitTraining`], *optional*): what trainers ask for.
            num_items_in_batch (`int`, *optional*): divides summed losses instead of the number of counted positions.

        Raises:
            ValueError: no or both of `input_ids` and `inputs_embeds`, an empty batch, `labels` that do not fit or are
                missing, also where Trainer took them out, or an exit argument out of range. No layer has run by then.
        """
        check_arguments(EarlyExitCausalLM.forward, self.config, kwargs)
        shape, options = check_inputs(input_ids, inputs_embeds), exit_training or ExitTraining()
        if options.roll_outs:
            return self.run_roll_outs(input_ids, attention_mask, labels, options.roll_outs)
        targets = token_targets(labels, shape, kwargs.pop("shift_labels", None), kwargs.pop("ignore_index", -100))
        if targets is None and (output_all_exits or options.sample_exits):
            raise ValueError("`output_all_exits` and `sample_exits` need `labels`, which say what positions count.")
        full_depth = exit_threshold is None and exit_budget is None and not options.sample_exits
        if self.training and full_depth and targets is None:
            check_training_without_labels(num_items_in_batch)
        elif self.training and full_depth and not output_all_exits:
            say_what_labels_train(self.config.exit_criterion)
        # All exits are told from training as Trainer knows it by what they are for: not to hold logits.
        all_exits = targets is not None and (output_all_exits or (self.training and full_depth))
        attention_mask = _checked_mask(attention_mask, full_depth and not all_exits)
        if inputs_embeds is None:
            inputs_embeds = self.model.embed_tokens(input_ids)
        inputs = TextInputs(inputs_embeds, attention_mask, position_ids, cache, targets, num_items_in_batch, kwargs)
        if all_exits:
            return self.run_all_exits(inputs, options, None if output_all_exits else logits_to_keep)
        if full_depth:
            return self.run_full_depth(inputs, use_cache, logits_to_keep)
        if options.sample_exits:
            decision = ExitDecision("policy", 1.0)
        else:
            decision = resolve_decision(self.config, exit_threshold, exit_criterion, exit_budget)
        first_exit = self.first_exit(min_exit_layer)
        criterion = model_criterion(self, decision, input_ids=input_ids, first_exit=first_exit)
        check_skipped_kv(self.config.skipped_kv if skipped_kv is None else skipped_kv)
        if cache is not None and not criterion.is_off:
            self.check_length(cache.get_seq_length(), cache.get_seq_length() + shape[1])
        if shape[1] == 1 and cache is not None and targets is None:
            if not (criterion.is_off or decision.is_checked):
                self.check_walk(rows_leave=True)
            return self.run_decode_step(inputs, criterion, first_exit, skipped_kv or self.config.skipped_kv)
        check_known_text(skipped_kv, cache)
        if not criterion.is_off:
            check_no_graph()
        return self.run_known_text(inputs, options, criterion, first_exit, logits_to_keep)

    # Parts

    def prepare(self, inputs: TextInputs) -> tuple[RowBatch, list[Layer]]:
        """The embedded batch and the layers bound to masks, positions and cache."""
        embedded, cache = inputs.embedded, inputs.cache
        self.check_walk(rows_leave=False)
        if isinstance(cache, EarlyExitCache):
            complete_waiting(self.as_decoder, cache)
        positions = positions_of(inputs.position_ids, embedded, cache)
        masks = causal_masks(self.config, self.layer_types, embedded, inputs.attention_mask, positions, cache)
        arguments = {
            "position_embeddings": self.model.rotary_emb(embedded, position_ids=positions),
            "position_ids": positions,
            CACHE_NAME: cache,
            "use_cache": cache is not None,
            **inputs.layer_arguments,
        }
        layers = [_bind(layer, kind, arguments) for layer, kind in zip(self.layers, self.layer_types, strict=True)]
        return RowBatch(embedded, masks), layers


def _bind(layer: nn.Module, layer_type: str, arguments: dict[str, Any]) -> Layer:
    """A layer with the arguments that stay the same for all batches of a walk."""
    return lambda batch: layer(batch.hidden_states, attention_mask=batch.mask_of(layer_type), **arguments)


def _checked_mask(attention_mask: Any, full_depth: bool) -> Any:
    """The mask of a call; one of (batch, time) has truth values, true at tokens: what is not 0 is one.

    Raises:
        ValueError: masks by type of layer, which generation with static caches makes, where there are exits.
    """
    if isinstance(attention_mask, Mapping):
        if not full_depth:
            raise ValueError(
                f"`attention_mask` of the layer types {', '.join(attention_mask)} is accepted at full depth only, "
                "without `exit_threshold`; with exits give one tensor of shape (batch, past + time)."
            )
        return attention_mask
    return attention_mask != 0 if attention_mask is not None and attention_mask.dim() == 2 else attention_mask


__all__ = ["EarlyExitCausalLM"]
