# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""`pytest tests/common --family-table` prints a table of families and checks."""

from __future__ import annotations

import re
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--family-table", action="store_true", help="print a table of families and checks")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not config.getoption("--family-table", False):
        return
    cells: dict[str, dict[str, list[str]]] = {}
    for outcome in ("passed", "failed", "skipped", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            found = re.search(r"tests/common/.*::test_(\w+)\[(\w+_cee)", report.nodeid)
            if found is None:
                continue
            figures = dict(report.user_properties)
            shown = {"passed": "ok", "skipped": "–"}.get(outcome, outcome.upper())
            shown = f"{figures['difference']:.0e}" if "difference" in figures and outcome == "passed" else shown
            cells.setdefault(found[1], {}).setdefault(found[2], []).append(shown)
    families = sorted({family for row in cells.values() for family in row})
    terminalreporter.write_line("")
    terminalreporter.write_line(f"| check | {' | '.join(families)} |")
    terminalreporter.write_line(f"|---|{'---|' * len(families)}")
    for check, row in cells.items():
        shown = [", ".join(dict.fromkeys(row.get(family, []))) for family in families]
        terminalreporter.write_line(f"| {check.replace('_', ' ')} | {' | '.join(shown)} |")
