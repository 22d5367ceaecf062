# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Who drafts tokens for the whole model to verify."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from transformers_cee.exits.criteria import ExitCriterion, ExitStep
from transformers_cee.exits.jump_drafter import JumpDrafter
from transformers_cee.generation.draft_costs import DraftCosts
from transformers_cee.generation.drafts_pay import Chances, DraftsPay
from transformers_cee.generation.growing import GrowingTexts
from transformers_cee.generation.slots import SlotPass


@dataclass
class Drafts:
    """What a drafter proposes.

    Args:
        tokens (`LongTensor` of shape `(rows, drafts)`): proposed tokens.
        counts (`LongTensor` of shape `(rows,)`): how many of them count; what stands behind is thrown away.
        probabilities (`Tensor` of shape `(rows, drafts, vocabulary)`, *optional*):
            What each was drawn from; None where it is certain what the drafter says.
        states (`Tensor` of shape `(rows, drafts + 1, hidden)`, *optional*):
            Of each row's last token and the drafts, behind the layers that they have passed.
        layers_done (`int`): those layers, whose keys and values the cache holds.
        runs (`float`): how often the drafter ran, for these and for what it did not propose in the end.
        others (`LongTensor` of shape `(rows, others)`, *optional*):
            Other choices of the first of them: where one stands, and not the first, what follows it is known.
    """

    tokens: Tensor
    counts: Tensor
    probabilities: Tensor | None = None
    states: Tensor | None = None
    layers_done: int = 0
    runs: float = 0.0
    others: Tensor | None = None

    @property
    def columns(self) -> int:
        """Tokens of each row to verify."""
        return self.tokens.shape[1] + (0 if self.others is None else self.others.shape[1])


@dataclass
class Guess:
    """The first draft of each row, whether it is proposed or not.

    Args:
        tokens (`LongTensor` of shape `(rows,)`): tokens.
        kinds (`LongTensor` of shape `(rows,)`): kinds of these drafts, see `Chances`.
        said (`BoolTensor` of shape `(rows,)`): does the drafter say anything of the row?
        probabilities (`Tensor` of shape `(rows, vocabulary)`, *optional*): what each was drawn from; None as in
            `Drafts`.
        others, other_kinds (`LongTensor` of shape `(rows, others)`, *optional*): other choices, and their kinds.
    """

    tokens: Tensor
    kinds: Tensor
    said: Tensor
    probabilities: Tensor | None = None
    others: Tensor | None = None
    other_kinds: Tensor | None = None

    def held(self, got: Tensor, probabilities: Tensor | None) -> Tensor:
        """Was each accepted, or how probable was that (rows,)?

        Args:
            got (`LongTensor` of shape `(rows,)`): the tokens that rows got.
            probabilities (`Tensor` of shape `(rows, vocabulary)`, *optional*): what the model draws them from; None
                where it takes the most probable.
        """
        if probabilities is None:
            return self.tokens == got
        if self.probabilities is None:
            return probabilities.gather(1, self.tokens.unsqueeze(1)).squeeze(1)
        return torch.minimum(probabilities, self.probabilities).sum(1)


@dataclass
class Drafting:
    """What drafters get of one call of `generate`.

    Args:
        model (`EarlyExitCausalLM`): the model.
        texts (`GrowingTexts`): what there is so far.
        at (`Callable`): a pass over so many tokens of each row, whose first one stands so far from the last token.
        draw (`Callable`):
            From logits (rows, vocabulary) to tokens (rows,), and the probabilities (rows, vocabulary) that they were
            drawn from, None where the most probable is taken.
        chooses (`bool`): may drafts have others beside them? Where the model takes its most probable token.
    """

    model: Any
    texts: GrowingTexts
    at: Callable[[int, int], SlotPass]
    draw: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    chooses: bool = False


class Drafter(ABC):
    """Proposes tokens. An object belongs to one call of `generate`."""

    name: ClassVar[str]
    # Chances of each kind of draft, until more is known, and how many drafts of a kind they weigh as much as.
    kinds: ClassVar[Sequence[float]]
    known: ClassVar[float] = 6.0
    # Tokens of a draft at most.
    most_tokens: int
    # Of the pass at hand; None where the drafter was not asked.
    guess: Guess | None = None
    # The layer (1-based) whose states the drafter wants to see of verified tokens.
    looks_behind: int | None = None
    # Those (rows, hidden) of the last verified token of each row; None where no pass has given them.
    seen: Tensor | None = None

    def __init__(self, most: int) -> None:
        self.most_tokens, self.chances = most, Chances(self.kinds, self.known)

    def cost(self, costs: DraftCosts) -> float:
        """What drafting one token costs, in decode steps at full depth."""
        return 0.0

    def hopes(self, pays: DraftsPay) -> bool:
        """Is asking expected to pay, as far as is known from training?"""
        return True

    def learn(self, guess: Guess, grew: Tensor, got: Tensor, probabilities: Tensor | None) -> None:
        """Takes a lesson from how its first drafts would have fared.

        Args:
            guess (`Guess`): they.
            grew, got (tensors of shape `(rows,)`): which rows got a token, and which.
            probabilities (`Tensor` of shape `(rows, vocabulary)`, *optional*): as in `Guess.held`.
        """
        counts = guess.said & grew
        self.chances.note(guess.kinds[counts], guess.held(got, probabilities)[counts])

    @abstractmethod
    def draft(self, drafting: Drafting, room: Tensor, pays: DraftsPay) -> Drafts | None:
        """Drafts for some rows, or None where there is nothing to propose.

        Args:
            room (`LongTensor` of shape `(rows,)`): how many tokens each row may get.
            pays (`DraftsPay`): says whether one more is worth it.
        """


class PromptLookup(Drafter):
    """The tokens that followed the last ones where these stood before in the same text (prompt lookup decoding, Saxena
    2023).

    Args:
        most (`int`): tokens of a draft at most.
        ngram (`int`): so many last tokens are looked for, then one less, and so on.
    """

    name = "lookup"
    # By how many tokens before are the same, from one on; the last one also of more.
    kinds = (0.2, 0.4, 0.6)

    def __init__(self, most: int, ngram: int) -> None:
        super().__init__(most)
        self.ngram = ngram

    def draft(self, drafting: Drafting, room: Tensor, pays: DraftsPay) -> Drafts | None:
        texts = drafting.texts
        follows, same = self._follows(texts)
        counts = torch.where(follows > 0, torch.minimum(texts.lengths - follows, room), 0)
        ahead = torch.arange(self.most_tokens, device=follows.device)
        tokens = texts.tokens.gather(1, (follows.unsqueeze(1) + ahead).clamp_max(texts.tokens.shape[1] - 1))
        # A draft that holds makes the match longer.
        kinds = (same.unsqueeze(1) - 1 + ahead).clamp(0, len(self.kinds) - 1)
        self.guess = Guess(tokens[:, 0], kinds[:, 0], follows > 0)
        chances = self.chances.of(kinds).cumprod(1)
        most = pays.most(texts.reach(counts, self.most_tokens, chances))
        if most == 0 or pays.rests():
            return None
        return Drafts(tokens[:, :most], counts.clamp_max(most))

    def _follows(self, texts: GrowingTexts) -> tuple[Tensor, Tensor]:
        """Column (rows,) of what followed the longest and latest match, 0 where there is none; and how many tokens
        (rows,) were the same."""
        longest = int(texts.lengths.max())
        ngram = min(self.ngram, longest - 1)
        if ngram < 1:
            none = torch.zeros_like(texts.lengths)
            return none, none
        before = F.pad(texts.tokens[:, : longest - 1], (ngram - 1, 0), value=-1)
        goes_on = torch.ones_like(before[:, ngram - 1 :], dtype=torch.bool)
        same = torch.zeros_like(goes_on, dtype=torch.long)
        for back in range(1, ngram + 1):
            # Rows that are too short have no places for what is wanted of their beginning.
            wanted = texts.tokens.gather(1, (texts.lengths - back).clamp_min(0).unsqueeze(1))
            goes_on &= before[:, ngram - back : ngram - back + longest - 1] == wanted
            same += goes_on
        places = torch.arange(1, longest, device=same.device)
        same = torch.where(places < texts.lengths.unsqueeze(1), same, 0)
        best = (same * longest + places).amax(1)
        lengths = best // longest
        return torch.where(lengths > 0, best % longest, 0), lengths


class ExitDrafts(Drafter):
    """The exit behind one layer proposes tokens, as long as its criterion lets them leave there. The whole model goes
    on with their keys, values and states (self-speculation: Kangaroo, Liu et al. 2024; LayerSkip, Elhoushi et al.
    2024).

    Args:
        index (`int`): the exit (0-based).
        layer (`int`): the layer (1-based) it stands behind.
        most (`int`): tokens of a draft at most.
        criterion (`Callable`): makes the criterion of one token per row.
    """

    name = "exits"
    kinds = (0.5,)

    def __init__(self, index: int, layer: int, most: int, criterion: Callable[[], ExitCriterion]) -> None:
        super().__init__(most)
        self.index, self.layer, self.criterion = index, layer, criterion
        self.refused = 0.0

    def cost(self, costs: DraftCosts) -> float:
        found = self.layer * costs.layer + costs.head
        # Of a token that the criterion refuses the head was for nothing; its layers are not run again.
        self.refused = costs.head / found
        return found

    def draft(self, drafting: Drafting, room: Tensor, pays: DraftsPay) -> Drafts | None:
        model, texts = drafting.model, drafting.texts
        reach, chance = texts.reach(room, self.most_tokens), self.chances.mean
        # Nothing would be learned from drafts that do not pay even where all of them hold.
        if pays.most(reach) == 0 or pays.rests():
            return None
        goes_on, counts = room > 0, torch.zeros_like(room)
        token = texts.last(1)
        tokens: list[Tensor] = []
        probabilities: list[Tensor] = []
        states: list[Tensor] = []
        refused = 0.0
        while True:
            embedded = model.get_input_embeddings()(token)
            states.append(drafting.at(len(tokens), 1).run(embedded, 0, self.layer))
            if len(tokens) == len(reach):
                break
            state = model.exit_state(states[-1][:, 0], self.index)
            step = ExitStep(self.index, state, lambda state: model.exit_logits(state, self.index))
            criterion = self.criterion()
            goes_on = goes_on & criterion.passes(criterion.score(step), criterion.thresholds[self.index])
            drawn, probability = drafting.draw(step.logits)
            # A column costs all rows the same, and brings a token to those at most that go on.
            share = float(texts.mean(goes_on)) * chance ** (len(tokens) + 1)
            if not tokens:
                self.guess = Guess(drawn, torch.zeros_like(room), goes_on, probability)
            if not pays.goes_on(share, chance, len(reach) - len(tokens), len(tokens), runs=1):
                refused = self.refused
                break
            counts = counts + goes_on
            goes_on = goes_on & (counts < room)
            token = drawn.unsqueeze(1)
            tokens.append(token)
            probabilities += [] if probability is None else [probability]
        drafted = torch.cat(tokens, 1) if tokens else texts.tokens.new_empty(len(texts), 0)
        drawn_from = torch.stack(probabilities, 1) if probabilities else None
        return Drafts(drafted, counts, drawn_from, torch.cat(states, 1), self.layer, drafted.shape[1] + refused)


class JumpDrafts(Drafter):
    """The model's drafter proposes tokens, as long as the product of their probabilities pays; see `JumpDrafter`.

    Args:
        model (`EarlyExitCausalLM`): a model that has one.
        most (`int`): tokens of a draft at most.
    """

    name = "jump"
    kinds = tuple((place + 0.5) / JumpDrafter.KINDS for place in range(JumpDrafter.KINDS))
    # It learned to say what the model says as often as that.
    known = 15.0
    # Other choices of a first draft at most, and their chances by halvings of their probability, which is 1/2 at most.
    _MOST_OTHERS = 3
    _OTHER_KINDS = tuple(0.375 / 2**halvings for halvings in range(5))

    def __init__(self, model: Any, most: int) -> None:
        super().__init__(most)
        self.other_chances = Chances(self._OTHER_KINDS, self.known)
        self.drafter = model.exit_drafter
        self.looks_behind, self.vocab_size = model.config.drafter_layer, model.config.vocab_size
        self.index = model.config.drafter_layer - 1
        self.head = model.lm_head.weight.index_select(0, self.drafter.token_ids)

    def cost(self, costs: DraftCosts) -> float:
        predictor = self.drafter.predictor.weight.numel() + self.drafter.readout.weight.numel()
        layer = sum(weight.numel() for weight in self.drafter.layer.parameters())
        return costs.layer * (1 + predictor / layer) + costs.head * len(self.drafter.token_ids) / self.vocab_size

    def hopes(self, pays: DraftsPay) -> bool:
        judged = self.drafter.judged
        return not bool(judged[0].any()) or pays.hopes(judged, self.most_tokens)

    def learn(self, guess: Guess, grew: Tensor, got: Tensor, probabilities: Tensor | None) -> None:
        super().learn(guess, grew, got, probabilities)
        if guess.others is not None and guess.other_kinds is not None:
            held = guess.others == got.unsqueeze(1)
            self.other_chances.note(guess.other_kinds[grew].flatten(), held[grew].flatten())

    def draft(self, drafting: Drafting, room: Tensor, pays: DraftsPay) -> Drafts | None:
        if self.seen is None:
            return None
        model, texts, drafter, index = drafting.model, drafting.texts, self.drafter, self.index
        reach = texts.reach(room, self.most_tokens)
        # Nothing would be learned from drafts that do not pay even where all of them hold.
        if pays.most(reach) == 0 or pays.rests():
            return None
        counts = torch.zeros_like(room)
        product, chance = torch.ones_like(room, dtype=torch.float), self.chances.mean
        token, state = texts.last(1), self.seen.unsqueeze(1)
        tokens: list[Tensor] = []
        probabilities: list[Tensor] = []
        others: Tensor | None = None
        runs, beside = 0, 0.0

        def goes_on(runs: int) -> bool:
            share = float(texts.mean(product))
            more = 0.0 if tokens else beside
            return pays.goes_on(share, chance, len(reach) - len(tokens), len(tokens), runs, more)

        while len(tokens) < len(reach) and (runs == 0 or goes_on(0)):
            runs += 1
            embedded = model.get_input_embeddings()(token)
            state = drafting.at(len(tokens), 1).run_layer(drafter.layer, index, drafter.jump(state, embedded))
            logits = F.linear(model.model.norm(drafter.read(state[:, 0])), self.head)
            # Known before a token is drawn: to drop a draft for what it says would bend the distribution.
            sure = logits.float().softmax(-1)
            kinds = drafter.kinds(sure.amax(-1))
            product = torch.where(len(tokens) < room, product * self.chances.of(kinds), 0.0)
            drawn, probability = drafting.draw(logits)
            token = drafter.token_ids[drawn].unsqueeze(1)
            if probability is not None:
                full = probability.new_zeros(len(room), self.vocab_size)
                probability = full.index_copy_(1, drafter.token_ids, probability)
            if not tokens:
                self.guess = Guess(token[:, 0], kinds, torch.ones_like(room, dtype=torch.bool), probability)
                if drafting.chooses and pays.gains([self.other_chances.highest]):
                    others, beside = self._others(sure.scatter(1, drawn.unsqueeze(1), 0.0), room, texts, pays)
            if not goes_on(1):
                break
            counts = counts + (len(tokens) < room)
            tokens.append(token)
            probabilities += [] if probability is None else [probability]
        if not tokens:
            return Drafts(texts.tokens.new_empty(len(texts), 0), counts, runs=runs)
        drawn_from = torch.stack(probabilities, 1) if probabilities else None
        return Drafts(torch.cat(tokens, 1), counts, drawn_from, runs=runs, others=others)

    def _others(self, sure: Tensor, room: Tensor, texts: GrowingTexts, pays: DraftsPay) -> tuple[Tensor | None, float]:
        """Other choices (rows, others) of a first draft, as many as pay, and the tokens that they bring beyond their
        costs, from probabilities (rows, words) in which that draft has none."""
        assert self.guess is not None
        best = sure.topk(min(self._MOST_OTHERS, sure.shape[-1]), dim=-1)
        halvings = (-best.values.log2()).nan_to_num(torch.inf) - 1
        kinds = halvings.clamp(0, len(self._OTHER_KINDS) - 1).long()
        others = self.drafter.token_ids[best.indices]
        self.guess.others, self.guess.other_kinds = others, kinds
        shares = texts.mean(self.other_chances.of(kinds) * (room > 0).unsqueeze(1))
        gains = pays.gains(shares.tolist())
        return (others[:, : len(gains)] if gains else None), sum(gains)


__all__ = ["Drafter", "Drafting", "Drafts", "ExitDrafts", "Guess", "JumpDrafts", "PromptLookup"]
