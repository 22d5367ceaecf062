# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Space on disk is reserved before it is written to through memory."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest

from transformers_cee.stores.mapped import mapped_array


def test_an_array_of_zeros_that_numpy_reads_again(tmp_path):
    path = tmp_path / "new" / "states.npy"
    array = mapped_array(path, (5, 3, 2), "")
    assert array.shape == (5, 3, 2) and array.dtype == np.float32 and not array.any()
    array[2] = 7
    array.flush()
    np.testing.assert_array_equal(np.load(path), array)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot reserve space")
def test_the_space_is_reserved(tmp_path):
    path = tmp_path / "states.npy"
    mapped_array(path, (2**20,), "")
    about = os.stat(path)
    assert about.st_size > 4 * 2**20 and 512 * about.st_blocks >= 4 * 2**20


def test_a_full_disk_is_an_error_before_work(tmp_path):
    path = tmp_path / "states.npy"
    message = r"states\.npy needs 67,108,864 MB, of which .* MB are free.*\. Free some\."
    with pytest.raises(OSError, match=message) as error:
        mapped_array(path, (2**44,), "Free some.")
    assert error.value.errno == errno.ENOSPC and not path.exists()


def test_an_array_that_is_still_mapped_keeps_its_values(tmp_path):
    path = tmp_path / "states.npy"
    first = mapped_array(path, (4,), "")
    first[:] = 1
    mapped_array(path, (4,), "")[:] = 2
    assert first.tolist() == [1, 1, 1, 1]
