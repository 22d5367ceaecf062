# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Arguments of `run_clm_cee.py`, from the command line, from a .yaml or .json file, or from both."""

from dataclasses import dataclass, field
from typing import ClassVar

from arguments import CheckpointArguments
from baselines import NOT_GENERATED, check_criteria
from clm_data import TextArguments
from common import check_positive, parse_dataclasses

from transformers_cee import ConsistentEETrainingArguments


LM_EXIT_FIELDS = (
    "exit_layers",
    "exit_head",
    "exit_head_rank",
    "exit_criterion",
    "exit_threshold",
    "min_exit_layer",
    "skipped_kv",
    "drafter_layer",
    "drafter_vocab_size",
    "policy_inputs",
    "policy_hidden_size",
    "policy_activation",
    "policy_condition",
    "reward_alpha",
)
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class LanguageModelArguments(CheckpointArguments):
    """The exits of a decoder, LoRA for its layers, and how its weights are read."""

    exit_fields: ClassVar[tuple[str, ...]] = LM_EXIT_FIELDS

    gguf_file: str | None = field(
        default=None, metadata={"help": "GGUF file in --model_name_or_path to read weights and tokenizer from."}
    )
    dtype: str = field(default="float32", metadata={"help": f"Type of the weights: {', '.join(DTYPES)}."})
    lora_r: int | None = field(
        default=None,
        metadata={"help": "Train LoRA matrices of this rank and the exits; everything else stays as it is."},
    )
    lora_alpha: int | None = field(default=None, metadata={"help": "Scale of LoRA. Default: twice lora_r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before LoRA's matrices."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Linear layers that get LoRA matrices. Default: PEFT's for the architecture."}
    )
    exit_head: str | None = field(
        default=None, metadata={"help": "shared, norm, low_rank, untied or layernorm_linear."}
    )
    exit_head_rank: int | None = field(default=None, metadata={"help": "Rank of low_rank heads."})
    fit_heads_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Start the exit heads in closed form, on so many training tokens; those that the checkpoint has "
            "learned only where the phase heads goes on with them. Default: as they come."
        },
    )
    exit_criterion: str | None = field(default=None, metadata={"help": "Exit criterion of the published model."})
    skipped_kv: str | None = field(
        default=None, metadata={"help": "Keys and values of skipped layers: copy, deferred."}
    )

    drafter_layer: int | None = field(
        default=None,
        metadata={"help": "Layer that the model's drafter stands for; the phase drafter trains it. Default: none."},
    )
    drafter_vocab_size: int | None = field(default=None, metadata={"help": "Tokens that the drafter may propose."})

    def __post_init__(self):
        super().__post_init__()
        if self.dtype not in DTYPES:
            raise ValueError(f"`dtype` must be among {', '.join(DTYPES)}; got {self.dtype!r}.")
        check_positive(self, ("lora_r", "lora_alpha", "fit_heads_tokens"))
        if self.gguf_file is not None and not self.gguf_file.endswith(".gguf"):
            raise ValueError(f"`gguf_file` must end in .gguf; got {self.gguf_file!r}.")


@dataclass
class GenerationArguments:
    """What is measured after training: greedy answers to test prompts, with exits against full depth."""

    criteria: list[str] = field(
        default_factory=lambda: ["policy", "max_probability", "margin"],
        metadata={"help": "Exit criteria to compare; policy is ConsistentEE. Those that need it are fitted on dev."},
    )
    operating_points: int = field(
        default=4, metadata={"help": "Depths per criterion, evenly between the first exit and the last."}
    )
    eval_depths: list[float] | None = field(
        default=None, metadata={"help": "These depths (mean exit layer) instead; thresholds for them come from dev."}
    )
    agreements: list[float] = field(
        default_factory=list,
        metadata={
            "help": "Shares of tokens that are to be those of full depth, certified on dev for the first criterion: "
            "operating points such as agreement-0.99."
        },
    )
    max_eval_prompts: int = field(default=100, metadata={"help": "Test prompts that are answered."})
    max_new_tokens: int = field(default=128, metadata={"help": "Longest answer."})
    eval_batch_sizes: list[int] = field(
        default_factory=lambda: [1], metadata={"help": "Batch sizes of wall-clock figures; the first is plotted."}
    )
    timing_prompts: int = field(
        default=4, metadata={"help": "Test prompts on which time is taken, in three rounds in turn with full depth."}
    )
    perplexity_tokens: int | None = field(
        default=None,
        metadata={"help": "Tokens of each reference that perplexity is taken of; 0 for none. Default: all."},
    )
    bertscore_model: str | None = field(
        default=None, metadata={"help": "Encoder of BERTScore: a folder, or a name on the Hub. Default: no BERTScore."}
    )
    bertscore_num_layers: int | None = field(default=None, metadata={"help": "Layer of it to use. Default: the last."})
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop a phase after so many dev evaluations without improvement."}
    )

    def __post_init__(self):
        if not self.criteria:
            raise ValueError("`criteria` must name at least one exit criterion; got [].")
        check_criteria("criteria", self.criteria, left_out=NOT_GENERATED)
        names = ("operating_points", "max_eval_prompts", "max_new_tokens", "timing_prompts")
        check_positive(self, (*names, "bertscore_num_layers", "early_stopping_patience"))
        if not self.eval_batch_sizes or min(self.eval_batch_sizes) < 1:
            raise ValueError(f"`eval_batch_sizes` must be numbers of at least 1; got {self.eval_batch_sizes}.")
        if self.perplexity_tokens is not None and self.perplexity_tokens < 0:
            raise ValueError(f"`perplexity_tokens` must not be negative; got {self.perplexity_tokens}.")
        if not all(0 < level < 1 for level in self.agreements):
            raise ValueError(f"`agreements` must be shares between 0 and 1; got {self.agreements}.")
        if self.eval_depths is not None and min(self.eval_depths) < 1:
            raise ValueError(f"`eval_depths` must be layers, 1 or more; got {self.eval_depths}.")

    def target_depths(self, layer_numbers: list[int]) -> list[float]:
        """Wanted mean exit layers: those given, or evenly spaced between the first exit and the last layer."""
        first, last = layer_numbers[0], layer_numbers[-1]
        if self.eval_depths is None:
            step = (last - first) / (self.operating_points + 1)
            return [first + step * (index + 1) for index in range(self.operating_points)]
        if max(self.eval_depths) > last:
            raise ValueError(f"`eval_depths` must lie in 1..{last}; got {self.eval_depths}.")
        return list(self.eval_depths)


LMArguments = tuple[LanguageModelArguments, TextArguments, GenerationArguments, ConsistentEETrainingArguments]


def parse_arguments(argv: list[str]) -> LMArguments:
    """Command line to dataclasses; a leading .yaml or .json file stands for the options in it."""
    types = (LanguageModelArguments, TextArguments, GenerationArguments, ConsistentEETrainingArguments)
    arguments = parse_dataclasses(types, argv, "Gives a decoder exits and measures text quality against speed.")
    if arguments[0].lora_r is not None and arguments[3].trainable == "exits":
        raise ValueError("`lora_r` needs `trainable` 'all': 'exits' leaves the layers, and LoRA in them, alone.")
    return arguments
