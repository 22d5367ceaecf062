# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Figures that compare generated texts with references: Rouge and BERTScore. Both libraries are optional."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


ROUGE_NAMES = ("rouge1", "rouge2", "rougeL")


def rouge(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean F1 of Rouge-1, Rouge-2 and Rouge-L (Lin, 2004), with stemming, in [0, 1].

    Raises:
        ImportError: rouge-score is missing; the message names the extra to install.
        ValueError: no texts, or not as many answers as references.
    """
    _check(answers, references)
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError(_missing("Rouge", "rouge-score")) from error
    scorer = RougeScorer(list(ROUGE_NAMES), use_stemmer=True)
    scores = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    return {name: sum(score[name].fmeasure for score in scores) / len(scores) for name in ROUGE_NAMES}


def bert_score(
    answers: Sequence[str], references: Sequence[str], model: str, num_layers: int | None = None, device: Any = None
) -> dict[str, float]:
    """Mean F1 of BERTScore (Zhang et al., 2020), without rescaling: figures of different encoders do not compare.

    Args:
        answers: generated texts.
        references: texts to compare with.
        model: folder or Hub name of the encoder.
        num_layers: layer of the encoder whose states are compared; by default the last.
        device: where the encoder runs.

    Raises:
        ImportError: bert-score is missing; the message names the extra to install.
        ValueError: no texts, or not as many answers as references.
    """
    _check(answers, references)
    try:
        from bert_score import score
    except ImportError as error:
        raise ImportError(_missing("BERTScore", "bert-score")) from error
    from transformers import AutoConfig

    layers = AutoConfig.from_pretrained(model).num_hidden_layers if num_layers is None else num_layers
    _, _, f1 = score(list(answers), list(references), model_type=model, num_layers=layers, device=device)
    return {"bertscore": float(f1.mean())}


def text_metrics(
    bertscore_model: str | None = None, bertscore_num_layers: int | None = None
) -> Callable[[Sequence[str], Sequence[str]], dict[str, float]]:
    """A function of answers and references that gives Rouge and, with an encoder, BERTScore.

    Raises:
        ImportError: a library is missing. Raised here, before any text has been generated.
    """
    rouge(["a"], ["a"])
    if bertscore_model is None:
        return rouge
    try:
        import bert_score as _  # noqa: F401
    except ImportError as error:
        raise ImportError(_missing("BERTScore", "bert-score")) from error

    def both(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        return rouge(answers, references) | bert_score(answers, references, bertscore_model, bertscore_num_layers)

    return both


def _check(answers: Sequence[str], references: Sequence[str]) -> None:
    if not answers or len(answers) != len(references):
        raise ValueError(
            f"`answers` ({len(answers)}) and `references` ({len(references)}) must be as many, at least 1."
        )


def _missing(what: str, package: str) -> str:
    return f"{what} needs {package}, which is not installed: pip install 'transformers-cee[generation]'."
