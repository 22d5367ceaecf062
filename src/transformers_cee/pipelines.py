# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Pipeline for text classification that takes the exit threshold and tells where each text left."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import TextClassificationPipeline
from transformers.utils import ModelOutput


class EarlyExitTextClassificationPipeline(TextClassificationPipeline):
    """Text classification with a model that has exits.

    It is [`~transformers.TextClassificationPipeline`] with three more arguments, given when the pipeline is made or
    per call, and one more key in each result: `exit_layer`, the layer (1-based) at which the text left. (The stock
    `"text-classification"` pipeline also runs these models, at the threshold of their config; it hands arguments it
    does not know to the tokenizer, which drops them silently.)

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
        ValueError: the model has no exits or is a language model, or the threshold, criterion or budget is not
            accepted by the model.

    Example:

    ```python
    >>> import transformers_cee
    >>> from transformers import pipeline

    >>> classifier = pipeline("early-exit-text-classification", model="org/bert-cee-sst2", exit_threshold=0.5)
    >>> classifier("A film with a heart.")
    [{'label': 'positive', 'score': 0.98, 'exit_layer': 3}]
    ```
    """

    def check_model_type(self, supported_models: list[str] | dict[str, Any]) -> None:
        """Raises `ValueError` unless the model takes an exit threshold and classifies."""
        if "exit_threshold" not in inspect.signature(self.model.forward).parameters:
            raise ValueError(
                f"`model` is a {type(self.model).__name__}, which has no exits; an early-exit model such as "
                "`BertForConsistentEE` is needed."
            )
        if getattr(self.model, "exits_per_token", False):
            raise ValueError(
                f"`model` is a {type(self.model).__name__}, which generates text; use the task 'text-generation', "
                "which takes `exit_threshold` as well."
            )

    def _sanitize_parameters(  # type: ignore[override]
        self,
        exit_threshold: float | list[float] | str | None = None,
        exit_criterion: str | None = None,
        exit_budget: float | None = None,
        **kwargs: Any,
    ) -> tuple[dict, dict, dict]:
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        given = {"exit_threshold": exit_threshold, "exit_criterion": exit_criterion, "exit_budget": exit_budget}
        forward = {**forward, **{name: value for name, value in given.items() if value is not None}}
        return preprocess, forward, postprocess

    def _forward(self, model_inputs: dict[str, Any], **exit_arguments: Any) -> ModelOutput:  # type: ignore[override]
        return self.model(**model_inputs, **exit_arguments)

    def postprocess(self, model_outputs: ModelOutput, **kwargs: Any) -> dict[str, Any] | list[dict[str, Any]]:  # type: ignore[override]
        """Label(s) and score(s) of one text, each with the layer at which the text left."""
        scores = super().postprocess(model_outputs, **kwargs)
        exit_layer = int(model_outputs["exit_layers"][0])
        if isinstance(scores, dict):
            return {**scores, "exit_layer": exit_layer}
        return [{**score, "exit_layer": exit_layer} for score in scores]


__all__ = ["EarlyExitTextClassificationPipeline"]
