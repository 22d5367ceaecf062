# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Arguments of `run_glue_cee.py`, from the command line, from a .yaml or .json file, or from both."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from baselines import ORACLE, check_criteria
from common import MATMUL_PRECISIONS, check_positive, parse_dataclasses
from glue_data import DataArguments

from transformers_cee import ConsistentEETrainingArguments


EXIT_FIELDS = (
    "num_hidden_layers",
    "exit_layers",
    "exit_pooling",
    "exit_norm",
    "exit_threshold",
    "min_exit_layer",
    "policy_inputs",
    "policy_hidden_size",
    "policy_activation",
    "policy_condition",
    "reward_alpha",
)


@dataclass
class CheckpointArguments:
    """Which checkpoint to start from, and its exits. What is not given stays as in the checkpoint's config."""

    exit_fields: ClassVar[tuple[str, ...]]

    model_name_or_path: str = field(metadata={"help": "Folder or Hub name of a checkpoint, with or without exits."})
    base_model: str | None = field(default=None, metadata={"help": "What the model card calls that checkpoint."})
    language: str | None = field(
        default=None, metadata={"help": "Language of the data for the model card, such as en. Default: as known."}
    )
    license: str | None = field(
        default=None, metadata={"help": "Licence of that checkpoint for the model card, as the Hub names it: mit."}
    )
    data_license: str | None = field(default=None, metadata={"help": "Licence of the data for the model card."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer, if not that of the checkpoint."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})
    float32_matmul_precision: str = field(
        default="highest",
        metadata={
            "help": "Of float32 matrix products in training: highest, high or medium (inputs rounded to bfloat16 "
            "where the processor has units for it). Exits are measured at full precision."
        },
    )
    exit_layers: list[int] | None = field(
        default=None,
        metadata={"help": "One number: a stride, 2 for every second layer. Several: these layers."},
    )
    exit_threshold: list[float] | None = field(default=None, metadata={"help": "One for all exits, or one per exit."})
    min_exit_layer: int | None = field(default=None, metadata={"help": "Nothing leaves before this layer."})
    policy_inputs: str | None = field(default=None, metadata={"help": "state, confidence, log_confidence or both."})
    policy_hidden_size: int | None = field(default=None, metadata={"help": "Hidden units of each policy."})
    policy_activation: str | None = field(default=None, metadata={"help": "Activation of the policies."})
    policy_condition: str | None = field(
        default=None, metadata={"help": "none, or policies that serve any speed: input or film."}
    )
    reward_alpha: float | None = field(default=None, metadata={"help": "Weight of a layer in the reward."})

    def __post_init__(self) -> None:
        if self.float32_matmul_precision not in MATMUL_PRECISIONS:
            raise ValueError(
                f"`float32_matmul_precision` must be among {', '.join(MATMUL_PRECISIONS)}; "
                f"got {self.float32_matmul_precision!r}."
            )

    def exit_options(self) -> dict[str, Any]:
        """The exit fields that were given, as the config takes them."""
        options = {name: getattr(self, name) for name in self.exit_fields if getattr(self, name) is not None}
        for name in ("exit_layers", "exit_threshold"):
            if len(options.get(name, ())) == 1:
                options[name] = options[name][0]
        return options


@dataclass
class ModelArguments(CheckpointArguments):
    """The exits of an encoder, besides what all checkpoints have."""

    exit_fields: ClassVar[tuple[str, ...]] = EXIT_FIELDS

    num_hidden_layers: int | None = field(
        default=None, metadata={"help": "Keep the first so many layers of the checkpoint only."}
    )
    exit_pooling: str | None = field(
        default=None, metadata={"help": "cls, mean, or internal_mean, which leaves the last exit to the stock head."}
    )
    exit_norm: str | None = field(default=None, metadata={"help": "none or layer_norm."})
    ignore_mismatched_sizes: bool = field(
        default=False,
        metadata={"help": "Start the heads anew where the checkpoint has some for another number of classes."},
    )


@dataclass
class EvaluationArguments:
    """What is measured after training."""

    operating_points: int = field(default=6, metadata={"help": "How many depths, from 1/4 of the layers upwards."})
    baselines: list[str] = field(
        default_factory=lambda: ["max_probability", "entropy", "patience"],
        metadata={"help": "Exit criteria that ConsistentEE is compared with. Those that need it are fitted on dev."},
    )
    policies_at: list[float] = field(
        default_factory=list,
        metadata={"help": "Also train policies for these reward weights; per depth, dev picks the one to use."},
    )
    timing_batch_sizes: list[int] = field(
        default_factory=lambda: [32, 1],
        metadata={"help": "Batch sizes of wall-clock figures; the first is plotted."},
    )
    save_exits: bool = field(
        default=False,
        metadata={"help": "Write every exit's states and logits of all splits to exits-<split>.safetensors."},
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop a phase after so many dev evaluations without improvement."}
    )

    def __post_init__(self):
        check_criteria("baselines", self.baselines, left_out=("policy", ORACLE))
        check_positive(self, ("operating_points", "early_stopping_patience"))
        if not self.timing_batch_sizes or min(self.timing_batch_sizes) < 1:
            raise ValueError(f"`timing_batch_sizes` must be numbers of at least 1; got {self.timing_batch_sizes}.")

    def target_depths(self, num_layers: int) -> list[float]:
        """Evenly spaced depths from a quarter of the layers up, in layers; half of them for even numbers of points."""
        count = self.operating_points
        return [num_layers * (index + 1) / (count + 2) for index in range(1, count + 1)]


Arguments = tuple[ModelArguments, DataArguments, EvaluationArguments, ConsistentEETrainingArguments]


def parse_arguments(argv: list[str]) -> Arguments:
    """Command line to dataclasses; a leading .yaml or .json file stands for the options in it."""
    types = (ModelArguments, DataArguments, EvaluationArguments, ConsistentEETrainingArguments)
    return parse_dataclasses(types, argv, "Fine-tunes a BERT with exits and measures accuracy against speed.")


__all__ = ["CheckpointArguments", "EvaluationArguments", "ModelArguments", "parse_arguments"]
