# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""`python -m transformers_cee`: the command `transformers-cee`."""

from transformers_cee.cli import main


if __name__ == "__main__":
    raise SystemExit(main())
