# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The example script where checkpoints, data and what is installed differ from the usual."""

from __future__ import annotations

import json
import sys

import pytest
import run_glue_cee
import torch
from tiny_bert import QUESTIONS, make_options, questions, save_checkpoint, words, write_questions
from transformers import AutoTokenizer

from transformers_cee import BertForConsistentEE
from transformers_cee.exits.criteria import CRITERIA


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def train_file(tmp_path_factory):
    return write_questions(tmp_path_factory.mktemp("questions") / "train.csv")


@pytest.fixture(scope="module")
def trained(base, train_file, tmp_path_factory):
    """A checkpoint of the three classes that is right on test at full depth."""
    output = tmp_path_factory.mktemp("trained")
    options = make_options(base, train_file, output) | {"phases": ["heads"], "do_eval": False, "num_train_epochs": 6}
    run_glue_cee.main(words(options))
    return output


def evaluation(checkpoint, train_file, output, **more):
    """Words of an evaluation alone, as short as can be."""
    options = make_options(checkpoint, train_file, output) | {
        "do_train": False, "eval_timing_rows": 0, "baselines": ["max_probability"],
    }  # fmt: skip
    return words(options | more)


def accuracy(results):
    return results["comparisons"]["test"]["full"].metrics["accuracy"]


def save_with(folder, checkpoint, change):
    """A copy of a checkpoint whose model was changed."""
    model = BertForConsistentEE.from_pretrained(checkpoint)
    change(model)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reordered(trained, tmp_path_factory):
    """The same classifier with its classes in another order."""

    def change(model):
        names = [model.config.id2label[index] for index in range(3)]
        order = [2, 0, 1]
        state = model.state_dict()
        # Heads are the only tensors of three rows.
        changed = {name: value[order] for name, value in state.items() if value.shape[:1] == (3,)}
        assert len(changed) == 6
        model.load_state_dict({**state, **changed})
        model.config.id2label = {index: names[old] for index, old in enumerate(order)}
        model.config.label2id = {name: index for index, name in model.config.id2label.items()}

    return save_with(tmp_path_factory.mktemp("reordered"), trained, change)


class TestLabels:
    def test_a_checkpoint_with_its_labels_in_another_order(self, trained, reordered, train_file, tmp_path):
        before = run_glue_cee.main(evaluation(trained, train_file, tmp_path / "a"))
        after = run_glue_cee.main(evaluation(reordered, train_file, tmp_path / "b"))
        assert accuracy(before) > 0.9
        assert accuracy(after) == accuracy(before)
        assert any("human → human (1)" in note for note in after["corpus"]["notes"])
        config = json.loads((reordered / "config.json").read_text())
        assert config["id2label"]["1"] == "human", "the checkpoint is as it was"

    def test_training_goes_on_from_it(self, reordered, train_file, tmp_path):
        options = make_options(reordered, train_file, tmp_path) | {
            "do_eval": False, "phases": ["heads"], "learning_rate": 0.0, "num_train_epochs": 1,
        }  # fmt: skip
        run_glue_cee.main(words(options))
        after = BertForConsistentEE.from_pretrained(tmp_path)
        assert after.config.label2id == {"human": 1, "location": 2, "number": 0}
        results = run_glue_cee.main(evaluation(tmp_path, train_file, tmp_path / "eval"))
        assert accuracy(results) > 0.9

    def test_other_labels_are_not_evaluated(self, trained, tmp_path):
        path = tmp_path / "rows.csv"
        path.write_text("text,label\n" + "".join(f"who ?,{'xyz'[index % 3]}\n" for index in range(30)))
        with pytest.raises(
            ValueError, match="knows the labels human, location, number; those of the data are x, y, z"
        ):
            run_glue_cee.main(evaluation(trained, path, tmp_path))

    def test_another_number_of_classes_needs_leave_and_is_said(self, train_file, trained, tmp_path):
        two = write_questions(tmp_path / "two.csv", ["human", "location"])
        base = trained.parent / "two-classes"
        options = make_options(trained, two, base) | {
            "phases": ["heads"], "do_eval": False, "num_train_epochs": 1,
        }  # fmt: skip
        run_glue_cee.main(words(options | {"model_name_or_path": str(trained)}))
        assert BertForConsistentEE.from_pretrained(base).config.num_labels == 3, "classes that the checkpoint knows"

        def halve(model):
            model.config.id2label = {0: "yes", 1: "no"}
            model.config.label2id = {"yes": 0, "no": 1}
            for name, value in list(model.named_parameters()):
                if value.shape[:1] == (3,):
                    owner, _, last = name.rpartition(".")
                    owner = model.get_submodule(owner) if owner else model
                    setattr(owner, last, torch.nn.Parameter(value[:2].detach().clone()))

        checkpoint = save_with(tmp_path / "checkpoint", trained, halve)
        options = make_options(checkpoint, train_file, tmp_path / "out") | {"phases": ["heads"], "num_train_epochs": 6}
        with pytest.raises(
            ValueError, match=r"heads are for yes, no, the data has human, location, number\. Pass `--ign"
        ):
            run_glue_cee.main(words(options))
        results = run_glue_cee.main(words(options | {"ignore_mismatched_sizes": True}))
        assert any("classifier and exit heads start anew" in note for note in results["corpus"]["notes"])
        assert accuracy(results) > 0.6
        saved = BertForConsistentEE.from_pretrained(tmp_path / "out")
        assert saved.config.id2label == dict(enumerate(sorted(QUESTIONS)))

    def test_several_labels_per_row(self, base, tmp_path):
        path = tmp_path / "rows.jsonl"
        rows = [{"text": text, "label": [label] + (["any"] if "who" in text else [])} for text, label in questions()]
        path.write_text("\n".join(map(json.dumps, rows)))
        options = make_options(base, path, tmp_path / "out") | {"num_train_epochs": 6, "eval_timing_rows": 0}
        results = run_glue_cee.main(words(options | {"phases": ["heads", "hardness", "policy"]}))
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["problem_type"] == "multi_label_classification"
        full = results["comparisons"]["test"]["full"].metrics
        assert set(full) == {"f1_micro", "accuracy"}
        assert full["f1_micro"] > 0.9
        assert "(logits > 0)" in (tmp_path / "out" / "README.md").read_text()


class TestEvaluation:
    def test_a_named_operating_point_as_the_default(self, trained, train_file, tmp_path):
        def change(model):
            point = {"criterion": "max_probability", "thresholds": [0.4, 0.5, 0.0]}
            model.config.exit_operating_points = {"fast <b>": point}
            model.config.exit_threshold = "fast <b>"

        checkpoint = save_with(tmp_path / "checkpoint", trained, change)
        results = run_glue_cee.main(evaluation(checkpoint, train_file, tmp_path / "out", baselines=["entropy"]))
        curve = results["comparisons"]["test"]["curves"]["max_probability"]
        assert "fast <b>" in [point.exit_threshold for point in curve]
        card = (tmp_path / "out" / "README.md").read_text()
        assert "fast &lt;b&gt;" in card
        assert "| fast <b> |" not in card

    def test_every_baseline_is_fitted_or_needs_nothing(self, trained, train_file, tmp_path):
        baselines = sorted(set(CRITERIA) - {"policy", "oracle"})
        results = run_glue_cee.main(
            evaluation(trained, train_file, tmp_path, baselines=baselines, eval_timing_rows=4, timing_batch_sizes=[4])
        )
        assert set(results["comparisons"]["test"]["curves"]) == {"policy", *baselines}

    def test_more_tokens_than_positions(self, trained, train_file, tmp_path, capsys):
        rows = train_file.read_text().replace("river", "river " * 60)
        path = tmp_path / "long.csv"
        path.write_text(rows)
        run_glue_cee.main(evaluation(trained, path, tmp_path / "out", max_seq_length=512))
        assert "--max_seq_length 512 is more than the model's 32 positions; 32 is used." in capsys.readouterr().out

    def test_more_layers_than_the_checkpoint_has(self, trained, train_file, tmp_path):
        with pytest.raises(ValueError, match=r"`num_hidden_layers`=6, but .* has the weights of 3 layers"):
            run_glue_cee.main(evaluation(trained, train_file, tmp_path, num_hidden_layers=6))

    def test_a_damaged_record_is_written_anew(self, trained, train_file, tmp_path, capsys):
        (tmp_path / "results.json").write_text('{"train": {"heads"')
        results = run_glue_cee.main(evaluation(trained, train_file, tmp_path))
        assert "results.json cannot be read as JSON" in capsys.readouterr().out
        assert "train" not in results
        assert json.loads((tmp_path / "results.json").read_text())["comparisons"]

    def test_an_evaluation_alone_keeps_what_training_wrote(self, trained, train_file, tmp_path):
        (tmp_path / "results.json").write_text('{"train": {"heads": {"loss": 1}}, "train_seconds": 3.5, "timing": 1}')
        results = run_glue_cee.main(evaluation(trained, train_file, tmp_path))
        assert (results["train_seconds"], results["train"]) == (3.5, {"heads": {"loss": 1}})


class TestPictures:
    def test_without_matplotlib_everything_else_is_there(self, trained, train_file, tmp_path, capsys, monkeypatch):
        for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        results = run_glue_cee.main(evaluation(trained, train_file, tmp_path))
        told = capsys.readouterr().out
        assert told.index("No pictures will be drawn: matplotlib is missing") < told.index("{'train': 36")
        assert json.loads((tmp_path / "results.json").read_text())["comparisons"].keys() == {"test"}
        assert results["comparisons"]
        assert "curve.png" not in (tmp_path / "README.md").read_text()
        assert not list(tmp_path.glob("*.png"))

    def test_results_and_card_come_first(self, trained, train_file, tmp_path, monkeypatch):
        def fail(*arguments, **options):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(run_glue_cee, "plot_curves", fail)
        with pytest.raises(OSError, match="No space left"):
            run_glue_cee.main(evaluation(trained, train_file, tmp_path))
        results = json.loads((tmp_path / "results.json").read_text())
        assert {"comparisons", "executed", "timing"} <= results.keys()
        assert (tmp_path / "README.md").is_file()

    def test_dollar_signs_are_no_formula(self, trained, tmp_path):
        run_glue_cee.main(evaluation(trained, write_questions(tmp_path / "a $\\frac$ b.csv"), tmp_path / "out"))
        assert (tmp_path / "out" / "curve.png").is_file()


class TestCard:
    def test_language_is_what_is_known(self, trained, train_file, tmp_path):
        run_glue_cee.main(evaluation(trained, train_file, tmp_path))
        assert "language:" not in (tmp_path / "README.md").read_text()
        run_glue_cee.main(evaluation(trained, train_file, tmp_path, language="de"))
        assert "language: de" in (tmp_path / "README.md").read_text()
        # The card of the checkpoint says it.
        run_glue_cee.main(evaluation(tmp_path, train_file, tmp_path / "next", model_name_or_path=str(trained)))
        assert "language:" not in (tmp_path / "next" / "README.md").read_text()
        (trained / "README.md").write_text("---\nlanguage:\n- fr\n- nl\n---\n# A card\n")
        try:
            run_glue_cee.main(evaluation(trained, train_file, tmp_path / "more"))
        finally:
            (trained / "README.md").unlink()
        assert "language:\n- fr\n- nl" in (tmp_path / "more" / "README.md").read_text()

    def test_names_show_as_they_are(self, trained, tmp_path):
        path = write_questions(tmp_path / "<img src=x> [a](b) | c.csv")
        run_glue_cee.main(evaluation(trained, path, tmp_path / "out"))
        card = (tmp_path / "out" / "README.md").read_text()
        assert "&lt;img src=x&gt; \\[a\\](b) \\| c" in card
        assert "<img" not in card.partition("\n# ")[2]
