# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
from __future__ import annotations

import re

import pytest
from huggingface_hub import ModelCard
from tiny_models import run_python, tiny_tokenizer

from transformers_cee import OperatingPoint
from transformers_cee.evaluation.environment import installed_versions
from transformers_cee.hub.model_card import EarlyExitCard


def point(criterion="policy", threshold=0.5, depth=2.0, wall_clock=1.8, **metrics):
    return OperatingPoint(
        criterion,
        threshold,
        depth=depth,
        saved_layers=1 - depth / 4,
        layer_speedup=4 / depth,
        wall_clock_speedup=wall_clock,
        metrics=metrics or {"accuracy": 0.9123},
    )


def make(**arguments):
    return EarlyExitCard(
        **{
            "model_name": "bert-cee-sst2",
            "num_layers": 4,
            "dataset_name": "SST-2",
            "metric_name": "accuracy",
            "curves": {
                "policy": [point(depth=3.0, threshold=0.7, accuracy=0.93), point()],
                "entropy": [point("entropy", 0.2, wall_clock=None)],
            },
            **arguments,
        }
    )


def test_full_card():
    card = make(
        base_model="google-bert/bert-base-uncased",
        repo_id="org/bert-cee-sst2",
        dataset_id="nyu-mll/glue",
        dataset_config="sst2",
        data_notes="The dev rows were split in two.",
        full_depth=point("full depth", 1.0, depth=4.0, wall_clock=1.0, accuracy=0.94),
        exit_layers=[2, 3, 4],
        timing="2 CPU threads, batch size 32.",
        training_arguments={"learning_rate": 2e-5, "phases": ["heads", "policy"], "note": "a|b"},
        seeds=[1, 2, 3],
        limits=["Only English film reviews were seen."],
        library_versions={"torch": "2.13.0"},
        license="apache-2.0",
    ).render()
    data = card.data.to_dict()
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-classification"
    assert data["base_model"] == "google-bert/bert-base-uncased" and data["datasets"] == ["nyu-mll/glue"]
    assert "early-exit" in data["tags"] and data["metrics"] == ["accuracy"] and data["license"] == "apache-2.0"
    result = data["model-index"][0]["results"][0]
    assert result["dataset"] == {"name": "SST-2", "type": "nyu-mll/glue", "config": "sst2", "split": "test"}
    assert result["metrics"][0]["value"] == 0.9123
    headings = re.findall(r"^#+ (.+)$", card.text, flags=re.MULTILINE)
    assert headings[:1] == ["bert-cee-sst2"]
    assert {"Method", "Usage", "Data", "Operating points", "Training arguments", "Limits", "Versions"} <= set(headings)
    assert "AAAI 2024" in card.text and "exit after layers 2, 3 and 4" in card.text
    assert "memorized layer" not in card.text and "policy gradient" in card.text  # only the phases that ran
    assert "The dev rows were split in two." in card.text and "Seeds: 1, 2, 3." in card.text
    assert "![accuracy against depth and wall-clock time](curve.png)" in card.text
    assert "2 CPU threads, batch size 32." in card.text
    assert re.search(r"\| `learning_rate` +\| +2e-05 \|", card.text) and "a\\|b" in card.text
    assert "- Only English film reviews were seen." in card.text
    assert "{{" not in card.text and "{%" not in card.text


def test_table_has_both_speedups_of_every_point():
    rows = make(full_depth=point("full depth", 1.0, depth=4.0)).render().text.splitlines()
    header = next(line for line in rows if "wall-clock speed-up" in line and line.startswith("|"))
    columns = [cell.strip() for cell in header.strip("|").split("|")]
    for name in ("threshold", "depth", "saved layers", "layer speed-up", "wall-clock speed-up", "accuracy"):
        assert name in columns
    points = rows[rows.index(header) + 2 : rows.index(header) + 6]
    assert [row.split("|")[1].strip() for row in points] == [
        "full depth",
        "ConsistentEE (policy)",
        "ConsistentEE (policy)",
        "entropy",
    ]
    assert "0.9300" in points[1] and "1.33x" in points[1] and "1.80x" in points[1] and "25.0%" in points[1]
    assert points[3].split("|")[columns.index("wall-clock speed-up") + 1].strip() == "-"


def test_noise_is_called_so():
    noisy = point(wall_clock=None)
    noisy.noisy_wall_clock_speedup, noisy.wall_clock_spread = 6.1, 0.4
    calm = point(threshold=0.9)
    calm.wall_clock_spread = 0.1
    text = make(curves={"policy": [noisy, calm]}, full_depth=None).render().text
    rows = [line for line in text.splitlines() if line.startswith("| ConsistentEE")]
    assert [row.split("|")[6].strip() for row in rows] == ["noise", "1.80x ± 0.09"]
    assert "6.1" not in text and "`noise` stands where" in text


def test_least_card(tmp_path):
    card = make(figure=None, curves={"policy": [point(wall_clock=None)]}, base_model="../folder")
    path = card.save(tmp_path / "new")
    loaded = ModelCard.load(path)
    assert "model-index" not in loaded.data.to_dict() and "base_model" not in loaded.data.to_dict()
    assert "![" not in loaded.text and "an exit after every one" in loaded.text
    assert "`noise` stands" not in loaded.text
    assert "The seed was not recorded." in loaded.text and "Not recorded." in loaded.text
    assert f"| {installed_versions()['torch']} |".replace(" ", "") in loaded.text.replace(" ", "")


def test_published_point_must_have_been_measured():
    assert make(dataset_id="nyu-mll/glue", exit_threshold=0.4).published_point is None
    assert "model-index" not in make(dataset_id="nyu-mll/glue", exit_threshold=0.4).metadata().to_dict()


def test_published_budget():
    """A budget is no threshold: points of the one are not taken for the other."""
    half = OperatingPoint("policy", 0.5, 2.0, 0.5, 2.0, metrics={"accuracy": 0.9}, exit_budget=0.5)
    card = make(curves={"policy": [half]}, dataset_id="nyu-mll/glue", exit_budget=0.5)
    assert card.published_point is half
    assert make(curves={"policy": [half]}, exit_threshold=0.5).published_point is None
    assert make(curves={"policy": [half]}, exit_budget=0.4).published_point is None
    assert make(exit_budget=0.5).published_point is None
    text = card.render().text
    assert ", exit_budget=0.5)" in text and "exit_threshold=" not in text
    assert "Wanted mean depth as a share of all layers; 1.0 runs all layers." in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"curves": {}}, "`curves`"),
        ({"metric_name": "f1"}, "`metric_name`='f1' is missing .* 'policy', which has 'accuracy'"),
        ({"examples": "one text"}, "`examples`='one text' must be a list"),
        ({"examples": []}, "`examples`"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


@pytest.mark.parametrize(
    ("regression", "pairs"),
    # Each in a process of its own.
    [
        pytest.param(False, False, marks=pytest.mark.slow),
        (True, False),
        pytest.param(False, True, marks=pytest.mark.slow),
    ],
)
def test_usage_runs_as_pasted(tmp_path, saved, regression, pairs):
    folder = saved
    if regression:
        from tiny_models import tiny_model

        folder = tmp_path / "model"
        tiny_model(id2label={0: "score"}, label2id={"score": 0}, problem_type="regression").save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    examples = ["a film with heart", 'not a "single" joke\nlands']
    if pairs:
        examples = [(text, "a joke") for text in examples]
    problem_type = "regression" if regression else "single_label_classification"
    text = make(repo_id=str(folder), exit_threshold=0.0, examples=examples, problem_type=problem_type).render().text
    (snippet,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    done = run_python(snippet)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("left after layer 1") == 2
    assert regression or re.match(r"(negative|positive) \(", done.stdout)


class TestNames:
    """Names come from configs, files and command lines: they show as they are written."""

    def test_markup_in_names(self):
        evil = "<script>alert(1)</script> [here](http://x) **b** `c` | d\n# e"
        card = make(
            model_name=evil,
            base_model=evil,
            dataset_name=evil,
            data_notes=evil,
            split=evil,
            timing=evil,
            metric_name="<b>",
            curves={evil: [point(evil, evil, **{"<b>": 0.5})], "policy": [point(**{"<b>": 0.5})]},
            other_sets={evil: [point(evil, evil, **{"<b>": 0.5})]},
            training_arguments={"note": evil},
            examples=[evil],
        ).render()
        text = re.sub(r"```python\n.*?```", "", card.text, flags=re.DOTALL)
        for markup in ("<script", "<b>", " [here](", "**b**", "`c`", "\n# e"):
            assert markup not in text, markup
        assert (
            text.count("&lt;script&gt;alert(1)&lt;/script&gt; \\[here\\](http://x) \\*\\*b\\*\\* \\`c\\` \\| d # e")
            >= 9
        )
        lines = [line for line in text.splitlines() if line.startswith("|")]
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
        assert columns == {8, 3}, "no cell was cut in two"

    def test_names_as_they_are_usual_stay(self):
        card = (
            make(base_model="sentence-transformers/all-MiniLM-L6_v2", dataset_name="SST-2 (dev_matched)").render().text
        )
        assert "sentence-transformers/all-MiniLM-L6_v2 with early exits." in card
        assert "Trained and measured on SST-2 (dev_matched)." in card


def test_further_sets_have_tables_of_their_own():
    text = make(split="matched", other_sets={"mismatched rows": [point(depth=3.5, accuracy=0.1234)]}).render().text
    assert "Measured on the matched rows;" in text
    (_, after) = text.split("On mismatched rows:\n\n")
    assert "0.1234" in after and "0.1234" not in text.split("On mismatched rows:")[0]


def test_language_is_left_out_where_nobody_knows_it():
    assert "language" not in make().render().data.to_dict()
    assert make(language=["de", "en"]).render().data.to_dict()["language"] == ["de", "en"]


def test_a_card_is_replaced_whole(tmp_path, monkeypatch):
    make().save(tmp_path)
    before = (tmp_path / "README.md").read_text()

    def fail(self, path, **options):
        with open(path, "w") as file:
            file.write("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ModelCard, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        make(model_name="other").save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == before
