# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What a model with exits is, whatever its family: the base, classifiers, and language models."""
