# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Makes the scripts of `benchmarks/` and `examples/` importable, as they are for each other when run."""

import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
for folder in (str(ROOT / "benchmarks"), str(ROOT / "examples")):
    if folder not in sys.path:
        sys.path.insert(0, folder)
