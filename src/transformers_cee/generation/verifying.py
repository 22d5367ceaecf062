# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Decoding in which drafts are verified by the whole model: the text is the one that it would write alone.

Greedy drafts stand as long as each is the whole model's own choice. Drawn ones are accepted with probability
min(1, p/q), and the first that is not is drawn anew from what p has more than q (speculative sampling: Leviathan et
al. 2023; Chen et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import logits_process
from transformers.generation.utils import GenerateDecoderOnlyOutput

from transformers_cee.exits.cache_name import CACHE_NAME
from transformers_cee.generation.cache import EarlyExitCache
from transformers_cee.generation.draft_costs import DraftCosts
from transformers_cee.generation.drafting import Drafter, Drafting, Drafts
from transformers_cee.generation.drafts_pay import DraftsPay, Pace, PassTimes
from transformers_cee.generation.growing import GrowingTexts, KeptScores
from transformers_cee.generation.slots import SlotPass


if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer


# They look at the scores alone: all places can be given to them at once.
_WARPERS = tuple(
    getattr(logits_process, name)
    for name in (
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TopHLogitsWarper",
        "MinPLogitsWarper",
        "TypicalLogitsWarper",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
    )
    if hasattr(logits_process, name)
)


class Verification:
    """One call of `generate` whose drafts are verified.

    Args:
        model (`EarlyExitCausalLM`): the model.
        drafters (sequence of `Drafter`): asked one after the other, until one proposes something.
        costs (`Callable`): from the rows of a batch to `DraftCosts`, what drafting and verifying cost.
        streamer (`BaseStreamer`, *optional*): gets new tokens.
    """

    def __init__(
        self,
        model: Any,
        drafters: Sequence[Drafter],
        costs: Callable[[int], DraftCosts],
        streamer: BaseStreamer | None = None,
    ) -> None:
        self.model, self.drafters, self.costs, self.streamer = model, drafters, costs, streamer
        self.decoder = model.as_decoder
        # Of each pass, how many drafts of each row (rows,) were proposed and accepted, −1 where it had stopped.
        self.proposed: list[Tensor] = []
        self.accepted: list[Tensor] = []
        # What all passes cost by the measured costs, in decode steps.
        self.steps = 0.0

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> GenerateDecoderOnlyOutput | Tensor:
        """What `generate` calls to decode, see `custom_generate` there."""
        costs = self.costs(len(input_ids))
        self.pace = Pace()
        self.pays = {
            one.name: DraftsPay(one.cost(costs), costs.verify, costs.start, self.pace) for one in self.drafters
        }
        for one in self.drafters:
            self.pays[one.name].trusted = one.hopes(self.pays[one.name])
        self.processors, self.samples = logits_processor, generation_config.do_sample
        self.warpers = LogitsProcessorList(one for one in logits_processor if isinstance(one, _WARPERS))
        length = stopping_criteria.max_length or generation_config.max_length
        pad = generation_config._pad_token_tensor
        pad = None if pad is None else int(pad)
        most = max(drafter.most_tokens for drafter in self.drafters)
        self.texts = GrowingTexts(input_ids, length, most + 1, stopping_criteria, pad, self.streamer)
        wants = generation_config.return_dict_in_generate
        self.scores = KeptScores() if wants and generation_config.output_scores else None
        self.logits = KeptScores() if wants and generation_config.output_logits else None

        given = model_kwargs[CACHE_NAME]
        self.cache = model_kwargs[CACHE_NAME] = EarlyExitCache.from_cache(
            given, model.config.num_hidden_layers, model.layer_types
        )
        self._place(self._prefill(input_ids, generation_config, model_kwargs), model_kwargs)
        texts, times, before_pass = self.texts, PassTimes(), None
        while texts.tell(self.scores):
            # Whether rows have ended is known once the pass before has run.
            now = perf_counter()
            if before_pass is not None:
                start, came = before_pass
                self._note(came, now - start, times)
            drafts = self._draft()
            logits = self._logits(self._states(drafts))
            proposed = torch.zeros_like(texts.lengths) if drafts is None else drafts.counts
            if drafts is not None and drafts.others is not None:
                logits = self._with_others(drafts, logits)
            counts = proposed if drafts is None else drafts.counts
            scores = self._processed(logits)
            accepted, chosen = self._choose(scores, drafts, counts)
            self._keep(logits, scores, accepted)
            grew, before = texts.grows, texts.lengths
            texts.extend(accepted, chosen)
            self._judge(scores[:, 0], grew, before)
            self._show(accepted)
            self.proposed.append(torch.where(grew, proposed, -1))
            self.accepted.append(torch.where(grew, accepted, -1))
            self.steps += 1
            if drafts is not None:
                self.steps += self.pays[self.drafter].spent(drafts.columns, drafts.runs)
            # A batch is as far as the last of its rows.
            came = None if drafts is None else (drafts, float(texts.lengths[grew].min() - before[grew].min()))
            before_pass = now, came
        if self.streamer is not None:
            self.streamer.end()
        if wants or getattr(given, "_is_user_defined", False):
            self._complete()
        if not wants:
            return texts.sequences
        count = texts.told - texts.prompt
        return GenerateDecoderOnlyOutput(
            sequences=texts.sequences,
            scores=None if self.scores is None else self.scores.first(count),
            logits=None if self.logits is None else self.logits.first(count),
            **{CACHE_NAME: self.cache},
        )

    def noted(self, output: Any) -> Any:
        """The output of `generate` with what verification did."""
        texts = self.texts
        behind = torch.arange(texts.prompt, texts.told, device=texts.lengths.device)
        layers = torch.full((len(texts), len(behind)), len(self.decoder.layers), device=behind.device)
        lengths = texts.ended.unsqueeze(1)
        output["exit_layers"] = layers.masked_fill(behind >= lengths, 0)
        none = texts.lengths.new_empty(len(texts), 0)
        for name, passes in (("proposed_drafts", self.proposed), ("accepted_drafts", self.accepted)):
            output[name] = torch.stack(passes, 1) if passes else none
        count = int((output["accepted_drafts"] >= 0).sum())
        # The prompt's pass gave the first token of each row.
        tokens = int((lengths - texts.prompt).sum()) - len(texts)
        output["tokens_per_pass"] = tokens / count if count else 1.0
        # Without drafts there are as many steps as the longest row has tokens.
        output["expected_speedup"] = (int(lengths.max()) - texts.prompt - 1) / self.steps if count else 1.0
        return output

    # The prompt

    def _prefill(self, input_ids: Tensor, config: GenerationConfig, model_kwargs: dict[str, Any]) -> Tensor:
        """Runs the prompt as `generate` does, in one or many chunks; logits (rows, 1, vocabulary) of its end."""
        output = self.model._prefill(input_ids, config, model_kwargs)
        return output.logits[:, -1:]

    def _place(self, logits: Tensor, model_kwargs: dict[str, Any]) -> None:
        """Finds out where tokens stand, and appends the first one."""
        texts, mask = self.texts, model_kwargs.get("attention_mask")
        held = self.cache.get_seq_length()
        # Prompts of embeddings, and virtual tokens, stand in the cache alone.
        self.ahead = held - texts.prompt
        self.padding = mask
        shifts = torch.zeros(len(texts), dtype=torch.long, device=logits.device)
        if mask is not None:
            shifts = (mask == 0).sum(1)
        positions = model_kwargs.get("position_ids")
        if positions is not None:
            shifts = (held - 1 - positions[..., -1]).to(shifts.device).expand(len(texts))
        self.shifts = shifts
        scores = self._processed(logits)
        accepted, chosen = self._choose(scores, None, torch.zeros_like(texts.lengths))
        self._keep(logits, scores, accepted)
        texts.extend(accepted, chosen)

    # One pass

    def at(self, offset: int, columns: int) -> SlotPass:
        """A pass over so many tokens of each row, whose first one stands `offset` behind the row's last token."""
        return self._pass(self.texts.lengths - 1 + self.ahead + offset, columns)

    def _pass(self, first: Tensor, columns: int, others: int = 0) -> SlotPass:
        like = self.model.get_input_embeddings().weight[:0, :0]
        return SlotPass(self.decoder, self.cache, first, columns, self.padding, self.shifts, like, others)

    def _draft(self) -> Drafts | None:
        # What else is done with the scores may look at the text before.
        chooses = not self.samples and not self.processors
        drafting = Drafting(self.model, self.texts, self.at, self._draw, chooses)
        room = self.texts.room
        for drafter in self.drafters:
            drafter.guess = None
        for drafter in self.drafters:
            drafts = drafter.draft(drafting, room, self.pays[drafter.name])
            if drafts is not None:
                self.drafter = drafter.name
                if drafts.tokens.shape[1]:
                    self.texts.draft(drafts.tokens)
                return drafts
        return None

    def _states(self, drafts: Drafts | None) -> Tensor:
        """Last hidden states (rows, columns, hidden) of the last token, the drafts and other choices of the first."""
        layers = len(self.decoder.layers)
        tokens, others = self.texts.last(1 if drafts is None else 1 + drafts.tokens.shape[1]), 0
        if drafts is not None and drafts.others is not None:
            tokens, others = torch.cat((tokens, drafts.others), 1), drafts.others.shape[1]
        run = self._pass(self.texts.lengths - 1 + self.ahead, tokens.shape[1], others)
        self.run = run
        if drafts is not None and drafts.states is not None:
            states, done = drafts.states, drafts.layers_done
        else:
            states, done = self.model.get_input_embeddings()(tokens), 0
        self.behind: dict[int, Tensor] = {}
        for layer in sorted({one.looks_behind for one in self.drafters if one.looks_behind}):
            if layer >= done:
                states, done = run.run(states, done, layer), layer
                self.behind[layer] = states
        return run.run(states, done, layers)

    def _with_others(self, drafts: Drafts, logits: Tensor) -> Tensor:
        """Gives the place of a row's first draft, which does not stand, to another choice that does.

        Args:
            drafts (`Drafts`): of such a row that draft alone counts from then on.
            logits (`Tensor` of shape `(rows, columns, vocabulary)`): of all tokens of the pass.

        Returns:
            `Tensor` of shape `(rows, drafts + 1, vocabulary)`: without those of other choices.
        """
        assert drafts.others is not None
        count = 1 + drafts.tokens.shape[1]
        said = logits[:, 0].argmax(-1)
        stands = (drafts.others == said.unsqueeze(1)) & (drafts.tokens[:, 0] != said).unsqueeze(1)
        rows = (stands.any(1) & (drafts.counts > 0)).nonzero().squeeze(1)
        if len(rows):
            source = count + stands[rows].int().argmax(1)
            self.run.move(rows, source)
            for held in (logits, *self.behind.values()):
                held[rows, 1] = held[rows, source]
            drafts.tokens[rows, 0] = said[rows]
            drafts.counts = drafts.counts.index_fill(0, rows, 1)
            self.texts.draft(drafts.tokens)
        return logits[:, :count]

    def _judge(self, scores: Tensor, grew: Tensor, before: Tensor) -> None:
        """Tells drafters how the first drafts that they had in mind would have fared.

        Args:
            scores (`Tensor` of shape `(rows, vocabulary)`): of the first token that rows got.
            grew, before (tensors of shape `(rows,)`): which rows got it, and their lengths before.
        """
        probabilities = scores.softmax(-1) if self.samples else None
        got = self.texts.tokens.gather(1, before.unsqueeze(1)).squeeze(1)
        for drafter in self.drafters:
            if drafter.guess is not None:
                drafter.learn(drafter.guess, grew, got, probabilities)

    def _show(self, accepted: Tensor) -> None:
        """Gives drafters the states that they want to see, of the last token that was verified."""
        rows = torch.arange(len(accepted), device=accepted.device)
        for drafter in self.drafters:
            states = self.behind.get(drafter.looks_behind) if drafter.looks_behind else None
            drafter.seen = None if states is None else states[rows, accepted]

    def _logits(self, states: Tensor) -> Tensor:
        """Logits (rows, columns, vocabulary)."""
        return self.model.exit_logits(self.model.exit_state(states, self.model.last_exit), self.model.last_exit)

    def _processed(self, logits: Tensor) -> Tensor:
        """What `generate` makes of logits (rows, columns, vocabulary): those of a column are behind one draft more."""
        scores = logits.to(torch.float32)
        if not self.processors:
            return scores
        rows, columns, _ = scores.shape
        if len(self.warpers) == len(self.processors):
            return self.processors(self.texts.tokens[:, :0], scores.flatten(0, 1).clone()).view_as(scores)
        offsets = torch.arange(columns, device=scores.device).expand(rows, columns)
        lengths = self.texts.lengths.unsqueeze(1) + offsets
        found = scores.clone()
        # Whoever looks at the text sees the whole batch at one length; rows of another length have their own turn.
        for length in lengths[self.texts.grows].unique().tolist():
            here = (lengths == length) & self.texts.grows.unsqueeze(1)
            column = here.int().argmax(1)
            asked = scores[torch.arange(rows, device=scores.device), column]
            answer = self.processors(self.texts.tokens[:, :length], asked)
            found[here] = answer[here.any(1)].to(found.dtype)
        return found

    def _draw(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """A draft of each row from logits (rows, vocabulary)."""
        if not self.samples:
            return logits.argmax(-1), None
        scores = self.warpers(self.texts.tokens[:, :0], logits.to(torch.float32, copy=True))
        probabilities = scores.softmax(-1)
        return torch.multinomial(probabilities, 1).squeeze(1), probabilities

    def _choose(self, scores: Tensor, drafts: Drafts | None, counts: Tensor) -> tuple[Tensor, Tensor]:
        """How many drafts (rows,) stand, and the token (rows,) that follows them."""
        columns = scores.shape[1] - 1
        drafted = None if drafts is None or not columns else drafts.tokens
        if not self.samples:
            choice = scores.argmax(-1)
            accepted = torch.zeros_like(counts)
            if drafted is not None:
                accepted = _first(choice[:, :-1] == drafted, counts)
            return accepted, choice.gather(1, accepted.unsqueeze(1)).squeeze(1)
        probabilities = scores.softmax(-1)
        if drafted is None:
            return torch.zeros_like(counts), torch.multinomial(probabilities[:, 0], 1).squeeze(1)
        assert drafts is not None
        wanted = probabilities[:, :-1].gather(-1, drafted.unsqueeze(-1)).squeeze(-1)
        given = drafts.probabilities
        had = 1.0 if given is None else given.gather(-1, drafted.unsqueeze(-1)).squeeze(-1)
        accepted = _first(torch.rand_like(wanted) * had < wanted, counts)
        rows = torch.arange(len(scores), device=scores.device)
        rest = probabilities[rows, accepted]
        # The one that was refused is drawn anew from what it had too little of.
        refused, place = accepted < counts, accepted.clamp_max(columns - 1)
        if given is None:
            less = torch.zeros_like(rest).scatter_(1, drafted.gather(1, place.unsqueeze(1)), 1.0)
        else:
            less = given[rows, place]
        left = (rest - less).clamp_min(0)
        left = torch.where(left.sum(-1, keepdim=True) > 0, left, rest)
        return accepted, torch.multinomial(torch.where(refused.unsqueeze(1), left, rest), 1).squeeze(1)

    def _keep(self, logits: Tensor, scores: Tensor, accepted: Tensor) -> None:
        """Notes scores and logits of the tokens that rows get, each in its column."""
        texts = self.texts
        columns = torch.arange(scores.shape[1], device=scores.device)
        gets = texts.grows.unsqueeze(1) & (columns <= accepted.unsqueeze(1))
        places = (texts.lengths.unsqueeze(1) + columns - texts.prompt)[gets]
        rows = gets.nonzero()[:, 0]
        for kept, new in ((self.scores, scores), (self.logits, logits.to(torch.float32))):
            if kept is not None:
                kept.put(places, rows, new[gets], len(texts))

    def _note(self, came: tuple[Drafts, float] | None, seconds: float, times: PassTimes) -> None:
        """Tells what came of a pass, and how long it took."""
        if came is None:
            times.note(seconds)
            self.pace.note(1.0, 1.0)
            return
        drafts, tokens = came
        columns = drafts.columns
        pays = self.pays[self.drafter]
        if not columns:
            # The pass itself was over one token.
            times.note(seconds / (1 + pays.spent(0, drafts.runs) * pays.correction))
        pays.note(columns, drafts.runs, tokens, times.beyond_one(seconds))

    def _complete(self) -> None:
        """Leaves the cache as `generate` does: all tokens but the last one, padding behind a row's end included."""
        texts = self.texts
        wanted = texts.told - 1
        lacking = wanted - int(texts.ended.min()) + 1
        if lacking > 0:
            first = torch.full_like(texts.lengths, wanted - lacking + self.ahead)
            tokens = texts.tokens[:, wanted - lacking : wanted]
            embedded = self.model.get_input_embeddings()(tokens)
            self._pass(first, lacking).run(embedded, 0, len(self.decoder.layers))
        surplus = self.cache.get_seq_length() - wanted - self.ahead
        if surplus > 0:
            self.cache.crop(-surplus)


def _first(stands: Tensor, counts: Tensor) -> Tensor:
    """How many drafts (rows,) stand before the first that does not, of those that count (rows,)."""
    counted = torch.arange(stands.shape[1], device=stands.device) < counts.unsqueeze(1)
    return (stands & counted).int().cumprod(1).sum(1)


__all__ = ["Verification"]
