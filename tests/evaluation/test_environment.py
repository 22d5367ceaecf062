# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
from __future__ import annotations

import json
import platform

import torch

from transformers_cee.evaluation.environment import installed_versions, processor_name, timing_environment


def test_what_figures_were_measured_with():
    found = timing_environment(torch.device("cpu"))
    assert found["device"] == "cpu"
    assert found["threads"] == torch.get_num_threads()
    assert found["processor"] == processor_name()
    assert found["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert json.loads(json.dumps(found)) == found
    assert found.keys() == {"device", "processor", "threads", "cores", "load_average", "versions"}


def test_the_processor_by_name(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text("processor\t: 0\nmodel\t\t: 85\nmodel name\t: Some: Maker's 3000\nflags\t: fpu\n")
    assert processor_name(path) == "Some: Maker's 3000"
    path.write_text("processor\t: 0\nmodel name\t:\n")
    for other in (path, tmp_path / "none"):
        assert processor_name(other) == (platform.processor() or platform.machine())


def test_versions_of_what_is_not_installed_are_left_out():
    assert installed_versions(["torch", "no-such-package"]).keys() == {"Python", "torch"}
