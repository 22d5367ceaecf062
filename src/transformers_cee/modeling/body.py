# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The body of a model alone, for whoever wants its states."""

from __future__ import annotations

from functools import wraps
from typing import Any, ClassVar

from transformers_cee.exits.arguments import check_arguments


class BodyWithoutExits:
    """The body of a model with exits at full depth, without exits and heads: what stock heads and
    `AutoModel.from_config` make of its config. Mix in before the stock body of a family."""

    config: Any
    # What else a checkpoint of ours holds: exits, and heads of the stock model.
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [
        r"^exit_",
        r"^(classifier|pre_classifier|pooler|head|lm_head)\.",
    ]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        stock = next(one for one in cls.__mro__[1:] if "forward" in vars(one) and one is not BodyWithoutExits)
        stock_forward = stock.forward  # type: ignore[attr-defined]

        @wraps(stock_forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            # There are no exits here, and arguments that ask for them would be dropped.
            check_arguments(stock_forward, self.config, kwargs)
            return stock_forward(self, *args, **kwargs)

        cls.forward = forward  # type: ignore[attr-defined]


__all__ = ["BodyWithoutExits"]
