# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What exits learn from stored states alone, in seconds: the model itself does not run."""
