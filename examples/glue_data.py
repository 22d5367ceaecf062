# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Reading classification corpora for the examples: GLUE (online or its own tsv files), csv, tsv and json files.

Everything ends as one [`Corpus`]: a `DatasetDict` with the splits `train`, `validation` and `test` and the columns
`sentence1`, `sentence2` (pairs only) and `label`. Thresholds and early stopping may use `validation` only; reported
numbers come from `test`. Where a corpus has no labelled test split, one is made from the rows there are, and
`Corpus.notes` says so.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from class_labels import class_id, class_names, label_list, label_text, target_value
from common import check_files, check_positive, check_split_shares
from data_files import Row, cell_text, read_rows
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value, load_dataset
from prepare_data import stratified_rows
from transformers import EvalPrediction


@dataclass(frozen=True)
class Task:
    """One GLUE task.

    Args:
        folder: name of the task's folder in GLUE's own download.
        hub_columns: text columns in `nyu-mll/glue`.
        tsv_columns: text columns in GLUE's own tsv files.
        tsv_label: label column in those files.
        labels: class names in the order of their ids; empty for regression.
        metrics: metric names, the headline first (see [`METRICS`]).
        tsv_header: column names of a file that has no header line.
    """

    folder: str
    hub_columns: tuple[str, ...]
    tsv_columns: tuple[str, ...]
    tsv_label: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    tsv_header: tuple[str, ...] = ()


PAIR = ("sentence1", "sentence2")
ENTAILMENT = ("entailment", "not_entailment")
TASKS = {
    "cola": Task(
        "CoLA", ("sentence",), ("sentence",), "label", ("unacceptable", "acceptable"),
        ("matthews_correlation", "accuracy"), ("source", "label", "star", "sentence"),
    ),
    "mnli": Task("MNLI", ("premise", "hypothesis"), PAIR, "gold_label", ("entailment", "neutral", "contradiction")),
    "mrpc": Task(
        "MRPC", PAIR, ("#1 String", "#2 String"), "Quality", ("not_equivalent", "equivalent"), ("accuracy", "f1")
    ),
    "qnli": Task("QNLI", ("question", "sentence"), ("question", "sentence"), "label", ENTAILMENT),
    "qqp": Task(
        "QQP", ("question1", "question2"), ("question1", "question2"), "is_duplicate", ("not_duplicate", "duplicate"),
        ("accuracy", "f1"),
    ),
    "rte": Task("RTE", PAIR, PAIR, "label", ENTAILMENT),
    "sst2": Task("SST-2", ("sentence",), ("sentence",), "label", ("negative", "positive")),
    "stsb": Task("STS-B", PAIR, PAIR, "score", (), ("pearson", "spearmanr")),
    "wnli": Task("WNLI", PAIR, PAIR, "label", ("not_entailment", "entailment")),
}  # fmt: skip

DEV_FILES = {"mnli": "dev_matched.tsv"}
LABELLED_TEST_FILES = ("test-labeled.tsv", "msr_paraphrase_test.txt", "test.tsv")
FILE_TYPES = (".csv", ".tsv", ".json", ".jsonl")


@dataclass
class DataArguments:
    """Which corpus to read, and how to split it."""

    task_name: str | None = field(default=None, metadata={"help": f"GLUE task: {', '.join(TASKS)}."})
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Folder with GLUE's own tsv files of --task_name. Without it the task comes from the Hub."},
    )
    train_file: str | None = field(default=None, metadata={"help": "Training rows: csv, tsv, json or jsonl."})
    validation_file: str | None = field(default=None, metadata={"help": "Dev rows, same format and columns."})
    test_file: str | None = field(default=None, metadata={"help": "Labelled test rows, same format and columns."})
    text_columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "One text column, or two for pairs, of the files given by --train_file and its siblings. Default: "
            "sentence1 and sentence2, sentence, text, or the only one beside the labels."
        },
    )
    label_column: str = field(
        default="label", metadata={"help": "Label column of those files; of json, lists are several labels per row."}
    )
    regression: bool = field(default=False, metadata={"help": "The labels of those files are numbers to predict."})
    validation_split: float = field(
        default=0.1, metadata={"help": "Share of the training rows that becomes dev when there is no dev file."}
    )
    test_split: float = field(
        default=0.1, metadata={"help": "Share of the training rows that becomes test when there is no test file."}
    )
    split_seed: int = field(
        default=42,
        metadata={"help": "Seed of all splits and samples of rows. Not --seed, so that runs share one test split."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on a random sample this large."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use a random sample of dev this large."})
    max_test_samples: int | None = field(default=None, metadata={"help": "Use a random sample of test this large."})
    max_seq_length: int = field(default=128, metadata={"help": "Longer inputs are truncated to this many tokens."})

    def __post_init__(self):
        if self.task_name is not None:
            self.task_name = self.task_name.lower().replace("-", "")
            if self.task_name not in TASKS:
                raise ValueError(f"`task_name` must be one of {', '.join(TASKS)}; got {self.task_name!r}.")
        files = {name: getattr(self, name) for name in ("train_file", "validation_file", "test_file")}
        given = {name: path for name, path in files.items() if path is not None}
        if self.task_name is not None and given:
            raise ValueError(f"`task_name` and {', '.join(f'`{name}`' for name in given)} exclude each other.")
        if self.task_name is None and self.train_file is None:
            raise ValueError("Give either `task_name` (with or without `data_dir`) or `train_file`; got neither.")
        if self.data_dir is not None:
            if self.task_name is None:
                raise ValueError("`data_dir` needs `task_name`, which says how to read the folder's files.")
            if not os.path.isdir(self.data_dir):
                raise ValueError(f"`data_dir` must be an existing folder; got {self.data_dir!r}.")
        check_files(files, FILE_TYPES)
        self._check_numbers()

    def _check_numbers(self):
        if self.text_columns is not None and not 1 <= len(self.text_columns) <= 2:
            raise ValueError(f"`text_columns` must name one or two columns; got {self.text_columns!r}.")
        check_split_shares(self)
        check_positive(self, ("max_train_samples", "max_eval_samples", "max_test_samples", "max_seq_length"))


@dataclass
class Corpus:
    """A corpus ready for tokenisation.

    Args:
        name: what to call it in reports, e.g. `"GLUE SST-2"`.
        splits: `train`, `validation`, `test` (and `test_mismatched` for MNLI), see above.
        label_names: class names in the order of their ids; empty for regression.
        metrics: metric names, the headline first.
        notes: one sentence for every split that is not the publisher's own.
        multi_label: a row may have several labels, or none; `label` is then an indicator (0.0 or 1.0) per class.
    """

    name: str
    splits: DatasetDict
    label_names: list[str]
    metrics: tuple[str, ...]
    notes: list[str]
    multi_label: bool = False

    @property
    def is_regression(self) -> bool:
        return not self.label_names

    @property
    def problem_type(self) -> str:
        """As a config names it."""
        if self.multi_label:
            return "multi_label_classification"
        return "regression" if self.is_regression else "single_label_classification"

    @property
    def text_columns(self) -> list[str]:
        return [column for column in PAIR if column in self.splits["train"].column_names]

    def relabel(self, names: Sequence[str], ids: Sequence[int]) -> None:
        """Takes other classes, in place.

        Args:
            names: the classes in the order of their new ids.
            ids: new id of each class so far.
        """
        if list(names) == self.label_names:
            return

        def encode(rows: dict[str, list]) -> dict[str, list]:
            if not self.multi_label:
                return {"label": [ids[label] for label in rows["label"]]}
            labels = np.zeros((len(rows["label"]), len(names)), dtype=np.float32)
            labels[:, list(ids)] = rows["label"]
            return {"label": labels.tolist()}

        for split, rows in self.splits.items():
            features = Features({**rows.features, "label": _label_feature(names, self.multi_label)})
            # Ids are cast by number: `map` would look at the names.
            plain = rows.cast_column("label", Value("int64")) if not self.multi_label else rows
            self.splits[split] = plain.map(encode, batched=True, features=features, desc="Match labels")
        self.label_names = list(names)


def load_corpus(args: DataArguments) -> Corpus:
    """Reads, splits and samples the corpus that `args` describes.

    Raises:
        ValueError: a file, column or label is missing or not understood; the message names file and row.
    """
    if args.task_name is None:
        corpus = _corpus_from_files(args)
    elif args.data_dir is None:
        corpus = _corpus_from_hub(args)
    else:
        corpus = _corpus_from_glue_folder(args)
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples}
    for name, split in corpus.splits.items():
        limit = limits.get(name, args.max_test_samples)
        if limit is not None and limit < len(split):
            corpus.splits[name] = split.select(stratified_rows(split["label"], limit, args.split_seed))
            note = f"{name}: a stratified sample of {limit} of {len(split)} rows, seed {args.split_seed}."
            corpus.notes.append(note)
    return corpus


def take_split(rows: Dataset, count: int, seed: int) -> tuple[Dataset, Dataset]:
    """Splits `rows` into (rest, part of `count` rows), stratified and seeded."""
    if not 0 < count < len(rows):
        raise ValueError(f"Cannot take {count} of {len(rows)} rows for a split: both parts need at least one row.")
    part = stratified_rows(rows["label"], count, seed)
    rest = sorted(set(range(len(rows))) - set(part))
    return rows.select(rest), rows.select(part)


def _halve_dev(splits: dict[str, Dataset], seed: int) -> str:
    """Replaces `validation` by one half of it and adds the other as `test`; returns the note to print."""
    dev = splits["validation"]
    splits["validation"], splits["test"] = take_split(dev, len(dev) // 2, seed)
    return (
        f"no labelled test split: the dev split ({len(dev)} rows) was divided into dev ({len(splits['validation'])}) "
        f"and test ({len(splits['test'])}), stratified, seed {seed}."
    )


def _complete_splits(splits: dict[str, Dataset], args: DataArguments) -> list[str]:
    """Takes the splits that the corpus does not have from `train`, in place; returns the notes to print."""
    notes, total = [], len(splits["train"])
    shares = {"test": args.test_split, "validation": args.validation_split}
    for seed, (name, share) in enumerate(shares.items(), start=args.split_seed):
        if name not in splits:
            count = max(1, round(share * total))
            splits["train"], splits[name] = take_split(splits["train"], count, seed)
            taken = f"{count} of {total} training rows ({share:.0%}) taken for it"
            notes.append(f"no {name} split: {taken}, stratified, seed {seed}.")
    return notes


def _corpus_from_hub(args: DataArguments) -> Corpus:
    """GLUE from `nyu-mll/glue` on the Hub; its test labels are withheld (-1), so dev is divided."""
    task = TASKS[args.task_name]
    raw = load_dataset("nyu-mll/glue", args.task_name)
    names = {"train": "train", "validation": "validation"}
    if args.task_name == "mnli":
        names |= {"validation": "validation_matched", "test_mismatched": "validation_mismatched"}
    splits = {}
    for name, source in names.items():
        columns = dict(zip(task.hub_columns, PAIR, strict=False))
        kept = raw[source].select_columns([*columns, "label"])
        splits[name] = kept.rename_columns({old: new for old, new in columns.items() if old != new})
    notes = [_halve_dev(splits, args.split_seed)]
    return Corpus(f"GLUE {task.folder}", DatasetDict(splits), list(task.labels), task.metrics, notes)


def _corpus_from_glue_folder(args: DataArguments) -> Corpus:
    """GLUE's own tsv files, with a labelled test file where the folder has one."""
    task, folder = TASKS[args.task_name], Path(args.data_dir)
    dev_file = folder / DEV_FILES.get(args.task_name, "dev.tsv")
    if not dev_file.is_file():
        raise ValueError(f"`data_dir` {str(folder)!r} has no {dev_file.name}; it has {_names_in(folder)}.")
    notes: list[str] = []
    splits = {"validation": _read_glue_file(dev_file, task, notes)}
    if (folder / "train.tsv").is_file():
        splits["train"] = _read_glue_file(folder / "train.tsv", task, notes)
    test_file = _labelled_test_file(folder, task)
    if test_file is not None:
        splits["test"] = _read_glue_file(test_file, task, notes)
        notes.append(f"test: the labelled {test_file.name} of the folder.")
    if (folder / "dev_mismatched.tsv").is_file():
        splits["test_mismatched"] = _read_glue_file(folder / "dev_mismatched.tsv", task, notes)
    if "train" not in splits:
        notes.append(f"no train.tsv: {dev_file.name} serves as the training rows.")
        splits["train"] = splits.pop("validation")
        notes += _complete_splits(splits, args)
    elif "test" not in splits:
        notes.append(_halve_dev(splits, args.split_seed))
    order = ("train", "validation", "test", "test_mismatched")
    splits = {name: splits[name] for name in order if name in splits}
    return Corpus(f"GLUE {task.folder}", DatasetDict(splits), list(task.labels), task.metrics, notes)


def _labelled_test_file(folder: Path, task: Task) -> Path | None:
    for name in LABELLED_TEST_FILES:
        path = folder / name
        if not path.is_file() or (task.tsv_header and name == "test.tsv"):
            continue
        if task.tsv_header or task.tsv_label in next(read_rows(path, suffix=".tsv", broken=[]), (0, {}))[1]:
            return path
    return None


def _read_glue_file(path: Path, task: Task, notes: list[str]) -> Dataset:
    """One of GLUE's tsv files; QQP's hold a few broken lines, which are dropped and counted in `notes`."""
    broken: list[int] = []
    rows = list(read_rows(path, suffix=".tsv", header=task.tsv_header or None, broken=broken))
    if broken:
        total = len(broken) + len(rows)
        notes.append(f"{path.name}: {len(broken)} of {total} lines have too few or too many cells and were dropped.")
    return _to_dataset(path, rows, list(task.tsv_columns), task.tsv_label, list(task.labels))


def _names_in(folder: Path) -> str:
    return ", ".join(sorted(entry.name for entry in folder.iterdir())) or "no files"


def _corpus_from_files(args: DataArguments) -> Corpus:
    """csv, tsv, json or jsonl files; class names are the distinct labels of the training file."""
    paths = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
    raw = {name: (Path(path), list(read_rows(Path(path)))) for name, path in paths.items() if path is not None}
    train_path, train_rows = raw["train"]
    _check_rows(train_path, train_rows)
    columns = args.text_columns or guess_text_columns(train_path, list(train_rows[0][1]), args.label_column)
    for path, rows in raw.values():
        _check_columns(path, rows, [*columns, args.label_column])
    labels = [(number, row[args.label_column]) for number, row in train_rows]
    multi_label = not args.regression and any(isinstance(label, list) for _, label in labels)
    names = [] if args.regression else class_names(train_path, labels, args.label_column, multi_label)
    splits = {
        name: _to_dataset(path, rows, columns, args.label_column, names, multi_label)
        for name, (path, rows) in raw.items()
    }
    notes = _complete_splits(splits, args)
    splits = {name: splits[name] for name in ("train", "validation", "test")}
    metrics = ("f1_micro", "accuracy") if multi_label else ("accuracy",)
    name = train_path.parent.name if train_path.stem == "train" else train_path.stem
    return Corpus(
        name or train_path.stem,
        DatasetDict(splits),
        names,
        ("pearson", "spearmanr") if args.regression else metrics,
        notes,
        multi_label,
    )


def guess_text_columns(path: Path, names: list[str], label_column: str) -> list[str]:
    """The columns of texts where nobody named them: known names, or the only column beside the labels.

    Raises:
        ValueError: several columns could be it.
    """
    for known in (list(PAIR), ["sentence"], ["text"]):
        if set(known) <= set(names):
            return known
    others = [name for name in names if name != label_column]
    if label_column in names and len(others) == 1:
        return others
    raise ValueError(
        f"{path}: the columns are {', '.join(map(repr, names))}; name those of the texts by `text_columns` and that "
        f"of the labels by `label_column` (now {label_column!r})."
    )


def _check_rows(path: Path, rows: list[Row]) -> None:
    if not rows:
        raise ValueError(f"{path}: no rows.")


def _check_columns(path: Path, rows: list[Row], columns: list[str]) -> None:
    """Raises `ValueError` where a row, of json, lacks one of the columns."""
    _check_rows(path, rows)
    first = rows[0][1]
    missing = next((column for column in columns if column not in first), None)
    if missing is not None:
        raise ValueError(f"{path}: no column {missing!r}; the columns are {', '.join(map(str, first))}.")
    for number, row in rows:
        for column in columns:
            if column not in row:
                raise ValueError(
                    f"{path}: row {number} has no {column!r}; it has {', '.join(map(repr, row)) or 'nothing'}."
                )


def _to_dataset(
    path: Path,
    rows: list[Row],
    text_columns: list[str],
    label_column: str,
    label_names: list[str],
    multi_label: bool = False,
) -> Dataset:
    """Rows of a file as a dataset with `sentence1`[, `sentence2`] and `label` (class id, indicators of the classes, or
    number for regression)."""
    _check_columns(path, rows, [*text_columns, label_column])
    ids = {name: index for index, name in enumerate(label_names)}
    columns: dict[str, list] = {new: [] for new, _ in zip(PAIR, text_columns, strict=False)} | {"label": []}
    for number, row in rows:
        for new, old in zip(PAIR, text_columns, strict=False):
            text = cell_text(path, number, old, row[old])
            if text is None:
                raise ValueError(f"{path}: row {number} has no text in {old!r}; its cells are {list(row.values())}.")
            columns[new].append(text)
        columns["label"].append(_parse_label(path, number, row[label_column], ids, multi_label))
    features = {name: Value("string") for name in columns if name != "label"}
    return Dataset.from_dict(columns, Features({**features, "label": _label_feature(label_names, multi_label)}))


def _label_feature(names: Sequence[str], multi_label: bool) -> Any:
    if multi_label:
        return List(Value("float32"))
    return ClassLabel(names=list(names)) if names else Value("float32")


def _parse_label(path: Path, number: int, value: Any, ids: dict[str, int], multi_label: bool) -> Any:
    """Class id of a label, indicators of a list of labels, or the number itself for regression."""
    if not ids:
        return target_value(path, number, value)
    if not multi_label:
        return class_id(path, number, label_text(path, number, value), ids)
    indicators = [0.0] * len(ids)
    for name in label_list(path, number, value):
        indicators[class_id(path, number, name, ids)] = 1.0
    return indicators


def _metric_functions() -> dict[str, Callable[[np.ndarray, np.ndarray], float]]:
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    return {
        "accuracy": accuracy_score,
        "f1": f1_score,
        "f1_micro": lambda labels, predictions: f1_score(labels, predictions, average="micro", zero_division=0.0),
        "matthews_correlation": matthews_corrcoef,
        "pearson": lambda labels, predictions: pearsonr(labels, predictions)[0],
        "spearmanr": lambda labels, predictions: spearmanr(labels, predictions)[0],
    }


METRICS = ("accuracy", "f1", "f1_micro", "matthews_correlation", "pearson", "spearmanr")


def make_compute_metrics(names: Sequence[str]) -> Callable[[EvalPrediction], dict[str, float]]:
    """A `compute_metrics` for `Trainer` that needs no network.

    Args:
        names: metrics out of [`METRICS`]. `pearson` and `spearmanr` read the first logit, the others the arg max; of
            labels (rows, classes), each logit above 0 is a predicted label, and `accuracy` counts rows that are right
            in all of them.
    """
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise ValueError(f"`names` must be among {', '.join(METRICS)}; got {unknown[0]!r}.")
    functions = _metric_functions()

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions
        logits = np.asarray(logits[0] if isinstance(logits, tuple) else logits)
        labels = np.asarray(prediction.label_ids)
        multi_label = labels.ndim == 2 and labels.shape[1] > 1
        labels = labels.astype(int) if multi_label else labels.reshape(-1)
        result = {}
        for name in names:
            predictions = logits.reshape(len(labels), -1)
            if multi_label:
                predictions = (predictions > 0).astype(int)
            else:
                predictions = predictions[:, 0] if name in ("pearson", "spearmanr") else predictions.argmax(-1)
            result[name] = float(functions[name](labels, predictions))
        return result

    return compute_metrics
