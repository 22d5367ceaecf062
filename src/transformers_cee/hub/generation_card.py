# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Model cards of language models with exits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData

from transformers_cee.evaluation.environment import installed_versions
from transformers_cee.evaluation.generation_report import generation_table, speed_table
from transformers_cee.evaluation.report import escape_markdown
from transformers_cee.hub import model_card
from transformers_cee.hub.model_card import EarlyExitCard


if TYPE_CHECKING:
    from transformers_cee.evaluation.generation import GenerationPoint

TEMPLATE = Path(__file__).with_name("generation_card_template.md")
LIMITS = (
    "A wrong token stays in the text and what follows builds on it; an early exit can also end an answer too soon.",
    "Speed-ups depend on hardware, batch size and length: a step of a batch ends with its slowest row.",
    "Thresholds hold for texts like those they were measured on; whatever the base model gets wrong, early exits "
    "get wrong too.",
)


@dataclass(kw_only=True)
class GenerationCard(EarlyExitCard):
    """What the card of a language model says; arguments are those of [`EarlyExitCard`], and

    Args:
        chat (`bool`, *optional*, defaults to `False`): the usage snippet uses the chat template.
        prompt (`str`): prompt of the usage snippet.
        usage (`dict`): exit arguments of the usage snippet, as `generate` takes them.
    """

    curves: Any
    full_depth: GenerationPoint | None = None  # type: ignore[assignment]
    chat: bool = False
    prompt: str = "What is an atom?"
    usage: Mapping[str, Any] = field(default_factory=lambda: {"exit_criterion": "policy", "exit_threshold": 0.5})

    def metadata(self) -> ModelCardData:
        """The YAML block."""
        known = {
            "base_model": self.base_model if model_card._is_hub_name(self.base_model) else None,
            "datasets": [self.dataset_id] if self.dataset_id else None,
            "license": self.license,
            "language": self.language,
        }
        return ModelCardData(
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=["early-exit", "transformers-cee", "consistentee"],
            **{name: value for name, value in known.items() if value is not None},
        )

    def render(self) -> ModelCard:
        """The card: metadata and text."""
        versions = installed_versions() if self.library_versions is None else self.library_versions
        timed = [point for point in self.points if point.speeds]  # type: ignore[attr-defined]
        return ModelCard.from_template(
            self.metadata(),
            template_str=TEMPLATE.read_text(encoding="utf-8"),
            title=escape_markdown(self.model_name),
            base_sentence=self._base_sentence("A language model with early exits."),
            method=self._method(),
            num_layers=self.num_layers,
            exit_layers=model_card._and(self.exit_layers or ()),
            load_name=repr(self.repo_id or self.model_name),
            chat=self.chat,
            prompt=repr(self.prompt),
            usage={name: repr(value) for name, value in self.usage.items()},
            data_sentence=self._data_sentence(),
            points_sentence=self._points_sentence(),
            points_table=self._tables(generation_table),  # type: ignore[arg-type]
            speeds_table=speed_table(timed) if timed else "",  # type: ignore[arg-type]
            timing=self._timing_sentences(),
            figure=self.figure,
            arguments_table=model_card._two_columns("argument", self.training_arguments) or "Not recorded.",
            seeds_sentence=model_card._sentence(
                "Seeds: {}.", ", ".join(map(str, self.seeds)), "The seed was not recorded."
            ),
            limits="\n".join(f"- {limit}" for limit in (*self.limits, *LIMITS)),
            versions_table=model_card._two_columns("library", versions),
        )

    def _method(self) -> str:
        phases = self.training_arguments.get("phases") or ()
        frozen = self.training_arguments.get("trainable") == "exits"
        loss = {
            "ce": "the next token",
            "kl": "the last exit's distribution",
            "argmax": "the last exit's most probable token",
        }.get(self.training_arguments.get("token_loss", "ce"), "the next token")
        where = "with all other weights frozen" if frozen else "together with the layers"
        sentences = {
            "heads": f"Every exit head learned to predict {loss}, {where}.",
            "hardness": "For each training token, the first layer from which all exit heads are right was recorded "
            "(its memorized layer).",
            "policy": "The exit policy learned by policy gradient to leave where the exit head's loss and the cost of "
            "the layers run are lowest.",
            "consistent": "Then the exit heads learned from the tokens that the policy lets out at them.",
        }
        return " ".join(sentence for phase, sentence in sentences.items() if phase in phases)


__all__ = ["GenerationCard"]
