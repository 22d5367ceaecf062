# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Reading and formatting text for language models: instructions, summaries, or plain text for self-supervised exits.

Everything ends as one [`TextCorpus`] with the splits `train`, `validation` and `test`. Its rows hold

- `input_ids`: the prompt, then the answer and the end-of-sequence token (plain text: a stretch of the text);
- `labels`: the same ids, −100 where nothing is learned: the prompt, unless `loss_on_prompt`;
- `prompt_length`: how many of the ids are the prompt that generation starts from.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import check_files, check_positive, check_split_shares
from data_files import column_names, read_texts
from datasets import Dataset, DatasetDict, Value, load_dataset


FILE_TYPES = (".csv", ".json", ".jsonl", ".txt")
PROMPT_FORMATS = ("chat", "alpaca", "plain")
IGNORED = -100


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a corpus: `prompt` and `answer`, and `input`, which goes with the prompt; or `text`."""

    prompt: str | None = None
    input: str | None = None
    answer: str | None = None
    text: str | None = None

    @property
    def names(self) -> list[str]:
        return [name for name in (self.prompt, self.input, self.answer, self.text) if name is not None]


# Recognised without options, the first that fits. A corpus without a prompt column has one instruction for all rows.
KNOWN_COLUMNS = (
    Columns("instruction", "input", "output"),  # Alpaca
    Columns("instruction", "context", "response"),  # Dolly
    Columns("instruction", None, "output"),
    Columns("prompt", None, "answer"),
    Columns("question", None, "answer"),
    Columns(None, "article", "highlights"),  # CNN/DailyMail
    Columns(None, "document", "summary"),
    Columns(text="text"),
)

# The prompt of Stanford Alpaca (Taori et al., 2023), which models trained on it expect to the letter.
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass
class TextArguments:
    """Which text to read, how to format it, and how to split it."""

    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_file: str | None = field(default=None, metadata={"help": "Training rows: csv, json, jsonl or txt."})
    validation_file: str | None = field(default=None, metadata={"help": "Dev rows, same format and columns."})
    test_file: str | None = field(default=None, metadata={"help": "Test rows, same format and columns."})
    prompt_column: str | None = field(default=None, metadata={"help": "Column of prompts or instructions."})
    input_column: str | None = field(default=None, metadata={"help": "Column of text that goes with the prompt."})
    answer_column: str | None = field(default=None, metadata={"help": "Column of answers or summaries."})
    text_column: str | None = field(default=None, metadata={"help": "Column of plain text, without answers."})
    instruction: str = field(
        default="Summarize the following text.",
        metadata={"help": "Instruction of every row, where the data has no column for it."},
    )
    prompt_format: str | None = field(
        default=None,
        metadata={"help": "chat (the tokenizer's template), alpaca or plain. Default: chat if there is a template."},
    )
    loss_on_prompt: bool = field(
        default=False, metadata={"help": "Learn from the prompt's tokens, too; makes sense for self-supervised exits."}
    )
    max_seq_length: int = field(default=512, metadata={"help": "Longer answers are cut to this many tokens in all."})
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Longer prompts lose the end of their text. Default: 3/4 of max_seq_length."}
    )
    text_prompt_length: int = field(default=64, metadata={"help": "Plain text: tokens that generation starts from."})
    validation_split: float = field(
        default=0.05, metadata={"help": "Share of the training rows that becomes dev when there is no dev split."}
    )
    test_split: float = field(
        default=0.05, metadata={"help": "Share of the training rows that becomes test when there is no test split."}
    )
    split_seed: int = field(
        default=42,
        metadata={"help": "Seed of all splits and samples of rows. Not --seed, so that runs share one test split."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on a random sample this large."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use a random sample of dev this large."})
    max_test_samples: int | None = field(default=None, metadata={"help": "Use a random sample of test this large."})

    def __post_init__(self):
        files = {name: getattr(self, name) for name in ("train_file", "validation_file", "test_file")}
        given = [name for name, path in files.items() if path is not None]
        if self.dataset_name is not None and given:
            raise ValueError(f"`dataset_name` and {', '.join(f'`{name}`' for name in given)} exclude each other.")
        if self.dataset_name is None and self.train_file is None:
            raise ValueError("Give either `dataset_name` or `train_file`; got neither.")
        check_files(files, FILE_TYPES)
        suffixes = {name: Path(files[name]).suffix.replace("jsonl", "json") for name in given}
        if len(set(suffixes.values())) > 1:
            raise ValueError(f"`train_file` and its siblings must be of one type; got {suffixes}.")
        if self.text_column is not None and self.answer_column is not None:
            raise ValueError("`text_column` and `answer_column` exclude each other: plain text has no answers.")
        if self.answer_column is None and (self.prompt_column or self.input_column):
            raise ValueError("`prompt_column` and `input_column` need `answer_column`.")
        if self.prompt_format is not None and self.prompt_format not in PROMPT_FORMATS:
            raise ValueError(f"`prompt_format` must be among {', '.join(PROMPT_FORMATS)}; got {self.prompt_format!r}.")
        check_split_shares(self)
        check_positive(self, ("max_train_samples", "max_eval_samples", "max_test_samples", "text_prompt_length"))
        self._check_lengths()

    def limit_lengths(self, positions: int) -> None:
        """Cuts rows to as many tokens as the model has positions; prompts keep their share of them.

        Raises:
            ValueError: `max_prompt_length` leaves no room for an answer.
        """
        if positions < self.max_seq_length:
            if self._default_prompt_length:
                self.max_prompt_length = None
            self.max_seq_length = positions
            self._check_lengths()

    def _check_lengths(self):
        if self.max_seq_length < 2:
            raise ValueError(f"`max_seq_length` must be at least 2; got {self.max_seq_length}.")
        self._default_prompt_length = self.max_prompt_length is None
        if self.max_prompt_length is None:
            self.max_prompt_length = max(1, self.max_seq_length * 3 // 4)
        if not 1 <= self.max_prompt_length < self.max_seq_length:
            raise ValueError(
                f"`max_prompt_length` must lie in 1..{self.max_seq_length - 1} (below `max_seq_length`); "
                f"got {self.max_prompt_length}."
            )

    @property
    def columns(self) -> Columns | None:
        """The columns that were named, or None."""
        named = Columns(self.prompt_column, self.input_column, self.answer_column, self.text_column)
        return named if named.names else None


@dataclass
class TextCorpus:
    """A corpus ready for a language model.

    Args:
        name: what to call it in reports.
        splits: `train`, `validation` and `test`, with the columns of the module's docstring.
        notes: one sentence for every split that is not the publisher's own, and for what was cut.
        is_plain: plain text, without prompts and answers of its own.
        prompt_format: how prompts were made; None for plain text.
    """

    name: str
    splits: DatasetDict
    notes: list[str]
    is_plain: bool
    prompt_format: str | None

    def prompts_and_answers(self, split: str, limit: int | None = None) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids of the prompts and of the answers (end-of-sequence included) of the first rows of a split."""
        rows = self.splits[split]
        rows = rows.select(range(len(rows) if limit is None else min(limit, len(rows))))
        parts = [(ids[:cut], ids[cut:]) for ids, cut in zip(rows["input_ids"], rows["prompt_length"], strict=True)]
        parts = [(prompt, answer) for prompt, answer in parts if prompt and answer]
        return [prompt for prompt, _ in parts], [answer for _, answer in parts]


def load_text_corpus(args: TextArguments, tokenizer: Any) -> TextCorpus:
    """Reads, splits, samples, formats and tokenises what `args` describes.

    Raises:
        ValueError: a file is damaged (the message names file and row), a column is missing or no known set of columns
            is there, the tokenizer has no chat template or no end-of-sequence token, or a split would be empty.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no end-of-sequence token, which answers end with.")
    raw, columns = _read(args)
    notes = [note for name in raw for note in _drop_empty(raw, name, columns)]
    notes += complete_splits(raw, args)
    if columns.text is None:
        notes += sample_rows(raw, args)
    raw = DatasetDict({name: raw[name] for name in ("train", "validation", "test")})
    name = args.dataset_name or Path(args.train_file).parent.name
    if args.train_file and Path(args.train_file).stem != "train":
        name = Path(args.train_file).stem
    if columns.text is not None:
        splits, prompt_format = cut_text(raw, columns.text, tokenizer, args), None
        notes += sample_rows(splits, args)
    else:
        prompt_format = choose_format(args.prompt_format, tokenizer)
        splits = format_pairs(raw, columns, prompt_format, tokenizer, args, notes)
    empty = [split for split, rows in splits.items() if len(rows) == 0]
    if empty:
        raise ValueError(f"The split {empty[0]!r} has no row left; give more text or a smaller `max_seq_length`.")
    return TextCorpus(name, splits, notes, columns.text is not None, prompt_format)


def _read(args: TextArguments) -> tuple[dict[str, Dataset], Columns]:
    """The splits there are, with the columns to read."""
    if args.dataset_name is not None:
        raw = dict(load_dataset(args.dataset_name, args.dataset_config_name))
        if "train" not in raw:
            raise ValueError(f"`dataset_name` {args.dataset_name!r} has no train split; it has {', '.join(raw)}.")
        columns = find_columns(raw["train"].column_names, args.columns)
        raw = {name: rows for name, rows in raw.items() if name in ("train", "validation", "test")}
        for name in columns.names:
            if not isinstance(raw["train"].features[name], Value):
                raise ValueError(f"Column {name!r} holds {raw['train'].features[name]}; accepted are texts.")
        return raw, columns
    files = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
    paths = {name: Path(path) for name, path in files.items() if path is not None}
    names = {name: column_names(path) for name, path in paths.items()}
    columns = find_columns(names["train"], args.columns, f"{paths['train']}: ")
    # What goes with the prompt may be there in some rows, and so in some files, only.
    needed = Columns(columns.prompt, None, columns.answer, columns.text)
    for name, path in paths.items():
        find_columns(names[name], needed if needed.names else columns, f"{path}: ")
    return {name: read_texts(path, columns.names) for name, path in paths.items()}, columns


def find_columns(names: Sequence[str], wanted: Columns | None = None, where: str = "") -> Columns:
    """The columns to read: those that were asked for, or the first known set that is there.

    Raises:
        ValueError: a column that was asked for is missing, or no known set is there.
    """
    if wanted is not None:
        missing = [name for name in wanted.names if name not in names]
        if missing:
            raise ValueError(f"{where}No column {missing[0]!r}; the columns are {', '.join(names)}.")
        return wanted
    for columns in KNOWN_COLUMNS:
        if set(columns.names) <= set(names):
            return columns
    raise ValueError(
        f"{where}None of the known sets of columns is among {', '.join(names)}; name them by `prompt_column`, "
        "`input_column` and `answer_column`, or by `text_column`."
    )


def _drop_empty(raw: dict[str, Dataset], name: str, columns: Columns) -> list[str]:
    """Takes rows without answer (or text), or without anything to answer, out of a split, in place; returns the notes
    to print."""
    notes = []
    asked = [column for column in (columns.prompt, columns.input) if column is not None]
    for needed in ([columns.text or columns.answer], asked):
        rows = raw[name].filter(_has_text, fn_kwargs={"columns": needed}) if needed else raw[name]
        dropped, raw[name] = len(raw[name]) - len(rows), rows
        # Empty lines of a text file are how it is laid out.
        if dropped and columns.text is None:
            notes.append(f"{name}: {dropped} rows without {' and '.join(map(repr, needed))} were dropped.")
    return notes


def _has_text(row: dict[str, Any], columns: Sequence[str]) -> bool:
    return any(_text(row[column]) for column in columns)


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def complete_splits(splits: dict[str, Dataset], args: TextArguments) -> list[str]:
    """Takes the splits that the corpus does not have from `train`, in place; returns the notes to print."""
    notes, total = [], len(splits["train"])
    shares = {"test": args.test_split, "validation": args.validation_split}
    for seed, (name, share) in enumerate(shares.items(), start=args.split_seed):
        if name not in splits:
            count = max(1, round(share * total))
            if count >= len(splits["train"]):
                raise ValueError(f"Cannot take {count} of {len(splits['train'])} training rows for {name}.")
            parts = splits["train"].train_test_split(test_size=count, seed=seed)
            splits["train"], splits[name] = parts["train"], parts["test"]
            notes.append(f"no {name} split: {count} of {total} training rows ({share:.0%}) taken for it, seed {seed}.")
    return notes


def sample_rows(splits: dict[str, Dataset], args: TextArguments) -> list[str]:
    """Replaces splits by random samples of the sizes that `args` limits them to; returns the notes to print."""
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples, "test": args.max_test_samples}
    notes = []
    for name, limit in limits.items():
        rows = splits[name]
        if limit is not None and limit < len(rows):
            splits[name] = rows.shuffle(seed=args.split_seed).select(range(limit))
            notes.append(f"{name}: a sample of {limit} of {len(rows)} rows, seed {args.split_seed}.")
    return notes


# Prompts and answers


def choose_format(wanted: str | None, tokenizer: Any) -> str:
    """How prompts are made: as wanted, or the tokenizer's chat template, or Alpaca's prompt where there is none."""
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if wanted == "chat" and not has_template:
        raise ValueError("`prompt_format` 'chat' needs a tokenizer with a chat template; this one has none.")
    return wanted or ("chat" if has_template else "alpaca")


def prompt_ids(tokenizer: Any, prompt_format: str, instruction: str, text: str = "") -> list[int]:
    """Token ids that generation starts from.

    Args:
        tokenizer: with a chat template, for `"chat"`.
        prompt_format: `"chat"`, `"alpaca"` or `"plain"` (instruction and text with an empty line between them).
        instruction: what is asked.
        text: what it is asked about, if anything.
    """
    if prompt_format == "alpaca":
        template = ALPACA_WITH_INPUT if text else ALPACA_WITHOUT_INPUT
        return _tokens(tokenizer, template.format(instruction=instruction, input=text))
    content = "\n\n".join(part for part in (instruction, text) if part)
    if prompt_format == "plain":
        return _tokens(tokenizer, content)
    messages = [{"role": "user", "content": content}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])


def _tokens(tokenizer: Any, text: str) -> list[int]:
    """The tokenizer's own ids, without an end-of-sequence token: the answer follows."""
    ids = list(tokenizer(text)["input_ids"])
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def fit_prompt(
    tokenizer: Any, prompt_format: str, instruction: str, text: str, max_length: int
) -> tuple[list[int], bool]:
    """`prompt_ids`, and whether the end of the text (or of the instruction, without text) was cut to fit.

    Raises:
        ValueError: the format alone is longer than `max_length`.
    """
    ids = prompt_ids(tokenizer, prompt_format, instruction, text)
    words = tokenizer(text or instruction, add_special_tokens=False)["input_ids"]
    kept, cut = len(words), len(ids) > max_length
    while len(ids) > max_length:
        kept -= len(ids) - max_length
        if kept < 1:
            raise ValueError(
                f"`max_prompt_length` {max_length} is too small: the prompt format {prompt_format!r} alone takes "
                f"{len(ids) - kept} tokens or more."
            )
        shorter = tokenizer.decode(words[:kept], skip_special_tokens=True)
        ids = prompt_ids(tokenizer, prompt_format, *((instruction, shorter) if text else (shorter, "")))
    return ids, cut


def encode_pair(prompt: list[int], answer: list[int], eos: int, max_length: int, loss_on_prompt: bool) -> dict:
    """One row: prompt and answer; an answer that fits ends with `eos`, so that the model learns to stop."""
    whole = [*answer, eos] if not answer or answer[-1] != eos else list(answer)
    ids = [*prompt, *whole][:max_length]
    labels = ids if loss_on_prompt else [IGNORED] * len(prompt) + ids[len(prompt) :]
    return {"input_ids": ids, "labels": list(labels), "prompt_length": len(prompt)}


def format_pairs(
    raw: DatasetDict, columns: Columns, prompt_format: str, tokenizer: Any, args: TextArguments, notes: list[str]
) -> DatasetDict:
    """Prompts and answers as rows of token ids; `notes` gets what was cut."""

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        instruction = args.instruction if columns.prompt is None else _text(row[columns.prompt])
        text = "" if columns.input is None else _text(row[columns.input])
        prompt, cut = fit_prompt(tokenizer, prompt_format, instruction, text, args.max_prompt_length)
        answer = tokenizer(_text(row[columns.answer]), add_special_tokens=False)["input_ids"]
        made = encode_pair(prompt, answer, tokenizer.eos_token_id, args.max_seq_length, args.loss_on_prompt)
        return {**made, "cut": [cut, len(prompt) + len(answer) + 1 > args.max_seq_length]}

    formatted = DatasetDict(
        {
            name: rows.map(encode, remove_columns=rows.column_names, desc="Format and tokenize")
            for name, rows in raw.items()
        }
    )
    for name, rows in formatted.items():
        for part, limit, flags in zip(
            ("prompts", "answers"),
            (args.max_prompt_length, args.max_seq_length),
            zip(*rows["cut"], strict=True),
            strict=False,
        ):
            if any(flags):
                where = "" if part == "prompts" else ", prompt included"
                notes.append(f"{name}: {sum(flags)} of {len(rows)} {part} cut to {limit} tokens{where}.")
    return formatted.remove_columns("cut")


# Plain text


def cut_text(raw: DatasetDict, column: str, tokenizer: Any, args: TextArguments) -> DatasetDict:
    """Stretches of at most `max_seq_length` tokens of each text; texts are not joined. A stretch must be longer than
    the prompt that generation starts from."""
    if args.text_prompt_length >= args.max_seq_length:
        limit = f"`max_seq_length` {args.max_seq_length}"
        raise ValueError(f"`text_prompt_length` must be below {limit}; got {args.text_prompt_length}.")

    def encode(rows: dict[str, list]) -> dict[str, list]:
        made: dict[str, list] = {"input_ids": [], "labels": [], "prompt_length": []}
        for ids in tokenizer([_clean(_text(text)) for text in rows[column]])["input_ids"]:
            for start in range(0, len(ids), args.max_seq_length):
                part = ids[start : start + args.max_seq_length]
                if len(part) > args.text_prompt_length:
                    made["input_ids"].append(part)
                    made["labels"].append(part)
                    made["prompt_length"].append(args.text_prompt_length)
        return made

    names = raw["train"].column_names
    return raw.map(encode, batched=True, remove_columns=names, desc="Tokenize")


def _clean(text: str) -> str:
    return re.sub(r"[ \t]+", " ", text).strip()
