# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""LLaMA with exits: `transformers`' own decoder layers, walked by the early-exit loop token by token."""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import (
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
)
from transformers.utils import can_return_tuple

from transformers_cee.exits.adapters import check_adapters
from transformers_cee.exits.arguments import check_arguments
from transformers_cee.exits.cache_name import CACHE_NAME, named_cache, takes_cache
from transformers_cee.exits.configuration import check_min_exit_layer, check_skipped_kv
from transformers_cee.exits.criteria import ExitCriterion
from transformers_cee.exits.deciding import ExitDecision, model_criterion, resolve_decision
from transformers_cee.exits.estimators import init_estimator, make_estimators, resize_estimators
from transformers_cee.exits.lm_heads import LMExitHeads, LMExitNorms
from transformers_cee.exits.losses import (
    OwnLoss,
    check_training_without_labels,
    layer_weighted,
    say_what_labels_train,
)
from transformers_cee.exits.outputs import ExitCausalLMOutput
from transformers_cee.exits.policy import make_policies
from transformers_cee.exits.recording import Place, hide_left, restore_step, wants_states
from transformers_cee.exits.runner import ExitRun, Layer, RowBatch, TokenRun, collect_states, run_token_exits
from transformers_cee.exits.support import check_no_graph, check_rows_can_leave
from transformers_cee.exits.token_losses import CrossEntropy, TokenLoss, taken_exit_losses, token_exit_losses
from transformers_cee.exits.token_targets import TokenTargets, token_targets
from transformers_cee.generation.cache import EarlyExitCache
from transformers_cee.generation.decoding import Decoder, Rotary, complete_waiting, decode_step
from transformers_cee.generation.mixin import EarlyExitGenerationMixin
from transformers_cee.models.decoder_parts import (
    OUTPUT_FLAGS,
    PickedExits,
    bind,
    captured_by,
    check_inputs,
    check_known_text,
    kept,
    positions_of,
    reduced,
)
from transformers_cee.models.gguf import GGUFLoadingMixin
from transformers_cee.models.llama_cee.configuration_llama_cee import LlamaCeeConfig
from transformers_cee.models.loading import EarlyExitLoadingMixin, check_config_class


class LlamaForConsistentEECausalLM(
    GGUFLoadingMixin, EarlyExitLoadingMixin, OwnLoss, EarlyExitGenerationMixin, LlamaPreTrainedModel
):
    """LLaMA for text generation in which every token leaves at its own layer (ConsistentEE, Zeng et al., AAAI 2024).

    Loads from its own checkpoints and from any LLaMA checkpoint, GGUF files included (`gguf_file=`). Norms and heads
    of the internal exits start as copies of the model's own, policies at random; [`ConsistentEETrainer`] trains them.
    Until then exits are off (`config.exit_threshold` is None) and the model does what the stock one does.

    Args:
        config ([`LlamaCeeConfig`]): sizes of LLaMA and the fields of the exits.
    """

    config_class = LlamaCeeConfig
    config: LlamaCeeConfig
    stock_class = LlamaForCausalLM
    task_modules: ClassVar[tuple[str, ...]] = ("lm_head",)
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    # How the head is spread over devices is the stock model's matter.
    _tp_plan = LlamaForCausalLM._tp_plan
    _pp_plan = LlamaForCausalLM._pp_plan
    _fsdp_plan = getattr(LlamaForCausalLM, "_fsdp_plan", None)
    # Every token leaves on its own.
    exits_per_token = True

    def __init__(self, config: LlamaCeeConfig) -> None:
        check_config_class(config, type(self))
        # Fields may have been set on a config that was checked before.
        config.check_exits()
        super().__init__(config)
        # Transformers guesses this from the class name, and Trainer counts labels by it.
        self.loss_type = "ForCausalLM"
        self.layer_numbers = config.exit_layer_numbers
        internal = self.layer_numbers[:-1]
        self.vocab_size = config.vocab_size
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.exit_norms = LMExitNorms(
            config.exit_head,
            internal,
            config.hidden_size,
            config.rms_norm_eps,
            lambda: LlamaRMSNorm(config.hidden_size, config.rms_norm_eps),
        )
        self.exit_heads = LMExitHeads(
            config.exit_head, internal, config.hidden_size, config.vocab_size, config.exit_head_rank
        )
        self.exit_policies = make_policies(config, self.layer_numbers)
        self.exit_estimators = make_estimators(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_estimator(module)
        # Asked for single layers only: containers of classes outside of transformers are passed over when it loads.
        if any(module is norm for norm in self.exit_norms.norms) and isinstance(module, LlamaRMSNorm):
            init.copy_(module.weight, self.model.norm.weight)
        elif any(module is head for head in self.exit_heads.heads) and self.exit_heads.kind == "untied":
            tied = self.config.tie_word_embeddings
            init.copy_(module.weight, (self.model.embed_tokens if tied else self.lm_head).weight)
        elif any(module is getattr(head, "up", None) for head in self.exit_heads.heads):
            init.zeros_(module.weight)

    def get_decoder(self) -> nn.Module:
        return self.model

    def resize_token_embeddings(self, *args: Any, mean_resizing: bool = True, **kwargs: Any) -> nn.Module:
        """As `PreTrainedModel.resize_token_embeddings`, heads of the internal exits and tables of tokens included."""
        embeddings = super().resize_token_embeddings(*args, mean_resizing=mean_resizing, **kwargs)
        for index, head in enumerate(self.exit_heads.heads):
            if isinstance(head, nn.Linear):
                size = self.config.vocab_size
                self.exit_heads.heads[index] = self._get_resized_lm_head(head, size, mean_resizing=mean_resizing)
        resize_estimators(self)
        return embeddings

    # What the walks over layers ask.

    def exit_state(self, hidden_states: Tensor, index: int) -> Tensor:
        """Normed state (…, hidden) of exit `index` (0-based) from its layer's hidden states (…, hidden)."""
        if index == len(self.layer_numbers) - 1 or self.exit_norms.is_shared:
            return self.model.norm(hidden_states)
        return self.exit_norms(hidden_states, index)

    def exit_logits(self, state: Tensor, index: int) -> Tensor:
        """Logits (…, vocabulary) of exit `index` from its normed state (…, hidden)."""
        if index == len(self.layer_numbers) - 1:
            return self.lm_head(state)
        return self.exit_heads(state, index, self.lm_head)

    def head_state(self, state: Tensor, index: int) -> Tensor:
        """What the LM head takes (…, hidden) at exit `index`, where all exits share it."""
        last = index == len(self.layer_numbers) - 1
        return state if last else self.exit_heads.head_state(state, index)

    def project_skipped(self, start: int, stop: int, states: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Keys and values (layers, rows, heads, time, head size) of the layers `start..stop−1` (0-based) for input
        states (rows, time, hidden): each layer's own input norm, projections and rotary embedding."""
        keys, values = [], []
        for layer in self._layers[start:stop]:
            normed = layer.input_layernorm(states)
            keys.append(layer.self_attn.k_proj(normed))
            values.append(layer.self_attn.v_proj(normed))
        shape = (stop - start, *states.shape[:-1], -1, self._layers[0].self_attn.head_dim)
        rotated = torch.stack(keys).view(shape).transpose(2, 3)
        rotated = apply_rotary_pos_emb(rotated[:, :, :0], rotated, *rotary)[1]
        return rotated, torch.stack(values).view(shape).transpose(2, 3)

    @property
    def _layers(self) -> list[nn.Module]:
        # Slicing a ModuleList would make a new module in every step.
        return list(self.model.layers)[: self.config.num_hidden_layers]

    @property
    def _as_decoder(self) -> Decoder:
        return Decoder(self.config, self._layers, self.model.rotary_emb, self.project_skipped)

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        exit_threshold: float | list[float] | str | None = None,
        exit_criterion: str | None = None,
        exit_budget: float | None = None,
        min_exit_layer: int | None = None,
        skipped_kv: str | None = None,
        output_all_exits: bool = False,
        sample_exits: bool = False,
        gradient_equilibrium: bool = False,
        output_policies: bool = False,
        token_loss: TokenLoss | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> ExitCausalLMOutput:
        """Runs the model: at full depth, to all exits, or each token to its own exit.

        - Without `exit_threshold`: full depth, as the stock model. In training mode with `labels`, the loss is that of
          all exits, and `logits` are the last exit's; without labels, a loss on `logits` trains the last exit alone.
        - One token per row with a cache and `exit_threshold`: a decode step. Layers behind a token's exit
          are not executed for it.
        - Several tokens with `exit_threshold`, or `sample_exits`: the text is known, so each token leaves at its own
          exit and others see it as generation with `skipped_kv="copy"` would. All layers are executed. With `labels`,
          positions whose own label is −100 (the prompt) stay at full depth, as in generation.

        Args:
            input_ids (`LongTensor` of shape `(batch, time)`): token ids; or give `inputs_embeds`.
            attention_mask (`Tensor` of shape `(batch, past + time)`, *optional*):
                0 at padding; anything else, of any dtype, at tokens. Or, but for decode steps with exits, what the
                attention itself takes, of shape `(batch, 1, time, past + time)`.
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
                config or of the config; here `None` means full depth.
            exit_criterion (`str`, *optional*, defaults to `config.exit_criterion`): name of the exit criterion.
            exit_budget (`float`, *optional*):
                Wanted mean depth as a share of all layers, instead of a threshold; of policies conditioned on α.
            min_exit_layer (`int`, *optional*, defaults to `config.min_exit_layer`): first layer to leave at.
            skipped_kv (`str`, *optional*, defaults to `config.skipped_kv`): `"copy"` or `"deferred"`.
            output_all_exits (`bool`): with `labels`, states, losses and predictions of all exits at counted positions.
            sample_exits (`bool`): with `labels`, leave with the policy's probability; the loss is that of the exits.
            gradient_equilibrium (`bool`): with all exits, every layer gets the mean of the gradients of the exits
                behind it; see `exits.runner.collect_states`.
            output_policies (`bool`): with `output_all_exits`, also what the policies make of every internal exit, with
                gradient.
            token_loss (`TokenLoss`, *optional*): per-token loss with `output_all_exits`; cross-entropy by default.
            num_items_in_batch (`int`, *optional*): divides summed losses instead of the number of counted positions.

        Raises:
            ValueError: no or both of `input_ids` and `inputs_embeds`, an empty batch, `labels` that do not fit or are
                missing, also where Trainer took them out, or an exit argument out of range. No layer has run by then.
        """
        check_arguments(LlamaForConsistentEECausalLM.forward, self.config, kwargs)
        shape = check_inputs(input_ids, inputs_embeds)
        targets = token_targets(labels, shape, kwargs.pop("shift_labels", None), kwargs.pop("ignore_index", -100))
        if targets is None and (output_all_exits or sample_exits):
            raise ValueError("`output_all_exits` and `sample_exits` need `labels`, which say what positions count.")
        full_depth = exit_threshold is None and exit_budget is None and not sample_exits
        if self.training and full_depth and targets is None:
            check_training_without_labels(num_items_in_batch)
        elif self.training and full_depth and not output_all_exits:
            say_what_labels_train(self.config.exit_criterion)
        if attention_mask is not None and attention_mask.dim() == 2:
            # What is not 0 is a token, whatever its number.
            attention_mask = attention_mask != 0
        if inputs_embeds is None:
            inputs_embeds = self.model.embed_tokens(input_ids)
        inputs = (inputs_embeds, attention_mask, position_ids, cache)
        if targets is not None and (output_all_exits or (self.training and full_depth)):
            # All exits are told from training as Trainer knows it by what they are for: not to hold logits.
            keep = None if output_all_exits else logits_to_keep
            loss = token_loss or CrossEntropy()
            outputs = self._all_exits(inputs, targets, loss, num_items_in_batch, gradient_equilibrium, keep, kwargs)
            if output_policies:
                outputs.all_policy_logits = self.exit_policies(outputs.all_exit_states, outputs.all_exit_features)
            return outputs
        if full_depth:
            return self._full_depth(inputs, targets, use_cache, logits_to_keep, num_items_in_batch, kwargs)
        if sample_exits:
            decision = ExitDecision("policy", 1.0)
        else:
            decision = resolve_decision(self.config, exit_threshold, exit_criterion, exit_budget)
        first_exit = self._first_exit(min_exit_layer)
        criterion = model_criterion(self, decision, input_ids=input_ids, first_exit=first_exit)
        check_skipped_kv(self.config.skipped_kv if skipped_kv is None else skipped_kv)
        if inputs_embeds.shape[1] == 1 and cache is not None and targets is None:
            return self._decode(inputs, criterion, first_exit, skipped_kv or self.config.skipped_kv, kwargs)
        check_known_text(skipped_kv, cache)
        if not criterion.is_off:
            check_no_graph()
        return self._known_text(
            inputs, targets, criterion, first_exit, sample_exits, logits_to_keep, num_items_in_batch, kwargs
        )

    # The four ways to run

    def _full_depth(
        self,
        inputs: tuple,
        targets: TokenTargets | None,
        use_cache: bool | None,
        logits_to_keep: Any,
        items: Any,
        kwargs: dict,
    ) -> ExitCausalLMOutput:
        inputs_embeds, attention_mask, position_ids, cache = inputs
        if isinstance(cache, EarlyExitCache):
            complete_waiting(self._as_decoder, cache)
        outputs = self.model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **named_cache(cache),
            **kwargs,
        )
        states = outputs.last_hidden_state
        logits = self.lm_head(kept(states, logits_to_keep))
        loss = None
        if targets is not None:
            # As many logits as positions may be in another order, or some twice, where positions are named.
            whole = isinstance(logits_to_keep, int) and logits.shape[1] == states.shape[1]
            loss = reduced(self._last_losses(states, logits if whole else None, targets), items)
        layers = torch.full(inputs_embeds.shape[:2], self.layer_numbers[-1], device=inputs_embeds.device)
        return ExitCausalLMOutput(
            loss=loss,
            logits=logits,
            exit_layers=layers,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )

    def _all_exits(
        self,
        inputs: tuple,
        targets: TokenTargets,
        token_loss: TokenLoss,
        items: Any,
        equilibrium: bool,
        logits_to_keep: Any,
        kwargs: dict,
    ) -> ExitCausalLMOutput:
        exits = PickedExits(self, lambda hidden_states: hidden_states.flatten(0, 1).index_select(0, targets.positions))
        batch, layers = self._prepare(inputs, kwargs)
        captured = self._captured(lambda: collect_states(batch, layers, exits, equilibrium), kwargs)
        states = torch.stack(captured.pop("run"), dim=1)
        found = token_exit_losses(
            states, targets.tokens, self.exit_logits, token_loss, features=self.exit_policies.needs_logits
        )
        logits = None
        if logits_to_keep is not None:
            last = len(self.layer_numbers) - 1
            logits = self.lm_head(self.exit_state(kept(exits.seen, logits_to_keep), last))
        # Summed first where the divisor is given: a part of a batch may hold nothing that counts.
        sums = found.losses.sum(0, keepdim=True)
        loss = layer_weighted(found.losses) if items is None else layer_weighted(sums) / items
        return ExitCausalLMOutput(
            loss=loss,
            logits=logits,
            exit_layers=torch.full(targets.labels.shape, self.layer_numbers[-1], device=states.device),
            all_exit_states=states,
            all_exit_losses=found.losses,
            all_exit_predictions=found.predictions,
            all_exit_features=found.features,
            token_labels=targets.tokens,
            token_rows=targets.rows,
            may_exit=targets.may_exit(inputs[1]).flatten()[targets.positions],
            **captured,
        )

    def _known_text(
        self,
        inputs: tuple,
        targets: TokenTargets | None,
        criterion: ExitCriterion,
        first_exit: int,
        draw: bool,
        logits_to_keep: Any,
        items: Any,
        kwargs: dict,
    ) -> ExitCausalLMOutput:
        shape, device = inputs[0].shape[:2], inputs[0].device
        may_exit = (
            torch.ones(shape, dtype=torch.bool, device=device) if targets is None else targets.may_exit(inputs[1])
        )
        batch, layers = self._prepare(inputs, kwargs)
        walk = partial(
            run_token_exits,
            batch,
            layers,
            PickedExits(self, lambda hidden_states: hidden_states),
            criterion,
            may_exit,
            first_exit=first_exit,
            copy_states=self.config.copy_exit_states or not draw,
            draw=draw,
        )
        captured = self._captured(walk, kwargs)
        run: TokenRun = captured.pop("run")
        exit_layers = torch.tensor(self.layer_numbers, device=device)[run.exits]
        for first, name in enumerate(("hidden_states", "attentions")):
            if name in captured:
                captured[name] = hide_left(captured[name], exit_layers, first)
        taken, states = run.exits.flatten(), run.states
        found: dict[str, Tensor] = {}
        if targets is not None:
            places, num_exits = targets.positions, len(self.layer_numbers)
            losses, predictions = taken_exit_losses(
                states[places], taken[places], targets.tokens, self.exit_logits, num_exits
            )
            found = {
                "loss": reduced(losses, items),
                "token_losses": losses,
                "token_predictions": predictions,
                "token_labels": targets.tokens,
                "token_rows": targets.rows,
                "may_exit": may_exit.flatten()[places],
            }
        logits = None
        if not draw:
            positions = torch.arange(len(states), device=device).view(*shape, 1)
            positions = kept(positions, logits_to_keep).squeeze(-1)
            logits = self._taken_logits(states, taken, positions.flatten())
            logits = logits.view(*positions.shape, logits.shape[-1])
        return ExitCausalLMOutput(
            **found,
            logits=logits,
            exit_layers=exit_layers,
            exit_probabilities=run.scores,
            **captured,
            **{CACHE_NAME: inputs[3]},
        )

    def _decode(
        self, inputs: tuple, criterion: ExitCriterion, first_exit: int, skipped_kv: str, kwargs: dict
    ) -> ExitCausalLMOutput:
        inputs_embeds, attention_mask, position_ids, cache = inputs
        if not isinstance(cache, EarlyExitCache):
            raise ValueError(
                f"`{CACHE_NAME}` of type {type(cache).__name__} cannot hold tokens that leave early; use "
                "`EarlyExitCache.from_cache`."
            )
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(
                f"`attention_mask` of shape {tuple(attention_mask.shape)} must be (batch, past + 1) in a decode step "
                "with exits, where rows leave; set `exit_threshold`=1.0 for other masks."
            )
        if not criterion.is_off and not self._is_checked(cache):
            self._check_rows_can_leave()
        decoder = self._as_decoder
        if skipped_kv == "copy":
            complete_waiting(decoder, cache)
        exits = PickedExits(self, lambda hidden_states: hidden_states[:, -1])
        # A shared head is asked once for all rows of the step, wherever they left: it costs as much as several layers.
        one_head = self.exit_heads.share_head and not criterion.needs_logits
        if one_head:
            exits.logits = self.head_state
        places: list[Place] = []

        def walk() -> ExitRun:
            return decode_step(
                decoder,
                exits,
                criterion,
                cache,
                inputs_embeds,
                attention_mask,
                positions_of(position_ids, inputs_embeds, cache),
                first_exit=first_exit,
                skipped_kv=skipped_kv,
                layer_arguments={name: value for name, value in kwargs.items() if name not in OUTPUT_FLAGS},
                places=places,
            )

        wanted = wants_states(self.config, kwargs)
        found = captured_by(self.model, walk, **wanted, return_dict=True) if any(wanted.values()) else {"run": walk()}
        run, captured = found["run"], restore_step(found, places, len(self._layers))
        if "hidden_states" in captured:
            *states, last = captured["hidden_states"]
            captured["hidden_states"] = (*states, self.model.norm(last))
        logits = self.lm_head(run.logits) if one_head else run.logits
        return ExitCausalLMOutput(
            logits=logits.unsqueeze(1),
            exit_layers=run.exit_layers.unsqueeze(1),
            exit_probabilities=run.scores.unsqueeze(1),
            **captured,
            **{CACHE_NAME: cache},
        )

    # Parts

    def _check_rows_can_leave(self) -> None:
        check_rows_can_leave(self.config, self._layers)
        check_adapters(self, self._layers, rows_leave=True)

    def _captured(self, walk: Callable[[], Any], arguments: dict) -> dict[str, Any]:
        """A walk's result as `run`, and what its layers gave that the arguments or the config ask for. The last hidden
        states are normed, as the stock model has them."""
        found = captured_by(self.model, walk, **wants_states(self.config, arguments), return_dict=True)
        states = found.get("hidden_states")
        if states and states[-1] is not None:
            found["hidden_states"] = (*states[:-1], self.model.norm(states[-1]))
        return found

    def _last_losses(self, states: Tensor, logits: Tensor | None, targets: TokenTargets) -> Tensor:
        """Losses (tokens,) of the last exit, from its logits (batch, time, vocabulary), or its normed states."""
        if logits is not None:
            return F.cross_entropy(logits.flatten(0, 1)[targets.positions].float(), targets.tokens, reduction="none")
        last, places = len(self.layer_numbers) - 1, targets.positions
        taken = torch.full_like(places, last)
        return taken_exit_losses(states.flatten(0, 1)[places], taken, targets.tokens, self.exit_logits, last + 1)[0]

    def _prepare(self, inputs: tuple, kwargs: dict) -> tuple[RowBatch, list[Layer]]:
        """The embedded batch and the layers bound to masks, positions and cache."""
        inputs_embeds, attention_mask, position_ids, cache = inputs
        check_adapters(self, self._layers, rows_leave=False)
        if isinstance(cache, EarlyExitCache):
            complete_waiting(self._as_decoder, cache)
        position_ids = positions_of(position_ids, inputs_embeds, cache)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE_NAME: cache},
        )
        arguments = {
            "position_embeddings": self.model.rotary_emb(inputs_embeds, position_ids=position_ids),
            "position_ids": position_ids,
            CACHE_NAME: cache,
            "use_cache": cache is not None,
            **{name: value for name, value in kwargs.items() if name not in OUTPUT_FLAGS},
        }
        layers = [bind(layer, arguments) for layer in self._layers]
        return RowBatch(inputs_embeds, mask), layers

    def _taken_logits(self, states: Tensor, taken: Tensor, positions: Tensor) -> Tensor:
        """Logits (positions, vocabulary) of flat positions, each from its own exit."""
        if not len(positions):
            return states.new_empty(0, self.config.vocab_size)
        order, logits = [], []
        for index in range(len(self.layer_numbers)):
            mine = (taken[positions] == index).nonzero().squeeze(1)
            if len(mine):
                # Not every kind of quantized layer takes nothing.
                order.append(mine)
                logits.append(self.exit_logits(states[positions[mine]], index))
        return torch.cat(logits)[torch.cat(order).argsort()]

    def _first_exit(self, min_exit_layer: int | None) -> int:
        """Exit (0-based) before which nothing leaves."""
        layer = self.config.min_exit_layer if min_exit_layer is None else min_exit_layer
        check_min_exit_layer(layer, self.config.num_hidden_layers)
        return 0 if layer is None else sum(number < layer for number in self.layer_numbers)


__all__ = ["LlamaForConsistentEECausalLM"]
