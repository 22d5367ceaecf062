# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Every field of saved thresholds with every kind of wrong value: they load, or a `ValueError` names the field."""

from __future__ import annotations

import json

import pytest
from mutations import WRONG_VALUES, mutated
from populations import population

from transformers_cee import CalibratedPoint, calibrate_agreement, calibrate_budget, calibrate_risk
from transformers_cee.calibration.budget import with_rejection


def saved_thresholds():
    rows = population(400)
    for found in (
        calibrate_agreement(rows, 0.1),
        with_rejection(calibrate_budget(rows, 4.0), rows, 0.1).check(rows),
        calibrate_risk(rows, 0.9),
    ):
        yield pytest.param(json.loads(json.dumps(found.to_dict())), id=found.promise)


@pytest.mark.parametrize("values", saved_thresholds())
def test_one_wrong_field(values):
    rows, loaded, refused = population(50), 0, 0
    for path, changed in mutated(values):
        if path[0] == "held_out" and len(path) > 1:
            continue
        try:
            found = CalibratedPoint.from_dict(changed)
        except ValueError as error:
            refused += 1
            assert str(path[0]) in str(error) or "levels" in str(error), (path, changed, str(error))
            continue
        loaded += 1
        if found.criterion == "max_probability" and found.alpha is None and len(found.thresholds) == 8:
            try:
                found.check(rows)
            except ValueError as error:
                assert "risk" in str(error)
    assert refused > 200 and loaded > 20


@pytest.mark.parametrize("values", [value for value in WRONG_VALUES if not isinstance(value, dict)])
def test_no_dictionary(values):
    with pytest.raises(ValueError, match="must be a dictionary"):
        CalibratedPoint.from_dict(values)
