# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Arrays on disk whose space is reserved, so that a full disk is an error before work and no crash during it."""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def mapped_array(path: str | os.PathLike[str], shape: Sequence[int], way_out: str) -> np.ndarray:
    """A new memory-mapped array of float32 zeros in an .npy file, whose folder is made when missing. An old file is
    taken away and not overwritten: an earlier array may still be mapped to it.

    Args:
        way_out (`str`): what to do when the disk is full; a sentence for the error.

    Raises:
        OSError: there is not enough space. Writing to a mapped file without it would end the process by a signal.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    free, size = shutil.disk_usage(path.parent).free, 4 * math.prod(shape)
    try:
        if free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with open(path, "wb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": tuple(shape)}
            np.lib.format.write_array_header_2_0(file, header)
            size += file.tell()
            if hasattr(os, "posix_fallocate"):
                file.flush()
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
        return np.lib.format.open_memmap(path, mode="r+")
    except OSError as error:
        path.unlink(missing_ok=True)
        needed = f"needs {size / 2**20:,.0f} MB, of which {free / 2**20:,.0f} MB are free"
        raise OSError(error.errno, f"{path} {needed} ({error.strerror}). {way_out}") from error
