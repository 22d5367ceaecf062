# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Evaluates one trained run of the comparison: every exit criterion on the same stored exits, thresholds from dev,
figures from test. See compare.py."""

from __future__ import annotations

import copy
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from calibration_coverage import write_scores
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    set_seed,
)

from transformers_cee import ConsistentEETrainingArguments
from transformers_cee.evaluation.comparison import Comparison, compare_criteria, time_points
from transformers_cee.evaluation.operating_points import full_depth_point
from transformers_cee.evaluation.overthinking import overthinking
from transformers_cee.evaluation.reliability import exit_reliability
from transformers_cee.exits.criteria import CRITERIA, CriterionSettings
from transformers_cee.exits.deciding import criterion_settings
from transformers_cee.exits.estimators import ESTIMATORS
from transformers_cee.exits.policy import ExitPolicies, make_policies
from transformers_cee.stores.scoring import score_exits
from transformers_cee.stores.store import ExitStore
from transformers_cee.training.estimators import TOKEN_HASH, fit_estimators, fit_token_hash
from transformers_cee.training.hardness import memorized_layers
from transformers_cee.training.policy_phase import StoredRewards, run_policy_phase


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from arguments import parse_arguments
from baselines import settings_for
from glue_data import Corpus, load_corpus, make_compute_metrics
from run_glue_cee import tokenize


SPLITS = ("train", "validation", "test")
# The oracle is a line of its own; policies come under `policy` and `policies_by_alpha`.
NOT_COMPARED = ("policy", "oracle")
# Metrics are reported at these layer speed-ups, and curves have so many points.
SPEEDUPS = (1.2, 1.5, 2.0, 3.0, 4.0)
CURVE_POINTS = 23
# Criteria that are timed at one of them, on some rows of test, in batches of these sizes.
TIMED = ("policy", "max_probability")
TIMED_SPEEDUP, TIMED_ROWS, TIMED_BATCHES = 2.0, 32, (1, 32)
# Criteria whose scores are kept for trials of calibration.
CALIBRATED = ("policy", "max_probability")


@dataclass
class Evaluation:
    """A trained run, ready to be evaluated.

    Args:
        model: the early-exit model.
        corpus: its data, for the metric and the notes.
        splits: token ids of the rows of each split.
        stores: every exit's states and logits of each split.
        arguments: those that the run was trained with.
        collator: makes padded batches.
    """

    model: PreTrainedModel
    corpus: Corpus
    splits: Any
    stores: dict[str, ExitStore]
    arguments: ConsistentEETrainingArguments
    collator: DataCollatorWithPadding

    @classmethod
    def load(cls, folder: Path, words: Sequence[str]) -> Evaluation:
        """From a model folder and the options that it was trained with."""
        _, data_args, _, training_args = parse_arguments(list(words))
        corpus = load_corpus(data_args)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        splits = tokenize(corpus, tokenizer, data_args.max_seq_length)
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        stores = {name: ExitStore.load(folder / f"exits-{name}.safetensors") for name in SPLITS}
        fit_token_hash(model, splits["train"]["input_ids"], tokenizer.all_special_ids)
        return cls(model, corpus, splits, stores, training_args, DataCollatorWithPadding(tokenizer))

    def settings(self, split: str, rows: Tensor | None = None) -> CriterionSettings:
        """What criteria need besides, for the rows of a split, or some of them."""
        chosen = self.splits[split] if rows is None else self.splits[split].select(rows.tolist())
        return settings_for(self.model, chosen["input_ids"])

    def policies_at(self, alphas: Sequence[float]) -> dict[float, ExitPolicies]:
        """Policies trained apart, one set per price of a layer, on the stored training rows."""
        store, config, args = self.stores["train"], copy.copy(self.model.config), self.arguments
        config.policy_condition = "none"
        memorized = memorized_layers(store.correct, store.layers)
        family = {}
        for alpha in alphas:
            set_seed(args.seed)
            policies = make_policies(config, store.layers.tolist())
            rewards = StoredRewards.of(
                store, memorized, config, reward=args.reward, loss=args.reward_loss, alpha=alpha
            )
            self.train_policies(policies, rewards)
            family[alpha] = policies.eval()
        return family

    def conditioned_policies(self, store: ExitStore) -> ExitPolicies:
        """Policies for all prices, trained on stored rows."""
        config, args = self.model.config, self.arguments
        set_seed(args.seed)
        policies = make_policies(config, store.layers.tolist())
        memorized = memorized_layers(store.correct, store.layers)
        named = {"reward": args.reward, "loss": args.reward_loss}
        rewards = StoredRewards.of(store, memorized, config, is_conditioned=True, **named)
        self.train_policies(policies, rewards)
        return policies.eval()

    def train_policies(self, policies: ExitPolicies, rewards: StoredRewards) -> None:
        args = copy.copy(self.arguments)
        args.disable_tqdm, args.logging_steps, args.report_to = True, 10**9, []
        with tempfile.TemporaryDirectory() as folder:
            run_policy_phase(policies.train(), args, folder, rewards, {}, exit_threshold=0.5)

    def compare(self, alphas: Sequence[float], criteria: Sequence[str]) -> tuple[Comparison, dict[str, float]]:
        """Criteria on test, thresholds and estimators from dev; and the estimators' losses."""
        fitted = self.fit(criteria, self.stores["validation"])
        depths = torch.linspace(1, self.layers, CURVE_POINTS).tolist() + self.depths
        comparison = self.compared(
            criteria,
            (self.stores["validation"], self.stores["test"]),
            (self.settings("validation"), self.settings("test")),
            sorted(set(depths)),
            more_policies={"policies_by_alpha": self.policies_at(alphas)} if alphas else None,
        )
        return comparison, fitted

    def on_dev(self, criteria: Sequence[str]) -> dict[str, dict[str, float | None]]:
        """Metric on dev at the reported speed-ups, by criterion, which chooses between methods: estimators, prices and
        thresholds come from one half of the rows and figures from the other, in turn."""
        order = torch.randperm(len(self.stores["validation"]), generator=torch.Generator().manual_seed(0))
        halves = order.tensor_split(2)
        found = [self._judged(criteria, *ways).matched for ways in (halves, halves[::-1])] if criteria else [{}]
        return {
            name: {
                str(speedup): _mean([one[name][depth] for one in found])
                for speedup, depth in zip(SPEEDUPS, self.depths, strict=True)
            }
            for name in found[0]
        }

    def _judged(self, criteria: Sequence[str], fitted_on: Tensor, judged_on: Tensor) -> Comparison:
        """Criteria on some rows of dev, fitted on others."""
        stores = [self.stores["validation"].select(rows) for rows in (fitted_on, judged_on)]
        self.fit(criteria, stores[0])
        settings = [self.settings("validation", rows) for rows in (fitted_on, judged_on)]
        return self.compared(criteria, tuple(stores), tuple(settings), self.depths)

    def fit(self, criteria: Sequence[str], store: ExitStore) -> dict[str, float]:
        """Gives the model estimators for all criteria that have some, if any are asked; returns their losses."""
        return fit_estimators(
            self.model, store, [name for name in ESTIMATORS if name != TOKEN_HASH] if criteria else []
        )

    def compared(
        self,
        criteria: Sequence[str],
        stores: tuple[ExitStore, ExitStore],
        settings: tuple[CriterionSettings, CriterionSettings],
        depths: Sequence[float],
        **more: Any,
    ) -> Comparison:
        """`compare_criteria` of this run."""
        policies, metrics = self.model.exit_policies, make_compute_metrics(self.corpus.metrics)
        metric = self.corpus.metrics[0]
        return compare_criteria(criteria, *stores, policies, metrics, metric, depths, settings=settings, **more)

    @property
    def layers(self) -> int:
        return self.model.config.num_hidden_layers

    @property
    def depths(self) -> list[float]:
        """Mean exit layers that have the reported speed-ups."""
        return [self.layers / speedup for speedup in SPEEDUPS]

    def time(self, comparison: Comparison) -> dict[str, dict[str, dict[str, float | None]]]:
        """Layer and wall-clock speed-up as executed, by criterion and batch size, at the point of the curve that is
        nearest to the timed layer speed-up; None of what is noise."""
        depth = self.layers / TIMED_SPEEDUP
        points = [
            min(comparison.curves[name], key=lambda point: abs(point.depth - depth))
            for name in TIMED
            if comparison.curves.get(name)
        ]
        chosen = self.splits["test"].shuffle(seed=0)
        chosen = chosen.select(range(min(TIMED_ROWS, len(chosen)))).remove_columns("labels")
        found: dict[str, dict[str, dict[str, float | None]]] = {point.criterion: {} for point in points}
        for batch_size in TIMED_BATCHES if points else ():
            loader = DataLoader(chosen, batch_size, collate_fn=self.collator)
            for point in time_points(self.model, list(loader), points):
                found[point.criterion][str(batch_size)] = {
                    "layers": point.layer_speedup,
                    "wall_clock": point.wall_clock_speedup,
                    "wall_clock_spread": point.wall_clock_spread,
                    "noisy_wall_clock": point.noisy_wall_clock_speedup,
                }
        return found


def _mean(values: Sequence[float | None]) -> float | None:
    """Mean of numbers; None where one is missing."""
    known = [value for value in values if value is not None]
    return statistics.mean(known) if len(known) == len(values) else None


def evaluate_run(
    folder: Path, words: Sequence[str], alphas: Sequence[float], criteria: Sequence[str] | None = None
) -> dict[str, Any]:
    """Everything that is reported of one run, ready for JSON.

    Args:
        folder: model folder with the exits of all splits.
        words: options of `run_glue_cee.py` that it was trained with.
        alphas: prices of a layer for which policies are trained apart; none for none.
        criteria: which exit criteria; all by default.
    """
    if criteria is None:
        criteria = ["policy", *(name for name in CRITERIA if name not in NOT_COMPARED)]
    run = Evaluation.load(folder, words)
    metric, layers = run.corpus.metrics[0], run.layers
    # What is judged on halves of dev is fitted anew for test.
    on_dev = run.on_dev(criteria)
    comparison, fitted = run.compare(alphas, criteria)
    test = run.stores["test"]
    return {
        "metric": metric,
        "num_layers": layers,
        "rows": {name: len(store) for name, store in run.stores.items()},
        "notes": run.corpus.notes,
        "full": comparison.full.metrics[metric],
        "oracle": {"metric": comparison.oracle.metrics[metric], "depth": comparison.oracle.depth},
        "exits": [point.metrics[metric] for point in comparison.exits],
        "at_speedup": {
            name: {str(speedup): found[layers / speedup] for speedup in SPEEDUPS}
            for name, found in comparison.matched.items()
        },
        "on_dev": on_dev,
        "full_on_dev": full_depth_point(run.stores["validation"], make_compute_metrics(run.corpus.metrics)).metrics[
            metric
        ],
        "curves": {
            name: [[point.depth, point.metrics[metric]] for point in curve]
            for name, curve in comparison.curves.items()
        },
        "timed": run.time(comparison),
        "threads": torch.get_num_threads(),
        "estimators": fitted,
        "overthinking": {
            name: value for name, value in asdict(overthinking(test.correct, test.layers)).items() if value is not None
        },
        "calibration_error": {
            str(layer): found.expected_calibration_error for layer, found in exit_reliability(test).items()
        },
    }


def write_held_out_scores(folder: Path) -> None:
    """Writes what `calibration_coverage.py` reads, `scores-CRITERION.safetensors`, on the rows of dev and test, of
    criteria that have learned from training rows at most.

    Args:
        folder: model folder with the exits of all splits.
    """
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    stores = [ExitStore.load(folder / f"exits-{split}.safetensors") for split in ("validation", "test")]
    for criterion in CALIBRATED:
        write_scores(
            folder / f"scores-{criterion}.safetensors",
            criterion,
            torch.cat(
                [score_exits(criterion, store, model.exit_policies, criterion_settings(model)) for store in stores]
            ),
            torch.cat([store.logits.argmax(-1) for store in stores]),  # type: ignore[union-attr]
            torch.cat([store.correct for store in stores]),
            stores[0].layers,
            f"{folder.name}, {criterion}",
        )
