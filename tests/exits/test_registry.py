# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""One style of registry: names, what is refused, and options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest

from transformers_cee.exits.criteria import CRITERIA, ExitCriterion
from transformers_cee.exits.lm_heads import LM_EXIT_HEADS
from transformers_cee.exits.registry import Registry
from transformers_cee.exits.token_losses import TOKEN_LOSSES
from transformers_cee.training.heads_objectives import HEADS_OBJECTIVES


class Fruit:
    name: ClassVar[str] = "fruit"


@pytest.fixture
def fruits() -> Registry:
    return Registry("fruit", "register_fruit", Fruit)


@pytest.fixture
def anything() -> Registry:
    return Registry("thing", "register_thing")


def test_classes_are_found_by_their_names(fruits):
    class Apple(Fruit):
        name = "apple"

    assert fruits.register(Apple) is Apple
    assert fruits.find("apple") is Apple and fruits["apple"] is Apple and list(fruits) == ["apple"]


def test_functions_are_found_by_their_names(anything):
    @anything.register
    def halved(value):
        return value / 2

    assert anything.find("halved")(3) == 1.5 and anything.make("halved")(3) == 1.5


def test_unknown_names(fruits):
    for name in ("pear", "apple"):
        fruits.register(type(name.title(), (Fruit,), {"name": name}))
    message = "`fruit`='plum' is unknown; accepted are apple, pear, and what `register_fruit` adds."
    with pytest.raises(ValueError) as found:
        fruits.find("plum")
    assert str(found.value) == message
    with pytest.raises(ValueError, match="`dessert`=None is unknown; accepted are apple, pear"):
        fruits.find(None, "dessert")
    with pytest.raises(ValueError, match=r"`fruit`=\['apple'\] is unknown"):
        fruits.find(["apple"])


def test_a_name_belongs_to_one_definition(fruits):
    def define(rate):
        class Apple(Fruit):
            name = "apple"
            price = rate

        return Apple

    first, again = fruits.register(define(1)), define(2)
    assert fruits.register(first) is first
    fruits.register(again)
    assert fruits["apple"] is again, "the same definition, run again"
    with pytest.raises(ValueError, match=r"`fruit`='apple' is .*define.*Apple already; give .*Other another name"):
        fruits.register(type("Other", (Fruit,), {"name": "apple"}))
    with pytest.raises(ValueError, match="already"):
        # Without a name of its own a class has that of what it derives from.
        fruits.register(type("Derived", (again,), {}))
    assert fruits["apple"] is again


@pytest.mark.parametrize("entry", [int, Fruit(), "apple", None, lambda: 1])
def test_other_kinds_are_refused(fruits, entry):
    with pytest.raises(TypeError, match="`register_fruit` takes a class derived from Fruit; got"):
        fruits.register(entry)
    assert not fruits


def test_what_has_no_name_is_refused(fruits, anything):
    for name in ("", None, 3):
        with pytest.raises(ValueError, match=r"the name of .*Nameless is .*; needed is a text"):
            fruits.register(type("Nameless", (Fruit,), {"name": name}))
    with pytest.raises(ValueError, match=r"the name of .*lambda.* needed is a function"):
        anything.register(lambda value: value)
    with pytest.raises(TypeError, match="takes a class or function; got 'name'"):
        anything.register("name")
    assert not fruits and not anything


def test_what_lacks_a_method_is_refused():
    class Half(ExitCriterion):
        name = "half"

    with pytest.raises(TypeError, match=r"`register_criterion`: .*Half must define score"):
        CRITERIA.register(Half)
    assert "half" not in CRITERIA


def test_options(anything):
    @anything.register
    @dataclass(frozen=True)
    class Power:
        name: ClassVar[str] = "power"
        exponent: float = 2.0

        def __post_init__(self) -> None:
            if self.exponent < 0:
                raise ValueError(f"`exponent`={self.exponent} must not be negative.")

    @anything.register
    @dataclass
    class Line:
        name: ClassVar[str] = "line"
        slope: float
        start: float = 0.0

    @anything.register
    def plain(value):
        return value

    assert anything.make("line", {"slope": 2}) == Line(2, 0.0)
    assert anything.make("power") == Power(2.0) and anything.make("power", {"exponent": 3}) == Power(3)
    for name, options, message in (
        ("power", {"base": 1}, "`thing_options`: 'base' is unknown to 'power'; accepted are exponent"),
        ("power", {"exponent": "2"}, "`thing_options`: 'exponent' must be a number; got '2'"),
        ("power", {"exponent": True}, "`thing_options`: 'exponent' must be a number; got True"),
        ("power", {"exponent": -1}, "`thing_options` of 'power': `exponent`=-1 must not be negative"),
        ("line", None, "`thing_options`: 'line' needs slope; got None"),
        ("line", {"start": 1}, "`thing_options`: 'line' needs slope; got {'start': 1}"),
        ("power", "exponent", "`thing_options`='exponent' must be a dictionary"),
        ("plain", {"exponent": 1}, "`thing_options`: 'exponent' is unknown to 'plain'; accepted are none"),
        ("other", {}, "`thing`='other' is unknown; accepted are line, plain, power"),
    ):
        with pytest.raises(ValueError, match=message):
            anything.make(name, options)


@pytest.mark.parametrize("registry", [CRITERIA, HEADS_OBJECTIVES, LM_EXIT_HEADS, TOKEN_LOSSES])
def test_everything_of_the_package_is_found_by_its_own_name(registry):
    assert registry and all(entry.name == name for name, entry in registry.items())
    assert all(entry.__doc__ for entry in registry.values())
