"""A run that is killed and run again ends as one that nobody touched. See kill_harness.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from kill_harness import SMOKE, Harness, differences, kill


@pytest.mark.slow
def test_a_run_that_was_killed_four_times_ends_as_one_that_was_not(tmp_path: Path) -> None:
    outcome = Harness(SMOKE, (), tmp_path).run(kills=4, seed=1, max_minutes=15)
    assert not outcome.faults, "\n".join(outcome.faults)
    assert (outcome.kills, outcome.parents_alone) == (4, 1)


@pytest.mark.kill
def test_forty_kills(tmp_path: Path) -> None:
    outcome = Harness(SMOKE, (), tmp_path).run(kills=40, seed=0, max_minutes=90)
    print(outcome)
    assert not outcome.faults, "\n".join(outcome.faults)
    assert outcome.kills == 40


def test_the_harness_sees_what_differs() -> None:
    expected = {"a": b"1", "b": b"2", "c": b"3"}
    assert differences(expected, {"a": b"1", "b": b"0", "d": b""}) == [
        "c is missing", "d should not be there", "b differs",
    ]  # fmt: skip
    assert differences(expected, dict(expected)) == []


def test_the_harness_sees_a_worker_that_outlives_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kill_harness.GRACE", 0.3)
    orphaned = "import subprocess, sys, time; subprocess.Popen(['sleep', '60']); print(flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", orphaned], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    process.stdout.readline()
    (fault,) = kill(process, alone=True)
    assert fault.endswith("outlived its parent by 0 s")
