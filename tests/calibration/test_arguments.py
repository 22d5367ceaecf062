# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Arguments of another kind are refused by name."""

from __future__ import annotations

import numpy as np
import pytest
from populations import population

from transformers_cee.calibration.agreement import calibrate_agreement
from transformers_cee.calibration.budget import calibrate_budget
from transformers_cee.calibration.risk import calibrate_risk


class TestCalibration:
    @pytest.mark.parametrize("value", ["x", {0.5}, 3, None, [None], [True], 10**400, [10**400]])
    def test_what_is_no_list_of_numbers_is_named(self, value):
        scores = population(50)
        for call, name in ((calibrate_budget, "costs"), (calibrate_budget, "risks"), (calibrate_risk, "grid")):
            if value is None:
                continue
            first = 4.0 if call is calibrate_budget else 0.4
            with pytest.raises(ValueError, match=f"`{name}`"):
                call(scores, first, **{name: value})

    @pytest.mark.parametrize("name,value", [("beta", "x"), ("batch_rows", {1}), ("beta", 10**400)])
    def test_what_is_no_number_is_named(self, name, value):
        with pytest.raises(ValueError, match=f"`{name}`"):
            calibrate_budget(population(50), 4.0, **{name: value})

    @pytest.mark.parametrize("asked", [{"beta": 1e-320}, {"risks": [1e308] * 7 + [-1e308]}])
    def test_what_cannot_be_weighed_ends(self, asked):
        with pytest.raises(ValueError, match=r"`beta`.*`risks`.*too far apart"):
            calibrate_budget(population(50), 4.0, **asked)

    @pytest.mark.parametrize("method", ["certified", "conformal"])
    def test_a_level_next_to_nothing_switches_exits_off(self, method):
        with pytest.warns(UserWarning, match="too few for an agreement of 1; it takes at least 9007199254740992"):
            found = calibrate_agreement(population(50), 1e-320, method)
        assert found.reason is not None

    def test_names_are_texts(self):
        with pytest.raises(ValueError, match="`method`"):
            calibrate_agreement(population(50), 0.1, method=np.array(["certified", "x"]))
