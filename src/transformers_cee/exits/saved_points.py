# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Fields of operating points and of fitted budgets, as configs and files hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers_cee.exits.criteria import CRITERIA, check_thresholds
from transformers_cee.exits.fields import (
    Kind,
    check_field,
    check_fields,
    choice,
    is_number,
    listed,
    mapping,
    number,
    shown,
    text,
    whole,
)


PROMISES = ("agreement", "budget", "risk")
# A threshold that closes an exit may be infinite.
_threshold = Kind(lambda value: is_number(value) or value == float("inf"), "a number")
POINT_FIELDS = {
    "criterion": choice(CRITERIA),
    "thresholds": listed(_threshold),
    "promise": choice(PROMISES),
    "levels": mapping,
    "method": text,
    "rows": whole(0, 2**53),
    "alpha": number(0, above=True).or_none(),
    "reason": text.or_none(),
    "held_out": mapping.or_none(),
    "fitted_on": text.or_none(),
}
_LEVELS = {
    "epsilon": number(0, 1),
    "delta": number(0, 1),
    "level": number(0, 1),
    "risk": text,
    "budget": number(0, above=True),
    "unit": text,
    "costs": listed(number(0)),
    "reject_rate": number(0, 1),
}
_NEEDED_LEVELS = {"agreement": ("epsilon",), "budget": ("budget", "costs"), "risk": ("level", "risk")}


def check_point(point: Mapping[str, Any], needed: Sequence[str], where: str, num_exits: int | None = None) -> None:
    """Raises `ValueError` for an operating point with a field that is missing, unknown, or not of its kind.

    Args:
        point (`Mapping`): fields as `CalibratedPoint` has them.
        needed (sequence of `str`): fields that must be there.
        where (`str`): what they belong to, for the message.
        num_exits (`int`, *optional*): exits of the model, the last included.
    """
    check_field(where, point, mapping)
    check_fields(point, POINT_FIELDS, needed, where)
    try:
        check_thresholds(point["criterion"], point["thresholds"], num_exits or len(point["thresholds"]))
    except ValueError as error:
        exits = "" if num_exits is None else f" the {num_exits} exits of `exit_layers`"
        raise ValueError(f"`{where}.thresholds`={shown(point['thresholds'])} do not fit{exits}: {error}") from error
    if "promise" in point and "levels" in point:
        check_fields(point["levels"], _LEVELS, _NEEDED_LEVELS[point["promise"]], f"{where}.levels")
        costs = point["levels"].get("costs")
        if costs is not None and len(costs) != len(point["thresholds"]):
            raise ValueError(f"`{where}.levels.costs` has {len(costs)} values; accepted: one per exit.")


def made_on(config: Any) -> str | None:
    """Engine and precision that a model runs on, such as `"openvino int8"`; None of the model itself, in torch.

    Args:
        config: of the model.
    """
    record = getattr(config, "exit_engine", None)
    return f"{record.get('engine')} {record.get('precision')}" if isinstance(record, dict) else None


def check_fitted_on(name: str, fitted_on: str | None, config: Any) -> None:
    """Raises `ValueError` where thresholds were fitted on something else than what a model runs on: they promise
    nothing there.

    Args:
        name (`str`): of the operating point.
        fitted_on (`str`, *optional*): what `made_on` gave for the model that it was fitted on.
        config: of the model that is to use it.
    """
    own = made_on(config)
    if fitted_on != own:
        raise ValueError(
            f"The operating point {name!r} was fitted on {spoken_engine(fitted_on)}, and this model runs on "
            f"{spoken_engine(own)}, where its promise does not hold. Fit it anew with this model: `collect_exits`, "
            "`score_store`, the calibration, and `save_to`; `export` does so from `calibration_texts`."
        )


def spoken_engine(engine: str | None) -> str:
    """What `made_on` gave, in words."""
    return "the model itself, in torch" if engine is None else f"the engine {engine!r}"


def check_points(points: Any, num_exits: int) -> None:
    """Raises `ValueError` unless these are operating points of a model with so many exits."""
    check_field("exit_operating_points", points, mapping)
    for name, point in points.items():
        check_point(point, ("criterion", "thresholds"), f"exit_operating_points[{shown(name)}]", num_exits)


def check_budgets(points: Any) -> None:
    """Raises `ValueError` unless these are `[budget, α, threshold]` by rising budget."""
    kinds = (number(0, 1, above=True), number(0, above=True), number(0, 1))
    check_field("exit_budgets", points, Kind(lambda value: isinstance(value, list | tuple), "a list"))
    before = 0.0
    for place, point in enumerate(points):
        where = f"exit_budgets[{place}]"
        three = Kind(
            lambda value: (
                isinstance(value, list | tuple)
                and len(value) == 3
                and all(kind.accepts(one) for kind, one in zip(kinds, value, strict=True))
            ),
            "three numbers: a budget in (0, 1], a positive price of a layer, and a threshold in [0, 1]",
        )
        check_field(where, point, three)
        if point[0] <= before:
            raise ValueError(f"`{where}`={shown(point)}: budgets must rise; the one before is {before}.")
        before = point[0]
