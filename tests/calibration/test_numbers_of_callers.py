# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from populations import population

from transformers_cee import calibrate_agreement, calibrate_budget, calibrate_risk


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.array, torch.tensor])
def test_promises_take_numbers_of_all_kinds(kind):
    scores = population(300)
    assert calibrate_agreement(scores, kind(0.25), delta=kind(0.125)) == calibrate_agreement(scores, 0.25, delta=0.125)
    for method in ("conformal", "running"):
        assert calibrate_agreement(scores, kind(0.25), method) == calibrate_agreement(scores, 0.25, method)
    assert calibrate_budget(scores, kind(4.5), delta=kind(0.125)) == calibrate_budget(scores, 4.5, delta=0.125)
    assert calibrate_risk(scores, kind(0.5), kind(0.125)) == calibrate_risk(scores, 0.5, 0.125)
    grid = [1.0, 0.75, 0.5]
    assert calibrate_risk(scores, 0.5, grid=[kind(one) for one in grid]) == calibrate_risk(scores, 0.5, grid=grid)
    json.dumps(calibrate_risk(scores, kind(0.5), kind(0.125)).to_dict())


@pytest.mark.parametrize("wrong", [None, True, "0.1", [0.1], float("nan")])
def test_anything_else_is_refused_by_name(wrong):
    scores = population(50)
    with pytest.raises(ValueError, match="`epsilon`="):
        calibrate_agreement(scores, wrong)
    with pytest.raises(ValueError, match="`budget`="):
        calibrate_budget(scores, wrong)
    with pytest.raises(ValueError, match="`delta`="):
        calibrate_risk(scores, 0.5, wrong)
