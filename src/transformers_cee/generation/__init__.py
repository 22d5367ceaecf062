# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Generation in which every token leaves at its own layer: cache, decode step, and the mixin for `generate`."""
