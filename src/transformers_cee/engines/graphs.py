# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A classifier of texts as graphs that an engine can take: its embeddings, each layer and each exit.

Graphs take and give tensors in a fixed order, by the names below. An engine puts the graphs of consecutive layers
together, and that of an exit behind them, so that a block gives hidden states, logits and the score at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from transformers_cee.exits.criteria import CRITERIA, ExitCriterion, ExitStep, Policy, build_criterion
from transformers_cee.exits.deciding import criterion_settings
from transformers_cee.exits.row_batch import SLIDING, RowBatch


# Names of a graph's tensors: what the first layer takes, and what goes from block to block.
TOKENS = ("input_ids", "attention_mask", "token_type_ids")
HIDDEN, MASK, ALPHA, MARGIN, PREDICTIONS = "hidden", "attention_mask", "alpha", "margin", "predictions"
STATE, LOGITS, SCORE = "state", "logits", "score"
# What a policy that looks at confidences knows of earlier exits.
HISTORY = (MARGIN, PREDICTIONS)
# Criteria of the input or of its label cannot be answered by a graph of hidden states.
_OUTSIDE = {"tokens", "labels"}


@dataclass(frozen=True)
class Cut:
    """One block: some layers, and the exit behind them.

    Args:
        start, stop (`int`): it runs the layers `start + 1` … `stop` (1-based).
        gives (`frozenset[str]`): what its graph gives, of `"hidden"`, `"state"`, `"logits"`, `"score"` and `HISTORY`.
        has_history (`bool`): does its exit's score take what earlier exits have said?
    """

    start: int
    stop: int
    gives: frozenset[str]
    has_history: bool = False


def token_inputs(config: Any) -> tuple[str, ...]:
    """What the first layer's graph takes."""
    return TOKENS if getattr(config, "type_vocab_size", 0) > 1 else TOKENS[:2]


def fits_graph(criterion: type[ExitCriterion], policies: Any) -> bool:
    """Can a criterion's score be part of an exit's graph? Otherwise it is asked outside, of the graph's logits and
    states."""
    if criterion is Policy:
        return True
    return not criterion.has_memory and not criterion.looks_at & _OUTSIDE and not issubclass(criterion, Policy)


class Graph(nn.Module):
    """A part of a classifier, with the names of what it takes and gives.

    Args:
        model: the classifier; its weights take no gradients while a graph is traced.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def __init__(self, model: Any) -> None:
        super().__init__()
        # No module of this one: a graph has the weights that it uses, not all of the model's.
        self.held = (model,)

    @property
    def model(self) -> Any:
        return self.held[0]


class EmbeddingGraph(Graph):
    """Tokens (rows, time) in, their embeddings (rows, time, hidden) out."""

    outputs = (HIDDEN,)

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.inputs = token_inputs(model.config)

    def forward(self, *tokens: Tensor) -> tuple[Tensor]:
        given = dict(zip(self.inputs, tokens, strict=True))
        mask = given.pop(MASK)
        given = {"token_type_ids": None, "position_ids": None, "inputs_embeds": None, **given}
        return (self.model.embedded(**self.model.placed(given, mask)),)


class LayerGraph(Graph):
    """One layer: hidden states (rows, time, hidden) and the mask (rows, time) in, the next hidden states out. What
    else a layer takes follows from the mask, so that no layer needs anything of the one before it but its states.

    Args:
        model: the classifier.
        index (`int`): layer (0-based).
    """

    inputs, outputs = (HIDDEN, MASK), (HIDDEN,)

    def __init__(self, model: Any, index: int) -> None:
        super().__init__(model)
        self.index = index

    def forward(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor]:
        batch = replace(self.model.masked(mask.unsqueeze(-1).to(hidden.dtype), mask), hidden_states=hidden)
        return (_behind(self.model, self.index, _padding_sees_itself(batch)),)


def _padding_sees_itself(batch: RowBatch) -> RowBatch:
    """Engines divide by nothing where a token sees nobody, as padding further than a window from the text does. No
    text sees what padding becomes, as long as that is a number."""
    masks = batch.attention_mask
    if not isinstance(masks, dict) or masks.get(SLIDING) is None or masks[SLIDING].dtype != torch.bool:
        return batch
    columns = torch.arange(masks[SLIDING].shape[-1], device=masks[SLIDING].device)
    itself = columns.unsqueeze(0) == columns.unsqueeze(1)
    return replace(batch, attention_mask={**masks, SLIDING: masks[SLIDING] | itself})


def _behind(model: Any, index: int, batch: RowBatch) -> Tensor:
    """Hidden states (rows, time, hidden) behind a layer (0-based)."""
    after = model.bind(index, model.layers[index], {})(batch)
    # A layer may give its attentions, too.
    return after[0] if isinstance(after, tuple) else after


class ExitGraph(Graph):
    """One exit: hidden states (rows, time, hidden) and the mask (rows, time) in, what is known there out.

    Args:
        model: the classifier.
        index (`int`): exit (0-based).
        criterion (`str`, *optional*): the criterion whose score is part of the graph.
        has_history (`bool`): has an earlier exit been asked? Of policies that look at confidences.
    """

    def __init__(self, model: Any, index: int, criterion: str | None = None, has_history: bool = False) -> None:
        super().__init__(model)
        self.index, self.criterion = index, criterion
        policies = model.exit_policies
        has_policy = criterion == Policy.name
        self.looks_back = has_policy and policies.needs_logits
        inputs = [HIDDEN, MASK]
        if has_policy and policies.is_conditioned:
            inputs.append(ALPHA)
        if self.looks_back and has_history:
            inputs += HISTORY
        self.inputs = tuple(inputs)
        scored = () if criterion is None else (SCORE, *(HISTORY if self.looks_back else ()))
        self.outputs = (STATE, LOGITS, *scored)

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        known = dict(zip(self.inputs, given, strict=True))
        model = self.model
        state = model.state(known[HIDDEN], known[MASK], self.index)
        logits = model.logits(state, self.index)
        found = [state, logits]
        if self.criterion is not None:
            walk: Any = build_criterion(
                self.criterion,
                CRITERIA[self.criterion].off,
                len(model.layer_numbers),
                problem_type(model.config),
                model.exit_policies,
                criterion_settings(model, known.get(ALPHA)),
            )
            if MARGIN in known:
                walk.history.margin, walk.history.predictions = known[MARGIN], known[PREDICTIONS]
            found.append(walk.score(ExitStep(self.index, state, lambda _: logits, logits_=logits)))
            if self.looks_back:
                found += [walk.history.margin, walk.history.predictions]
        return tuple(found)


class BlockGraph(Graph):
    """A block at once, for engines that run modules: masks and rotary tables are made once for all of its layers, and
    the exit behind them computes in float32, whatever the layers' precision is.

    Args:
        model: the classifier.
        cut (`Cut`): which layers, and what the graph gives, sorted by name.
        criterion (`str`, *optional*): the criterion whose score the exit gives, where the cut asks for one.
    """

    def __init__(self, model: Any, cut: Cut, criterion: str | None = None) -> None:
        super().__init__(model)
        self.cut = cut
        self.embeddings = None if cut.start else EmbeddingGraph(model)
        self.exit = None
        if cut.gives != {HIDDEN}:
            index = model.layer_numbers.index(cut.stop)
            self.exit = ExitGraph(model, index, criterion if SCORE in cut.gives else None, cut.has_history)
        first = (HIDDEN, MASK) if self.embeddings is None else self.embeddings.inputs
        more = () if self.exit is None else self.exit.inputs
        self.inputs = (*first, *(name for name in more if name not in (HIDDEN, MASK)))
        self.outputs = tuple(sorted(cut.gives))

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        known = dict(zip(self.inputs, given, strict=True))
        if self.embeddings is not None:
            (known[HIDDEN],) = self.embeddings(*(known[name] for name in self.embeddings.inputs))
        batch = self.model.masked(known[HIDDEN], known[MASK])
        for index in range(self.cut.start, self.cut.stop):
            batch = replace(batch, hidden_states=_behind(self.model, index, batch))
        found = {HIDDEN: batch.hidden_states}
        if self.exit is not None:
            known[HIDDEN] = batch.hidden_states.float()
            found |= zip(self.exit.outputs, self.exit(*(known[name] for name in self.exit.inputs)), strict=True)
        return tuple(found[name] for name in self.outputs)


def layer_graphs(model: Any) -> list[Graph]:
    """The graphs of the embeddings and of each layer."""
    return [EmbeddingGraph(model), *(LayerGraph(model, index) for index in range(len(model.layers)))]


def exit_graphs(model: Any, criterion: str | None) -> dict[str, ExitGraph]:
    """The graphs of all exits, by `exit_name`; of criteria that remember earlier exits, one for each case."""
    graphs: dict[str, ExitGraph] = {}
    for index, layer in enumerate(model.layer_numbers):
        scored = criterion if index < model.last_exit else None
        graph = graphs[f"exit_{layer}"] = ExitGraph(model, index, scored)
        if graph.looks_back and index:
            graphs[f"exit_{layer}_later"] = ExitGraph(model, index, scored, has_history=True)
    return graphs


def exit_name(cut: Cut) -> str:
    """Name of the graph of the exit behind a block."""
    return f"exit_{cut.stop}" + "_later" * cut.has_history


def problem_type(config: Any) -> str:
    """What logits mean; of a model that has seen no labels, classes."""
    if config.problem_type is not None:
        return config.problem_type
    return "regression" if config.num_labels == 1 else "single_label_classification"


def example(names: Sequence[str], config: Any, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Small inputs of a graph, of two rows of which one is padded. Masks are truth values, true at tokens."""
    rows, time = 2, 8
    mask = torch.ones(rows, time, dtype=torch.bool)
    mask[1, 5:] = False
    made = {
        "input_ids": torch.arange(rows * time).view(rows, time) % config.vocab_size,
        MASK: mask,
        "token_type_ids": torch.zeros(rows, time, dtype=torch.long),
        HIDDEN: torch.linspace(-1, 1, rows * time * config.hidden_size, dtype=dtype).view(rows, time, -1),
        ALPHA: torch.full((1,), config.reward_alpha or 0.01),
        MARGIN: torch.full((rows, 1), 0.5),
        PREDICTIONS: torch.zeros(rows, 2, dtype=torch.long),
    }
    if problem_type(config) == "multi_label_classification":
        # Of each earlier exit an indicator per label, not one class.
        made[PREDICTIONS] = torch.zeros(rows, 2, config.num_labels, dtype=torch.bool)
    return {name: made[name] for name in names}


def free_axes(name: str) -> dict[int, str]:
    """Axes of a graph's tensor whose size differs from call to call."""
    if name == ALPHA:
        return {}
    if name in (HIDDEN, *TOKENS):
        return {0: "rows", 1: "time"}
    return {0: "rows", 1: "earlier"} if name == PREDICTIONS else {0: "rows"}
