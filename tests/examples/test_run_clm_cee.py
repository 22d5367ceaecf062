# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The language model script end to end, with a tiny random LLaMA on 40 generated rows."""

from __future__ import annotations

import json

import clm_arguments
import generate_demo
import pytest
import run_clm_cee
import torch
import yaml
from clm_arguments import GenerationArguments, LanguageModelArguments, parse_arguments
from clocks import steady_clock
from safetensors.torch import load_file
from tiny_lm import WORDS, instructions, save_checkpoint
from transformers import AutoModelForCausalLM


pytest.importorskip("rouge_score")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "tiny.json"
    path.write_text(json.dumps(instructions(40)))
    return path


def make_options(checkpoint, rows, output):
    return {
        "model_name_or_path": str(checkpoint),
        "base_model": "a tiny LLaMA",
        "train_file": str(rows),
        "validation_split": 0.2,
        "test_split": 0.2,
        "output_dir": str(output),
        "do_train": True,
        "do_eval": True,
        "exit_layers": [1, 2],
        "exit_head": "low_rank",
        "exit_head_rank": 4,
        "fit_heads_tokens": 100,
        "policy_inputs": "state",
        "trainable": "exits",
        "token_loss": "kl",
        "phases": ["heads", "hardness", "policy"],
        "max_seq_length": 32,
        "learning_rate": 1e-2,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 4,
        "policy_num_train_epochs": 2,
        "operating_points": 2,
        "max_eval_prompts": 4,
        "max_new_tokens": 5,
        "eval_batch_sizes": [1, 2],
        "timing_prompts": 2,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }


def words(options):
    """Options as command-line words."""
    made = []
    for name, value in options.items():
        made += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    return made


@pytest.fixture(scope="module")
def run(checkpoint, rows, tmp_path_factory):
    """(folder, results.json) of a run with frozen layers, from a yaml file and an override."""
    output = tmp_path_factory.mktemp("run")
    config = output / "config.yaml"
    config.write_text(yaml.safe_dump(make_options(checkpoint, rows, output) | {"seed": 1}))
    with pytest.MonkeyPatch.context() as patch:
        steady_clock(patch)
        run_clm_cee.main([str(config), "--seed", "2"])
    return output, json.loads((output / "results.json").read_text())


def test_phases_and_data_are_written_down(run):
    _, results = run
    assert list(results["train"]) == ["heads", "policy"]
    assert set(results["fitted_heads"]) == {"1", "2"}
    assert results["fitted_heads"]["1"] < results["fitted_heads"]["2"] < 1
    assert results["arguments"]["seed"] == 2
    assert results["corpus"]["splits"] == {"train": 24, "validation": 8, "test": 8}
    assert results["corpus"]["prompt_format"] == "chat"
    assert results["corpus"]["tokens"]["train"] > 24 * 8
    assert any(note.startswith("no test split: 8 of 40") for note in results["corpus"]["notes"])


def test_only_the_exits_were_trained(run, checkpoint):
    before, after = load_file(checkpoint / "model.safetensors"), load_file(run[0] / "model.safetensors")
    assert all(torch.equal(value, after[name]) for name, value in before.items() if name in after)
    assert {name.split(".")[0] for name in after} - {"model", "lm_head"} == {
        "exit_heads", "exit_norms", "exit_policies",
    }  # fmt: skip
    assert any(bool(after[name].any()) for name in after if name.endswith("up.weight"))


def test_a_drafter_and_promised_agreements(run, rows, tmp_path):
    options = make_options(run[0], rows, tmp_path) | {
        "phases": ["drafter"], "drafter_layer": 2, "drafter_vocab_size": 20, "drafter_fit_tokens": 50,
        "drafter_num_train_epochs": 2, "criteria": ["max_probability"], "operating_points": 1,
        "agreements": [0.05, 0.9999],
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch, pytest.warns(UserWarning, match="Exits are off"):
        steady_clock(patch)
        run_clm_cee.main(words(options))
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["train"]) == ["drafter"]
    kept, refused = (results["agreements"][name] for name in ("agreement-0.05", "agreement-0.9999"))
    assert kept["criterion"] == "max_probability" and "reason" not in kept and refused["reason"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert set(model.config.exit_operating_points) == {"agreement-0.05", "agreement-0.9999"}
    assert len(results["curves"]["max_probability"]) == 2
    ids = torch.tensor([[5, 6, 7, 5, 6]])
    named = model.generate(ids, exit_threshold="agreement-0.05", max_new_tokens=4)
    given = {"exit_threshold": kept["thresholds"], "exit_criterion": "max_probability"}
    assert torch.equal(named, model.generate(ids, max_new_tokens=4, **given))
    exact = model.generate(ids, exit_verify=True, max_new_tokens=4)
    assert torch.equal(exact, model.generate(ids, max_new_tokens=4))


def test_policies_alone_leave_the_heads_as_they_are(run, rows, tmp_path):
    """Options ask for fitted heads as before; the heads are those of the model that is continued."""
    options = make_options(run[0], rows, tmp_path) | {"phases": ["policy"], "do_eval": False}
    results = run_clm_cee.main(words(options))
    assert "fitted_heads" not in results
    before, after = load_file(run[0] / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name.split(".")[0] for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {"exit_policies"}


def test_new_heads_are_fitted_whatever_learns_afterwards(checkpoint, rows, tmp_path):
    options = make_options(checkpoint, rows, tmp_path) | {"phases": ["policy"], "do_eval": False}
    assert set(run_clm_cee.main(words(options))["fitted_heads"]) == {1, 2}


def test_a_resumed_run_fits_heads_where_nothing_was_trained(checkpoint, rows, tmp_path):
    """And only there: what a finished run found is kept."""
    options = make_options(checkpoint, rows, tmp_path / "whole") | {"do_eval": False}
    whole = run_clm_cee.main(words(options))
    resumed = options | {"output_dir": str(tmp_path / "resumed"), "resume_from_checkpoint": "true"}
    for _ in range(2):
        results = run_clm_cee.main(words(resumed))
        before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
        assert not [name for name, value in before.items() if not torch.equal(value, after[name])]
        written = json.loads((tmp_path / "resumed" / "results.json").read_text())
        assert written["fitted_heads"] == {str(layer): share for layer, share in whole["fitted_heads"].items()}
        assert {name: step["train_loss"] for name, step in results["train"].items()} == {
            name: step["train_loss"] for name, step in whole["train"].items()
        }


def test_every_criterion_is_measured_at_several_depths(run):
    _, results = run
    assert set(results["curves"]) == {"policy", "max_probability", "margin"}
    assert set(results["thresholds"]["policy"]) == {"2.0", "3.0"}
    full = results["full"]
    assert full["depth"] == 4
    assert full["metrics"]["agreement"] == 1
    for curve in results["curves"].values():
        assert 1 <= len(curve) <= 2
        assert [point["depth"] for point in curve] == sorted(point["depth"] for point in curve)
        for point in curve:
            assert {"rouge1", "rouge2", "rougeL", "perplexity", "agreement", "identical"} == set(point["metrics"])
            assert list(point["speeds"]) == ["1", "2"]
            assert point["speeds"]["1"]["tokens_per_second"] > 0
            assert point["wall_clock_speedup"] == point["speeds"]["1"]["speedup"]
            assert point["wall_clock_spread"] == point["speeds"]["1"]["spreads"]["speedup"] == 0.0
            assert point["peak_memory_mb"] > 0
    assert "Timed on 2 prompts, batch size 1" in results["timing"]


def test_the_folder_is_complete(run):
    output, results = run
    lines = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    points = sum(len(curve) for curve in results["curves"].values())
    assert len(lines[0]["answers"]) >= points
    assert "full depth 1.0" in lines[0]["answers"]
    card = (output / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card
    assert "a tiny LLaMA with early exits" in card
    assert "apply_chat_template" in card
    for name in ("curve.png", "config.json", "model.safetensors", "tokenizer_config.json"):
        assert (output / name).is_file()


def test_evaluation_alone_keeps_what_training_wrote(run, rows, checkpoint):
    output, before = run
    options = make_options(output, rows, output) | {"do_train": False, "criteria": ["margin"], "eval_depths": [3]}
    results = run_clm_cee.main(words(options))
    assert results["train_seconds"] == before["train_seconds"]
    assert list(results["curves"]) == ["margin"]
    assert results["full"].metrics == pytest.approx(before["full"]["metrics"])


def test_conditioned_policies_are_asked_for_budgets(checkpoint, rows, tmp_path):
    options = make_options(checkpoint, rows, tmp_path) | {
        "policy_condition": "film", "phases": ["policy"], "criteria": ["policy", "margin"],
    }  # fmt: skip
    results = run_clm_cee.main(words(options))
    assert results["thresholds"].keys() == {"margin"}
    curve = results["curves"]["policy"]
    assert {point.exit_budget for point in curve} == set(results["budgets"])
    # Tokens that may not leave take all layers, so that the others have less than the wanted half and three quarters.
    assert all(budget < wanted for budget, wanted in zip(results["budgets"], (0.5, 0.75), strict=True))
    assert f"exit_budget={curve[len(curve) // 2].exit_budget}" in (tmp_path / "README.md").read_text()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["exit_budgets"]


def test_results_survive_a_run_that_stops(checkpoint, rows, tmp_path, monkeypatch):
    measure = run_clm_cee.GenerationBenchmark.measure
    calls = []

    def stop(self, *arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(self, *arguments, **options)

    monkeypatch.setattr(run_clm_cee.GenerationBenchmark, "measure", stop)
    options = make_options(checkpoint, rows, tmp_path) | {
        "phases": ["policy"],
        "criteria": ["max_probability", "margin"],
    }
    with pytest.raises(KeyboardInterrupt):
        run_clm_cee.main(words(options))
    results = json.loads((tmp_path / "results.json").read_text())
    assert sum(len(curve) for curve in results["curves"].values()) == 1
    assert results["train"].keys() == {"policy"}


def test_lora_is_merged(checkpoint, rows, tmp_path):
    pytest.importorskip("peft")
    options = make_options(checkpoint, rows, tmp_path) | {
        "trainable": "all", "lora_r": 2, "token_loss": "ce", "phases": ["heads"], "do_eval": False,
    }  # fmt: skip
    run_clm_cee.main(words(options))
    before, after = load_file(checkpoint / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert set(before) <= set(after)
    assert not any("lora" in name or "base_layer" in name for name in after)
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {name for name in before if "q_proj" in name or "v_proj" in name}


def test_plain_text(checkpoint, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(" ".join(WORDS[index % 7 :]) for index in range(40)))
    options = make_options(checkpoint, text, tmp_path / "out") | {
        "text_prompt_length": 6, "criteria": ["policy"], "operating_points": 1, "eval_batch_sizes": [2],
    }  # fmt: skip
    results = run_clm_cee.main(words(options))
    assert results["corpus"]["is_plain"]
    # References are as long as the continuations.
    row = json.loads((tmp_path / "out" / "answers.jsonl").read_text().splitlines()[0])
    assert len(row["reference"].split()) == 5


def test_thresholds_hit_the_wanted_depths(run, rows):
    """On the known text that they were picked on."""
    output, _ = run
    arguments = parse_arguments(words(make_options(output, rows, output)))
    tokenizer = run_clm_cee.load_tokenizer(arguments[0])
    corpus = run_clm_cee.load_text_corpus(arguments[1], tokenizer)
    model = run_clm_cee.load_model(arguments[0], run_clm_cee.load_config(arguments[0]), tokenizer)
    trainer = run_clm_cee.make_trainer(model, tokenizer, corpus, arguments)
    dev = trainer.collect_exits(corpus.splits["validation"])
    found = run_clm_cee.pick_thresholds(model, dev, ["max_probability"], [2.0, 3.0])["max_probability"]
    scores = run_clm_cee.score_exits("max_probability", dev, heads=model.exit_logits)
    for wanted, threshold in found.items():
        leaves = torch.cat((scores > threshold, torch.ones(len(scores), 1, dtype=torch.bool)), dim=1)
        layers = torch.where(dev.may_exit, dev.layers[leaves.int().argmax(1)], 4)
        assert float(layers.float().mean()) == pytest.approx(wanted, abs=0.35)
    # Nothing leaves before `min_exit_layer`, and thresholds are picked accordingly.
    model.config.min_exit_layer = 2
    low = run_clm_cee.pick_thresholds(model, dev, ["max_probability"], [3.0])["max_probability"][3.0]
    leaves = torch.cat((scores[:, 1:] > low, torch.ones(len(scores), 1, dtype=torch.bool)), dim=1)
    layers = torch.where(dev.may_exit, dev.layers[1:][leaves.int().argmax(1)], 4)
    assert float(layers.float().mean()) == pytest.approx(3.0, abs=0.35)


def test_generate_demo_numbers_the_layers(run, capsys, monkeypatch):
    steady_clock(monkeypatch)
    output, _ = run
    generate_demo.main(["--model", str(output), "--prompt", "name two cats .", "--max_new_tokens", "4"])
    printed = capsys.readouterr().out
    assert "> name two cats ." in printed
    assert "[number]: the layer at which the token left, of 4" in printed
    assert "\nfull depth\n" in printed
    assert " tokens/s ± 0.0; full depth in turn: " in printed
    assert "\x1b[" not in printed
    generate_demo.main(["--model", str(output), "--exit_criterion", "margin", "--exit_threshold", "0"])
    assert "margin > 0: depth" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float8"}, "`dtype` must be among float32, bfloat16, float16; got 'float8'"),
        ({"float32_matmul_precision": "low"}, "`float32_matmul_precision` must be among highest, high, medium; got"),
        ({"lora_r": 0}, "`lora_r` must be at least 1; got 0"),
        ({"fit_heads_tokens": 0}, "`fit_heads_tokens` must be at least 1; got 0"),
        ({"gguf_file": "weights.bin"}, "`gguf_file` must end in .gguf; got 'weights.bin'"),
    ],
)
def test_bad_model_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        LanguageModelArguments(model_name_or_path="anything", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criteria": ["luck"]}, "`criteria` must be among .*policy.*; got 'luck'"),
        ({"criteria": []}, r"`criteria` must name at least one exit criterion; got \[\]"),
        ({"criteria": ["oracle"]}, "`criteria` must be among .*policy.*; got 'oracle'"),
        ({"operating_points": 0}, "`operating_points` must be at least 1; got 0"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1; got 0"),
        ({"eval_batch_sizes": []}, r"`eval_batch_sizes` must be numbers of at least 1; got \[\]"),
        ({"eval_depths": [0.5]}, r"`eval_depths` must be layers, 1 or more; got \[0.5\]"),
    ],
)
def test_bad_generation_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        GenerationArguments(**options)


def test_depths_lie_between_the_first_exit_and_the_last_layer():
    assert GenerationArguments(operating_points=3).target_depths([10, 20, 30]) == [15.0, 20.0, 25.0]
    assert GenerationArguments(eval_depths=[12.5]).target_depths([10, 20, 30]) == [12.5]
    with pytest.raises(ValueError, match=r"`eval_depths` must lie in 1..30; got \[31.0\]"):
        GenerationArguments(eval_depths=[31.0]).target_depths([10, 20, 30])


def test_lora_needs_layers_that_learn(checkpoint, rows, tmp_path):
    options = make_options(checkpoint, rows, tmp_path) | {"lora_r": 4}
    with pytest.raises(ValueError, match="`lora_r` needs `trainable` 'all'"):
        parse_arguments(words(options))


def test_nothing_to_do(checkpoint, rows, tmp_path):
    options = make_options(checkpoint, rows, tmp_path) | {"do_train": False, "do_eval": False}
    with pytest.raises(ValueError, match="Nothing to do"):
        run_clm_cee.main(words(options))


def test_exit_options_become_fields_of_the_config(checkpoint):
    arguments = LanguageModelArguments(
        model_name_or_path=str(checkpoint),
        exit_layers=[2],
        exit_threshold=[0.8],
        exit_head="norm",
        skipped_kv="deferred",
    )
    assert arguments.exit_options() == {
        "exit_layers": 2, "exit_threshold": 0.8, "exit_head": "norm", "skipped_kv": "deferred",
    }  # fmt: skip
    assert set(clm_arguments.LM_EXIT_FIELDS) >= set(arguments.exit_options())


def test_what_a_run_tells(run, rows, capsys):
    output, _ = run
    options = make_options(output, rows, output.parent / "told") | {
        "do_train": False, "criteria": ["margin"], "eval_depths": [3], "max_new_tokens": 2,
    }  # fmt: skip
    run_clm_cee.main(words(options))
    told = capsys.readouterr().out
    assert "rows {'train': 24, 'validation': 8, 'test': 8}" in told
    assert "no test split: 8 of 40 training rows (20%) taken for it, seed 42." in told
    assert "1/1 margin > " in told
    run_clm_cee.main([*words(options), "--log_level", "error"])
    assert "1/1 margin > " not in capsys.readouterr().out
