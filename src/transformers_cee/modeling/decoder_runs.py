# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The four ways to run a decoder with exits: at full depth, to all exits, with exits in a known text, one token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache

from transformers_cee.exits.cache_name import CACHE_NAME, named_cache
from transformers_cee.exits.criteria import ExitCriterion
from transformers_cee.exits.losses import layer_weighted
from transformers_cee.exits.outputs import ExitCausalLMOutput
from transformers_cee.exits.recording import Place, hide_left, restore_step
from transformers_cee.exits.row_batch import RowBatch
from transformers_cee.exits.runner import Layer, collect_states
from transformers_cee.exits.token_losses import CrossEntropy, taken_exit_losses, token_exit_losses
from transformers_cee.exits.token_runner import TokenRun, run_token_exits
from transformers_cee.exits.token_targets import TokenTargets
from transformers_cee.exits.training_options import ExitTraining
from transformers_cee.generation.cache import EarlyExitCache
from transformers_cee.generation.decoding import Decoder, complete_waiting, decode_step
from transformers_cee.modeling.base import OUTPUT_FLAGS, EarlyExitModel
from transformers_cee.modeling.roll_outs import judge_drafts, note_drafts, read_text, roll_outs


@dataclass
class TextInputs:
    """What all ways to run share.

    Args:
        embedded (`Tensor` of shape `(batch, time, hidden)`): embedded tokens.
        attention_mask (`Tensor`, *optional*): as in `forward`; by type of layer at full depth only.
        position_ids (`LongTensor` of shape `(1 or batch, time)`, *optional*): counted on behind the cache if missing.
        cache (`Cache`, *optional*): of the tokens before.
        targets (`TokenTargets`, *optional*): what is to be predicted.
        items (`Tensor` or `int`, *optional*): divides summed losses instead of the number of counted positions.
        arguments (`dict`): whatever else the caller hands on.
    """

    embedded: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None
    cache: Cache | None
    targets: TokenTargets | None
    items: Tensor | int | None
    arguments: dict[str, Any]

    @property
    def layer_arguments(self) -> dict[str, Any]:
        """What layers take of `arguments`."""
        return {name: value for name, value in self.arguments.items() if name not in OUTPUT_FLAGS}


class PickedExits:
    """A model's exits for one walk; `pick` chooses the positions that are looked at."""

    def __init__(self, model: DecoderRuns, pick: Callable[[Tensor], Tensor]) -> None:
        self.layer_numbers = model.layer_numbers
        self.logits = model.exit_logits
        self._model, self._pick = model, pick
        # Hidden states (batch, time, hidden) of the last exit that was asked for its state.
        self.seen: Tensor

    def state(self, hidden_states: Tensor, padding_mask: Tensor | None, index: int) -> Tensor:
        """Normed state (…, hidden) of exit `index` (0-based) at the picked positions."""
        self.seen = hidden_states
        return self._model.exit_state(self._pick(hidden_states), index)


class DecoderRuns(EarlyExitModel):
    """The four ways to run a decoder; `EarlyExitCausalLM` gives what they need."""

    model: Any
    lm_head: Any
    exit_heads: Any

    @property
    def as_decoder(self) -> Decoder:
        """What a decode step needs of the model."""
        raise NotImplementedError

    def prepare(self, inputs: TextInputs) -> tuple[RowBatch, list[Layer]]:
        """The embedded batch and the layers bound to masks, positions and cache."""
        raise NotImplementedError

    def exit_state(self, hidden_states: Tensor, index: int) -> Tensor:
        """Normed state (…, hidden) of exit `index` (0-based) from its layer's hidden states (…, hidden)."""
        raise NotImplementedError

    def exit_logits(self, state: Tensor, index: int) -> Tensor:
        """Logits (…, vocabulary) of exit `index` from its normed state (…, hidden)."""
        raise NotImplementedError

    def head_state(self, state: Tensor, index: int) -> Tensor:
        """What the LM head takes (…, hidden) at exit `index`, where all exits share it."""
        raise NotImplementedError

    def run_full_depth(
        self, inputs: TextInputs, use_cache: bool | None, logits_to_keep: int | Tensor
    ) -> ExitCausalLMOutput:
        """The stock model."""
        if isinstance(inputs.cache, EarlyExitCache):
            complete_waiting(self.as_decoder, inputs.cache)
        outputs = self.model(
            attention_mask=inputs.attention_mask,
            position_ids=inputs.position_ids,
            inputs_embeds=inputs.embedded,
            use_cache=use_cache,
            **named_cache(inputs.cache),
            **inputs.arguments,
        )
        states = outputs.last_hidden_state
        logits = self.lm_head(kept(states, logits_to_keep))
        loss = None
        if inputs.targets is not None:
            # As many logits as positions may be in another order, or some twice, where positions are named.
            whole = isinstance(logits_to_keep, int) and logits.shape[1] == states.shape[1]
            losses = _last_losses(self, states, logits if whole else None, inputs.targets)
            loss = reduced(losses, inputs.items)
        return ExitCausalLMOutput(
            loss=loss,
            logits=logits,
            exit_layers=self._at_full_depth(inputs.embedded),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )

    def run_all_exits(
        self, inputs: TextInputs, options: ExitTraining, logits_to_keep: int | Tensor | None
    ) -> ExitCausalLMOutput:
        """All layers, and every exit at the positions that count. Without `logits_to_keep` no logits are held."""
        targets = inputs.targets
        assert targets is not None
        exits = PickedExits(self, lambda hidden_states: hidden_states.flatten(0, 1).index_select(0, targets.positions))
        batch, layers = self.prepare(inputs)
        found = self._captured_text(
            lambda: collect_states(batch, layers, exits, options.gradient_equilibrium), inputs.arguments
        )
        states = torch.stack(found.pop("run"), dim=1)
        loss, needs_features = options.token_loss or CrossEntropy(), self.exit_policies.needs_logits
        tokens = token_exit_losses(states, targets.tokens, self.exit_logits, loss, features=needs_features)
        logits = None
        if logits_to_keep is not None:
            logits = self.lm_head(self.exit_state(kept(exits.seen, logits_to_keep), self.last_exit))
        output = ExitCausalLMOutput(
            loss=_of_all_exits(tokens.losses, inputs.items),
            logits=logits,
            exit_layers=self._at_full_depth(inputs.embedded),
            all_exit_states=states,
            all_exit_losses=tokens.losses,
            all_exit_predictions=tokens.predictions,
            all_exit_features=tokens.features,
            token_labels=targets.tokens,
            token_rows=targets.rows,
            may_exit=targets.may_exit(inputs.attention_mask).flatten()[targets.positions],
            **found,
        )
        if options.output_policies:
            output.all_policy_logits = self.exit_policies(states, tokens.features)
        return output

    def run_known_text(
        self,
        inputs: TextInputs,
        options: ExitTraining,
        criterion: ExitCriterion,
        first_exit: int,
        logits_to_keep: int | Tensor,
    ) -> ExitCausalLMOutput:
        """All layers, each token leaving at its own exit."""
        shape, device, targets = inputs.embedded.shape[:2], inputs.embedded.device, inputs.targets
        if targets is None:
            may_exit = torch.ones(shape, dtype=torch.bool, device=device)
        else:
            may_exit = targets.may_exit(inputs.attention_mask)
        batch, layers = self.prepare(inputs)
        walk = partial(
            run_token_exits,
            batch,
            layers,
            PickedExits(self, lambda hidden_states: hidden_states),
            criterion,
            may_exit,
            first_exit=first_exit,
            copy_states=options.copy_states or not options.sample_exits,
            draw=options.sample_exits,
        )
        found = self._captured_text(walk, inputs.arguments)
        run: TokenRun = found.pop("run")
        exit_layers = torch.tensor(self.layer_numbers, device=device)[run.exits]
        if isinstance(inputs.cache, EarlyExitCache):
            inputs.cache.note_exits(exit_layers)
        for first, name in enumerate(("hidden_states", "attentions")):
            if name in found:
                found[name] = hide_left(found[name], exit_layers, first)
        if targets is not None:
            found |= self._losses_of_taken(run, targets, may_exit, inputs.items)
        logits = None
        if not options.sample_exits:
            positions = torch.arange(len(run.states), device=device).view(*shape, 1)
            positions = kept(positions, logits_to_keep).squeeze(-1)
            logits = _taken_logits(self, run.states, run.exits.flatten(), positions.flatten())
            logits = logits.view(*positions.shape, logits.shape[-1])
        return ExitCausalLMOutput(
            **found,
            logits=logits,
            exit_layers=exit_layers,
            exit_probabilities=run.scores,
            **{CACHE_NAME: inputs.cache},
        )

    def run_decode_step(
        self, inputs: TextInputs, criterion: ExitCriterion, first_exit: int, skipped_kv: str
    ) -> ExitCausalLMOutput:
        """One token per row, for which the layers behind its exit are not executed."""
        cache = checked_cache(inputs)
        decoder = self.as_decoder
        if skipped_kv == "copy":
            complete_waiting(decoder, cache)
        # A shared head is asked once for all rows of the step, wherever they left: it costs as much as several layers.
        one_head = self.exit_heads.share_head and not criterion.needs_logits
        places: list[Place] = []
        walk = partial(
            decode_step,
            decoder,
            PickedExits(self, lambda hidden_states: hidden_states[:, -1]),
            criterion,
            cache,
            inputs.embedded,
            inputs.attention_mask,
            positions_of(inputs.position_ids, inputs.embedded, cache),
            first_exit=first_exit,
            skipped_kv=skipped_kv,
            layer_arguments=inputs.layer_arguments,
            places=places,
            head_state=self.head_state if one_head else None,
        )
        found = self.captured(walk, inputs.arguments)
        run, captured = found["run"], restore_step(found, places, len(decoder.layers))
        if "hidden_states" in captured:
            *states, last = captured["hidden_states"]
            captured["hidden_states"] = (*states, self.model.norm(last))
        exit_layers = run.exit_layers.unsqueeze(1)
        for first, name in enumerate(("hidden_states", "attentions")):
            if name in captured:
                # Layers may have run for rows that left.
                captured[name] = hide_left(captured[name], exit_layers, first)
        logits = self.lm_head(run.states) if one_head else run.logits
        return ExitCausalLMOutput(
            logits=logits.unsqueeze(1),
            exit_layers=exit_layers,
            exit_probabilities=run.scores.unsqueeze(1),
            **captured,
            **{CACHE_NAME: cache},
        )

    def run_roll_outs(
        self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None, ahead: int
    ) -> ExitCausalLMOutput:
        """The drafter's loss over a known text, in which it drafts so many tokens from every token on. It learns from
        all tokens; labels say which are judged."""
        found = list(roll_outs(self, read_text(self, input_ids, attention_mask), ahead))
        if not found:
            none = torch.zeros(len(input_ids), ahead, 4, device=input_ids.device)
            return ExitCausalLMOutput(loss=none.sum(), judged_drafts=none)
        if self.training:
            note_drafts(self, found[0], labels)
        loss = torch.stack([one.loss for one in found]).mean()
        return ExitCausalLMOutput(loss=loss, judged_drafts=judge_drafts(found, labels, ahead))

    # Parts

    def _at_full_depth(self, embedded: Tensor) -> Tensor:
        """Exit layers (batch, time) of tokens that all go to the end."""
        return torch.full(embedded.shape[:2], self.layer_numbers[-1], device=embedded.device)

    def _captured_text(self, walk: Callable[[], Any], arguments: dict[str, Any]) -> dict[str, Any]:
        """`captured`; the last hidden states are normed, as the stock model has them."""
        found = self.captured(walk, arguments)
        states = found.get("hidden_states")
        if states and states[-1] is not None:
            found["hidden_states"] = (*states[:-1], self.model.norm(states[-1]))
        return found

    def _losses_of_taken(
        self, run: TokenRun, targets: TokenTargets, may_exit: Tensor, items: Any
    ) -> dict[str, Tensor]:
        """Losses and predictions of counted tokens, each at its own exit, as the output has them."""
        places = targets.positions
        losses, predictions = taken_exit_losses(
            run.states[places], run.exits.flatten()[places], targets.tokens, self.exit_logits, len(self.layer_numbers)
        )
        return {
            "loss": reduced(losses, items),
            "token_losses": losses,
            "token_predictions": predictions,
            "token_labels": targets.tokens,
            "token_rows": targets.rows,
            "may_exit": may_exit.flatten()[places],
        }


def _last_losses(model: DecoderRuns, states: Tensor, logits: Tensor | None, targets: TokenTargets) -> Tensor:
    """Losses (tokens,) of the last exit, from its logits (batch, time, vocabulary), or its normed states."""
    if logits is not None:
        return F.cross_entropy(logits.flatten(0, 1)[targets.positions].float(), targets.tokens, reduction="none")
    last, places = model.last_exit, targets.positions
    taken = torch.full_like(places, last)
    return taken_exit_losses(states.flatten(0, 1)[places], taken, targets.tokens, model.exit_logits, last + 1)[0]


def _of_all_exits(losses: Tensor, items: Any) -> Tensor:
    """Layer-weighted mean of losses (tokens, exits), summed first where the divisor is given: a part of a batch may
    hold nothing that counts."""
    return layer_weighted(losses) if items is None else layer_weighted(losses.sum(0, keepdim=True)) / items


def _taken_logits(model: DecoderRuns, states: Tensor, taken: Tensor, positions: Tensor) -> Tensor:
    """Logits (positions, vocabulary) of flat positions, each from its own exit."""
    if not len(positions):
        return states.new_empty(0, model.config.vocab_size)
    order, logits = [], []
    for index in range(len(model.layer_numbers)):
        mine = (taken[positions] == index).nonzero().squeeze(1)
        if len(mine):
            # Not every kind of quantized layer takes nothing.
            order.append(mine)
            logits.append(model.exit_logits(states[positions[mine]], index))
    return torch.cat(logits)[torch.cat(order).argsort()]


def positions_of(position_ids: Tensor | None, inputs_embeds: Tensor, cache: Cache | None) -> Tensor:
    """Position ids (1 or batch, time), counted on behind the cache where none are given."""
    if position_ids is not None:
        return position_ids
    past = 0 if cache is None else cache.get_seq_length()
    return torch.arange(past, past + inputs_embeds.shape[1], device=inputs_embeds.device).unsqueeze(0)


def kept(tensor: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Positions of (batch, time, …) whose logits are wanted."""
    if isinstance(logits_to_keep, int):
        return tensor[:, -logits_to_keep:] if logits_to_keep else tensor
    return tensor[:, logits_to_keep]


def reduced(losses: Tensor, items: Any) -> Tensor:
    """Mean of losses (tokens,), or their sum over the number of items."""
    return losses.mean() if items is None else losses.sum() / items


def checked_cache(inputs: TextInputs) -> EarlyExitCache:
    """The cache of a decode step with exits. Raises `ValueError` for a cache or a mask that it cannot work with."""
    if not isinstance(inputs.cache, EarlyExitCache):
        raise ValueError(
            f"`{CACHE_NAME}` of type {type(inputs.cache).__name__} cannot hold tokens that leave early; use "
            "`EarlyExitCache.from_cache`."
        )
    mask = inputs.attention_mask
    if mask is not None and mask.dim() != 2:
        raise ValueError(
            f"`attention_mask` of shape {tuple(mask.shape)} must be (batch, past + 1) in a decode step with exits, "
            "where rows leave; set `exit_threshold`=1.0 for other masks."
        )
    return inputs.cache


def check_known_text(skipped_kv: str | None, cache: Cache | None) -> None:
    """Raises `ValueError` where tokens of a known text would wait for their keys and values."""
    if skipped_kv == "deferred" and cache is not None:
        raise ValueError(
            "`skipped_kv`='deferred' with several tokens at once is not supported: give one token per row, or use "
            "'copy'."
        )


__all__ = ["DecoderRuns", "PickedExits", "TextInputs", "check_known_text", "positions_of"]
