# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What an objective of the phase `heads` is: what it sees of a micro-batch, what it must answer, and the registry.

Everywhere: losses and the exit distribution are (rows, exits), exits in order, the last one included; a decoder's rows
are its counted tokens. The result is a mean over the rows of one micro-batch, so that accumulation stays right.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from transformers_cee.exits.registry import Registry


@dataclass
class HeadsStep:
    """What the exits make of one micro-batch, and where in the run it comes.

    Args:
        losses (`Tensor` of shape `(rows, exits)`): loss of each row at each exit.
        logits (`Tensor` of shape `(rows, exits, labels)`, *optional*): of all heads; None of a decoder.
        labels (`Tensor` of shape `(rows,)` or `(rows, labels)`, *optional*): true labels, beside logits.
        problem_type (`str`): what logits and labels mean.
        log_distribution (`Tensor` of shape `(rows, exits)`, *optional*):
            Log of the policies' exit distribution, with gradient; for objectives that train policies.
        may_exit (`BoolTensor` of shape `(rows,)`, *optional*): rows that have a choice; all by default.
        first_exit (`int`): exit (0-based) before which nothing leaves.
        number (`int`): optimizer steps taken before this one; all micro-batches of a step share it.
        progress (`float`): share of the optimizer steps taken, in [0, 1].
        epoch (`float`): epochs behind, with the share of the present one.
    """

    losses: Tensor
    logits: Tensor | None = None
    labels: Tensor | None = None
    problem_type: str = "single_label_classification"
    log_distribution: Tensor | None = None
    may_exit: Tensor | None = None
    first_exit: int = 0
    number: int = 0
    progress: float = 0.0
    epoch: float = 0.0


class HeadsObjective:
    """One objective. Subclasses have a `name`, are dataclasses of their options, numbers, and give `summary` or, where
    the loss is something else, `__call__`."""

    name: ClassVar[str]
    # Does it look at the logits of all exits, which a decoder never holds at once?
    needs_logits: ClassVar[bool] = False
    # Does it need class probabilities, which regression has not?
    needs_classes: ClassVar[bool] = False
    # Do the policies learn, too?
    trains_policies: ClassVar[bool] = False
    # Does it weigh rows, so that a mean loss over them will not do?
    needs_rows: ClassVar[bool] = False
    # Does every layer get the mean, not the sum, of the gradients of the exits behind it?
    scales_gradients: ClassVar[bool] = False
    # Does some part of the run learn from nothing but the last exit?
    last_exit_alone: ClassVar[bool] = False
    # Steps of the run, in order, and what each trains (see `freeze_for_model_step`; None for what the arguments say).
    # The last one has the phase's name.
    stages: ClassVar[dict[str, str | None]] = {"heads": None}
    # The step that this object is for.
    stage: str = "heads"

    def __call__(self, step: HeadsStep) -> Tensor:
        """The loss, a scalar."""
        return self.summary(step.losses)

    def summary(self, losses: Tensor) -> Tensor:
        """What an evaluation that knows losses (rows, exits) alone reports as `exit_loss`."""
        return losses.mean()


HEADS_OBJECTIVES: Registry[type[HeadsObjective]] = Registry(
    "heads_objective", "register_heads_objective", HeadsObjective
)
register_heads_objective = HEADS_OBJECTIVES.register


def make_heads_objective(name: str, options: Any = None, stage: str | None = None) -> HeadsObjective:
    """A fresh objective for one run.

    Args:
        name (`str`): a name of the registry.
        options (`Mapping[str, float]`, *optional*): its options, by name; what is not named keeps its default.
        stage (`str`, *optional*): of an objective with several stages, which one; the last by default.

    Raises:
        ValueError: an unknown objective, option or stage, or an option that is no number or out of its range.
    """
    objective: HeadsObjective = HEADS_OBJECTIVES.make(name, options)
    if stage is not None:
        if stage not in objective.stages:
            raise ValueError(f"`stage`={stage!r} is unknown to {name!r}; accepted are {', '.join(objective.stages)}.")
        objective.stage = stage
    return objective
