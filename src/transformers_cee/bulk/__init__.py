# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Classification of many texts, from files to files: read, classified and written window by window."""
