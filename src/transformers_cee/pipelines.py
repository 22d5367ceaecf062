# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Pipelines for models with exits: classification of texts and images that takes the exit threshold, one that also
tells where each text left, and features at full depth."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from functools import cache
from typing import Any, ClassVar

from transformers import (
    FeatureExtractionPipeline,
    ImageClassificationPipeline,
    ImageFeatureExtractionPipeline,
    Pipeline,
    TextClassificationPipeline,
    ZeroShotClassificationPipeline,
)
from transformers.utils import ModelOutput

from transformers_cee.exits.arguments import unknown_argument


EXIT_ARGUMENTS = ("exit_threshold", "exit_criterion", "exit_budget")


def exit_model(model: Any) -> Any:
    """The model with exits itself where adapters of PEFT are around it; other models are returned as they are."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def has_exits(model: Any) -> bool:
    """Does a model take an exit threshold?"""
    forward = getattr(exit_model(model), "forward", None)
    return forward is not None and "exit_threshold" in inspect.signature(forward).parameters


class _InPlaceOfStock:
    """Mixin before a pipeline of transformers that takes its place in the table of tasks: models without exits get the
    stock pipeline, which is `stock` of the class in the table."""

    stock: ClassVar[type[Pipeline]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # Copies and pickles are made without arguments.
        model = kwargs.get("model", *args[:1])
        if "stock" in vars(cls) and model is not None and not has_exits(model):
            return cls.stock(*args, **kwargs)
        return super().__new__(cls)

    def _take_exit_arguments(self, kwargs: dict[str, Any], others: Collection[str]) -> dict[str, Any]:
        """Exit arguments, taken out of what a pipeline was given; stock pipelines drop them silently.

        Raises:
            TypeError: what is left holds a name that is not among `others`.
        """
        given = {name: kwargs.pop(name) for name in EXIT_ARGUMENTS if name in kwargs}
        accepted = {*EXIT_ARGUMENTS, *others}
        for name in kwargs.keys() - accepted:
            raise unknown_argument(name, kwargs[name], accepted)
        return {name: value for name, value in given.items() if value is not None}


class _ExitArgumentsPipeline(_InPlaceOfStock):
    """Mixin before a stock pipeline whose model gets exit arguments, when the pipeline is made or per call."""

    def _others(self) -> Collection[str]:
        """What the stock pipeline takes."""
        return _arguments(self.stock._sanitize_parameters)

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict, dict, dict]:
        given = self._take_exit_arguments(kwargs, self._others())
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)  # type: ignore[misc]
        return preprocess, {**forward, **given}, postprocess

    def _forward(self, model_inputs: dict[str, Any], **exit_arguments: Any) -> Any:
        return self.model(**model_inputs, **exit_arguments)  # type: ignore[attr-defined]


class _FeaturesAtFullDepth(_InPlaceOfStock):
    """Mixin before a stock pipeline of features: they are the last layer's states at full depth, not the logits that
    the model itself returns."""

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict, dict, dict]:
        given = self._take_exit_arguments(kwargs, _arguments(self.stock._sanitize_parameters))
        for name, value in given.items():
            raise TypeError(f"`{name}`={value!r} is no argument of feature extraction, which is always at full depth.")
        return super()._sanitize_parameters(**kwargs)  # type: ignore[misc]

    def _forward(self, model_inputs: dict[str, Any]) -> ModelOutput:
        return exit_model(self.model).base_model(**model_inputs)  # type: ignore[attr-defined]


class ExitFeatureExtractionPipeline(_FeaturesAtFullDepth, FeatureExtractionPipeline):
    """[`~transformers.FeatureExtractionPipeline`] for models with exits: what `pipeline("feature-extraction")` makes
    of them. Features are the last layer's states at full depth.

    Raises:
        TypeError: an exit argument, or one that the pipeline does not take.
    """

    stock = FeatureExtractionPipeline


class ExitImageFeatureExtractionPipeline(_FeaturesAtFullDepth, ImageFeatureExtractionPipeline):
    """[`~transformers.ImageFeatureExtractionPipeline`] for models with exits: what
    `pipeline("image-feature-extraction")` makes of them. Features are the last layer's states at full depth.

    Raises:
        TypeError: an exit argument, or one that the pipeline does not take.
    """

    stock = ImageFeatureExtractionPipeline


class ExitTextClassificationPipeline(_ExitArgumentsPipeline, TextClassificationPipeline):
    """[`~transformers.TextClassificationPipeline`] for models with exits: what `pipeline("text-classification")` makes
    of them. Exit arguments go to the model, when the pipeline is made or per call; the stock pipeline hands all that
    it does not know to the tokenizer, which drops it silently. Models without exits get the stock pipeline.

    Args:
        exit_threshold (`float`, `list[float]` or `str`, *optional*, defaults to the config's):
            What the exit criterion's score is compared with: for the policy, 1.0 switches exits off and 0.0 lets
            every text out at the first exit. A list holds one number per exit; a name stands for one of
            `config.exit_operating_points`.
        exit_criterion (`str`, *optional*, defaults to the config's):
            `"policy"`, or another name of `transformers_cee.exits.criteria.CRITERIA`.
        exit_budget (`float`, *optional*, defaults to the config's):
            Wanted mean depth as a share of all layers, instead of a threshold; of policies conditioned on α.

    Raises:
        ValueError: a language model, or the threshold, criterion or budget is not accepted by the model.
        TypeError: an argument that neither the pipeline nor the tokenizer takes.
    """

    stock = TextClassificationPipeline

    def check_model_type(self, supported_models: list[str] | dict[str, Any]) -> None:
        """Raises `ValueError` unless the model takes an exit threshold and classifies."""
        model = exit_model(self.model)
        if not has_exits(model):
            raise ValueError(
                f"`model` is a {type(model).__name__}, which has no exits; an early-exit model such as "
                "`BertForConsistentEE` is needed."
            )
        if getattr(model, "item", None) == "token":
            raise ValueError(
                f"`model` is a {type(model).__name__}, which generates text; use the task 'text-generation', "
                "which takes `exit_threshold` as well."
            )

    def _others(self) -> Collection[str]:
        return {"function_to_apply", "top_k", *_tokenizer_arguments(type(self.tokenizer))}  # type: ignore[arg-type]


class ExitImageClassificationPipeline(_ExitArgumentsPipeline, ImageClassificationPipeline):
    """[`~transformers.ImageClassificationPipeline`] for models with exits: what `pipeline("image-classification")`
    makes of them. Exit arguments go to the model, as those of [`ExitTextClassificationPipeline`].

    Raises:
        ValueError: the threshold, criterion or budget is not accepted by the model.
        TypeError: an argument that the pipeline does not take.
    """

    stock = ImageClassificationPipeline


class ExitZeroShotClassificationPipeline(_ExitArgumentsPipeline, ZeroShotClassificationPipeline):
    """[`~transformers.ZeroShotClassificationPipeline`] for models with exits: what
    `pipeline("zero-shot-classification")` makes of them. Exit arguments go to the model, as those of
    [`ExitTextClassificationPipeline`].

    Raises:
        ValueError: the threshold, criterion or budget is not accepted by the model.
        TypeError: an argument that the pipeline does not take.
    """

    stock = ZeroShotClassificationPipeline

    def _others(self) -> Collection[str]:
        return ("candidate_labels", "hypothesis_template", "multi_label")

    def _forward(self, model_inputs: dict[str, Any], **exit_arguments: Any) -> dict[str, Any]:
        names = self.tokenizer.model_input_names  # type: ignore[union-attr]
        outputs = self.model(**{name: model_inputs[name] for name in names}, **exit_arguments)
        return {**{name: value for name, value in model_inputs.items() if name not in names}, **outputs}


class EarlyExitTextClassificationPipeline(ExitTextClassificationPipeline):
    """Text classification with a model that has exits, with one more key in each result: `exit_layer`, the layer
    (1-based) at which the text left. Arguments and errors are those of [`ExitTextClassificationPipeline`]; a model
    without exits is refused.

    Example:

    ```python
    >>> import transformers_cee
    >>> from transformers import pipeline

    >>> classifier = pipeline("early-exit-text-classification", model="org/bert-cee-sst2", exit_threshold=0.5)
    >>> classifier("A film with a heart.")
    [{'label': 'positive', 'score': 0.98, 'exit_layer': 3}]
    ```
    """

    def postprocess(self, model_outputs: ModelOutput, **kwargs: Any) -> dict[str, Any] | list[dict[str, Any]]:  # type: ignore[override]
        """Label(s) and score(s) of one text, each with the layer at which the text left."""
        scores = super().postprocess(model_outputs, **kwargs)
        exit_layer = int(model_outputs["exit_layers"][0])
        if isinstance(scores, dict):
            return {**scores, "exit_layer": exit_layer}
        return [{**score, "exit_layer": exit_layer} for score in scores]


@cache
def _tokenizer_arguments(tokenizer_class: type) -> frozenset[str]:
    """Names that a tokenizer takes beside the texts; its own may stand in a method behind `__call__`."""
    methods = [getattr(tokenizer_class, name, None) for name in ("__call__", "_encode_plus")]
    return frozenset(name for method in methods if method is not None for name in _arguments(method))


@cache
def _arguments(method: Callable) -> tuple[str, ...]:
    # Without `self` and whatever else is dropped.
    parameters = list(inspect.signature(method).parameters.values())[1:]
    return tuple(one.name for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD))


__all__ = [
    "EarlyExitTextClassificationPipeline",
    "ExitFeatureExtractionPipeline",
    "ExitImageClassificationPipeline",
    "ExitImageFeatureExtractionPipeline",
    "ExitTextClassificationPipeline",
    "ExitZeroShotClassificationPipeline",
]
