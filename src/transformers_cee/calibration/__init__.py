# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Calibration: from a promise (agreement with full depth, a budget, a bound on a risk) to thresholds."""
