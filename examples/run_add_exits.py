# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What exits gain a classifier that was fine-tuned without them, from texts without labels.

    python examples/run_add_exits.py --model_name_or_path google-bert/bert-base-uncased --task_name sst2 \\
        --max_train_samples 13000 --texts 3000 --agreement 0.99 0.97 --output_dir runs/sst2-exits

Some training rows become the texts; stock Trainer fine-tunes a stock classifier on the others, in the folder
`OUTPUT_DIR-plain`, unless an earlier run did. Then `add_exits` gives it exits, in `OUTPUT_DIR`. The texts' labels are
read for the accuracy alone. Options are those of `AddArguments`, `glue_data.DataArguments` and `TrainingArguments`.
"""

import copy
import json
import logging
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import check_positive, parse_dataclasses, set_up_logging
from glue_data import Corpus, DataArguments, load_corpus, take_split
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from transformers_cee import AddedExits, add_exits
from transformers_cee.files import read_json, write_text
from transformers_cee.hub.model_card import rights
from transformers_cee.modeling.exits_folder import CARD


logger = logging.getLogger("run_add_exits")
MADE_BY = "made_by.json"


@dataclass
class AddArguments:
    """What is fine-tuned, and what its exits promise."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub name of the encoder to fine-tune."})
    texts: int = field(default=3000, metadata={"help": "Training rows that become texts without labels."})
    agreement: list[float] = field(
        default_factory=lambda: [0.99, 0.97], metadata={"help": "Promised shares of answers that are full depth's."}
    )
    risk: float = field(default=0.05, metadata={"help": "Probability with which each promise may fail."})
    language: str | None = field(default=None, metadata={"help": "Language of the data for the card, such as en."})
    license: str | None = field(default=None, metadata={"help": "Licence of the encoder for the card, such as mit."})
    data_license: str | None = field(default=None, metadata={"help": "Licence of the data for the card."})

    def __post_init__(self) -> None:
        check_positive(self, ("texts",))


def fine_tune(args: AddArguments, data: DataArguments, training: TrainingArguments, corpus: Corpus) -> None:
    """A stock classifier in `training.output_dir`."""
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    names = dict(enumerate(corpus.label_names))
    model = AutoModelForSequenceClassification.from_pretrained(
        args.model_name_or_path,
        dtype=torch.float32,
        id2label=names,
        label2id={name: one for one, name in names.items()},
    )

    def encode(rows: dict[str, list]) -> dict[str, list]:
        made = tokenizer(rows[corpus.text_columns[0]], max_length=data.max_seq_length, truncation=True)
        return {**made, "labels": rows["label"]}

    rows = corpus.splits["train"]
    rows = rows.map(encode, batched=True, remove_columns=rows.column_names, desc="Tokenize")
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=rows,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.train()
    trainer.save_model()


def is_made(plain: Path, made_by: dict[str, Any]) -> bool:
    """Has an earlier run fine-tuned the classifier?

    Raises:
        ValueError: it did so with other options, and may have learned from what are texts now.
    """
    if not (plain / MADE_BY).is_file():
        return False
    before = read_json(plain / MADE_BY, "It says how the classifier was fine-tuned; remove its folder.")
    other = sorted(name for name, value in made_by.items() if before.get(name) != value)
    if other:
        raise ValueError(
            f"{plain} was fine-tuned with another {', '.join(other)}: remove it, or give another `output_dir`."
        )
    logger.info(f"{plain} is there: not fine-tuned again.")
    return True


def main(argv: list[str] | None = None) -> AddedExits:
    types = (AddArguments, DataArguments, TrainingArguments)
    args, data, training = parse_dataclasses(types, sys.argv[1:] if argv is None else argv, "Adds exits.")
    set_up_logging(logger, training)
    set_seed(training.seed)
    corpus = load_corpus(data)
    if corpus.problem_type != "single_label_classification" or len(corpus.text_columns) > 1:
        raise ValueError(f"{corpus.name}: accepted are classes of single texts.")
    corpus.splits["train"], texts = take_split(corpus.splits["train"], args.texts, data.split_seed)
    plain = f"{training.output_dir.rstrip('/')}-plain"
    made_by = {"encoder": args.model_name_or_path, "texts": args.texts, "seed": training.seed, **asdict(data)}
    made_by |= {"num_train_epochs": training.num_train_epochs, "learning_rate": training.learning_rate}
    if not is_made(Path(plain), made_by):
        own = copy.copy(training)
        own.output_dir = plain
        fine_tune(args, data, own, corpus)
        write_text(Path(plain, MADE_BY), json.dumps(made_by, indent=1))
    added: Any = add_exits(
        plain,
        texts,
        training.output_dir,
        agreement=args.agreement,
        risk=args.risk,
        text_column=corpus.text_columns[0],
        label_column="label",
        seed=training.seed,
        disable_tqdm=bool(training.disable_tqdm),
    )
    known = rights(args.language, args.license, args.data_license)
    if known:
        card = Path(training.output_dir, CARD)
        write_text(card, f"{card.read_text('utf-8').rstrip()}\n\n## Data\n\nThe texts are of {corpus.name}. {known}\n")
    for speed in added.speeds:
        logger.info(f"{speed.name}: depth {speed.depth:.2f} of {added.num_layers}, agreement {speed.agreement:.4f}")
    return added


if __name__ == "__main__":
    main()
