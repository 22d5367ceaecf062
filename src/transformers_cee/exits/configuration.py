# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The exit fields that every early-exit config carries, and their validation."""

from dataclasses import dataclass
from typing import Any, ClassVar


EXIT_POOLINGS = ("cls", "mean")
EXIT_NORMS = ("none", "layer_norm")
POLICY_INPUTS = ("state", "confidence", "both")


@dataclass(kw_only=True)
class ExitConfigMixin:
    """Fields of a config that say where the exits are and how an input leaves.

    Mix in before a `PreTrainedConfig` that has `num_hidden_layers`.

    Args:
        exit_layers (`int` or `list[int]`, *optional*):
            Layers (1-based) that end in an exit. A list names them, an integer is a stride counted back from the last
            layer, `None` stands for every layer. The last layer is always an exit.
        exit_criterion (`str`, *optional*, defaults to `"policy"`):
            Default rule that decides exit or continue; a name of `transformers_cee.exits.criteria.CRITERIA`.
        exit_threshold (`float` or `list[float]`, *optional*, defaults to 0.5):
            Number(s) that the criterion's score is compared with: one for all exits, or one per exit (the last one has
            no effect, since the last exit takes everything that reaches it).
        exit_pooling (`str`, *optional*, defaults to `"cls"`):
            How the hidden states (rows, time, hidden) of a layer become one exit state (rows, hidden): `"cls"` takes
            the first token through one tanh pooler shared by all exits (ConsistentEE's choice), `"mean"` averages the
            unmasked tokens.
        exit_norm (`str`, *optional*, defaults to `"none"`):
            `"layer_norm"` gives each exit a LayerNorm of its own behind the pooling.
        policy_hidden_size (`int`, *optional*, defaults to 32):
            Hidden units of each exit's policy network.
        policy_activation (`str`, *optional*, defaults to `"gelu"`):
            Activation of the policy networks, a name known to `transformers.activations.ACT2FN`.
        policy_inputs (`str`, *optional*, defaults to `"state"`):
            What a policy sees: `"state"` (the exit state, as in the paper), `"confidence"` (maximum probability,
            margin and entropy of the exit head, the previous exit's margin, agreement with earlier exits) or `"both"`.
        reward_alpha (`float`, *optional*, defaults to 0.02):
            Weight α of one layer in the reward `−CE − α·l`.
        reward_hardness (`bool`, *optional*, defaults to `True`):
            Scale α by `1 − M/L`, with M the memorized layer of the training row.
    """

    exit_layers: int | list[int] | None = None
    exit_criterion: str = "policy"
    exit_threshold: float | list[float] = 0.5
    exit_pooling: str = "cls"
    exit_norm: str = "none"
    policy_hidden_size: int = 32
    policy_activation: str = "gelu"
    policy_inputs: str = "state"
    reward_alpha: float = 0.02
    reward_hardness: bool = True

    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "exit_layers",
        "exit_probabilities",
        "all_exit_logits",
        "all_exit_states",
        "hidden_states",
        "attentions",
    ]

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        # The config of a stock checkpoint becomes ours: it would otherwise keep the stock name until it is saved.
        self.model_type = type(self).model_type  # type: ignore[attr-defined]
        self.check_exits()

    @property
    def exit_layer_numbers(self) -> list[int]:
        """1-based layers of all exits, ascending, the last layer included."""
        last: int = self.num_hidden_layers  # type: ignore[attr-defined]
        if self.exit_layers is None:
            return list(range(1, last + 1))
        if isinstance(self.exit_layers, int):
            return sorted(range(last, 0, -self.exit_layers))
        return sorted({*self.exit_layers, last})

    def check_exits(self) -> None:
        """Raises `ValueError` when a field of the exits is out of its range."""
        last: int = self.num_hidden_layers  # type: ignore[attr-defined]
        if isinstance(self.exit_layers, int):
            if not 1 <= self.exit_layers <= last:
                raise ValueError(f"`exit_layers`={self.exit_layers} as a stride must lie in 1..{last}.")
        elif self.exit_layers is not None:
            wrong = [layer for layer in self.exit_layers if not 1 <= layer <= last]
            if wrong:
                raise ValueError(f"`exit_layers`={self.exit_layers}: {wrong} outside of 1..{last}.")
        _check_choice("exit_pooling", self.exit_pooling, EXIT_POOLINGS)
        _check_choice("exit_norm", self.exit_norm, EXIT_NORMS)
        _check_choice("policy_inputs", self.policy_inputs, POLICY_INPUTS)
        if self.policy_hidden_size < 1:
            raise ValueError(f"`policy_hidden_size`={self.policy_hidden_size} must be at least 1.")
        if self.reward_alpha < 0:
            raise ValueError(f"`reward_alpha`={self.reward_alpha} must not be negative.")
        _check_activation(self.policy_activation)
        # Imported here: criteria need torch, a config alone does not.
        from transformers_cee.exits.criteria import check_thresholds

        check_thresholds(self.exit_criterion, self.exit_threshold, len(self.exit_layer_numbers))


def _check_choice(name: str, value: Any, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"`{name}`={value!r} is unknown; accepted are {', '.join(map(repr, accepted))}.")


def _check_activation(name: str) -> None:
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise ValueError(f"`policy_activation`={name!r} is unknown; accepted are {', '.join(sorted(ACT2FN))}.")
