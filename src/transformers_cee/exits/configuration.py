# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The exit fields that every early-exit config carries, and their validation."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers_cee.exits.cache_name import CACHE_NAME
from transformers_cee.exits.config_loading import ConfigLoadingMixin, drop_moved
from transformers_cee.exits.fields import (
    MAX_LAYERS,
    Kind,
    check_field,
    is_number,
    is_whole,
    number,
    shown,
    text,
    whole,
)
from transformers_cee.exits.numbers import plain
from transformers_cee.exits.numbers import whole as without_point


EXIT_POOLINGS = ("cls", "mean", "internal_mean")
EXIT_NORMS = ("none", "layer_norm")
POLICY_INPUTS = ("state", "confidence", "log_confidence", "both")
POLICY_CONDITIONS = ("none", "input", "film")
SKIPPED_KV = ("copy", "deferred")


def _are_alphas(value: Any) -> bool:
    is_pair = isinstance(value, list | tuple) and len(value) == 2 and all(is_number(one) for one in value)
    return is_pair and 0 < value[0] < value[1]


def _is_threshold(value: Any) -> bool:
    return is_number(value) or value in (float("inf"), float("-inf"))


def _are_thresholds(value: Any) -> bool:
    return isinstance(value, str | None) or all(
        map(_is_threshold, value if isinstance(value, list | tuple) else [value])
    )


# Kinds of fields that need no more than that.
_KINDS = {
    "exit_threshold": Kind(_are_thresholds, "a number or a list of numbers, or the name of an operating point"),
    "exit_criterion": text,
    "exit_patience": Kind(lambda value: is_whole(value) and 1 <= value < 2**31, "a whole number of at least 1"),
    "exit_tolerance": number(0),
    "exit_budget": number(0, 1, above=True).or_none(),
    "policy_hidden_size": whole(1),
    "policy_activation": text,
    "policy_alphas": Kind(_are_alphas, "two rising positive numbers"),
    "reward_alpha": number(0),
    "exit_head_rank": whole(1),
    "drafter_vocab_size": whole(1),
}


@dataclass(kw_only=True)
class ExitConfigMixin(ConfigLoadingMixin):
    """Fields of a config that say where the exits are and how an input leaves.

    Mix in before a `PreTrainedConfig` that has `num_hidden_layers`.

    Args:
        exit_layers (`int` or `list[int]`, *optional*):
            Layers (1-based) that end in an exit. A list names them, an integer is a stride counted back from the last
            layer, `None` stands for every layer. The last layer is always an exit.
        exit_criterion (`str`, *optional*, defaults to `"policy"`):
            Default rule that decides exit or continue; a name of `transformers_cee.exits.criteria.CRITERIA`.
        exit_threshold (`float`, `list[float]` or `str`, *optional*):
            Number(s) that the score of `exit_criterion` is compared with: one for all exits, or one per exit (the last
            one has no effect, since the last exit takes everything that reaches it); or the name of one of
            `exit_operating_points`, which brings its criterion. `None` switches exits off, whatever the criterion,
            until a call gives a threshold or a budget.
        min_exit_layer (`int`, *optional*): first layer (1-based) at which an input may leave; `None` allows all exits.
        exit_patience (`int`, *optional*, defaults to 2):
            Exits in a row that must agree, of criteria whose threshold is something else.
        exit_tolerance (`float`, *optional*, defaults to 0.5):
            Difference up to which two exits' predictions count as the same in regression.
        exit_estimators (`list[str]`, *optional*):
            Criteria whose fitted estimators the model carries, see `transformers_cee.exits.estimators`.
        exit_operating_points (`dict[str, dict]`, *optional*):
            Operating points by name, for `exit_threshold="name"`: `criterion`, `thresholds` and what calibration says
            of them, see `CalibratedPoint`.
        exit_budget (`float`, *optional*):
            Default mean depth as a share of all layers, of policies conditioned on the price of a layer; used when
            neither a threshold nor another criterion is asked for.
        exit_budgets (`list[list[float]]`, *optional*):
            Fitted on held-out data, by rising budget: budget, price α of one layer, threshold.
        policy_hidden_size (`int`, *optional*, defaults to 32):
            Hidden units of each exit's policy network.
        policy_activation (`str`, *optional*, defaults to `"gelu"`):
            Activation of the policy networks, a name known to `transformers.activations.ACT2FN`.
        policy_inputs (`str`, *optional*, defaults to `"state"`):
            What a policy sees: `"state"` (the exit state, as in the paper), `"confidence"` (maximum probability,
            margin and entropy of the exit head, the previous exit's margin, agreement with earlier exits),
            `"log_confidence"` (the same as log-odds, which tell 0.99 from 0.999) or `"both"` (state and confidence).
        policy_condition (`str`, *optional*, defaults to `"none"`):
            How the policies see the price α of a layer: `"none"`, `"input"` (one more input) or `"film"` (it scales
            and shifts the hidden units). Conditioned policies serve any speed.
        policy_alphas (`list[float]`, *optional*, defaults to `[0.0005, 0.5]`):
            Lowest and highest α that conditioned policies learn.
        reward_alpha (`float`, *optional*, defaults to 0.02):
            Price α of one layer in the reward of policies that are trained for one price; what conditioned policies
            are asked for where no budget says otherwise.
    """

    exit_layers: int | list[int] | None = None
    exit_criterion: str = "policy"
    exit_threshold: float | list[float] | str | None = None
    min_exit_layer: int | None = None
    exit_patience: int = 2
    exit_tolerance: float = 0.5
    exit_estimators: list[str] = field(default_factory=list)
    exit_operating_points: dict[str, dict] = field(default_factory=dict)
    exit_budget: float | None = None
    exit_budgets: list[list[float]] = field(default_factory=list)
    policy_hidden_size: int = 32
    policy_activation: str = "gelu"
    policy_inputs: str = "state"
    policy_condition: str = "none"
    policy_alphas: list[float] = field(default_factory=lambda: [0.0005, 0.5])
    reward_alpha: float = 0.02

    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "exit_layers",
        "exit_probabilities",
        "all_exit_logits",
        "all_exit_states",
        "all_exit_losses",
        "all_policy_logits",
        "hidden_states",
        "attentions",
    ]

    def __post_init__(self, **kwargs: Any) -> None:
        drop_moved(kwargs)
        super().__post_init__(**kwargs)  # type: ignore[misc]
        # The config of a stock checkpoint becomes ours: it would otherwise keep the stock name until it is saved.
        config: Any = self
        config.check_model_type(config.model_type)
        config.model_type = type(config).model_type
        self.check_exits()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As `PreTrainedConfig.save_pretrained`, unless a field of the exits was set to what nobody could load."""
        self.check_exits()
        super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    @property
    def exit_layer_numbers(self) -> list[int]:
        """1-based layers of all exits, ascending, the last layer included."""
        last: int = self.num_hidden_layers  # type: ignore[attr-defined]
        if self.exit_layers is None:
            return list(range(1, last + 1))
        if isinstance(self.exit_layers, int):
            return sorted(range(last, 0, -self.exit_layers))
        return sorted({*self.exit_layers, last})

    def state_sizes(self, layers: Sequence[int]) -> list[int]:
        """Size of the exit state behind each of some layers (1-based); `hidden_size` is the largest."""
        return [self.hidden_size] * len(layers)  # type: ignore[attr-defined]

    def check_exit_layers(self) -> None:
        """Raises `ValueError` unless `exit_layers` says which layers end in exits."""
        self.exit_layers = without_point(self.exit_layers)
        if isinstance(self.exit_layers, list | tuple):
            self.exit_layers = [without_point(layer) for layer in self.exit_layers]
        last, layers = self.num_hidden_layers, self.exit_layers  # type: ignore[attr-defined]
        check_field("num_hidden_layers", last, whole(1, MAX_LAYERS))
        if is_whole(layers):
            if not 1 <= layers <= last:
                raise ValueError(f"`exit_layers`={shown(layers)} as a stride must lie in 1..{last}.")
        elif layers is not None:
            if not isinstance(layers, list | tuple):
                raise ValueError(f"`exit_layers`={shown(layers)} must be a stride or a list of layers.")
            wrong = [layer for layer in layers if not is_whole(layer) or not 1 <= layer <= last]
            if wrong:
                raise ValueError(f"`exit_layers`={shown(layers)}: {shown(wrong)} are no layers of 1..{last}.")

    def check_exits(self) -> None:
        """Raises `ValueError` when a field of the exits is out of its range. Numbers of numpy and torch, and whole
        numbers with a point, become Python's own."""
        for name in _NUMBERS:
            setattr(self, name, plain(getattr(self, name)))
        for name in _WHOLE_NUMBERS & vars(self).keys():
            setattr(self, name, without_point(getattr(self, name)))
        self.check_exit_layers()
        for name, kind in _KINDS.items():
            if hasattr(self, name):
                check_field(name, getattr(self, name), kind)
        _check_choice("policy_inputs", self.policy_inputs, POLICY_INPUTS)
        _check_choice("policy_condition", self.policy_condition, POLICY_CONDITIONS)
        _check_activation(self.policy_activation)
        check_min_exit_layer(self.min_exit_layer, self.num_hidden_layers)  # type: ignore[attr-defined]
        # Imported here: defining the class of a config then needs no criteria.
        from transformers_cee.exits.criteria import check_criterion, check_thresholds
        from transformers_cee.exits.deciding import resolve_decision
        from transformers_cee.exits.estimators import check_estimators
        from transformers_cee.exits.saved_points import check_budgets, check_points

        check_estimators(self.exit_estimators)
        check_criterion(self.exit_criterion)
        num_exits = len(self.exit_layer_numbers)
        check_points(self.exit_operating_points, num_exits)
        check_budgets(self.exit_budgets)
        decision = resolve_decision(self)
        check_thresholds(decision.criterion, decision.threshold, num_exits)


@dataclass(kw_only=True)
class ClassifierExitConfigMixin(ExitConfigMixin):
    """Exit fields of a classifier, whose exits look at one state per row.

    Args:
        exit_norm (`str`, *optional*, defaults to `"none"`):
            `"layer_norm"` gives each exit a LayerNorm of its own behind the pooling.
        kwargs: fields of `ExitConfigMixin`.
    """

    exit_norm: str = "none"

    def check_exits(self) -> None:
        super().check_exits()
        _check_choice("exit_norm", self.exit_norm, EXIT_NORMS)


@dataclass(kw_only=True)
class StagedExitConfigMixin(ClassifierExitConfigMixin):
    """Exit fields of a convolutional network. Its layers are the residual blocks of all stages, counted through: the
    exit state of a block is the mean over its map, as wide as the block's stage has channels. For an exit behind each
    stage, `exit_layers` are the sums of `depths`. Mix in before a config with `depths` and `hidden_sizes`.

    Args:
        kwargs: fields of `ClassifierExitConfigMixin`.
    """

    @property
    def num_hidden_layers(self) -> int:
        """Blocks of all stages."""
        return sum(self.depths)  # type: ignore[attr-defined]

    @property
    def hidden_size(self) -> int:
        """Channels of the widest stage: exit states of others are filled up with zeros."""
        return max(self.hidden_sizes)  # type: ignore[attr-defined]

    def state_sizes(self, layers: Sequence[int]) -> list[int]:
        stages: Any = zip(self.hidden_sizes, self.depths, strict=True)  # type: ignore[attr-defined]
        widths = [width for width, depth in stages for _ in range(depth)]
        return [widths[layer - 1] for layer in layers]

    def check_exit_layers(self) -> None:
        depths, widths = self.depths, self.hidden_sizes  # type: ignore[attr-defined]
        stages = getattr(self, "num_stages", len(depths))
        if not len(depths) == len(widths) == stages:
            raise ValueError(
                f"`depths`={shown(depths)} and `hidden_sizes`={shown(widths)} must have one number for each of "
                f"{stages} stages."
            )
        super().check_exit_layers()


@dataclass(kw_only=True)
class EncoderExitConfigMixin(ClassifierExitConfigMixin):
    """Exit fields of an encoder, whose exits pool the states of its tokens.

    Args:
        exit_pooling (`str`, *optional*, defaults to `"cls"`):
            How the hidden states (rows, time, hidden) of a layer become one exit state (rows, hidden): `"cls"` takes
            the first token through what the stock head has before its last layer, shared by all exits (ConsistentEE's
            choice; BERT's tanh pooler), `"mean"` averages the unmasked tokens, `"internal_mean"` does so at internal
            exits and leaves the last one to the stock head, so that full depth stays the stock model.
        kwargs: fields of `ClassifierExitConfigMixin`.
    """

    exit_pooling: str = "cls"

    def check_exits(self) -> None:
        super().check_exits()
        _check_choice("exit_pooling", self.exit_pooling, EXIT_POOLINGS)

    @property
    def keeps_stock_pooling(self) -> bool:
        """Does an exit use what the stock head has before its last layer?"""
        return self.exit_pooling != "mean"

    def averages_tokens(self, is_last: bool) -> bool:
        """Is an exit's state the mean over tokens?

        Args:
            is_last (`bool`): is it the last exit?
        """
        return self.exit_pooling == "mean" or (self.exit_pooling == "internal_mean" and not is_last)


@dataclass(kw_only=True)
class DecoderExitConfigMixin(ExitConfigMixin):
    """Exit fields of a causal language model, in which every generated token leaves at its own layer.

    Args:
        exit_head (`str`, *optional*, defaults to `"norm"`):
            LM head of the internal exits, a name of `LM_EXIT_HEADS`: `"shared"` (the model's own final norm and head,
            no new weights), `"norm"` (a norm per exit, shared head), `"low_rank"` (norm and a residual adapter of rank
            `exit_head_rank` per exit, shared head), `"untied"` (norm and a head per exit, started from the model's;
            ConsistentEE) or `"layernorm_linear"` (LayerNorm and a linear layer with bias per exit; Valade 2024).
        exit_head_rank (`int`, *optional*, defaults to 64): rank of the adapters of `"low_rank"`.
        skipped_kv (`str`, *optional*, defaults to `"copy"`):
            Keys and values of a token at the layers that it skipped: `"copy"` projects its exit state, `"deferred"`
            computes them exactly, several tokens at a time, when a later token goes that deep.
        drafter_layer (`int`, *optional*):
            Layer (1-based, neither the first nor the last) that the model's drafter stands for, see `JumpDrafter`;
            None for no drafter.
        drafter_vocab_size (`int`, *optional*, defaults to 8192): tokens that the drafter may propose.
        kwargs: fields of `ExitConfigMixin`.
    """

    exit_head: str = "norm"
    exit_head_rank: int = 64
    skipped_kv: str = "copy"
    drafter_layer: int | None = None
    drafter_vocab_size: int = 8192

    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        *ExitConfigMixin.keys_to_ignore_at_inference,
        CACHE_NAME,
        "all_exit_predictions",
        "all_exit_features",
        "token_labels",
        "token_rows",
        "may_exit",
        "token_losses",
        "token_predictions",
    ]

    def check_exits(self) -> None:
        super().check_exits()
        # Imported here, as criteria are.
        from transformers_cee.exits.lm_heads import LM_EXIT_HEADS

        LM_EXIT_HEADS.find(self.exit_head)
        check_skipped_kv(self.skipped_kv)
        layers: int = self.num_hidden_layers  # type: ignore[attr-defined]
        check_field("drafter_layer", self.drafter_layer, whole(2, max(2, layers - 1)).or_none())


_NUMBERS = (
    "exit_threshold",
    "exit_tolerance",
    "exit_budget",
    "exit_budgets",
    "policy_alphas",
    "reward_alpha",
)
_WHOLE_NUMBERS = {"exit_patience", "policy_hidden_size", "exit_head_rank", "min_exit_layer"}


def check_min_exit_layer(layer: int | None, num_layers: int) -> None:
    """Raises `ValueError` unless `layer` is a layer (1-based) or `None`."""
    if layer is not None and not (is_whole(without_point(layer)) and 1 <= layer <= num_layers):
        raise ValueError(f"`min_exit_layer`={shown(layer)} must lie in 1..{num_layers}, or be None.")


def first_exit(layer_numbers: Sequence[int], min_exit_layer: int | None) -> int:
    """Exit (0-based) before which nothing leaves.

    Args:
        layer_numbers (sequence of `int`): layers (1-based) of all exits, ascending.
        min_exit_layer (`int`, *optional*): first layer to leave at.
    """
    return 0 if min_exit_layer is None else sum(number < min_exit_layer for number in layer_numbers)


def check_skipped_kv(name: str) -> None:
    """Raises `ValueError` unless `name` is a way to fill the keys and values of skipped layers."""
    _check_choice("skipped_kv", name, SKIPPED_KV)


def _check_choice(name: str, value: Any, accepted: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in accepted:
        raise ValueError(f"`{name}`={shown(value)} is unknown; accepted are {', '.join(map(repr, accepted))}.")


def _check_activation(name: str) -> None:
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise ValueError(f"`policy_activation`={name!r} is unknown; accepted are {', '.join(sorted(ACT2FN))}.")
