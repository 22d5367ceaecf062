# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Exits of a whole data set: what hindsight curves, hardness and policies work on.

An *entry* of a store is what leaves at one exit: a row of an encoder, a counted token of a decoder.
"""

import os
from dataclasses import dataclass, fields, replace

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from transformers_cee.exits.losses import exit_errors, exit_losses
from transformers_cee.exits.saved_points import made_on, spoken_engine
from transformers_cee.files import replacing


# Loss terms of rewards.
REWARD_LOSSES = ("ce", "error", "disagreement")


@dataclass
class ExitStore:
    """Every exit's state and result for every entry of a data set, in evaluation mode, in the data set's order; tokens
    row by row, from left to right.

    Of an encoder the logits are kept and everything else follows from them. Of a decoder, whose logits are as wide as
    the vocabulary, losses and predictions are kept instead.

    Args:
        states (`Tensor` of shape `(entries, exits, hidden)`): exit states, float32, possibly memory-mapped.
        logits (`Tensor` of shape `(rows, exits, labels)`, *optional*): logits of all exit heads, float32; None with
            tokens.
        labels (`Tensor` of shape `(entries,)` or `(rows, labels)`): true labels, or the tokens to predict; NaN where
            they are not known.
        layers (`LongTensor` of shape `(exits,)`): 1-based layer of each exit.
        problem_type (`str`): what logits and labels mean; a token is one class of the vocabulary.
        tolerance (`float`): in regression, the absolute error up to which a head counts as right.
        features (`Tensor` of shape `(entries, exits − 1, 5)`, *optional*): confidence features, if policies use them.
        token_losses (`Tensor` of shape `(tokens, exits)`, *optional*): cross-entropy of each token at each exit.
        predictions (`LongTensor` of shape `(tokens, exits)`, *optional*): each exit's most probable token.
        rows (`LongTensor` of shape `(entries,)`, *optional*): row of the data set; by default the entry's number.
        may_exit (`BoolTensor` of shape `(entries,)`, *optional*):
            Can the entry leave before the last exit? By default all can; the last token of a prompt cannot.
        made_on (`str`, *optional*):
            Engine and precision of the model that gave the exits, such as `"openvino int8"`; None of a model in torch.
    """

    states: Tensor
    logits: Tensor | None
    labels: Tensor
    layers: Tensor
    problem_type: str
    tolerance: float = 0.5
    features: Tensor | None = None
    token_losses: Tensor | None = None
    predictions: Tensor | None = None
    # Both are tensors once the store is made.
    rows: Tensor = None  # type: ignore[assignment]
    may_exit: Tensor = None  # type: ignore[assignment]
    made_on: str | None = None

    def __post_init__(self) -> None:
        if self.rows is None:
            self.rows = torch.arange(len(self))
        if self.may_exit is None:
            self.may_exit = torch.ones(len(self), dtype=torch.bool)
        exits = (len(self), len(self.layers))
        shapes = dict.fromkeys(("states", "logits", "token_losses", "predictions"), exits)
        for name, shape in {**shapes, "rows": exits[:1], "may_exit": exits[:1], "features": exits[:1]}.items():
            value = getattr(self, name)
            if value is not None and tuple(value.shape[: len(shape)]) != shape:
                raise ValueError(f"`{name}` of shape {tuple(value.shape)} must begin with {shape}, as `labels` do.")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def has_labels(self) -> bool:
        """Are the labels known? What needs none can be asked of a store without: scores, disagreement, budgets."""
        return not bool(self.labels.isnan().any())

    @property
    def losses(self) -> Tensor:
        """Loss (entries, exits) of each entry at each exit."""
        if self.logits is None:
            return self._of_tokens(self.token_losses)
        return exit_losses(self.logits, self._known_labels(), self.problem_type)

    @property
    def errors(self) -> Tensor:
        """Error (entries, exits) of each entry at each exit."""
        if self.logits is None:
            return (self._of_tokens(self.predictions) != self.labels.unsqueeze(1)).float()
        return exit_errors(self.logits, self._known_labels(), self.problem_type)

    @property
    def disagreements(self) -> Tensor:
        """Error (entries, exits) of each entry at each exit when the last exit's prediction is taken for the truth."""
        if self.logits is None:
            predictions = self._of_tokens(self.predictions)
            return (predictions != predictions[:, -1:]).float()
        last = self.logits[:, -1]
        if self.problem_type == "single_label_classification":
            last = last.argmax(-1)
        elif self.problem_type == "multi_label_classification":
            last = (last > 0).float()
        return exit_errors(self.logits, last, self.problem_type)

    def reward_losses(self, name: str) -> Tensor:
        """The loss term (entries, exits) of rewards: `"ce"`, `"error"` or `"disagreement"`."""
        if name not in REWARD_LOSSES:
            raise ValueError(f"`name`={name!r} is unknown; accepted are {', '.join(REWARD_LOSSES)}.")
        if name == "ce":
            return self.losses
        return self.errors if name == "error" else self.disagreements

    @property
    def correct(self) -> Tensor:
        """Does each exit predict the entry's label? (entries, exits)."""
        return self.errors <= self._same

    @property
    def disagrees(self) -> Tensor:
        """Does each exit predict something else than the last one? (entries, exits)."""
        return self.disagreements > self._same

    @property
    def _same(self) -> float:
        """Error up to which two predictions count as the same."""
        return self.tolerance if self.problem_type == "regression" else 0.0

    def select(self, entries: Tensor) -> "ExitStore":
        """The store of some entries (LongTensor) only; states are copied."""
        shared = ("layers", "problem_type", "tolerance", "made_on")
        kept = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in shared}
        return replace(self, **{name: value[entries] for name, value in kept.items() if value is not None})

    def deciding(self, rows: Tensor | None = None) -> Tensor:
        """Numbers of the entries that can leave early, all or those of some rows (LongTensor) of the data set."""
        mine = self.may_exit if rows is None else self.may_exit & torch.isin(self.rows, rows)
        return mine.nonzero().squeeze(1)

    def check_model(self, model: nn.Module) -> None:
        """Raises `ValueError` for an early-exit model whose exits are not those of the store, or that runs on another
        engine or precision."""
        numbers, size = list(model.layer_numbers), model.config.hidden_size
        if self.layers.tolist() != numbers or self.states.shape[-1] != size:
            raise ValueError(
                f"`store` has exits at layers {self.layers.tolist()} and states of {self.states.shape[-1]} numbers; "
                f"this model has {numbers} and {size}. Collect it again with this model."
            )

        own = made_on(model.config)
        if self.made_on != own:
            raise ValueError(
                f"`store` was collected on {spoken_engine(self.made_on)}, and this model runs on "
                f"{spoken_engine(own)}, where exits say other things. Collect it again with this model."
            )

    def save(self, path: str | os.PathLike) -> None:
        """Replaces a safetensors file by the store."""
        tensors = {name: value.contiguous() for name, value in vars(self).items() if isinstance(value, Tensor)}
        about = {"problem_type": self.problem_type, "tolerance": repr(self.tolerance)}
        if self.made_on is not None:
            about["made_on"] = self.made_on
        with replacing(path) as beside:
            save_file(tensors, beside, metadata=about)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "ExitStore":
        """Reads a store that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, or holds something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            return cls(
                **{"logits": None, **tensors},
                problem_type=about["problem_type"],
                tolerance=float(about["tolerance"]),
                made_on=about.get("made_on"),
            )
        except (SafetensorError, TypeError, KeyError, ValueError) as error:
            raise ValueError(
                f"{os.fspath(path)} is damaged, or no store of exits ({error}). Delete it and store the exits again."
            ) from error

    def _known_labels(self) -> Tensor:
        if not self.has_labels:
            raise ValueError("`labels` of the store are not known (`needs_labels=False`), and losses need them.")
        return self.labels

    @staticmethod
    def _of_tokens(value: Tensor | None) -> Tensor:
        if value is None:
            raise ValueError("A store without `logits` needs `token_losses` and `predictions`.")
        return value
