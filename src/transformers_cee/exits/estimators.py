# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Estimators: small modules that some exit criteria fit on stored exits. They are saved with the model's weights, and
`config.exit_estimators` names them, so that a saved model has them again."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from transformers_cee.exits.by_layer import LayerModules, layer_name
from transformers_cee.exits.policy import NUM_CONFIDENCE_FEATURES


# Beyond so many labels the consistency estimator does not see which one is predicted.
MAX_ONE_HOT = 64
STATE_PROJECTION = 32
# Bounds |log T|: separable logits would drive a temperature to 0.
MAX_LOG_TEMPERATURE = 5.0


def _apply(linear: nn.Linear, inputs: Tensor) -> Tensor:
    """A linear layer in its own precision, its result in float32."""
    weight = getattr(linear, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point():
        inputs = inputs.to(weight.dtype)
    # Otherwise it is quantized and knows best.
    return linear(inputs).float()


class ErrorEstimator(nn.Module):
    """One linear layer on the exit state, shared by all exits, that expects whether the exit is wrong (BERxiT, Xin et
    al. 2021)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)

    def forward(self, state: Tensor) -> Tensor:
        """Logits (…,) from states (…, hidden)."""
        return _apply(self.linear, state).squeeze(-1)


class Temperatures(nn.Module):
    """One temperature per internal exit; all 1 before they are fitted (Schwartz et al. 2020).

    Args:
        layers (sequence of `int`): layers (1-based) of the internal exits.
    """

    def __init__(self, layers: Sequence[int]) -> None:
        super().__init__()
        for layer in layers:
            self.register_parameter(layer_name(layer), nn.Parameter(torch.zeros(1)))

    def unfit(self) -> None:
        """Sets all temperatures to 1."""
        for log_temperature in self.parameters():
            init.zeros_(log_temperature)

    @property
    def log_temperatures(self) -> Tensor:
        """Logarithms (exits − 1,) of the temperatures."""
        values = list(self.parameters())
        return torch.cat(values) if values else torch.zeros(0)

    @property
    def temperatures(self) -> Tensor:
        """Temperatures (exits − 1,) in float32."""
        return self.log_temperatures.float().clamp(-MAX_LOG_TEMPERATURE, MAX_LOG_TEMPERATURE).exp()

    def forward(self, logits: Tensor, index: int) -> Tensor:
        """Logits (rows, labels) of internal exit `index` (0-based) over its temperature."""
        return logits.float() / self.temperatures[index]


class ConsistencyEstimator(nn.Module):
    """Expects whether an exit predicts what the last exit will (CAT's meta classifier, Schuster et al. 2021).

    Each exit projects its state to 32 numbers. One network, shared by all exits, sees these, the prediction, maximum
    probability and margin, the share of earlier exits that predict the same, and the share of layers so far.

    Args:
        hidden_size (`int`): size of an exit state.
        num_labels (`int`): labels of a head; the prediction is left out where there are more than 64.
        layer_numbers (sequence of `int`): 1-based layers of all exits.
    """

    def __init__(self, hidden_size: int, num_labels: int, layer_numbers: Sequence[int]) -> None:
        super().__init__()
        self.num_labels = num_labels if num_labels <= MAX_ONE_HOT else 0
        self.shares = [layer / layer_numbers[-1] for layer in layer_numbers[:-1]]
        self.projections = LayerModules(layer_numbers[:-1], lambda: nn.Linear(hidden_size, STATE_PROJECTION))
        self.widen = nn.Linear(STATE_PROJECTION + self.num_labels + 4, STATE_PROJECTION)
        self.narrow = nn.Linear(STATE_PROJECTION, 1)

    def forward(self, state: Tensor, features: Tensor, predictions: Tensor, index: int) -> Tensor:
        """Logits (rows,) at internal exit `index` (0-based).

        Args:
            state (`Tensor` of shape `(rows, hidden)`): exit states.
            features (`Tensor` of shape `(rows, 5)`): confidence features, see `ExitHistory.features`.
            predictions (`Tensor` of shape `(rows, 1)` or `(rows, labels)`): a class, or indicators of labels.
        """
        assert features.shape[-1] == NUM_CONFIDENCE_FEATURES
        features = features.float()
        parts = [_apply(self.projections[index], state), features[:, :2], features[:, 4:]]  # type: ignore[arg-type]
        parts.append(torch.full_like(parts[2], self.shares[index]))
        if self.num_labels:
            known = predictions if predictions.dtype == torch.bool else F.one_hot(predictions[:, 0], self.num_labels)
            parts.append(known.float())
        return _apply(self.narrow, F.gelu(_apply(self.widen, torch.cat(parts, dim=-1)))).squeeze(-1)


class StateEstimator(nn.Module):
    """One linear layer per internal exit that expects from the exit state whether the exit predicts what the last one
    will (CALM's meta classifier, Schuster et al. 2022).

    Args:
        hidden_size (`int`): size of an exit state.
        layers (sequence of `int`): layers (1-based) of the internal exits.
    """

    def __init__(self, hidden_size: int, layers: Sequence[int]) -> None:
        super().__init__()
        self.linears = LayerModules(layers, lambda: nn.Linear(hidden_size, 1))

    def forward(self, state: Tensor, index: int) -> Tensor:
        """Logits (rows,) of internal exit `index` (0-based) from states (rows, hidden)."""
        return _apply(self.linears[index], state).squeeze(-1)  # type: ignore[arg-type]


class TokenExits(nn.Module):
    """A table from token to exit (HashEE, Sun et al. 2022); the last exit for all before it is fitted."""

    exits: Tensor

    def __init__(self, vocab_size: int, num_exits: int) -> None:
        super().__init__()
        self.last = num_exits - 1
        self.register_buffer("exits", torch.full((vocab_size,), self.last, dtype=torch.long))

    def unfit(self) -> None:
        """Gives all tokens the last exit."""
        init.constant_(self.exits, self.last)

    def resize(self, vocab_size: int) -> None:
        """Cuts the table, or gives new tokens the last exit, as unknown ones have."""
        more = self.exits.new_full((max(0, vocab_size - len(self.exits)),), self.last)
        self.exits = torch.cat((self.exits[:vocab_size], more))

    def forward(self, input_ids: Tensor) -> Tensor:
        """Exits (0-based) of tokens, in their shape."""
        return self.exits[input_ids]


def _num_labels(config: Any) -> int:
    """Labels of an exit head: a decoder's are the words of its vocabulary."""
    return config.vocab_size if hasattr(config, "exit_head") else config.num_labels


# Name of the criterion to a function from a config to its estimator, before it is fitted.
ESTIMATORS: dict[str, Callable[[Any], nn.Module]] = {
    "learning_to_exit": lambda config: ErrorEstimator(config.hidden_size),
    "calibrated_probability": lambda config: Temperatures(config.exit_layer_numbers[:-1]),
    "consistency": lambda config: ConsistencyEstimator(
        config.hidden_size, _num_labels(config), config.exit_layer_numbers
    ),
    "state_classifier": lambda config: StateEstimator(config.hidden_size, config.exit_layer_numbers[:-1]),
    "token_hash": lambda config: TokenExits(config.vocab_size, len(config.exit_layer_numbers)),
}


# What is fitted at each exit alone, whatever others there are.
_AT_EACH_EXIT = frozenset({"calibrated_probability", "state_classifier"})
# What is fitted once for all exits and looks at none of them in particular.
_AT_ANY_EXIT = frozenset({"learning_to_exit"})


def fitting_estimators(names: Sequence[str], before: Sequence[int], now: Sequence[int]) -> list[str]:
    """Names of the estimators that go on to hold when a model has other exits.

    Args:
        names (sequence of `str`): names of fitted estimators.
        before, now (sequence of `int`): layers (1-based) of the exits that they were fitted for, and of those now.
    """
    fits = _AT_ANY_EXIT | (_AT_EACH_EXIT if set(now) <= set(before) else frozenset())
    return [name for name in names if name in fits or list(before) == list(now)]


def init_estimator(module: nn.Module) -> None:
    """What `_init_weights` of a model does for an estimator that a checkpoint lacks: estimators of linear layers are
    drawn as these are, others start as if never fitted."""
    if isinstance(module, Temperatures | TokenExits):
        module.unfit()


def resize_estimators(model: nn.Module) -> None:
    """Makes the estimators of a model fit the size of its vocabulary."""
    for estimator in model.exit_estimators.values():
        if isinstance(estimator, TokenExits):
            estimator.resize(model.config.vocab_size)


def check_estimators(names: Sequence[str], argument: str = "exit_estimators") -> None:
    """Raises `ValueError` unless all names are those of estimators."""
    are_names = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    if not are_names or not set(names) <= set(ESTIMATORS):
        raise ValueError(f"`{argument}`={names!r} must be a list of names among {', '.join(sorted(ESTIMATORS))}.")


def make_estimators(config: Any) -> nn.ModuleDict:
    """Estimators named by `config.exit_estimators`; none by default. They learn nothing while the model trains: they
    are fitted afterwards."""
    return nn.ModuleDict({name: ESTIMATORS[name](config) for name in config.exit_estimators}).requires_grad_(False)
