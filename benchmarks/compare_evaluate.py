# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Evaluates one trained run of the comparison: every exit criterion on the same stored exits, thresholds from dev,
figures from test. See compare.py."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments, set_seed

from transformers_cee import BertForConsistentEE
from transformers_cee.evaluation.comparison import Comparison, compare_criteria
from transformers_cee.evaluation.operating_points import OperatingPoint
from transformers_cee.evaluation.store import ExitStore
from transformers_cee.exits.criteria import CRITERIA, CriterionSettings
from transformers_cee.exits.deciding import criterion_settings
from transformers_cee.exits.estimators import ESTIMATORS
from transformers_cee.training.estimators import fit_estimators, fit_token_hash


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from arguments import parse_arguments  # noqa: E402
from glue_data import Corpus, load_corpus, make_compute_metrics  # noqa: E402
from run_glue_cee import tokenize  # noqa: E402


SPLITS = ("train", "validation", "test")
# The oracle is a line of its own, and policies come by names of their own.
NOT_COMPARED = ("policy", "oracle")
# Metrics are reported at these layer speed-ups, and curves have so many points.
SPEEDUPS = (1.2, 1.5, 2.0, 3.0, 4.0)
CURVE_POINTS = 23


def pad_tokens(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """`input_ids` and `attention_mask` (rows, time)."""
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows]).unsqueeze(1)
    return ids, (torch.arange(ids.shape[1]) < lengths).long()


@dataclass
class Evaluation:
    """A trained run, ready to be evaluated.

    Args:
        model: the early-exit model.
        corpus: its data, for the metric and the notes.
        tokens: token ids of the rows of each split.
        stores: every exit's states and logits of each split.
    """

    model: BertForConsistentEE
    corpus: Corpus
    tokens: dict[str, list[list[int]]]
    stores: dict[str, ExitStore]

    @classmethod
    def load(cls, folder: Path, words: Sequence[str]) -> Evaluation:
        """From a model folder and the options that it was trained with."""
        _, data_args, _, _ = parse_arguments(list(words))
        corpus = load_corpus(data_args)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        splits = tokenize(corpus, tokenizer, data_args.max_seq_length)
        model = BertForConsistentEE.from_pretrained(folder).eval()
        stores = {name: ExitStore.load(folder / f"exits-{name}.safetensors") for name in SPLITS}
        fit_token_hash(model, splits["train"]["input_ids"], tokenizer.all_special_ids)
        return cls(model, corpus, {name: splits[name]["input_ids"] for name in SPLITS}, stores)

    def settings(self, split: str) -> CriterionSettings:
        """What criteria need besides, for the rows of a split."""
        ids, mask = pad_tokens(self.tokens[split])
        return criterion_settings(self.model, input_ids=ids, attention_mask=mask)

    def compare(self, families: Mapping[str, Mapping[float, ExitPolicies]]) -> tuple[Comparison, dict[str, float]]:
        """All criteria on test, thresholds and estimators from dev; and the estimators' losses."""
        dev, test = self.stores["validation"], self.stores["test"]
        fitted = fit_estimators(self.model, dev, [name for name in ESTIMATORS if name != "token_hash"])
        layers = self.model.config.num_hidden_layers
        depths = torch.linspace(1, layers, CURVE_POINTS).tolist() + [layers / speedup for speedup in SPEEDUPS]
        metrics = make_compute_metrics(self.corpus.metrics)
        comparison = compare_criteria(
            ["policy", *(name for name in CRITERIA if name not in NOT_COMPARED)],
            dev,
            test,
            self.model.exit_policies,
            metrics,
            self.corpus.metrics[0],
            sorted(set(depths)),
            more_policies=families,
            settings=(self.settings("validation"), self.settings("test")),
        )
        return comparison, fitted
