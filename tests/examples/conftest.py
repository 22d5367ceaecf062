# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Makes the scripts of `examples/` importable, as they are for each other when run, and the shared module beside."""

import sys
from pathlib import Path


HERE = Path(__file__).resolve().parent
for folder in (str(HERE.parents[1] / "examples"), str(HERE)):
    if folder not in sys.path:
        sys.path.insert(0, folder)
