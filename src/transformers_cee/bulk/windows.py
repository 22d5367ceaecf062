# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""One window of texts: sorted by length, classified, and put back into order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from transformers_cee.engines.graphs import fits_graph
from transformers_cee.exits.criteria import CRITERIA, check_thresholds
from transformers_cee.exits.deciding import model_criterion, resolve_decision
from transformers_cee.exits.evaluating import evaluating
from transformers_cee.exits.fields import check_field, whole
from transformers_cee.exits.losses import resolve_problem_type
from transformers_cee.exits.pooling import run_pooled
from transformers_cee.exits.row_batch import RowBatch
from transformers_cee.modeling.sequence_classification import EarlyExitSequenceClassifier
from transformers_cee.pipelines import exit_model
from transformers_cee.tokenizing import longest_text


@dataclass
class ClassifiedTexts:
    """What became of some texts, in their order.

    Args:
        classes (`LongTensor` of shape `(rows,)`): the likeliest class.
        scores (`Tensor` of shape `(rows,)`): its probability; of a regression, the value.
        exit_layers (`LongTensor` of shape `(rows,)`): layer (1-based) at which the text left.
    """

    classes: Tensor
    scores: Tensor
    exit_layers: Tensor


class WindowClassifier:
    """Classifies windows of texts. Everything that could stop it is checked when it is made.

    Args:
        model ([`EarlyExitSequenceClassifier`]): classifies texts; of torch, or exported.
        processing_class: its tokenizer.
        batch_size (`int`): rows per batch.
        max_length (`int`, *optional*): tokens that a text is cut to; by default, and at
            most, what tokenizer and model read.
        exit_threshold, exit_criterion, exit_budget, min_exit_layer (*optional*): as in the model's call.

    Raises:
        TypeError: a model that classifies no texts, or has no exits.
        ValueError: what the model does not accept.
    """

    def __init__(
        self,
        model: Any,
        processing_class: Any,
        *,
        batch_size: int = 32,
        max_length: int | None = None,
        exit_threshold: float | list[float] | str | None = None,
        exit_criterion: str | None = None,
        exit_budget: float | None = None,
        min_exit_layer: int | None = None,
    ) -> None:
        self.model: Any = checked_model(model)
        check_field("batch_size", batch_size, whole(1))
        check_field("max_length", max_length, whole(1).or_none())
        self.tokenizer, self.batch_size = processing_class, batch_size
        self.max_length = longest_text(self.model, processing_class, max_length)
        self.decision = resolve_decision(self.model.config, exit_threshold, exit_criterion, exit_budget)
        self.min_exit_layer = min_exit_layer
        self.first_exit = self.model.first_exit(min_exit_layer)
        self.problem_type = resolve_problem_type(self.model.config.problem_type, self.model.num_labels, None)
        # Made of one token, where it looks at tokens: it says now what it lacks.
        token = torch.zeros(1, 1, dtype=torch.long, device=self.model.device)
        criterion = self._criterion(token, torch.ones_like(token))
        check_thresholds(self.decision.criterion, self.decision.threshold, len(self.model.layer_numbers))
        self.model.check_walk(rows_leave=not criterion.is_off)
        is_off = criterion.is_off or self.first_exit >= self.model.last_exit
        # What else criteria remember stays with its batch, and so do their rows.
        self.is_pooled = not is_off and fits_graph(CRITERIA.find(self.decision.criterion), self.model.exit_policies)

    @property
    def takes_blanks(self) -> bool:
        """Does the tokenizer make tokens of an empty text?"""
        return len(self.tokenizer("")["input_ids"]) > 0

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> ClassifiedTexts:
        """Classifies texts, all of which are held at once.

        Raises:
            ValueError: a text of which the tokenizer makes no token; its number is counted from 1.
        """
        made = self.tokenizer(list(texts), truncation=True, max_length=self.max_length)
        encoded = {name: made[name] for name in self.tokenizer.model_input_names if name in made}
        lengths = torch.tensor([len(ids) for ids in encoded["input_ids"]])
        if not bool((lengths > 0).all()):
            number = int((lengths == 0).nonzero()[0]) + 1
            raise ValueError(f"The tokenizer makes no token of text {number} of {len(texts)}: {texts[number - 1]!r}.")
        order = lengths.argsort(descending=True, stable=True)
        with evaluating(self.model):
            run = self._pooled if self.is_pooled and len(texts) > self.batch_size else self._batch_by_batch
            logits, exit_layers = run(self._batches(encoded, order), len(texts))
        back = order.argsort()
        scores, classes = self._probabilities(logits.float().cpu()).max(-1)
        return ClassifiedTexts(classes[back], scores[back], exit_layers.cpu()[back])

    def _criterion(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None) -> Any:
        return model_criterion(
            self.model, self.decision, self.problem_type, input_ids, attention_mask, self.first_exit
        )

    def _batches(self, encoded: dict[str, Any], order: Tensor) -> Iterator[dict[str, Tensor]]:
        """Batches of texts of similar length, longest first, padded on the right."""
        for rows in order.split(self.batch_size):
            some = {name: [values[row] for row in rows.tolist()] for name, values in encoded.items()}
            batch = self.tokenizer.pad(some, padding_side="right", return_tensors="pt")
            yield {name: batch[name].to(self.model.device) for name in some}

    def _batch_by_batch(self, batches: Iterator[dict[str, Tensor]], rows: int) -> tuple[Tensor, Tensor]:
        """Logits (rows, labels) and exit layers (rows,), each batch on a walk of its own."""
        asked = {"exit_threshold": self.decision, "min_exit_layer": self.min_exit_layer}
        found = [self.model(**batch, **asked) for batch in batches]
        return torch.cat([one.logits for one in found]), torch.cat([one.exit_layers for one in found])

    def _pooled(self, batches: Iterator[dict[str, Tensor]], rows: int) -> tuple[Tensor, Tensor]:
        """Logits (rows, labels) and exit layers (rows,), all batches on one walk."""
        model, criterion = self.model, self._criterion()
        embedded = map(self._embedded, batches)
        first = next(embedded)
        # Whatever the config asks for, states of a whole window are not kept.
        arguments = {"output_hidden_states": False, "output_attentions": False}
        stack = model.stack(first, arguments, criterion, self.first_exit)
        run = model.walked(
            lambda layers: run_pooled(
                chain([first], embedded), rows, layers, model, criterion, model.masked,
                batch_size=self.batch_size, first_exit=self.first_exit, ends=stack.ends,
            ),
            stack.layers,
            arguments,
        )["run"]  # fmt: skip
        return run.logits, run.exit_layers

    def _embedded(self, batch: dict[str, Tensor]) -> RowBatch:
        given = {name: batch.get(name) for name in ("input_ids", "token_type_ids", "position_ids", "inputs_embeds")}
        mask = batch.get("attention_mask")
        embedded: RowBatch = self.model.embed(None if mask is None else mask != 0, **given)
        return embedded

    def _probabilities(self, logits: Tensor) -> Tensor:
        """Scores (rows, labels) of classes, as pipelines of text classification give them."""
        if self.model.config.problem_type == "regression":
            return logits
        if self.model.config.problem_type == "multi_label_classification" or logits.shape[-1] == 1:
            return logits.sigmoid()
        return logits.softmax(-1)


def checked_model(model: Any) -> EarlyExitSequenceClassifier:
    """The classifier with exits itself where adapters of PEFT are around it.

    Raises:
        TypeError: a model that classifies no texts, or has no exits.
    """
    found = exit_model(model)
    if not isinstance(found, EarlyExitSequenceClassifier):
        raise TypeError(f"`model` of type {type(model).__name__} must be a classifier of texts with exits.")
    return found
