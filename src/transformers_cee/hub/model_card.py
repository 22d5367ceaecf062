# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Model cards written from what a run measured."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from transformers_cee.evaluation.environment import installed_versions
from transformers_cee.evaluation.report import (
    WALL_CLOCK_NOTE,
    escape_markdown,
    markdown_table,
    method_name,
    operating_points_table,
)
from transformers_cee.files import replacing


if TYPE_CHECKING:
    from transformers_cee.evaluation.operating_points import OperatingPoint

TEMPLATE = Path(__file__).with_name("model_card_template.md")
PHASE_SENTENCES = {
    "heads": "Every exit head learned the task together with the encoder.",
    "hardness": "For each training input, the first layer from which all exit heads are right was recorded (its "
    "memorized layer).",
    "policy": "The exit policy learned by policy gradient to leave where the exit head's loss and the cost of the "
    "layers run are lowest.",
    "consistent": "Then the model learned from the exits that the policy takes, which is how it is used.",
}
_KINDS = {"text-generation": "A transformer decoder", "image-classification": "A model of images"}
GENERAL_LIMITS = (
    "Thresholds and speed-ups hold for inputs like those they were measured on; under other data the policy may leave "
    "too early or too late without any sign of it.",
    "Speed-ups depend on hardware, batch size and sequence length: a batch ends with its slowest row.",
    "Whatever biases the base model and the training data have, an early exit has too, and it may hit easy "
    "and hard inputs unequally.",
)


@dataclass(kw_only=True)
class EarlyExitCard:
    """What a model card says; collected from a run.

    Args:
        model_name (`str`): title of the card, such as `"bert-cee-sst2"`.
        num_layers (`int`): layers of the model.
        dataset_name (`str`): the data as a reader knows it, such as `"SST-2"`.
        metric_name (`str`): key into the `metrics` of the operating points; the metric that counts.
        curves (`dict[str, list[OperatingPoint]]`): operating points per method; `"policy"` is this model's own.
        base_model (`str`, *optional*): Hub name or description of the encoder that training started from.
        repo_id (`str`, *optional*): where the usage snippet loads from; defaults to `model_name`.
        dataset_id (`str`, *optional*): Hub name of the data, such as `"nyu-mll/glue"`; without it the card
            names no data set in its metadata and has no model index.
        dataset_config (`str`, *optional*): configuration of the data set, such as `"sst2"`.
        split (`str`, *optional*, defaults to `"test"`): rows that the operating points were measured on.
        data_notes (`str`, *optional*): how the splits were made.
        other_sets (`dict[str, list[OperatingPoint]]`, *optional*): points measured on further rows, by what these are.
        full_depth (`OperatingPoint`, *optional*): the same model with exits off.
        exit_layers (`list[int]`, *optional*): layers (1-based) with an exit, where not every layer has one.
        exit_threshold (`float` or `list[float]`, *optional*, defaults to 0.5): the published threshold of the policy.
        exit_budget (`float`, *optional*): the published budget, of policies that serve any; instead of the threshold.
        figure (`str`, *optional*, defaults to `"curve.png"`): picture of the curve, beside the card; None for none.
        timing (`str`, *optional*): what the wall-clock figures were measured on.
        training_arguments (`dict`): name to value.
        seeds (`list[int]`): seeds of the runs behind the figures.
        limits (`list[str]`): limits of this model, before the general ones.
        library_versions (`dict[str, str]`, *optional*): defaults to what is installed.
        examples (`list[str]` or list of pairs of `str`): texts, or pairs of texts, of the usage snippet.
        image_shape (sequence of `int`, *optional*):
            Channels, height and width of an image; the usage snippet is then that of a model of images.
        problem_type (`str`, *optional*, defaults to `"single_label_classification"`): what logits mean, as a config
            names it.
        task (`str`, *optional*, defaults to `"text-classification"`): the task as the Hub names it.
        tags (`list[str]`, *optional*): further tags of the metadata.
        language (`str` or `list[str]`, *optional*): of the data, where known, as the Hub names it, such as `"en"`.
        license (`str`, *optional*): of the base model, as the Hub names it, such as `"mit"`.
        data_license (`str`, *optional*): of the data, in words.

    Raises:
        ValueError: no operating points, a point without the metric, or no examples.
    """

    model_name: str
    num_layers: int
    dataset_name: str
    metric_name: str
    curves: Mapping[str, Sequence[OperatingPoint]]
    base_model: str | None = None
    repo_id: str | None = None
    dataset_id: str | None = None
    dataset_config: str | None = None
    split: str = "test"
    data_notes: str | None = None
    other_sets: Mapping[str, Sequence[OperatingPoint]] = field(default_factory=dict)
    full_depth: OperatingPoint | None = None
    exit_layers: Sequence[int] | None = None
    exit_threshold: float | Sequence[float] = 0.5
    exit_budget: float | None = None
    figure: str | None = "curve.png"
    timing: str | None = None
    training_arguments: Mapping[str, Any] = field(default_factory=dict)
    seeds: Sequence[int] = ()
    limits: Sequence[str] = ()
    library_versions: Mapping[str, str] | None = None
    examples: Sequence[str] | Sequence[tuple[str, str]] = (
        "A film with a heart.",
        "Not a single joke lands, and the plot is worse.",
    )
    image_shape: Sequence[int] | None = None
    problem_type: str = "single_label_classification"
    task: str = "text-classification"
    tags: Sequence[str] = ()
    language: str | list[str] | None = None
    license: str | None = None
    data_license: str | None = None

    def __post_init__(self) -> None:
        if not self.points:
            raise ValueError(f"`curves`={dict(self.curves)!r} holds no operating point; at least one is needed.")
        for point in self.points:
            if self.metric_name not in point.metrics:
                raise ValueError(
                    f"`metric_name`={self.metric_name!r} is missing from an operating point of "
                    f"{point.criterion!r}, which has {', '.join(map(repr, point.metrics)) or 'no metrics'}."
                )
        if isinstance(self.examples, str) or not self.examples:
            raise ValueError(f"`examples`={self.examples!r} must be a list of at least one text.")

    @property
    def points(self) -> list[OperatingPoint]:
        """All operating points, full depth first, methods in the order of `curves`."""
        first = [] if self.full_depth is None else [self.full_depth]
        return [*first, *(point for curve in self.curves.values() for point in curve)]

    @property
    def published_point(self) -> OperatingPoint | None:
        """The policy's point at the published budget or threshold, if it was measured."""
        for point in self.curves.get("policy", ()):
            is_asked_for = self.exit_budget is not None or point.exit_threshold == self.exit_threshold
            if point.exit_budget == self.exit_budget and is_asked_for:
                return point
        return None

    def metadata(self) -> ModelCardData:
        """The YAML block; its model index is filled when data set and published point are known."""
        known = {
            "base_model": self.base_model if _is_hub_name(self.base_model) else None,
            "datasets": [self.dataset_id] if self.dataset_id else None,
            "license": self.license,
            "language": self.language,
        }
        results = self._results()
        return ModelCardData(
            library_name="transformers",
            pipeline_tag=self.task,
            tags=list(dict.fromkeys(("early-exit", "transformers-cee", "consistentee", *self.tags))),
            metrics=[self.metric_name],
            model_name=self.model_name if results else None,
            eval_results=results,
            **{name: value for name, value in known.items() if value is not None},
        )

    def render(self) -> ModelCard:
        """The card: metadata and text."""
        names = list(dict.fromkeys(name for point in self.points for name in point.metrics))
        names.sort(key=lambda name: name != self.metric_name)
        versions = installed_versions() if self.library_versions is None else self.library_versions
        return ModelCard.from_template(
            self.metadata(),
            template_str=TEMPLATE.read_text(encoding="utf-8"),
            title=escape_markdown(self.model_name),
            base_sentence=self._base_sentence(f"{_KINDS.get(self.task, 'A transformer encoder')} with early exits."),
            method=self._method(),
            num_layers=self.num_layers,
            exit_layers=_and(self.exit_layers or ()),
            load_name=repr(self.repo_id or self.model_name),
            examples=repr(list(self.examples)),
            pairs=not isinstance(self.examples[0], str),
            exit_threshold=repr(self.exit_threshold),
            exit_budget=self.exit_budget,
            image_shape=", ".join(map(str, self.image_shape or ())),
            problem_type=self.problem_type,
            data_sentence=self._data_sentence(),
            points_sentence=self._points_sentence(),
            points_table=self._tables(lambda points: operating_points_table(points, names)),
            metric_name=escape_markdown(self.metric_name),
            figure=self.figure,
            timing=self._timing_sentences(),
            arguments_table=_two_columns("argument", self.training_arguments) or "Not recorded.",
            seeds_sentence=_sentence("Seeds: {}.", ", ".join(map(str, self.seeds)), "The seed was not recorded."),
            limits="\n".join(f"- {limit}" for limit in (*self.limits, *GENERAL_LIMITS)),
            versions_table=_two_columns("library", versions),
        )

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes the card as `README.md` into a folder, which is made when missing, and returns the file."""
        path = Path(folder) / "README.md"
        card = self.render()
        with replacing(path) as beside:
            card.save(beside)
        return path

    def _base_sentence(self, otherwise: str) -> str:
        return f"{escape_markdown(self.base_model)} with early exits." if self.base_model else otherwise

    def _data_sentence(self) -> str:
        notes = escape_markdown(self.data_notes or "")
        known = rights(self.language, self.license, self.data_license)
        paragraphs = (f"Trained and measured on {escape_markdown(self.dataset_name)}. {notes}", known)
        return "\n\n".join(filter(None, map(str.strip, paragraphs)))

    def _tables(self, table: Callable[[list[OperatingPoint]], str]) -> str:
        """The table of the points, and that of each further set under its name."""
        others = [f"On {escape_markdown(name)}:\n\n{table(list(points))}" for name, points in self.other_sets.items()]
        return "\n\n".join([table(self.points), *others])

    def _method(self) -> str:
        phases = self.training_arguments.get("phases") or tuple(PHASE_SENTENCES)
        return " ".join(PHASE_SENTENCES[phase] for phase in PHASE_SENTENCES if phase in phases)

    def _timing_sentences(self) -> str:
        """How wall-clock figures are read, and what they were measured on; nothing if none was."""
        shown = [*self.points, *(point for points in self.other_sets.values() for point in points)]
        is_timed = any(point.wall_clock.text() != "-" for point in shown)
        return " ".join(filter(None, [WALL_CLOCK_NOTE if is_timed else "", escape_markdown(self.timing or "")]))

    def _points_sentence(self) -> str:
        methods = _and([escape_markdown(method_name(method)) for method in self.curves])
        shared = ", all on the exits and heads of this model" if len(self.curves) > 1 else ""
        return f"Measured on the {escape_markdown(self.split)} rows; exit criteria: {methods}{shared}."

    def _results(self) -> list[EvalResult] | None:
        point = self.published_point
        if point is None or not self.dataset_id:
            return None
        return [
            EvalResult(
                task_type=self.task,
                dataset_type=self.dataset_id,
                dataset_name=self.dataset_name,
                dataset_config=self.dataset_config,
                dataset_split=self.split,
                metric_type=self.metric_name,
                metric_name=f"{self.metric_name} at mean exit layer {point.depth:.2f} of {self.num_layers}",
                metric_value=point.metrics[self.metric_name],
            )
        ]


def rights(language: str | list[str] | None, license: str | None, data_license: str | None) -> str:
    """Sentences on the language of the data and on the licences of base model and data, as far as they are known."""
    languages = [language] if isinstance(language, str) else language or ()
    known = {
        "Language: {}.": ", ".join(languages),
        "Licence of the base model: {}.": license,
        "Licence of the data: {}": data_license,
    }
    return " ".join(sentence.format(escape_markdown(value)) for sentence, value in known.items() if value)


def _is_hub_name(name: str | None) -> bool:
    """Whether `name` looks like `owner/name` of the Hub and is not a folder."""
    return (
        name is not None and name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()
    )


def _two_columns(header: str, values: Mapping[str, Any]) -> str:
    rows = [[f"`{name}`", escape_markdown(value)] for name, value in values.items()]
    return markdown_table([header, "value"], rows) if rows else ""


def _sentence(pattern: str, value: str | None, otherwise: str) -> str:
    return pattern.format(value) if value else otherwise


def _and(items: Sequence[Any]) -> str:
    """`"a, b and c"`."""
    *first, last = [str(item) for item in items] or [""]
    return f"{', '.join(first)} and {last}" if first else last


__all__ = ["EarlyExitCard"]
