# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Exits of many rows, on disk: filled in one pass, scored without a model."""
