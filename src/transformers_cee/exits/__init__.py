# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What an exit is: configuration, heads, policies, criteria and the one early-exit loop. Knows no architecture."""
