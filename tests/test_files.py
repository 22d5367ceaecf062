# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Files are replaced whole or not at all, and damaged ones are named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from transformers_cee.files import read_json, replacing, write_json, write_text


class TestReplacing:
    def test_new_and_old_files_get_the_content(self, tmp_path: Path) -> None:
        path = tmp_path / "new folder" / "results.json"
        for value in ({"a": 1}, {"b": "é"}):
            write_json(path, value)
            assert read_json(path, "") == value
        assert os.listdir(path.parent) == ["results.json"]

    def test_an_error_leaves_the_old_file_and_nothing_beside_it(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        write_text(path, "old")
        with pytest.raises(OSError, match="disk full"), replacing(path) as beside:
            beside.write_text("ne")
            assert path.read_text() == "old"
            raise OSError("disk full")
        assert path.read_text() == "old"
        assert os.listdir(tmp_path) == ["a.txt"]

    def test_the_suffix_stays(self, tmp_path: Path) -> None:
        with replacing(tmp_path / "curve.png") as beside:
            assert beside.suffix == ".png" and beside.parent == tmp_path
            beside.write_bytes(b"picture")
        assert (tmp_path / "curve.png").read_bytes() == b"picture"

    def test_json_has_no_nan(self, tmp_path: Path) -> None:
        write_json(tmp_path / "a.json", [1])
        with pytest.raises(ValueError, match="not JSON compliant"):
            write_json(tmp_path / "a.json", [float("nan")])
        assert read_json(tmp_path / "a.json", "") == [1]


class TestReadJson:
    @pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff\xfe", b"[" * 100_000])
    def test_damage_names_the_file_and_the_way_out(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "finished.json"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"finished\.json cannot be read as JSON .* Start anew\."):
            read_json(path, "Start anew.")

    def test_a_missing_file_is_said_to_be_missing(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            read_json(tmp_path / "none.json", "")
