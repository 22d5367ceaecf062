# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Every entry of the zoo has a recipe that its script takes, and a card whose figures are those of its results."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import build_zoo
import pytest
import run_add_exits
import run_image_cee
from arguments import EvaluationArguments, ModelArguments
from build_zoo import given_paths, lift, place, publish, read_recipe
from clm_arguments import GenerationArguments, LanguageModelArguments
from clm_data import TextArguments
from glue_data import DataArguments
from transformers import TrainingArguments

from transformers_cee import AddedExits, CertifiedSpeed, ConsistentEETrainingArguments, OperatingPoint
from transformers_cee.adding.report import measured
from transformers_cee.evaluation.generation import GenerationPoint
from transformers_cee.evaluation.generation_report import generation_table, speed_table
from transformers_cee.evaluation.report import operating_points_table
from transformers_cee.evaluation.speeds import Speed
from transformers_cee.evaluation.timing import Reported


CARDS = Path(__file__).parents[2] / "model_cards"
RECIPES = sorted(CARDS.glob("*.yaml"))
OPTIONS = {
    "run_glue_cee.py": (ModelArguments, DataArguments, EvaluationArguments, ConsistentEETrainingArguments),
    "run_clm_cee.py": (
        LanguageModelArguments,
        TextArguments,
        GenerationArguments,
        ConsistentEETrainingArguments,
    ),
    "run_image_cee.py": (run_image_cee.ImageArguments, ConsistentEETrainingArguments),
    "run_add_exits.py": (run_add_exits.AddArguments, DataArguments, TrainingArguments),
}


def points_of(rows):
    return [OperatingPoint(**row) for row in rows]


def of_encoders(results):
    found = results["comparisons"]["test"]
    points = points_of([found["full"], *(row for curve in found["curves"].values() for row in curve)])
    return [operating_points_table(points, results["corpus"]["metrics"]), results["timing"]]


def of_images(results):
    curves = run_image_cee.card_points(results)
    points = [point for curve in curves.values() for point in curve]
    return [operating_points_table(points, ["accuracy", "FLOPs"])]


def of_added_exits(results):
    speeds = [
        CertifiedSpeed(**{**one, "speedups": {size: Reported(*text) for size, text in one["speedups"].items()}})
        for one in results["speeds"]
    ]
    names = {field.name for field in fields(AddedExits)}
    return [measured(AddedExits(**{name: results[name] for name in names} | {"speeds": speeds}))]


def of_language_models(results):
    rows = [results["full"], *(row for curve in results["curves"].values() for row in curve)]
    points = [
        GenerationPoint(**{**row, "speeds": {size: Speed(**one) for size, one in row["speeds"].items()}})
        for row in rows
    ]
    return [generation_table(points), speed_table([point for point in points if point.speeds]), results["timing"]]


MEASURED = {
    "run_glue_cee.py": of_encoders,
    "run_clm_cee.py": of_language_models,
    "run_image_cee.py": of_images,
    "run_add_exits.py": of_added_exits,
}


def test_there_are_entries():
    assert len(RECIPES) >= 3
    assert {path.stem for path in RECIPES} == {path.stem for path in CARDS.glob("*.json")}
    # `make demo` writes a card, too.
    others = {"README", "bert-cee-trec-demo"}
    assert {path.stem for path in CARDS.glob("*.md")} == {path.stem for path in RECIPES} | others


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_options_are_those_of_the_script(recipe):
    found = read_recipe(recipe)
    known = {field.name for kind in OPTIONS[found["script"]] for field in fields(kind) if field.init}
    assert set(found["options"]) <= known
    named = set(re.findall(r"{(\w+)}", json.dumps(found["options"])))
    assert named == set(found["paths"])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_figures_of_the_card_are_those_of_the_results(recipe):
    text = (CARDS / f"{recipe.stem}.json").read_text("utf-8")
    card = recipe.with_suffix(".md").read_text("utf-8")
    for part in MEASURED[read_recipe(recipe)["script"]](json.loads(text)):
        assert part in card
    assert not re.search(r'"/(?:home|root|tmp|work|Users)/', text)
    for picture in re.findall(r"\]\((\w[\w-]*\.png)\)", card):
        assert (CARDS / picture).is_file()
    assert recipe.stem in card
    assert re.search(r"Licence of the (base model|data): ", card)
    assert not re.search(r"(^|[\s'\"`(])/(home|root|tmp|work|Users)/", card)


RECIPE = {"script": "run_glue_cee.py", "paths": {"data": "a folder"}, "options": {"train_file": "{data}/a.csv"}}


def write(folder, recipe):
    path = folder / "entry.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"script": "../setup.py"}, "no script"),
        ({"script": "run_nothing.py"}, "no script"),
        ({"options": ["a"]}, "`options` holds"),
        ({"more": 1}, "a recipe has"),
    ],
)
def test_what_is_no_recipe(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_recipe(write(tmp_path, RECIPE | change))


def test_options_stand_over_those_of_the_configuration(tmp_path):
    (tmp_path / "base.yaml").write_text("seed: 1\nlearning_rate: 0.5\n", encoding="utf-8")
    found = read_recipe(write(tmp_path, RECIPE | {"config": "base.yaml", "options": {"seed": 2}}))
    assert found["options"] == {"seed": 2, "learning_rate": 0.5}


@pytest.mark.parametrize(
    ("words", "message"),
    [([], "lacks data=…: a folder"), (["date=."], "with one of data"), (["data=no"], "there is no")],
)
def test_paths_are_given_by_name(words, message):
    with pytest.raises(ValueError, match=message):
        given_paths(words, RECIPE)


def test_paths_go_in_and_out():
    paths = {"data": Path("/a/b"), "model": Path("/a/b/c")}
    assert place(["{data}/x and {model}", {"a": "{data}"}, 1], paths) == ["/a/b/x and /a/b/c", {"a": "/a/b"}, 1]
    assert lift({"/a/b/c": ["/a/b/x", 1, None]}, paths) == {"{model}": ["{data}/x", 1, None]}
    assert lift("/a/bc and '/a/b'", paths) == "/a/bc and '{data}'", "names that only begin alike are others"


SCRIPT = """
import json, pathlib, sys
options = json.loads(pathlib.Path(sys.argv[1]).read_text())
folder = pathlib.Path(options["output_dir"])
folder.mkdir()
(folder / "results.json").write_text(json.dumps({"read": options["train_file"], "depth": 2.5}))
(folder / "README.md").write_text(f"# {folder.name}\\n\\nname = '{folder}'\\n\\n![curve](curve.png)\\n")
(folder / "curve.png").write_bytes(b"picture")
"""


def test_an_entry_is_built_and_published(tmp_path, monkeypatch):
    monkeypatch.setattr(build_zoo, "SCRIPTS", tmp_path)
    (tmp_path / "run_glue_cee.py").write_text(SCRIPT, encoding="utf-8")
    recipe = write(tmp_path, RECIPE)
    asked = [str(recipe), "--path", f"data={tmp_path}", "--output", str(tmp_path / "zoo")]
    build_zoo.main([*asked, "--cards", str(tmp_path / "cards")])
    assert json.loads((tmp_path / "cards" / "entry.json").read_text()) == {"read": "{data}/a.csv", "depth": 2.5}
    card = (tmp_path / "cards" / "entry.md").read_text()
    assert card == "# entry\n\nname = 'runs/entry'\n\n![curve](entry.png)\n"
    assert (tmp_path / "cards" / "entry.png").read_bytes() == b"picture"
    assert (tmp_path / "zoo" / "entry" / "curve.png").is_file()
    # The folder is there now.
    with pytest.raises(SystemExit) as ended:
        build_zoo.main(asked)
    assert ended.value.code == 1
    assert publish.__doc__
