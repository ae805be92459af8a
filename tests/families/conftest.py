"""Print what became of each family at each step, and leave out the costly steps of families that repeat others."""

from __future__ import annotations

from collections import defaultdict

import pytest

COSTLY = ("test_vllm", "test_sft", "test_rrhf", "test_ppo", "test_evaluate")
WORDS = {"passed": "ok", "failed": "FAILED", "error": "ERROR"}


@pytest.hookimpl(tryfirst=True)  # before tests are selected by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if getattr(params.get("case"), "repeats", False) and item.originalname in COSTLY:
            item.add_marker(pytest.mark.slow)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    cells: dict[str, dict[str, str]] = defaultdict(dict)
    for outcome, reports in terminalreporter.stats.items():
        for report in reports:
            said = dict(getattr(report, "user_properties", ()))
            if "family" in said and outcome:
                cells[said["family"]][said["step"]] = WORDS.get(outcome, outcome)
    if not cells:
        return
    steps = list(dict.fromkeys(step for row in cells.values() for step in row))
    terminalreporter.section("family x step")
    rows = [["", *steps], *([name, *(row.get(step, "-") for step in steps)] for name, row in cells.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        terminalreporter.write_line("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)))
