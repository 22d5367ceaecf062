# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Servers that stop in the middle of a transfer."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi, get_session


# A server that sends nothing for so long is taken for one that never will.
STALL_SECONDS = 120.0


@contextmanager
def stalls_end() -> Iterator[None]:
    """Within, a server that stalls is an error after `STALL_SECONDS`; the client of `huggingface_hub` would wait for
    good. A time limit that the client has already (`huggingface_hub.set_client_factory`) stays.

    Raises:
        TimeoutError: the server has sent nothing for so long.
    """
    client = get_session()
    limits = type(client.timeout)
    # Of `httpx` or `httpx2`, by the release of the client: other packages have timeouts, too.
    timeouts: type[Exception] = sys.modules[limits.__module__.partition(".")[0]].TimeoutException
    if client.timeout == limits(None):
        # Stays, for uploads that go on in the background.
        client.timeout = limits(STALL_SECONDS)
    try:
        yield
    except timeouts as error:
        raise TimeoutError(f"{HfApi().endpoint} has not answered for {client.timeout.read} seconds.") from error
