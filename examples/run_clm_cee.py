# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Gives a decoder exits, trains them on instructions, summaries or plain text, measures its answers and its speed.

    python examples/run_clm_cee.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --do_train --do_eval \\
        --dataset_name tatsu-lab/alpaca --output_dir runs/alpaca --trainable exits --exit_layers 10 15 20 25
    python examples/run_clm_cee.py examples/configs/demo_llm.yaml --seed 1

Options are those of `clm_arguments.LanguageModelArguments`, `clm_arguments.GenerationArguments`,
`clm_data.TextArguments` and `ConsistentEETrainingArguments`. They may come from a .yaml or .json file; options after
the file name override it. As in run_clm.py of 🤗 Transformers, `--do_train` and `--do_eval` say what is done.

ConsistentEE and the baselines share one model and its heads. Their thresholds are picked on dev, on known text, for
the same depths. Figures on test come from answers that were really generated with these thresholds, and speed from
answering in turn with the full model. Agreement and perplexity are taken on known text, with exits. `results.json` is
written after each operating point.
"""

import json
import logging
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from baselines import check_fitted, fit_criteria
from clm_arguments import (
    LM_EXIT_FIELDS,
    LanguageModelArguments,
    LMArguments,
    parse_arguments,
)
from clm_data import TextCorpus, load_text_corpus
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
    written_before,
)
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    set_seed,
)

from transformers_cee import CalibratedPoint, ConsistentEETrainer, calibrate_agreement, score_store
from transformers_cee.auto import has_exits, model_class_of
from transformers_cee.evaluation.environment import installed_versions, timing_environment
from transformers_cee.evaluation.exit_budget import budgets_for_depths
from transformers_cee.evaluation.generation import GenerationBenchmark, GenerationPoint
from transformers_cee.evaluation.generation_report import generation_table, plot_generation, setting_name, speed_table
from transformers_cee.evaluation.report import WALL_CLOCK_NOTE, method_name, write_results
from transformers_cee.evaluation.text_metrics import text_metrics
from transformers_cee.exits.deciding import criterion_settings
from transformers_cee.files import replacing
from transformers_cee.hub.generation_card import GenerationCard
from transformers_cee.hub.publishing import stalls_end
from transformers_cee.stores.scoring import score_exits, thresholds_for_depths
from transformers_cee.stores.store import ExitStore
from transformers_cee.training.least_squares import fit_exit_heads


logger = logging.getLogger("run_clm_cee")

CARD_ARGUMENTS = (
    "phases",
    "trainable",
    "token_loss",
    "heads_objective",
    "learning_rate",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
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
RESULTS = "results.json"
CURVE = "curve.png"
CURVE_METRICS = ("agreement", "rougeL")


def load_tokenizer(args: LanguageModelArguments) -> Any:
    """The tokenizer, with a padding token."""
    gguf = {"gguf_file": args.gguf_file} if args.gguf_file and not args.tokenizer_name else {}
    tokenizer = AutoTokenizer.from_pretrained(
        args.tokenizer_name or args.model_name_or_path,
        cache_dir=args.cache_dir,
        revision=args.model_revision,
        **gguf,
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(args: LanguageModelArguments) -> Any:
    """The checkpoint's config with the exits that were asked for.

    Raises:
        ValueError: a checkpoint of an architecture that is given no exits; the message lists those that are.
    """
    name, source = args.model_name_or_path, _source(args)
    model_class = model_class_of(name, "AutoModelForCausalLM", **source)
    return model_class.config_class.from_pretrained(name, **source, **args.exit_options())


def _source(args: LanguageModelArguments) -> dict[str, Any]:
    source = {"cache_dir": args.cache_dir, "revision": args.model_revision}
    return source | ({"gguf_file": args.gguf_file} if args.gguf_file else {})


def load_model(args: LanguageModelArguments, config: Any, tokenizer: Any) -> PreTrainedModel:
    """The checkpoint with exits."""
    dtype = getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, config=config, dtype=dtype, **_source(args))
    for name in ("eos_token_id", "pad_token_id"):
        if getattr(model.generation_config, name) is None:
            setattr(model.generation_config, name, getattr(tokenizer, name))
    return model


def add_lora(model: PreTrainedModel, args: LanguageModelArguments, seed: int) -> Any:
    """LoRA matrices (Hu et al., 2022) inside the layers, in place; they and the exits are what is trained.

    Returns:
        The tuner, whose `merge_and_unload` turns the layers into plain ones again; None without `lora_r`.
    """
    if args.lora_r is None:
        return None
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    set_seed(seed)
    config = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha or 2 * args.lora_r,
        lora_dropout=args.lora_dropout,
        target_modules=args.lora_target_modules,
    )
    tuner = LoraModel(model, config, "default")
    for part in (model.exit_norms, model.exit_heads, model.exit_policies):
        part.requires_grad_(True)
    return tuner


def make_trainer(
    model: PreTrainedModel, tokenizer: Any, corpus: TextCorpus, arguments: LMArguments
) -> ConsistentEETrainer:
    return ConsistentEETrainer(
        model=model,
        args=arguments[3],
        train_dataset=corpus.splits["train"],
        eval_dataset=corpus.splits["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=training_callbacks(arguments[0].float32_matmul_precision, arguments[2].early_stopping_patience),
    )


def depths_of_deciding(dev: ExitStore, depths: list[float]) -> list[float]:
    """Mean exit layers of the tokens that may leave, which give the wanted ones over all tokens of an answer."""
    first, last = int(dev.layers[0]), int(dev.layers[-1])
    deciding = len(dev.deciding())
    stay = len(dev) - deciding
    return [max(first, (depth * len(dev) - last * stay) / max(1, deciding)) for depth in depths]


def pick_budgets(model: PreTrainedModel, dev: ExitStore, depths: list[float]) -> list[float]:
    """The budget for each wanted depth; it counts the tokens that may leave."""
    return budgets_for_depths(model.config.exit_budgets, depths_of_deciding(dev, depths), int(dev.layers[-1]))


def pick_thresholds(
    model: PreTrainedModel, dev: ExitStore, criteria: list[str], depths: list[float]
) -> dict[str, dict[float, float]]:
    """Per criterion, the threshold by wanted depth, from the exits of known dev text."""
    layers = dev.layers.tolist()
    deciding, wanted = dev.select(dev.deciding()), depths_of_deciding(dev, depths)
    settings, found = criterion_settings(model), {}
    for criterion in criteria:
        scores = score_exits(criterion, deciding, model.exit_policies, settings, heads=model.exit_logits)
        thresholds = thresholds_for_depths(criterion, scores, layers, wanted)
        found[criterion] = dict(zip(depths, thresholds, strict=True))
    return found


def certify(model: PreTrainedModel, dev: ExitStore, criterion: str, levels: list[float]) -> dict[str, CalibratedPoint]:
    """Operating points by name whose tokens agree with full depth as often as promised, kept in the model's config."""
    found = {}
    for level in levels:
        name = f"agreement-{level:g}"
        found[name] = calibrate_agreement(score_store(dev, criterion, model), 1 - level)
        found[name].save_to(model, name)
    return found


def make_benchmark(
    model: PreTrainedModel, tokenizer: Any, corpus: TextCorpus, arguments: LMArguments
) -> GenerationBenchmark:
    """The test prompts, ready to be answered."""
    args, training_args = arguments[2], arguments[3]
    prompts, answers = corpus.prompts_and_answers("test", args.max_eval_prompts)
    if corpus.is_plain:
        # A continuation is compared with as much of the text as it may be long.
        answers = [tokens[: args.max_new_tokens] for tokens in answers]

    def decode(rows: Any) -> list[str]:
        return tokenizer.batch_decode(rows, skip_special_tokens=True)

    return GenerationBenchmark(
        model,
        prompts,
        answers,
        decode,
        pad=tokenizer.pad_token_id,
        text_metrics=text_metrics(args.bertscore_model, args.bertscore_num_layers),
        max_new_tokens=args.max_new_tokens,
        batch_size=training_args.per_device_eval_batch_size,
        timing_batch_sizes=args.eval_batch_sizes,
        timing_prompts=args.timing_prompts,
        perplexity_tokens=args.perplexity_tokens,
        disable_tqdm=bool(training_args.disable_tqdm),
    )


def write_answers(benchmark: GenerationBenchmark, path: Path) -> None:
    """All answers so far, one prompt per line."""
    prompts = benchmark.decode(benchmark.prompts)
    with replacing(path) as beside, beside.open("w", encoding="utf-8") as lines:
        for number, (prompt, reference) in enumerate(zip(prompts, benchmark.references, strict=True)):
            answers = {" ".join(point): texts[number] for point, texts in benchmark.texts.items()}
            row = {"prompt": prompt, "reference": reference, "answers": answers}
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def evaluate(
    trainer: ConsistentEETrainer,
    tokenizer: Any,
    corpus: TextCorpus,
    arguments: LMArguments,
    results: dict[str, Any],
    draws: bool,
) -> None:
    """Measures all operating points into `results`, which is written after each, then writes the card and draws."""
    args, output = arguments[2], Path(trainer.args.output_dir)
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    depths = args.target_depths(model.layer_numbers)
    dev = trainer.collect_exits(corpus.splits["validation"], "validation")
    if not trainer.is_world_process_zero():
        return
    fit_criteria(model, args.criteria, dev, keep=not trainer.args.do_train)
    # Policies conditioned on the price of a layer have a budget for every depth, other criteria a threshold.
    by_budget = "policy" in args.criteria and model.exit_policies.is_conditioned
    budgets = pick_budgets(model, dev, depths) if by_budget else []
    thresholds = pick_thresholds(
        model, dev, [name for name in args.criteria if not (by_budget and name == "policy")], depths
    )
    promised = certify(model, dev, args.criteria[0], args.agreements)
    if promised:
        model.config.save_pretrained(output)
    del dev
    benchmark = make_benchmark(model, tokenizer, corpus, arguments)
    logger.info(f"Answering {len(benchmark.prompts)} test prompts, at most {args.max_new_tokens} tokens each.")
    full = benchmark.full_depth()
    curves: dict[str, list] = {}
    results |= {"thresholds": thresholds, "budgets": budgets, "full": full, "curves": curves}
    results |= {"timing": timing_note(benchmark, model), "environment": timing_environment(model.device)}
    points: list[tuple[str, Any, float | None]] = [("policy", None, budget) for budget in dict.fromkeys(budgets)]
    points += [(name, one, None) for name, found in thresholds.items() for one in dict.fromkeys(found.values())]
    points += [(args.criteria[0], one.thresholds, None) for one in promised.values() if one.reason is None]
    results["agreements"] = {name: one.to_dict() for name, one in promised.items()}
    for number, (criterion, threshold, budget) in enumerate(points, start=1):
        point = benchmark.measure(criterion, threshold) if budget is None else benchmark.measure_budget(budget)
        curves.setdefault(criterion, []).append(point)
        curves[criterion].sort(key=lambda one: one.depth)
        speed = f"speed-up {point.wall_clock.text()}"
        if "agreement" in point.metrics:
            speed += f", agreement {point.metrics['agreement']:.3f}"
        name = setting_name(criterion, threshold, budget)
        logger.info(f"{number}/{len(points)} {name}: depth {point.depth:.2f}, {speed}")
        write_results(results, output / RESULTS)
        write_answers(benchmark, output / "answers.jsonl")
    print_tables(corpus, results)
    write_card(corpus, results, arguments, model.config, CURVE if draws else None)
    if draws:
        methods = {method_name(name): curve for name, curve in curves.items()}
        title = f"{corpus.name}, {len(benchmark.prompts)} test prompts. {results['timing']}"
        plot_generation(methods, curve_metrics(results["curves"]), output / CURVE, full, title)


def curve_metrics(curves: dict[str, list[GenerationPoint]]) -> list[str]:
    """What is drawn; agreement with full depth on known text is not there where tokens that wait are `deferred`."""
    points = [point for curve in curves.values() for point in curve]
    names = [name for name in CURVE_METRICS if all(name in point.metrics for point in points)]
    return names if "agreement" in names else ["identical", *names]


def timing_note(benchmark: GenerationBenchmark, model: PreTrainedModel) -> str:
    threads = torch.get_num_threads()
    size = benchmark.timing_batch_sizes[0]
    where = f"{model.device.type}, {threads} thread{'s' if threads > 1 else ''}"
    return f"Timed on {len(benchmark.timed)} prompts, batch size {size} unless said otherwise, {where}."


def print_tables(corpus: TextCorpus, results: dict[str, Any]) -> None:
    points = [point for curve in results["curves"].values() for point in curve]
    print(f"\n{corpus.name}, test\n\n{generation_table([results['full'], *points])}")
    print(f"\nTokens per second (full depth in the same run)\n\n{speed_table(points)}\n\n{WALL_CLOCK_NOTE}")
    print("\n".join(["", *corpus.notes]))


def write_card(
    corpus: TextCorpus, results: dict[str, Any], arguments: LMArguments, config: Any, figure: str | None
) -> None:
    """README.md of the model folder, from what was measured."""
    model_args, data_args, _, training_args = arguments
    shown = next(iter(results["curves"].values()))
    shown = shown[len(shown) // 2]
    GenerationCard(
        model_name=Path(training_args.output_dir).name,
        repo_id=training_args.hub_model_id or training_args.output_dir,
        num_layers=config.num_hidden_layers,
        dataset_name=corpus.name,
        dataset_id=data_args.dataset_name,
        metric_name=curve_metrics(results["curves"])[0],
        curves=results["curves"],
        full_depth=results["full"],
        exit_layers=None if config.exit_layers is None else config.exit_layer_numbers,
        exit_threshold=config.exit_threshold,
        figure=figure,
        language=card_language(model_args.language, model_args.model_name_or_path),
        license=model_args.license,
        data_license=model_args.data_license,
        base_model=model_args.base_model or model_args.model_name_or_path,
        data_notes=" ".join(corpus.notes),
        timing=results["timing"],
        training_arguments={name: getattr(training_args, name) for name in CARD_ARGUMENTS}
        | {name: getattr(config, name) for name in LM_EXIT_FIELDS}
        | {name: getattr(model_args, name) for name in ("lora_r", "fit_heads_tokens") if getattr(model_args, name)},
        seeds=[training_args.seed],
        chat=corpus.prompt_format == "chat",
        usage=shown.exit_arguments,
    ).save(training_args.output_dir)


def fit_heads(trainer: ConsistentEETrainer, max_tokens: int) -> dict[int, float]:
    """Starts the exit heads in closed form, on training rows that the heads may see."""
    rows = trainer.train_dataset.select(trainer._split()[0].tolist()).shuffle(seed=trainer.args.seed)
    rows = rows.select_columns(["input_ids", "labels"])
    loader = DataLoader(rows, trainer.args.per_device_eval_batch_size, collate_fn=trainer.data_collator)
    model = trainer.accelerator.unwrap_model(trainer.model)
    tokens = sum(map(len, rows["input_ids"]))
    batches = -(-len(rows) * min(max_tokens, tokens) // (tokens * loader.batch_size))
    bar = tqdm(loader, desc="Fit heads", total=batches, disable=bool(trainer.args.disable_tqdm))
    explained = fit_exit_heads(model, bar, max_tokens=max_tokens)
    shares = ", ".join(f"{layer}: {share:.1%}" for layer, share in explained.items())
    logger.info(f"Exit heads fitted; explained variance of the last exit's states by exit layer: {shares}")
    return explained


def train(trainer: ConsistentEETrainer, tuner: Any, args: LanguageModelArguments, results: dict[str, Any]) -> None:
    """Runs the phases and saves the model, LoRA merged into it."""
    start = time.perf_counter()
    resume = resume_argument(trainer.args)
    # Without the phase `heads`, heads that the checkpoint has learned stay.
    begins = "heads" in trainer.args.phases or not has_exits(args.model_name_or_path, **_source(args))
    if args.fit_heads_tokens is not None and not begins:
        logger.info("--fit_heads_tokens is not used: the checkpoint has heads, and the phase heads is not asked for.")
    if args.fit_heads_tokens is not None and begins:
        if trainer.resumes(resume):
            results |= written_before(trainer.args, logger, "fitted_heads")
        else:
            # What would stop a phase later is said before this work, too.
            trainer.check_phases()
            results["fitted_heads"] = fit_heads(trainer, args.fit_heads_tokens)
            if trainer.is_world_process_zero():
                # A run that is resumed does not fit them again.
                write_results(results, Path(trainer.args.output_dir) / "results.json")
    steps = trainer.train(resume_from_checkpoint=resume).phases
    results["train"] = {name: step.metrics for name, step in steps.items() if hasattr(step, "metrics")}
    results["train_seconds"] = time.perf_counter() - start
    if tuner is not None:
        tuner.merge_and_unload()
    trainer.save_model()


@stalls_end()
def main(argv: list[str] | None = None) -> dict[str, Any]:
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    model_args, data_args, eval_args, training_args = arguments
    check_stages(training_args)
    if training_args.do_eval:
        # Asks for the libraries of the metrics before any work.
        text_metrics(eval_args.bertscore_model)
    # The folder is uploaded once, when everything is in it.
    pushes, training_args.push_to_hub = training_args.push_to_hub, False
    set_up_logging(logger, training_args)
    set_seed(training_args.seed)

    draws = training_args.do_eval and can_draw(logger)
    config = load_config(model_args)
    if training_args.do_eval:
        eval_args.target_depths(config.exit_layer_numbers)
        check_fitted("criteria", eval_args.criteria, config)
    tokenizer = load_tokenizer(model_args)
    data_args.limit_lengths(fitting_length(data_args.max_seq_length, tokenizer, config, logger))
    with training_args.main_process_first(desc="data"):
        corpus = load_text_corpus(data_args, tokenizer)
    sizes = {name: len(rows) for name, rows in corpus.splits.items()}
    tokens = {name: sum(map(len, rows["input_ids"])) for name, rows in corpus.splits.items()}
    logger.info(f"{corpus.name}: rows {sizes}, tokens {tokens}. {' '.join(corpus.notes)}")
    model = load_model(model_args, config, tokenizer)
    tuner = add_lora(model, model_args, training_args.seed) if training_args.do_train else None
    trainer = make_trainer(model, tokenizer, corpus, arguments)

    results: dict[str, Any] = earlier_training(training_args, logger)
    results["corpus"] = vars(corpus) | {"splits": sizes, "tokens": tokens}
    results["versions"] = installed_versions()
    results["arguments"] = {name: value for part in arguments[:3] for name, value in asdict(part).items()}
    results["arguments"] |= training_args.to_sanitized_dict()
    if training_args.do_train:
        train(trainer, tuner, model_args, results)
    if trainer.is_world_process_zero():
        write_results(results, Path(training_args.output_dir) / RESULTS)
    if training_args.do_eval:
        evaluate(trainer, tokenizer, corpus, arguments, results, draws)
    if trainer.is_world_process_zero() and pushes:
        push(Path(training_args.output_dir), training_args)
    return results


if __name__ == "__main__":
    main()
