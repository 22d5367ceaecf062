# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Fine-tunes an encoder with exits on GLUE or on your own files and measures accuracy against speed.

    python examples/run_glue_cee.py --model_name_or_path google-bert/bert-base-uncased --do_train --do_eval \\
        --task_name sst2 --output_dir runs/sst2 --exit_pooling mean --exit_norm layer_norm
    python examples/run_glue_cee.py examples/configs/demo.yaml --seed 1

Options are those of `arguments.ModelArguments`, `arguments.EvaluationArguments`, `glue_data.DataArguments` and
`ConsistentEETrainingArguments`. They may come from a .yaml or .json file; options after the file name override it.
As in run_glue.py of 🤗 Transformers, `--do_train` and `--do_eval` say what is done.

ConsistentEE and the baselines share one model and its heads. Their thresholds are picked on dev, for the same depths;
the figures come from test. Metrics and depths are computed from stored exits, wall-clock figures from runs in which
rows really leave the batch.
"""

import logging
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import torch
from arguments import EXIT_FIELDS, Arguments, EvaluationArguments, ModelArguments, parse_arguments
from baselines import fit_criteria, settings_for
from class_labels import match_labels
from common import (
    can_draw,
    card_language,
    check_stages,
    earlier_training,
    fitting_length,
    push,
    resume_argument,
    set_up_logging,
    training_callbacks,
)
from glue_data import Corpus, load_corpus, make_compute_metrics
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    set_seed,
)

from transformers_cee import ConsistentEETrainer
from transformers_cee.auto import model_class_of
from transformers_cee.evaluation.comparison import Comparison, compare_criteria, time_points
from transformers_cee.evaluation.environment import installed_versions, timing_environment
from transformers_cee.evaluation.plots import plot_curves, plot_exit_histogram
from transformers_cee.evaluation.report import (
    WALL_CLOCK_NOTE,
    matched_depth_table,
    method_name,
    operating_points_table,
    write_results,
)
from transformers_cee.exits.criteria import CRITERIA
from transformers_cee.exits.deciding import resolve_decision
from transformers_cee.hub.model_card import EarlyExitCard
from transformers_cee.hub.publishing import stalls_end


logger = logging.getLogger("run_glue_cee")

RESULTS = "results.json"
CURVE = "curve.png"
CARD_ARGUMENTS = (
    "phases",
    "heads_objective",
    "learning_rate",
    "exit_learning_rate",
    "num_train_epochs",
    "per_device_train_batch_size",
    "policy_learning_rate",
    "policy_num_train_epochs",
    "policy_gradient",
    "policy_holdout",
    "reward",
    "reward_loss",
    "consistent_num_rounds",
    "consistent_num_train_epochs",
    "consistent_objective",
)


def _source(args: ModelArguments) -> dict[str, Any]:
    return {"cache_dir": args.cache_dir, "revision": args.model_revision}


def load_config(args: ModelArguments) -> Any:
    """The checkpoint's config with the exits that were asked for.

    Raises:
        ValueError: a checkpoint of an architecture that is given no exits; the message lists those that are.
    """
    name, source = args.model_name_or_path, _source(args)
    model_class = model_class_of(name, "AutoModelForSequenceClassification", **source)
    config = model_class.config_class.from_pretrained(name, **source, **args.exit_options())
    if config.exit_threshold is None and config.exit_criterion == "policy":
        # Without a threshold in its config the model would leave at none of the exits that it learns here.
        config.exit_threshold = 0.5
    return config


def match_corpus(corpus: Corpus, config: Any, args: ModelArguments, trains: bool) -> bool:
    """Gives corpus and config the same classes, those of the checkpoint where it knows them; says what is new.

    Returns:
        Do the heads start anew, for another number of classes?
    """
    match = match_labels(corpus.label_names, corpus.problem_type, config, trains, args.ignore_mismatched_sizes)
    if match.note:
        corpus.notes.append(match.note)
    if match.is_new:
        # Fitted to the heads that go.
        if isinstance(config.exit_threshold, str):
            raise ValueError(
                f"`exit_threshold` of the checkpoint is the operating point {config.exit_threshold!r}, which holds "
                "for its own classes only; pass a number as `--exit_threshold`."
            )
        config.exit_estimators, config.exit_operating_points, config.exit_budgets = [], {}, []
        config.exit_budget = None
    if corpus.is_regression:
        config.num_labels = 1
    else:
        corpus.relabel(match.names, match.ids)
        config.id2label = dict(enumerate(match.names))
        config.label2id = {name: index for index, name in enumerate(match.names)}
    config.problem_type = corpus.problem_type
    return match.is_new


def load_model(args: ModelArguments, config: Any, new_heads: bool) -> PreTrainedModel:
    """The checkpoint with exits."""
    # Training needs float32 weights, also from a checkpoint saved in half precision; --bf16 and --fp16 autocast.
    return AutoModelForSequenceClassification.from_pretrained(
        args.model_name_or_path,
        config=config,
        dtype=torch.float32,
        ignore_mismatched_sizes=new_heads,
        **_source(args),
    )


def tokenize(corpus: Corpus, tokenizer: Any, max_length: int) -> datasets.DatasetDict:
    """Token ids instead of texts, unpadded: batches are padded to their own longest row."""

    def encode(rows: dict[str, list]) -> dict[str, list]:
        texts = [rows[column] for column in corpus.text_columns]
        return {**tokenizer(*texts, max_length=max_length, truncation=True), "labels": rows["label"]}

    texts_and_labels = corpus.splits["train"].column_names
    return corpus.splits.map(encode, batched=True, remove_columns=texts_and_labels, desc="Tokenize")


def compare_on_test(
    trainer: ConsistentEETrainer, splits: datasets.DatasetDict, corpus: Corpus, args: EvaluationArguments
) -> dict[str, Comparison]:
    """One comparison of the exit criteria per test split; thresholds come from dev."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    config, tokenizer = model.config, trainer.processing_class
    stores = {name: trainer.collect_exits(rows, name) for name, rows in splits.items() if name != "train"}
    dev = stores.pop("validation")
    family = trainer.train_policies_at(args.policies_at) if args.policies_at else {}
    baselines = [name for name in args.baselines if not (corpus.is_regression and CRITERIA[name].needs_classes)]
    left_out = [name for name in args.baselines if name not in baselines]
    if left_out:
        corpus.notes.append(f"regression has no class probabilities: {', '.join(left_out)} do not apply.")
    # What the model does when nothing is asked for; a named operating point brings criterion and thresholds.
    own = resolve_decision(config)
    criteria = list(dict.fromkeys(["policy", *baselines, own.criterion]))
    rows = splits["train"]["input_ids"]
    fit_criteria(model, criteria, dev, rows, tokenizer.all_special_ids, keep=not trainer.args.do_train)
    comparisons = {
        name: compare_criteria(
            criteria,
            dev,
            test,
            policies=model.exit_policies,
            metrics=trainer.compute_metrics,
            metric=corpus.metrics[0],
            depths=args.target_depths(config.num_hidden_layers),
            own=(own.criterion, own.threshold),
            more_policies={"policies_by_alpha": family} if family else None,
            settings=tuple(settings_for(model, splits[split]["input_ids"]) for split in ("validation", name)),
        )
        for name, test in stores.items()
    }
    if config.exit_budget is None and isinstance(config.exit_threshold, str):
        for comparison in comparisons.values():
            for point in comparison.curves[own.criterion]:
                if point.exit_threshold == own.threshold:
                    point.exit_threshold = config.exit_threshold
    return comparisons


def time_on_test(
    trainer: ConsistentEETrainer, rows: datasets.Dataset, comparison: Comparison, batch_sizes: list[int]
) -> dict[str, list]:
    """Executed points by batch size: all criteria at the first one, which the comparison then shows, and ConsistentEE
    at the others."""
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    rows = rows.shuffle(seed=trainer.args.seed).select(range(min(len(rows), trainer.args.eval_timing_rows)))
    timed = {}
    for batch_size in batch_sizes if len(rows) else ():
        points = comparison.curves["policy"]
        if batch_size == batch_sizes[0]:
            points = [
                point for name, curve in comparison.curves.items() if name != "policies_by_alpha" for point in curve
            ]
        loader = DataLoader(rows.remove_columns("labels"), batch_size, collate_fn=trainer.data_collator)
        batches = [{name: value.to(model.device) for name, value in batch.items()} for batch in loader]
        timed[str(batch_size)] = time_points(model, batches, points)
        if batch_size == batch_sizes[0]:
            comparison.full.wall_clock_speedup = 1.0
            for point, executed in zip(points, timed[str(batch_size)], strict=True):
                point.wall_clock = executed.wall_clock
    return timed


def print_tables(corpus: Corpus, comparisons: dict[str, Comparison], timed: dict[str, list], num_layers: int) -> None:
    for name, comparison in comparisons.items():
        curves = [point for curve in comparison.curves.values() for point in curve]
        points = [comparison.full, *curves, comparison.oracle]
        print(f"\n{corpus.name}, {name}\n\n{operating_points_table(points, corpus.metrics)}")
        print(f"\n{matched_depth_table(comparison.matched, corpus.metrics[0], num_layers)}")
    for batch_size, points in timed.items():
        points = [point for point in points if point.criterion == "policy"]
        print(f"\nExecuted, batch size {batch_size}, on the timed rows\n\n{operating_points_table(points, [])}")
    if timed:
        print(f"\n{WALL_CLOCK_NOTE}")
    print("\n".join(["", *corpus.notes]))


def write_card(
    corpus: Corpus,
    comparisons: dict[str, Comparison],
    timing: str | None,
    arguments: Arguments,
    config: Any,
    figure: str | None,
) -> None:
    """README.md of the model folder, from what was measured."""
    model_args, data_args, _, training_args = arguments
    comparison = comparisons["test"]
    examples = [list(corpus.splits["validation"][column][:2]) for column in corpus.text_columns]
    # Policies conditioned on the price of a layer are asked for a speed: the model's own, or half of the layers.
    budget = config.exit_budget if config.exit_budget is not None or not config.exit_budgets else 0.5
    in_glue = data_args.task_name is not None
    EarlyExitCard(
        model_name=Path(training_args.output_dir).name,
        repo_id=training_args.hub_model_id or training_args.output_dir,
        num_layers=config.num_hidden_layers,
        dataset_name=corpus.name,
        dataset_id="nyu-mll/glue" if in_glue else None,
        dataset_config=data_args.task_name,
        metric_name=corpus.metrics[0],
        curves=comparison.curves,
        other_sets={
            f"{name} rows": [other.full, *(point for curve in other.curves.values() for point in curve)]
            for name, other in comparisons.items()
            if name != "test"
        },
        full_depth=comparison.full,
        exit_layers=None if config.exit_layers is None else config.exit_layer_numbers,
        exit_threshold=config.exit_threshold,
        exit_budget=budget,
        figure=figure,
        base_model=model_args.base_model or model_args.model_name_or_path,
        data_notes=" ".join(corpus.notes),
        timing=timing,
        training_arguments={name: getattr(training_args, name) for name in CARD_ARGUMENTS}
        | {name: getattr(config, name) for name in EXIT_FIELDS},
        seeds=[training_args.seed],
        examples=examples[0] if len(examples) == 1 else list(zip(*examples, strict=True)),
        problem_type=corpus.problem_type,
        language=card_language(model_args.language, model_args.model_name_or_path, "en" if in_glue else None),
        license=model_args.license,
        data_license=model_args.data_license,
    ).save(training_args.output_dir)


def draw(corpus: Corpus, test: Comparison, timing: str | None, num_layers: int, folder: Path) -> None:
    """curve.png and exits.png."""
    curves = {method_name(name): curve for name, curve in test.curves.items()}
    title = f"{corpus.name}, test. {timing or ''}"
    plot_curves(curves, corpus.metrics[0], folder / CURVE, test.full, test.oracle, title)
    nearest = {name: min(curve, key=lambda point: abs(point.depth - num_layers / 2)) for name, curve in curves.items()}
    histograms = {f"{name}, depth {point.depth:.1f}": point.exit_histogram for name, point in nearest.items()}
    plot_exit_histogram(histograms, folder / "exits.png", f"{corpus.name}, test: exits at about half depth")


def evaluate(
    trainer: ConsistentEETrainer,
    splits: datasets.DatasetDict,
    corpus: Corpus,
    arguments: Arguments,
    results: dict[str, Any],
    draws: bool,
) -> None:
    """Compares and times into `results`, which is written after each, then writes the card and draws the pictures."""
    eval_args, output = arguments[2], Path(trainer.args.output_dir)
    config = trainer.accelerator.unwrap_model(trainer.model).config
    comparisons = compare_on_test(trainer, splits, corpus, eval_args)
    if not trainer.is_world_process_zero():
        return
    results["comparisons"] = {name: vars(comparison) for name, comparison in comparisons.items()}
    write_results(results, output / RESULTS)
    test = comparisons["test"]
    timed = time_on_test(trainer, splits["test"], test, eval_args.timing_batch_sizes)
    threads = torch.get_num_threads()
    hardware = f"{trainer.args.device.type}, {threads} thread{'s' if threads > 1 else ''}"
    rows = min(len(splits["test"]), trainer.args.eval_timing_rows)
    timing = f"Timed on {rows} test rows, batch size {eval_args.timing_batch_sizes[0]}, {hardware}." if timed else None
    results |= {"executed": timed, "timing": timing}
    if timed:
        results["environment"] = timing_environment(trainer.args.device)
    write_results(results, output / RESULTS)
    print_tables(corpus, comparisons, timed, config.num_hidden_layers)
    write_card(corpus, comparisons, timing, arguments, config, CURVE if draws else None)
    if draws:
        draw(corpus, test, timing, config.num_hidden_layers, output)


@stalls_end()
def main(argv: list[str] | None = None) -> dict[str, Any]:
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    model_args, data_args, eval_args, training_args = arguments
    check_stages(training_args)
    # The folder is uploaded once, when everything is in it.
    pushes, training_args.push_to_hub = training_args.push_to_hub, False
    set_up_logging(logger, training_args)
    draws = training_args.do_eval and can_draw(logger)
    set_seed(training_args.seed)

    with training_args.main_process_first(desc="data"):
        corpus = load_corpus(data_args)
        config = load_config(model_args)
        new_heads = match_corpus(corpus, config, model_args, training_args.do_train)
    sizes = {name: len(rows) for name, rows in corpus.splits.items()}
    logger.info(f"{corpus.name}: {sizes}. {' '.join(corpus.notes)}")
    tokenizer = AutoTokenizer.from_pretrained(
        model_args.tokenizer_name or model_args.model_name_or_path,
        cache_dir=model_args.cache_dir,
        revision=model_args.model_revision,
    )
    model = load_model(model_args, config, new_heads)
    max_length = fitting_length(data_args.max_seq_length, tokenizer, config, logger)
    with training_args.main_process_first(desc="tokenization"):
        splits = tokenize(corpus, tokenizer, max_length)

    trainer = ConsistentEETrainer(
        model=model,
        args=training_args,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=make_compute_metrics(corpus.metrics),
        callbacks=training_callbacks(model_args.float32_matmul_precision, eval_args.early_stopping_patience),
    )
    results: dict[str, Any] = earlier_training(training_args, logger)
    results |= {"corpus": vars(corpus) | {"splits": sizes}, "versions": installed_versions()}
    results["arguments"] = {name: value for part in arguments[:3] for name, value in asdict(part).items()}
    results["arguments"] |= training_args.to_sanitized_dict()
    output = Path(training_args.output_dir)
    if training_args.do_train:
        start = time.perf_counter()
        steps = trainer.train(resume_from_checkpoint=resume_argument(training_args)).phases
        results["train"] = {name: step.metrics for name, step in steps.items() if hasattr(step, "metrics")}
        results["train_seconds"] = time.perf_counter() - start
        trainer.save_model()
    if trainer.is_world_process_zero():
        write_results(results, output / RESULTS)
    if eval_args.save_exits:
        for name, rows in splits.items():
            store = trainer.collect_exits(rows, name)
            if trainer.is_world_process_zero():
                store.save(output / f"exits-{name}.safetensors")
    if training_args.do_eval:
        evaluate(trainer, splits, corpus, arguments, results, draws)
    if trainer.is_world_process_zero() and pushes:
        push(output, training_args)
    return results


if __name__ == "__main__":
    main()
